import { useState } from "preact/hooks";
import { download, ServiceError, service } from "../api/client";
import type { Engine, Export, Job, Plan, PlanRequest, Profile } from "../api/contract";
import { isFinished } from "../api/job_following";
import { OWN, rankEngines } from "../figures/engine_ranking";
import { bytesText, lossText, percentText, signedText } from "../figures/quantities";
import { Select } from "../widgets/controls";
import { DataTable } from "../widgets/data_table";
import { Dialog } from "../widgets/dialog";
import { useJob, useLoaded } from "../widgets/hooks";
import { ErrorNote, JobLine } from "../widgets/job_line";

interface ExportDialogProps {
  plan: Plan;
  profile: Profile;
  request: PlanRequest;
  onClose: () => void;
}

/** Files for an engine: what its rules forbid, what that costs under this budget, and the files themselves. */
export function ExportDialog({ plan, profile, request, onClose }: ExportDialogProps) {
  const engines = useLoaded("engines", service.engines);
  const able = rankEngines(engines.value ?? [], profile.formats);
  const [name, setName] = useState<string | null>(null);
  const engine = able.find((candidate) => candidate.name === name) ?? able[0];
  return (
    <Dialog title="Export for an engine" onClose={onClose}>
      <ErrorNote error={engines.error} />
      {engine !== undefined && (
        <>
          <Select
            label="Engine"
            options={able.map((candidate) => ({ value: candidate.name, label: candidate.title }))}
            value={engine.name}
            onChange={setName}
          />
          <Rules engine={engine} />
          <Target key={engine.name} engine={engine} free={plan} profile={profile} request={request} />
        </>
      )}
    </Dialog>
  );
}

function Rules({ engine }: { engine: Engine }) {
  return (
    <details>
      <summary>What {engine.name} can load</summary>
      <ul>
        {engine.rules.map((rule) => (
          <li key={rule} class="small mono">
            {rule}
          </li>
        ))}
      </ul>
      {engine.note && <p class="small soft">{engine.note}</p>}
    </details>
  );
}

interface TargetProps {
  engine: Engine;
  free: Plan;
  profile: Profile;
  request: PlanRequest;
}

function Target({ engine, free, profile, request }: TargetProps) {
  // An engine's rules say nothing of caches: the weights alone are exported, within the same bytes.
  const { context: _context, batch: _batch, ...weights } = request;
  const own = engine === OWN;
  const legal = useLoaded(`${engine.name}\n${free.id}`, () =>
    own ? Promise.resolve(free) : service.makePlan({ ...weights, engine: engine.name }),
  );
  const [started, setStarted] = useState<Job | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const job = useJob(started, setStarted);
  const shown = job !== null && started !== null ? job : started;
  if (legal.value === null) {
    return legal.error === null ? (
      <p class="soft">Finding the best plan under its rules …</p>
    ) : (
      <Unreachable engine={engine} profile={profile} error={legal.error} />
    );
  }
  const plan = legal.value;
  function start(): void {
    setError(null);
    const what = own ? { kind: "apply" as const } : { kind: "export" as const, options: { engine: engine.name } };
    service
      .startJob({ ...what, model_id: plan.model_id, plan_id: plan.id })
      .then(setStarted)
      .catch(setError);
  }
  const exported = shown?.result?.export_id;
  return (
    <>
      <Cost plan={plan} engine={engine} />
      <ErrorNote error={error} />
      {shown !== null && <JobLine job={shown} />}
      {exported !== undefined ? (
        <Files id={exported} />
      ) : (
        <div>
          <button type="button" class="primary" disabled={shown !== null && !isFinished(shown)} onClick={start}>
            Export for {engine.name}
          </button>
        </div>
      )}
    </>
  );
}

interface UnreachableProps {
  engine: Engine;
  profile: Profile;
  error: Error;
}

/** No plan under the engine's rules: how far it is, and how to measure what the engine runs. */
function Unreachable({ engine, profile, error }: UnreachableProps) {
  const [job, setJob] = useState<Job | null>(null);
  const [failure, setFailure] = useState<Error | null>(null);
  const followed = useJob(job, setJob);
  const least = error instanceof ServiceError ? error.problem.least_reachable?.bytes : undefined;
  if (least === undefined) return <ErrorNote error={error} />;
  function measure(): void {
    const body = { kind: "measure" as const, model_id: profile.model_id, options: { engine: engine.name } };
    service.startJob(body).then(setJob).catch(setFailure);
  }
  return (
    <div class="stack">
      <p class="warning" role="alert">
        Under the rules of {engine.name} no plan keeps this budget; the least that can be reached is{" "}
        {bytesText(least, 4)}. Measured here: {profile.formats.join(", ")}. {engine.name} runs{" "}
        {engine.formats.join(", ")}.
      </p>
      <ErrorNote error={failure} />
      {followed === null ? (
        <div>
          <button type="button" onClick={measure}>
            Measure the formats of {engine.name}
          </button>
        </div>
      ) : (
        <JobLine job={followed} />
      )}
    </div>
  );
}

function Cost({ plan, engine }: { plan: Plan; engine: Engine }) {
  const price = plan.engine_price;
  const more = price === null ? 0 : plan.predicted_loss - price.unrestricted_loss;
  const refusals = price?.refusals.toSorted((a, b) => b.candidates - a.candidates) ?? [];
  return (
    <div class="stack">
      <dl class="figures">
        <div class="large">
          <dt>Predicted loss under its rules</dt>
          <dd>
            {lossText(plan.predicted_loss)}
            <span class="note">nats per token, {bytesText(plan.bytes, 4)}</span>
          </dd>
        </div>
        {price !== null && (
          <div class="large">
            <dt>The rules cost</dt>
            <dd>
              {Math.abs(more) < 1e-12 ? "nothing" : signedText(more, lossText)}
              <span class="note">
                without them {lossText(price.unrestricted_loss)} in {bytesText(price.unrestricted_bytes, 4)}
                {price.unrestricted_loss > 0 &&
                  Math.abs(more) >= 1e-12 &&
                  ` (${percentText(more / price.unrestricted_loss)} of it)`}
              </span>
            </dd>
          </div>
        )}
      </dl>
      {refusals.length > 0 && (
        <details>
          <summary>
            What {engine.name} forbids: {refusals.reduce((sum, refusal) => sum + refusal.candidates, 0)} pairs of unit
            and format
          </summary>
          <DataTable
            caption="What the engine forbids"
            rows={refusals}
            columns={[
              { title: "Reason", cell: (row) => row.reason },
              { title: "Pairs", cell: (row) => row.candidates, number: true },
            ]}
          />
        </details>
      )}
    </div>
  );
}

function Files({ id }: { id: string }) {
  const { value, error } = useLoaded<Export>(id, () => service.exported(id));
  const [saving, setSaving] = useState(false);
  if (value === null) return <ErrorNote error={error} />;
  const total = value.files.reduce((sum, file) => sum + file.bytes, 0);
  function save(): void {
    setSaving(true);
    void download(`/exports/${encodeURIComponent(id)}/archive`, `${id}.tar`).finally(() => setSaving(false));
  }
  return (
    <div class="stack">
      <div>
        <button type="button" class="primary" disabled={saving} onClick={save}>
          {saving ? "Saving …" : `Download, ${bytesText(total, 4)}`}
        </button>
      </div>
      {value.command && (
        <p class="small">
          Run it: <code>{value.command}</code>
        </p>
      )}
      <DataTable
        caption="Files of this export"
        rows={value.files}
        columns={[
          { title: "File", cell: (file) => file.name },
          { title: "Size", cell: (file) => bytesText(file.bytes, 4), number: true },
        ]}
      />
    </div>
  );
}
