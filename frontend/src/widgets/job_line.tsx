import { service } from "../api/client";
import type { Job } from "../api/contract";
import { isFinished } from "../api/job_following";

const KINDS: Record<Job["kind"], string> = {
  measure: "Measurement",
  evaluate: "Verification",
  apply: "Packing",
  export: "Export",
  report: "Report",
};

/** Returns what a job is doing, in a few words. */
export function describeJob(job: Job): string {
  const kind = KINDS[job.kind];
  if (job.state === "queued") return `${kind} waits for a worker`;
  if (job.state === "failed") return `${kind} failed`;
  if (job.state === "cancelled") return `${kind} cancelled`;
  if (job.state === "succeeded") return `${kind} finished`;
  const { progress } = job;
  if (progress === null || !progress.stage) return `${kind} is starting`;
  const count = progress.total ? ` ${progress.done} of ${progress.total} ${progress.unit ?? ""}` : "";
  return `${progress.stage}${count}`.trim();
}

interface JobLineProps {
  job: Job;
  onCancelled?: () => void;
}

/** A job's state with its progress, announced to screen readers as it changes stage. */
export function JobLine({ job, onCancelled }: JobLineProps) {
  const running = !isFinished(job);
  const { progress } = job;
  const known = job.state === "running" && progress?.total ? progress : null;
  return (
    <div class="progress-line">
      <div class="row spread">
        <span class="small" data-job-state={job.state}>
          {describeJob(job)}
        </span>
        {running && (
          <button
            type="button"
            class="plain small"
            aria-label={`Cancel: ${KINDS[job.kind]}`}
            onClick={() => void service.cancelJob(job.id).then(() => onCancelled?.())}
          >
            Cancel
          </button>
        )}
      </div>
      {running &&
        (known ? (
          <progress aria-label={KINDS[job.kind]} value={known.done} max={known.total ?? 1} />
        ) : (
          <progress aria-label={KINDS[job.kind]} />
        ))}
      <span class="visually-hidden" role="status">
        {running ? (progress?.stage ?? "") : describeJob(job)}
      </span>
      {job.error !== null && <p class="warning">{job.error.detail ?? job.error.title}</p>}
    </div>
  );
}

/** What went wrong, where a person sees it. */
export function ErrorNote({ error }: { error: Error | null }) {
  return error === null ? null : (
    <p class="warning" role="alert">
      {error.message}
    </p>
  );
}
