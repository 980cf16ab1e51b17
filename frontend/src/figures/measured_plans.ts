// What verifications measured on held-out text, from the jobs that did it.
import type { EvaluationRow, Job } from "../api/contract";

/** Returns every measured plan and uniform format once, the newest measurement of each. */
export function collectMeasured(jobs: Job[]): EvaluationRow[] {
  const found = new Map<string, EvaluationRow>();
  const evaluations = jobs.filter((job) => job.kind === "evaluate" && job.state === "succeeded");
  for (const job of evaluations.toSorted((a, b) => b.created_at.localeCompare(a.created_at))) {
    for (const row of job.result?.evaluation ?? []) {
      if (row.kind === "reference") continue;
      const key = row.kind === "uniform" ? row.name : `${job.plan_id}\n${row.name}`;
      if (!found.has(key)) found.set(key, row);
    }
  }
  return [...found.values()];
}
