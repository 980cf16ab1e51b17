// The question that the page asks while the budget moves, and how long the answer takes to be seen.
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { service } from "../api/client";
import type { Plan, PlanRequest } from "../api/contract";
import { LatestRequest } from "../api/latest_request";

/** Name of the browser's performance entries: from a move of the budget to its plan on the screen. */
export const MEASURE = "bitplan:budget-to-plan";
const PATIENCE_MS = 150;

interface Question {
  key: string;
  request: PlanRequest;
  asked_ms: number;
}

export interface PlanState {
  plan: Plan | null;
  error: Error | null;
  /** Whether an answer for the newest question is still missing. */
  waiting: boolean;
  /** From the move to the picture, in milliseconds. */
  seen_ms: number | null;
}

// The frame after the one in which the state was set shows it.
function afterPaint(then: () => void): void {
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = then;
    channel.port2.postMessage(null);
  });
}

/**
 * Returns the plan of the newest question and a function that asks; answers that were overtaken are dropped. A question
 * carries the moment at which the person moved.
 */
export function usePlanQuery(): [PlanState, (request: PlanRequest, asked_ms: number, again?: boolean) => void] {
  const [answered, setAnswered] = useState<{ key: string; plan: Plan | null; error: Error | null } | null>(null);
  const [asked, setAsked] = useState("");
  const [seen_ms, setSeen] = useState<number | null>(null);
  const answers = useRef(0);
  const queue = useRef<LatestRequest<Question, Plan> | null>(null);
  queue.current ??= new LatestRequest<Question, Plan>({
    ask: (question, signal) => service.makePlan(question.request, signal),
    onAnswer: (plan, { key, asked_ms }) => {
      setAnswered({ key, plan, error: null });
      // The first answer waits for the server to load the profile; it is no move of the budget.
      if (answers.current > 0) {
        afterPaint(() => {
          setSeen(performance.measure(MEASURE, { start: asked_ms, end: performance.now() }).duration);
        });
      }
      answers.current += 1;
    },
    onError: (error, { key }) => setAnswered({ key, plan: null, error: error as Error }),
    patience_ms: PATIENCE_MS,
  });
  useEffect(() => () => queue.current?.stop(), []);
  const ask = useCallback((request: PlanRequest, asked_ms: number, again = false) => {
    const key = JSON.stringify(request);
    setAsked((previous) => {
      if (again || previous !== key) queue.current?.ask({ key, request, asked_ms });
      return key;
    });
  }, []);
  return [
    { plan: answered?.plan ?? null, error: answered?.error ?? null, waiting: answered?.key !== asked, seen_ms },
    ask,
  ];
}
