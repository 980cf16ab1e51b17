import { useState } from "preact/hooks";
import { service } from "../api/client";
import type { Job, Model } from "../api/contract";
import { isFinished } from "../api/job_following";
import { agoText } from "../figures/quantities";
import { hashOf } from "../figures/routes";
import { Field } from "../widgets/controls";
import { Dialog } from "../widgets/dialog";
import { useJob, useLoaded } from "../widgets/hooks";
import { ErrorNote, JobLine } from "../widgets/job_line";
import { ModelFacts } from "./model_frame";

function State({ model, onEnd }: { model: Model; onEnd: () => void }) {
  const job = useJob(model.latest_job, onEnd);
  if (job !== null && (!isFinished(job) || job.state === "failed")) return <JobLine job={job} onCancelled={onEnd} />;
  const measured = model.profiles[0];
  if (measured === undefined) return <span class="soft">Not measured yet</span>;
  return <span class="soft">Measured {agoText(measured.created_at, Date.now())}</span>;
}

function ModelRow({ model, reload }: { model: Model; reload: () => void }) {
  const [error, setError] = useState<Error | null>(null);
  const measuring = model.latest_job !== null && !isFinished(model.latest_job) && model.latest_job.kind === "measure";
  const address = hashOf({ view: "plan", model: model.id });
  return (
    <li class="model-row">
      <div>
        <h2>
          <a href={address}>{model.name}</a>
        </h2>
        <ModelFacts model={model} />
      </div>
      <div>
        <State model={model} onEnd={reload} />
        <ErrorNote error={error} />
      </div>
      <div>
        {model.profiles.length === 0 && !measuring && (
          <button
            type="button"
            aria-label={`Measure ${model.name}`}
            onClick={() => void service.startJob({ kind: "measure", model_id: model.id }).then(reload).catch(setError)}
          >
            Measure
          </button>
        )}
        {model.profiles.length > 0 && (
          <a href={address} aria-label={`Plan ${model.name}`}>
            Plan →
          </a>
        )}
      </div>
    </li>
  );
}

interface AddModelProps {
  onClose: () => void;
  onAdded: () => void;
}

function readOptions(text: string): Record<string, unknown> {
  if (text.trim() === "") return {};
  const options: unknown = JSON.parse(text);
  if (typeof options !== "object" || options === null || Array.isArray(options)) {
    throw new Error(`options must be a JSON object: got ${text}. Write {"fisher_sequences": 48}, or leave it empty.`);
  }
  return options as Record<string, unknown>;
}

function AddModel({ onClose, onAdded }: AddModelProps) {
  const [path, setPath] = useState("");
  const [name, setName] = useState("");
  const [measure, setMeasure] = useState(true);
  const [time, setTime] = useState(false);
  const [options, setOptions] = useState("");
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<Error | null>(null);
  async function add(): Promise<void> {
    const chosen = readOptions(options);
    const model = await service.addModel({ path: path.trim(), ...(name.trim() === "" ? {} : { name: name.trim() }) });
    const timed = time ? { latency: true } : {};
    if (measure) await service.startJob({ kind: "measure", model_id: model.id, options: { ...chosen, ...timed } });
    onAdded();
  }
  function submit(event: Event): void {
    event.preventDefault();
    setBusy(true);
    setError(null);
    add()
      .catch(setError)
      .finally(() => setBusy(false));
  }
  return (
    <Dialog title="Add a model" onClose={onClose}>
      <form class="stack" onSubmit={submit}>
        <Field label="Path, on the server, below a directory it was given">
          <input type="text" required value={path} onInput={(event) => setPath(event.currentTarget.value)} />
        </Field>
        <Field label="Name, if not that of the directory">
          <input type="text" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        </Field>
        <label class="row">
          <input type="checkbox" checked={measure} onChange={(event) => setMeasure(event.currentTarget.checked)} />
          Measure it now
        </label>
        {measure && (
          <label class="row">
            <input type="checkbox" checked={time} onChange={(event) => setTime(event.currentTarget.checked)} />
            Time its formats on the server too, for budgets of latency
          </label>
        )}
        {measure && (
          <details>
            <summary>Options of the measurement</summary>
            <Field label="JSON, as the fields of the API; empty for the defaults">
              <input
                type="text"
                class="mono"
                placeholder='{"fisher_sequences": 48}'
                value={options}
                onInput={(event) => setOptions(event.currentTarget.value)}
              />
            </Field>
          </details>
        )}
        <ErrorNote error={error} />
        <div class="row">
          <button type="submit" class="primary" disabled={busy}>
            {busy ? "Reading its configuration …" : "Add"}
          </button>
          <button type="button" onClick={onClose}>
            Cancel
          </button>
        </div>
      </form>
    </Dialog>
  );
}

// A model measures, verifies and exports; what it does now is its newest job that is not finished.
function newestFirst(models: Model[]): Model[] {
  const active = (job: Job | null) => (job !== null && !isFinished(job) ? 0 : 1);
  return models.toSorted((a, b) => active(a.latest_job) - active(b.latest_job) || a.name.localeCompare(b.name));
}

/** All models, those with work in progress first. */
export function ModelList() {
  const { value: models, error, reload } = useLoaded("models", service.models);
  const [adding, setAdding] = useState(false);
  return (
    <>
      <div class="row spread">
        <h1>Models</h1>
        <button type="button" class="primary" onClick={() => setAdding(true)}>
          Add a model
        </button>
      </div>
      <ErrorNote error={error} />
      {models === null && error === null && <p class="soft">Loading …</p>}
      {models?.length === 0 && (
        <p class="soft">No model is known yet. Add one: a directory as Hugging Face writes it, or a GGUF file.</p>
      )}
      <ul class="card-list">
        {newestFirst(models ?? []).map((model) => (
          <ModelRow key={model.id} model={model} reload={reload} />
        ))}
      </ul>
      {adding && (
        <AddModel
          onClose={() => setAdding(false)}
          onAdded={() => {
            setAdding(false);
            reload();
          }}
        />
      )}
    </>
  );
}
