// What the page of a model knows: the budget, the plan that answers it, and what stands beside it on the axes.
import { useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { service } from "../api/client";
import type { EvaluationRow, Frontier, FrontierPoint, Plan, PlanRequest, Profile } from "../api/contract";
import { BUDGETS, type BudgetKind, type Range, rangeOf, resourceOf } from "../figures/budgets";
import { placeUniforms, type UniformPlace, usefulPoints } from "../figures/chart_series";
import { collectMeasured } from "../figures/measured_plans";
import { type Loaded, useLoaded } from "../widgets/hooks";
import type { Budget } from "./budget_controls";
import { type PlanState, usePlanQuery } from "./plan_query";

/** Budgets that are solved for the curve. */
export const POINTS = 65;
const NONE: EvaluationRow[] = [];
const REST_MS = 200;

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

function loadFrontier(profile: string, { kind, metric, context, batch }: Budget): Promise<Frontier> {
  const cache = context === null ? {} : { context, batch };
  return service.frontier(profile, { resource: resourceOf(kind), metric, points: POINTS, ...cache });
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
    const known = profile.metric_names.includes(found.metric) && (found.kind !== "latency_us" || profile.has_latency);
    return known ? found : startBudget(profile);
  });
  const newest = useRef(budget);
  newest.current = budget;
  useEffect(() => {
    // Once it rests, as a drag would write with every move; and when the page is left.
    const timer = setTimeout(() => sessionStorage.setItem(entry, JSON.stringify(budget)), REST_MS);
    return () => clearTimeout(timer);
  }, [entry, budget]);
  useEffect(() => () => sessionStorage.setItem(entry, JSON.stringify(newest.current)), [entry]);
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

/** Returns whether the budget can be asked for: a latency once its range is known, as it is a guess before. */
function useSettled(budget: Budget, range: Range | null, setBudget: Desk["setBudget"]): boolean {
  const guessed = budget.kind === "latency_us" && budget.value === Number.MAX_SAFE_INTEGER;
  useEffect(() => {
    if (guessed && range !== null) setBudget({ value: inside(budget.value, range) });
  }, [guessed, range]);
  return !guessed;
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
  const axes = [profile.id, resourceOf(budget.kind), budget.metric, budget.context, budget.batch].join("\n");
  const frontier = useLoaded(axes, () => loadFrontier(profile.id, budget));
  const measured = useLoaded(model, () => loadMeasured(model));
  const points = useMemo(() => frontier.value && usefulPoints(frontier.value, profile), [frontier.value, profile]);
  const range = useMemo(() => points && rangeOf(budget.kind, points), [points, budget.kind]);
  const settled = useSettled(budget, range, setBudget);
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
    range,
    failure: frontier.error,
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
