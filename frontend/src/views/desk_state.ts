// What the page of a model knows: the budget, the plan that answers it, and what stands beside it on the axes.
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { service } from "../api/client";
import type { EvaluationRow, Frontier, FrontierPoint, Plan, PlanRequest, Profile } from "../api/contract";
import { BUDGETS, type BudgetKind, type Range, rangeOf } from "../figures/budgets";
import { placeUniforms, type UniformPlace, usefulPoints } from "../figures/chart_series";
import { collectMeasured } from "../figures/measured_plans";
import { type Loaded, useLoaded } from "../widgets/hooks";
import type { Budget } from "./budget_controls";
import { loadLatencyRange } from "./latency_range";
import { type PlanState, usePlanQuery } from "./plan_query";

/** Budgets that are solved for the curve. */
export const POINTS = 65;
const NONE: EvaluationRow[] = [];

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

export interface Desk extends PlanState {
  budget: Budget;
  setBudget: (change: Partial<Budget>) => void;
  setKind: (kind: BudgetKind) => void;
  request: PlanRequest;
  frontier: Loaded<Frontier>;
  points: FrontierPoint[] | null;
  uniforms: UniformPlace[];
  measured: EvaluationRow[];
  range: Range | null;
  /** What went wrong besides the plan. */
  failure: Error | null;
  /** Asks for everything that a verification has changed. */
  reloadMeasured: () => void;
}

/** Returns the latency's range while latency is what is limited, and keeps the budget inside of it. */
function useLatency(profile: Profile, budget: Budget, setBudget: Desk["setBudget"]): Loaded<Range | null> {
  const active = budget.kind === "latency_us";
  const latency = useLoaded([profile.id, budget.metric, active].join("\n"), () =>
    active ? loadLatencyRange(profile.id, budget.metric) : Promise.resolve(null),
  );
  useEffect(() => {
    if (active && latency.value !== null) setBudget({ value: inside(budget.value, latency.value) });
  }, [active, latency.value]);
  return latency;
}

/** Returns the uniform formats by the plan's question: one value for all budgets on the same axes. */
function useUniforms(profile: Profile, plan: Plan | null): UniformPlace[] {
  const baselines = JSON.stringify(plan?.baselines ?? []);
  return useMemo(() => placeUniforms(profile, JSON.parse(baselines) as Plan["baselines"]), [profile, baselines]);
}

/** Returns the state of a model's page. */
export function useDesk(model: string, profile: Profile): Desk {
  const [budget, setBudget, moved_ms] = useStoredBudget(model, profile);
  const [answer, ask] = usePlanQuery();
  const { plan } = answer;
  const axes = [profile.id, budget.metric, budget.context, budget.batch].join("\n");
  const frontier = useLoaded(axes, () => loadFrontier(profile.id, budget));
  const measured = useLoaded(model, () => loadMeasured(model));
  const latency = useLatency(profile, budget, setBudget);
  const points = useMemo(() => frontier.value && usefulPoints(frontier.value, profile), [frontier.value, profile]);
  // A latency is asked for once its range is known; its value before that is a guess.
  const settled = budget.kind !== "latency_us" || latency.value !== null;
  const request = requestOf(profile.id, budget);
  // Before the next picture is painted: an ordinary effect would ask a frame later.
  useLayoutEffect(() => {
    if (settled) ask(request, moved_ms.current);
  }, [settled, profile.id, budget, ask]);
  const setKind = useCallback(
    (kind: BudgetKind) => {
      const use = plan === null ? null : BUDGETS[kind].ofPlan(plan);
      setBudget({ kind, value: use ?? (kind === "latency_us" ? Number.MAX_SAFE_INTEGER : budget.value) });
    },
    [plan, budget.value],
  );
  return {
    ...answer,
    waiting: answer.waiting || !settled,
    budget,
    setBudget,
    setKind,
    request,
    frontier,
    points,
    uniforms: useUniforms(profile, plan),
    measured: measured.value ?? NONE,
    range: budget.kind === "latency_us" ? latency.value : points && rangeOf(budget.kind, points),
    failure: frontier.error ?? latency.error,
    reloadMeasured: () => {
      measured.reload();
      ask(request, performance.now(), true);
    },
  };
}

/** Returns a value moved to the nearest end of a range that it is outside of. */
export function inside(value: number, range: Range): number {
  return Math.min(range.most, Math.max(range.least, value));
}
