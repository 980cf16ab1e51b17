import { describe, expect, it } from "vitest";
import { EventParser } from "../src/api/event_stream";
import { LatestRequest } from "../src/api/latest_request";

describe("server-sent events", () => {
  const stream =
    'event: job\ndata: {"a":1}\n\n: keep\n\nevent: job\r\ndata: one\r\ndata: two\r\n\r\nevent: end\ndata:\n\n';
  const expected = [
    { event: "job", data: '{"a":1}' },
    { event: "job", data: "one\ntwo" },
    { event: "end", data: "" },
  ];

  it.each([1, 2, 3, 7, 1000])("are the same, however the network cuts them (%d characters)", (length) => {
    const parser = new EventParser();
    const found = [];
    for (let at = 0; at < stream.length; at += length) found.push(...parser.push(stream.slice(at, at + length)));
    expect(found).toEqual(expected);
  });

  it("wait for their end", () => {
    const parser = new EventParser();
    expect(parser.push("data: half")).toEqual([]);
    expect(parser.push("\n\n")).toEqual([{ event: "message", data: "half" }]);
  });
});

interface Pending {
  question: number;
  signal: AbortSignal;
  answer: (text: string) => void;
  fail: (error: Error) => void;
}

function makeQueue(patience_ms = 1e6) {
  const pending: Pending[] = [];
  const shown: string[] = [];
  let now_ms = 0;
  const queue = new LatestRequest<number, string>({
    ask: (question, signal) =>
      new Promise((answer, fail) => {
        pending.push({ question, signal, answer, fail });
      }),
    onAnswer: (text) => shown.push(text),
    onError: (error) => shown.push(`error ${(error as Error).message}`),
    patience_ms,
    now: () => now_ms,
  });
  const settle = () => new Promise((resolve) => setTimeout(resolve, 0));
  return { queue, pending, shown, settle, tick: (ms: number) => (now_ms += ms) };
}

describe("questions that come faster than answers", () => {
  it("one is on its way, and of those that wait the newest is asked", async () => {
    const { queue, pending, shown, settle } = makeQueue();
    for (const question of [1, 2, 3, 4]) queue.ask(question);
    expect(pending.map((p) => p.question)).toEqual([1]);
    pending[0]?.answer("one");
    await settle();
    expect(pending.map((p) => p.question)).toEqual([1, 4]);
    pending[1]?.answer("four");
    await settle();
    expect(shown).toEqual(["one", "four"]);
  });

  it("one that takes too long is aborted for a newer one, and its late answer is not shown", async () => {
    const { queue, pending, shown, settle, tick } = makeQueue(100);
    queue.ask(1);
    tick(200);
    queue.ask(2);
    await new Promise((resolve) => setTimeout(resolve, 5));
    expect(pending.map((p) => [p.question, p.signal.aborted])).toEqual([
      [1, true],
      [2, false],
    ]);
    pending[1]?.answer("two");
    await settle();
    pending[0]?.answer("one, late");
    await settle();
    expect(shown).toEqual(["two"]);
  });

  it("an error is shown, and the next question is asked", async () => {
    const { queue, pending, shown, settle } = makeQueue();
    queue.ask(1);
    queue.ask(2);
    pending[0]?.fail(new Error("infeasible"));
    await settle();
    pending[1]?.answer("two");
    await settle();
    expect(shown).toEqual(["error infeasible", "two"]);
  });

  it("after the end nothing is shown", async () => {
    const { queue, pending, shown, settle } = makeQueue();
    queue.ask(1);
    queue.ask(2);
    queue.stop();
    pending[0]?.answer("one");
    await settle();
    expect(shown).toEqual([]);
    expect(pending).toHaveLength(1);
  });
});
