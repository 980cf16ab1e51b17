import { useState } from "preact/hooks";
import { currentKey, download, service } from "../api/client";
import type { Job, Model, Plan, PlanRequest, Profile, Report } from "../api/contract";
import { isFinished } from "../api/job_following";
import { bytesText } from "../figures/quantities";
import { Dialog } from "../widgets/dialog";
import { useJob, useLoaded } from "../widgets/hooks";
import { ErrorNote, JobLine } from "../widgets/job_line";
import { ExportDialog } from "./export_dialog";

interface PlanActionsProps {
  model: Model;
  plan: Plan;
  profile: Profile;
  request: PlanRequest;
  onVerified: () => void;
}

/** What can be done with a plan: verify, export, report. */
export function PlanActions({ model, plan, profile, request, onVerified }: PlanActionsProps) {
  const [open, setOpen] = useState<"export" | "report" | null>(null);
  const [verifying, setVerifying] = useState<Job | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const job = useJob(verifying, onVerified);
  function verify(): void {
    setError(null);
    service.startJob({ kind: "evaluate", model_id: model.id, plan_id: plan.id }).then(setVerifying).catch(setError);
  }
  const busy = job !== null && !isFinished(job);
  return (
    <div class="stack">
      <div class="row">
        <button type="button" class="primary" onClick={() => setOpen("export")}>
          Export …
        </button>
        <button type="button" disabled={busy} onClick={verify}>
          Verify
        </button>
        <button type="button" onClick={() => setOpen("report")}>
          Report …
        </button>
      </div>
      {job !== null && <JobLine job={job} />}
      <ErrorNote error={error} />
      {open === "export" && (
        <ExportDialog plan={plan} profile={profile} request={request} onClose={() => setOpen(null)} />
      )}
      {open === "report" && <ReportDialog plan={plan} onClose={() => setOpen(null)} />}
    </div>
  );
}

function ReportFiles({ report }: { report: Report }) {
  // A link cannot carry a key, so with one the file is fetched and saved; it works from disk.
  const linked = currentKey() === null;
  return (
    <ul class="card-list">
      {report.files.map((file) => {
        const address = file.url ?? `/reports/${encodeURIComponent(report.id)}/${encodeURIComponent(file.name)}`;
        const shown = linked && file.name.endsWith(".html");
        return (
          <li key={file.name} class="row spread">
            <span>
              {file.name} <span class="soft small">{bytesText(file.bytes)}</span>
            </span>
            <span class="row">
              {shown && (
                <a href={address} target="_blank" rel="noopener">
                  Open {file.name}
                </a>
              )}
              <button type="button" onClick={() => void download(address, file.name)} aria-label={`Save ${file.name}`}>
                Save
              </button>
            </span>
          </li>
        );
      })}
    </ul>
  );
}

function ReportDialog({ plan, onClose }: { plan: Plan; onClose: () => void }) {
  const started = useLoaded(plan.id, () =>
    service.startJob({ kind: "report", model_id: plan.model_id, plan_id: plan.id }),
  );
  const [reportId, setReportId] = useState<string | null>(null);
  const job = useJob(started.value, (ended) => setReportId(ended.result?.report_id ?? null));
  const id = reportId ?? (job !== null && isFinished(job) ? (job.result?.report_id ?? null) : null);
  const report = useLoaded(id ?? "", () => (id === null ? Promise.resolve(null) : service.report(id)));
  return (
    <Dialog title="Report of this plan" onClose={onClose}>
      <p class="soft">
        It measures the plan on held-out text, beside the reference and the uniform formats of its size.
      </p>
      <ErrorNote error={started.error ?? report.error} />
      {job !== null && <JobLine job={job} onCancelled={onClose} />}
      {report.value !== null && <ReportFiles report={report.value} />}
    </Dialog>
  );
}
