import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { ServiceError, service } from "../api/client";
import type { EvaluationRow, Frontier, Model, Plan, PlanRequest, Profile } from "../api/contract";
import { BUDGETS, type BudgetKind, type Range, rangeOf } from "../figures/budgets";
import { usefulPoints } from "../figures/chart_series";
import { collectMeasured } from "../figures/measured_plans";
import { significant } from "../figures/quantities";
import { hashOf } from "../figures/routes";
import { type Cell, makeGrid } from "../figures/unit_grid";
import { Select } from "../widgets/controls";
import { HeatMap } from "../widgets/heat_map";
import { useLoaded } from "../widgets/hooks";
import { ErrorNote } from "../widgets/job_line";
import { type Budget, BudgetControls } from "./budget_controls";
import { FrontierChart, planBudget } from "./frontier_chart";
import { loadLatencyRange } from "./latency_range";
import { PlanActions } from "./plan_actions";
import { PlanFigures } from "./plan_figures";
import { usePlanQuery } from "./plan_query";
import { RoleBars } from "./role_bars";
import { UnitDialog } from "./unit_dialog";

const POINTS = 65;
const NONE: EvaluationRow[] = [];

interface PlanViewProps {
  model: Model;
  reloadModel: () => void;
}

function requestOf(profile: string, budget: Budget): PlanRequest {
  const request: PlanRequest = {
    profile_id: profile,
    budget: BUDGETS[budget.kind].request(budget.value),
    metric: budget.metric,
  };
  return budget.context === null ? request : { ...request, context: budget.context, batch: budget.batch };
}

async function loadMeasured(model: string): Promise<EvaluationRow[]> {
  return collectMeasured(await service.jobs(`model_id=${encodeURIComponent(model)}&state=succeeded`));
}

// A place to start: what uniform 4-bit integers would take, so that the first picture shows what is won.
function startBudget(profile: Profile): Budget {
  const near = profile.uniform.toSorted(
    (a, b) => Math.abs(a.bits_per_weight - 4.3) - Math.abs(b.bits_per_weight - 4.3),
  );
  const value = near[0]?.bytes ?? 2 ** 26;
  return { kind: "memory", value, context: null, batch: 1, metric: profile.default_metric };
}

function loadFrontier(profile: string, budget: Budget | null): Promise<Frontier> {
  const cache = budget?.context == null ? {} : { context: budget.context, batch: budget.batch };
  return service.frontier(profile, { resource: "bytes", metric: budget?.metric ?? "", points: POINTS, ...cache });
}

/** The page of a model: a budget that moves, and everything that follows from it. */
export function PlanView({ model, reloadModel }: PlanViewProps) {
  const [profileId, setProfileId] = useState(model.profiles[0]?.id ?? "");
  const loadedProfile = useLoaded(profileId, () => service.profile(profileId));
  const profile = loadedProfile.value;
  if (profile === null) {
    return loadedProfile.error === null ? <p class="soft">Loading …</p> : <ErrorNote error={loadedProfile.error} />;
  }
  return (
    <>
      {model.profiles.length > 1 && (
        <div class="row profile-choice">
          <Select
            label="Measurement"
            options={model.profiles.map(({ id, created_at }) => ({
              value: id,
              label: created_at.slice(0, 16).replace("T", " "),
            }))}
            value={profileId}
            onChange={setProfileId}
          />
          <span class="soft small">of {profile.formats.join(", ")}</span>
        </div>
      )}
      <PlanDesk key={profile.id} model={model} profile={profile} reloadModel={reloadModel} />
    </>
  );
}

interface PlanDeskProps {
  model: Model;
  profile: Profile;
  reloadModel: () => void;
}

function PlanDesk({ model, profile, reloadModel }: PlanDeskProps) {
  const [budget, setBudget, moved_ms] = useStoredBudget(model.id, profile);
  const [{ plan, error, waiting, seen_ms }, ask] = usePlanQuery();
  const axesKey = [profile.id, budget.metric, budget.context, budget.batch].join("\n");
  const frontier = useLoaded(axesKey, () => loadFrontier(profile.id, budget));
  const measured = useLoaded(model.id, () => loadMeasured(model.id));
  const latency = useLoaded(`${axesKey}\n${budget.kind === "latency_us"}`, () =>
    budget.kind === "latency_us" ? loadLatencyRange(profile.id, budget.metric) : Promise.resolve(null),
  );
  const [pinned, setPinned] = useState<Plan | null>(null);
  const points = useMemo(() => frontier.value && usefulPoints(frontier.value, profile), [frontier.value, profile]);
  const range = budget.kind === "latency_us" ? latency.value : points && rangeOf(budget.kind, points);
  // A latency is asked for once its range is known; its value before that is a guess.
  const settled = budget.kind !== "latency_us" || latency.value !== null;
  // Before the next picture is painted: an ordinary effect would ask a frame later.
  useLayoutEffect(() => {
    if (settled) ask(requestOf(profile.id, budget), moved_ms.current);
  }, [settled, profile.id, budget, ask]);
  useEffect(() => {
    if (budget.kind === "latency_us" && latency.value !== null)
      setBudget({ value: inside(budget.value, latency.value) });
  }, [latency.value]);
  const changeKind = useCallback(
    (kind: BudgetKind) => {
      const use = plan === null ? null : BUDGETS[kind].ofPlan(plan);
      setBudget({ kind, value: use ?? (kind === "latency_us" ? Number.MAX_SAFE_INTEGER : (budget.value ?? 1)) });
    },
    [plan, budget.value],
  );
  const onValue = useCallback((value: number) => setBudget({ value }), []);
  return (
    <div class="stack">
      <BudgetControls
        budget={budget}
        profile={profile}
        hasCache={profile.has_cache}
        onChange={setBudget}
        onKind={changeKind}
      />
      <ErrorNote error={frontier.error ?? latency.error} />
      <div class="two-columns">
        <section class="panel" aria-label="Frontier">
          {frontier.value === null && frontier.error === null && (
            <p class="chart-place soft">Solving {POINTS} budgets along the frontier …</p>
          )}
          {frontier.value !== null && points !== null && range !== null && (
            <FrontierChart
              kind={budget.kind}
              value={inside(budget.value, range)}
              range={range}
              profile={profile}
              frontier={frontier.value}
              points={points}
              plan={plan}
              measured={measured.value ?? NONE}
              pinned={pinned}
              onValue={onValue}
            />
          )}
        </section>
        <section class={`panel stack ${waiting ? "stale" : ""}`} aria-label="Plan" aria-busy={waiting}>
          <Infeasible error={error} kind={budget.kind} onValue={onValue} />
          {plan !== null && (
            <>
              <h2>Plan for {planBudget(plan)}</h2>
              <PlanFigures plan={plan} />
              <PlanActions
                model={model}
                plan={plan}
                profile={profile}
                request={requestOf(profile.id, budget)}
                onVerified={() => {
                  measured.reload();
                  reloadModel();
                }}
              />
              <Pin model={model.id} plan={plan} pinned={pinned} onPin={setPinned} />
              <p class="soft small" data-seen-ms={seen_ms ?? ""}>
                {seen_ms === null ? "" : `From the move of the budget to this picture: ${significant(seen_ms, 2)} ms`}
              </p>
            </>
          )}
        </section>
      </div>
      {plan !== null && <PlanMaps plan={plan} profile={profile} waiting={waiting} />}
    </div>
  );
}

function inside(value: number, range: Range): number {
  return Math.min(range.most, Math.max(range.least, value));
}

/** The budget, what changes it, and when it was changed last; kept while the tab is open. */
function useStoredBudget(
  model: string,
  profile: Profile,
): [Budget, (change: Partial<Budget>) => void, { current: number }] {
  const moved_ms = useRef(performance.now());
  const entry = `bitplan.budget.${model}`;
  const [budget, setBudget] = useState<Budget>(() => {
    const stored = sessionStorage.getItem(entry);
    const found = { ...startBudget(profile), ...(stored === null ? {} : (JSON.parse(stored) as Partial<Budget>)) };
    return profile.metric_names.includes(found.metric) ? found : startBudget(profile);
  });
  useEffect(() => sessionStorage.setItem(entry, JSON.stringify(budget)), [entry, budget]);
  const change = useCallback((part: Partial<Budget>) => {
    moved_ms.current = performance.now();
    setBudget((previous) => ({ ...previous, ...part }));
  }, []);
  return [budget, change, moved_ms];
}

interface InfeasibleProps {
  error: Error | null;
  kind: BudgetKind;
  onValue: (value: number) => void;
}

function Infeasible({ error, kind, onValue }: InfeasibleProps) {
  if (error === null) return null;
  const least = error instanceof ServiceError ? error.problem.least_reachable : undefined;
  const reachable = least?.[kind === "memory" ? "bytes" : kind];
  if (reachable === undefined) return <ErrorNote error={error} />;
  // Rounded up, as the least value itself may fall on the wrong side of the last digit.
  const enough = reachable * (1 + 1e-9);
  return (
    <div class="warning" role="alert">
      <p>No plan keeps this budget. The least that can be reached is {BUDGETS[kind].text(reachable)}.</p>
      <button type="button" onClick={() => onValue(kind === "memory" ? Math.ceil(reachable) : enough)}>
        Take that
      </button>
    </div>
  );
}

interface PinProps {
  model: string;
  plan: Plan;
  pinned: Plan | null;
  onPin: (plan: Plan | null) => void;
}

function Pin({ model, plan, pinned, onPin }: PinProps) {
  const other = pinned !== null && pinned.id !== plan.id;
  return (
    <div class="row">
      <button type="button" onClick={() => onPin(plan)}>
        {pinned === null ? "Pin, to compare" : "Pin this one instead"}
      </button>
      {other && (
        <a href={hashOf({ view: "compare", model, first: pinned.id, second: plan.id })}>
          Compare with the pinned plan ({planBudget(pinned)})
        </a>
      )}
    </div>
  );
}

function PlanMaps({ plan, profile, waiting }: { plan: Plan; profile: Profile; waiting: boolean }) {
  const grid = useMemo(() => makeGrid(profile, plan.choice), [profile, plan]);
  const [open, setOpen] = useState<Cell | null>(null);
  return (
    <div class={`two-columns ${waiting ? "stale" : ""}`}>
      <section class="panel" aria-label="Bits by layer and role">
        <h2>Bits by layer and role</h2>
        <p class="caption">Choose a cell to see why its unit is stored so.</p>
        <HeatMap grid={grid} label="Bits per weight by layer and role" onCell={setOpen} />
      </section>
      <section class="panel" aria-label="Bytes by role">
        <h2>Bytes by role</h2>
        <p class="caption">Codes, scales and zero points; what no choice changes stands last.</p>
        <RoleBars plan={plan} profile={profile} />
      </section>
      {open !== null && <UnitDialog plan={plan} units={open.units} onClose={() => setOpen(null)} />}
    </div>
  );
}
