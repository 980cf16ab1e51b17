// Follows a job to its end by its events, through lost connections.
import { service } from "./client";
import type { Job } from "./contract";
import { readEvents } from "./event_stream";

// A browser opens six connections to one server. Streams leave some of them for everything else.
const MOST_STREAMS = 3;
const POLL_MS = 2000;
const LONGEST_WAIT_MS = 10_000;
let streams = 0;

export function isFinished(job: Job): boolean {
  return job.state === "succeeded" || job.state === "failed" || job.state === "cancelled";
}

async function stream(job: string, onChange: (job: Job) => void, signal: AbortSignal): Promise<boolean> {
  streams += 1;
  try {
    for await (const { event, data } of readEvents(`/jobs/${encodeURIComponent(job)}/events`, signal)) {
      if (event === "job") onChange(JSON.parse(data) as Job);
      if (event === "end") return true;
    }
    return false;
  } finally {
    streams -= 1;
  }
}

async function poll(job: string, onChange: (job: Job) => void): Promise<boolean> {
  const found = await service.job(job);
  onChange(found);
  return isFinished(found);
}

/** Calls `onChange` with every state of a job until it is finished; returns what stops this. */
export function followJob(job: string, onChange: (job: Job) => void): () => void {
  const controller = new AbortController();
  const { signal } = controller;
  async function follow(): Promise<void> {
    let wait_ms = 500;
    while (!signal.aborted) {
      try {
        const busy = streams >= MOST_STREAMS;
        const ended = await (busy ? poll(job, onChange) : stream(job, onChange, signal));
        if (ended) return;
        wait_ms = busy ? POLL_MS : 500;
      } catch {
        // The server is restarting or the network is gone: asked again, ever less often.
        wait_ms = Math.min(2 * wait_ms, LONGEST_WAIT_MS);
      }
      await new Promise((resolve) => setTimeout(resolve, wait_ms));
    }
  }
  void follow();
  return () => controller.abort();
}
