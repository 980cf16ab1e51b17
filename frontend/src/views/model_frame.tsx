import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";
import { service } from "../api/client";
import type { Job, Model } from "../api/contract";
import { isFinished } from "../api/job_following";
import { bytesText, countText } from "../figures/quantities";
import { hashOf, type Route } from "../figures/routes";
import { useJob, useLoaded } from "../widgets/hooks";
import { ErrorNote, JobLine } from "../widgets/job_line";

interface ModelFrameProps {
  id: string;
  view: Exclude<Route["view"], "models">;
  children: (model: Model, reload: () => void) => ComponentChildren;
}

/** What a model is, in one line. */
export function ModelFacts({ model }: { model: Model }) {
  return (
    <ul class="facts">
      <li>{model.architecture}</li>
      {model.parameters !== null && <li>{countText(model.parameters)} weights</li>}
      {model.layers !== null && <li>{model.layers} layers</li>}
      {model.experts_per_layer !== null && <li>{model.experts_per_layer} experts a layer</li>}
      {model.units !== null && <li>{model.units} units</li>}
      <li>{bytesText(model.bytes)}</li>
    </ul>
  );
}

function Tabs({ model, view }: { model: Model; view: Route["view"] }) {
  const tabs: { view: Route["view"]; label: string; href: string }[] = [
    { view: "plan", label: "Plan", href: hashOf({ view: "plan", model: model.id }) },
  ];
  if (model.experts_per_layer !== null) {
    tabs.push({ view: "experts", label: "Experts", href: hashOf({ view: "experts", model: model.id }) });
  }
  if (view === "compare") tabs.push({ view, label: "Comparison", href: location.hash });
  return (
    <nav class="tabs" aria-label="Parts of this model">
      {tabs.map((tab) => (
        <a key={tab.view} href={tab.href} aria-current={tab.view === view ? "page" : undefined}>
          {tab.label}
        </a>
      ))}
    </nav>
  );
}

function Measure({ model, onMeasured }: { model: Model; onMeasured: () => void }) {
  const [started, setStarted] = useState<Job | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const latest = model.latest_job?.kind === "measure" ? model.latest_job : null;
  const job = useJob(started ?? latest, (ended) => ended.state === "succeeded" && onMeasured());
  const running = job !== null && !isFinished(job);
  return (
    <div class="stack">
      <p>
        This model has not been measured yet. Measuring takes minutes, once; budget questions afterwards take
        milliseconds.
      </p>
      <ErrorNote error={error} />
      {job !== null && <JobLine job={job} />}
      {!running && (
        <div>
          <button
            type="button"
            class="primary"
            onClick={() =>
              void service.startJob({ kind: "measure", model_id: model.id }).then(setStarted).catch(setError)
            }
          >
            Measure
          </button>
        </div>
      )}
    </div>
  );
}

/** A model's name, facts and tabs around one of its views. */
export function ModelFrame({ id, view, children }: ModelFrameProps) {
  const { value: model, error, reload } = useLoaded(id, () => service.model(id));
  useEffect(() => {
    document.title = model === null ? "bitplan" : `${model.name} · bitplan`;
    return () => {
      document.title = "bitplan";
    };
  }, [model?.name]);
  if (model === null) return error === null ? <p class="soft">Loading …</p> : <ErrorNote error={error} />;
  return (
    <>
      <div class="heading">
        <h1>{model.name}</h1>
        <ModelFacts model={model} />
      </div>
      <Tabs model={model} view={view} />
      {model.profiles.length === 0 ? <Measure model={model} onMeasured={reload} /> : children(model, reload)}
    </>
  );
}
