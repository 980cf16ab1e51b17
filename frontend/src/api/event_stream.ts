// Server-sent events over fetch: the browser's EventSource cannot send the key.
import { send } from "./client";

export interface StreamEvent {
  event: string;
  data: string;
}

/** Cuts the text of a stream into events, as the HTML standard defines them; keeps what is not complete yet. */
export class EventParser {
  private rest = "";

  push(text: string): StreamEvent[] {
    const blocks = (this.rest + text).replaceAll("\r\n", "\n").split("\n\n");
    this.rest = blocks.pop() ?? "";
    return blocks.flatMap((block) => parseBlock(block));
  }
}

function parseBlock(block: string): StreamEvent[] {
  let event = "message";
  const data: string[] = [];
  for (const line of block.split("\n")) {
    // A line that opens with a colon is a comment; servers send some to keep the connection.
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
  return data.length > 0 || event !== "message" ? [{ event, data: data.join("\n") }] : [];
}

/** Yields the events of an address until the stream ends or is aborted. */
export async function* readEvents(path: string, signal: AbortSignal): AsyncGenerator<StreamEvent> {
  const response = await send(path, { signal, headers: { Accept: "text/event-stream" } });
  if (response.body === null) return;
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield* parser.push(value);
  }
}
