import { useState } from "preact/hooks";
import { currentKey, download, service } from "../api/client";
import type { Job, Report } from "../api/contract";
import { isFinished } from "../api/job_following";
import { bytesText } from "../figures/quantities";
import { Dialog } from "../widgets/dialog";
import { useJob, useLoaded } from "../widgets/hooks";
import { ErrorNote, JobLine } from "../widgets/job_line";

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

interface ExtraFilesProps {
  extra: { pdf: boolean; parquet: boolean };
  onChange: (extra: { pdf: boolean; parquet: boolean }) => void;
}

function ExtraFiles({ extra, onChange }: ExtraFilesProps) {
  return (
    <div class="row">
      <label class="row">
        <input
          type="checkbox"
          checked={extra.pdf}
          onChange={(event) => onChange({ ...extra, pdf: event.currentTarget.checked })}
        />
        One page as PDF
      </label>
      <label class="row">
        <input
          type="checkbox"
          checked={extra.parquet}
          onChange={(event) => onChange({ ...extra, parquet: event.currentTarget.checked })}
        />
        Parquet beside CSV
      </label>
    </div>
  );
}

interface ReportDialogProps {
  title: string;
  /** One plan, or two that are compared. */
  of: { plan_id: string } | { plan_ids: [string, string] };
  onClose: () => void;
}

/** A report of one plan or of two: what it writes besides its page, its progress, and its files. */
export function ReportDialog({ title, of, onClose }: ReportDialogProps) {
  const [extra, setExtra] = useState({ pdf: false, parquet: false });
  const [started, setStarted] = useState<Job | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const job = useJob(started, setStarted);
  const newest = job ?? started;
  const id = (newest !== null && isFinished(newest) ? newest : started)?.result?.report_id ?? null;
  const report = useLoaded(id ?? "", () => (id === null ? Promise.resolve(null) : service.report(id)));
  const single = "plan_id" in of;
  function start(): void {
    const chosen = Object.fromEntries(Object.entries(extra).filter(([, wanted]) => wanted));
    setError(null);
    service
      .startJob({ kind: "report", ...of, options: single ? chosen : {} })
      .then(setStarted)
      .catch(setError);
  }
  return (
    <Dialog title={title} onClose={onClose}>
      <p class="soft">
        {single
          ? "It measures the plan on held-out text, beside the reference and the uniform formats of its size."
          : "It measures both plans on the same held-out text and shows where they differ."}
      </p>
      {newest === null && single && <ExtraFiles extra={extra} onChange={setExtra} />}
      <ErrorNote error={error ?? report.error} />
      {newest === null ? (
        <div>
          <button type="button" class="primary" onClick={start}>
            Write the report
          </button>
        </div>
      ) : (
        <JobLine job={newest} onCancelled={onClose} />
      )}
      {report.value !== null && <ReportFiles report={report.value} />}
    </Dialog>
  );
}
