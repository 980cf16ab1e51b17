// Questions that come faster than answers: one is on its way, only the newest waits, and an answer that a newer one has
// overtaken is never shown.

export interface LatestRequestOptions<Q, A> {
  ask: (question: Q, signal: AbortSignal) => Promise<A>;
  onAnswer: (answer: A, question: Q) => void;
  onError: (error: unknown, question: Q) => void;
  /** A request older than this is aborted when a newer one waits; a younger one may still answer, which keeps a drag alive. */
  patience_ms: number;
  now?: () => number;
}

export class LatestRequest<Q, A> {
  private readonly options: LatestRequestOptions<Q, A>;
  private inFlight: { controller: AbortController; started_ms: number } | null = null;
  private waiting: { question: Q } | null = null;
  private timer: ReturnType<typeof setTimeout> | undefined;

  constructor(options: LatestRequestOptions<Q, A>) {
    this.options = options;
  }

  private now(): number {
    return (this.options.now ?? (() => performance.now()))();
  }

  /** Asks, or lets the question wait for its turn in the place of the one that waited. */
  ask(question: Q): void {
    if (this.inFlight === null) {
      void this.start(question);
      return;
    }
    this.waiting = { question };
    clearTimeout(this.timer);
    const left_ms = this.options.patience_ms - (this.now() - this.inFlight.started_ms);
    this.timer = setTimeout(() => this.giveUp(), Math.max(0, left_ms));
  }

  /** Forgets everything that is on its way. */
  stop(): void {
    this.waiting = null;
    clearTimeout(this.timer);
    this.inFlight?.controller.abort();
    this.inFlight = null;
  }

  private giveUp(): void {
    const next = this.waiting;
    if (next === null) return;
    this.stop();
    void this.start(next.question);
  }

  private async start(question: Q): Promise<void> {
    const mine = { controller: new AbortController(), started_ms: this.now() };
    this.inFlight = mine;
    try {
      const answer = await this.options.ask(question, mine.controller.signal);
      if (this.inFlight === mine) this.options.onAnswer(answer, question);
    } catch (error) {
      if (this.inFlight === mine && !mine.controller.signal.aborted) this.options.onError(error, question);
    }
    if (this.inFlight === mine) this.finish();
  }

  private finish(): void {
    this.inFlight = null;
    clearTimeout(this.timer);
    const next = this.waiting;
    this.waiting = null;
    if (next !== null) void this.start(next.question);
  }
}
