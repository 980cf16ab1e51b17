import { useState } from "preact/hooks";
import { service } from "../api/client";
import type { Job, Model, Plan, PlanRequest, Profile } from "../api/contract";
import { isFinished } from "../api/job_following";
import { useJob } from "../widgets/hooks";
import { ErrorNote, JobLine } from "../widgets/job_line";
import { ExportDialog } from "./export_dialog";
import { ReportDialog } from "./report_dialog";

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
      {open === "report" && (
        <ReportDialog title="Report of this plan" of={{ plan_id: plan.id }} onClose={() => setOpen(null)} />
      )}
    </div>
  );
}
