"""Answer a budget from a profile: solve, name the outcome, say what cannot be reached. No model is touched here."""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from allocator.assignments import Assignment, bits_per_weight, pick, use_of
from allocator.budget import MEMORY, Budget, InfeasibleBudget
from allocator.interactions import choose_shrinkage, sketch_from_gram
from allocator.plans import Plan, UnitPlan
from allocator.problems import build_problem, resolve_limits
from runtime.costs import CostTable
from sensitivity.combination import COMBINED
from sensitivity.measure import FISHER, OUTPUT_ERROR, SINGLE_UNIT_KL, WEIGHT_ERROR
from sensitivity.profile import NATS, SensitivityProfile
from solvers import AllocationProblem, SolveResult, Termination, solve, solve_least_cost

# The first of these that a profile holds predicts and plans when nothing else is asked for.
METRIC_PREFERENCE = (COMBINED, SINGLE_UNIT_KL, FISHER, OUTPUT_ERROR, WEIGHT_ERROR)
INTERACTIONS = "interactions"


def default_metric(profile: SensitivityProfile) -> str:
    """Returns the metric that predicts best among those the profile holds."""
    return next(metric for metric in METRIC_PREFERENCE if metric in profile.losses)


def find_assignment(
    profile: SensitivityProfile,
    budget: Budget,
    tables: Mapping[str, CostTable],
    *,
    metric: str,
    max_loss: float | None = None,
) -> Assignment:
    """Returns the assignment that loses least under a budget, or the smallest one under a ceiling on loss.

    Args:
        profile: The profile.
        budget: The budget.
        tables: Resource -> cost table.
        metric: Metric to minimise.
        max_loss: Overrides the budget's ceiling on loss.

    Raises:
        InfeasibleBudget: If no assignment keeps the budget.
    """
    table = profile.table(metric)
    limits = resolve_limits(profile, budget)
    problem = build_problem(profile, table.loss, limits, tables)
    if budget.max_kl is None:
        result = solve(problem)
    else:
        if table.unit_of_measure != NATS:
            msg = f"a ceiling on KL must be asked of a metric in {NATS}: got '{metric}' in {table.unit_of_measure}."
            raise ValueError(msg)
        result = solve_least_cost(problem, resource=MEMORY, max_loss=budget.max_kl if max_loss is None else max_loss)
    return Assignment(
        name=metric, kind="plan", metric=metric, choice=_require(result, limits, tables, budget), result=result
    )


def find_interacting_assignment(
    profile: SensitivityProfile, budget: Budget, tables: Mapping[str, CostTable], *, metric: str
) -> tuple[Assignment, float]:
    """Returns the assignment with cross terms shrunk by cross-validation, and the factor that was chosen.

    Raises:
        ValueError: If the profile holds no logit sketch.
        InfeasibleBudget: If no assignment keeps the budget.
    """
    if profile.logit_gram is None:
        msg = (
            f"cross terms must have been measured: the profile holds none. Measure with the metric '{SINGLE_UNIT_KL}'."
        )
        raise ValueError(msg)
    loss = profile.table(metric).loss
    limits = resolve_limits(profile, budget)
    build = partial(_build_interacting, profile, loss, limits, tables)
    solver = partial(solve, solver="quadratic")
    halves = [sketch_from_gram(half, loss) for half in profile.logit_gram]
    shrinkage = choose_shrinkage(halves, loss, build, solver)
    result = solver(build(sketch_from_gram(profile.logit_gram.mean(axis=0), loss), shrinkage))
    choice = _require(result, limits, tables, budget)
    name = f"{metric} + {INTERACTIONS} x {shrinkage:g}"
    return Assignment(name=name, kind="plan", metric=metric, choice=choice, result=result), shrinkage


def predicted_kl(profile: SensitivityProfile, assignment: Assignment) -> tuple[float, float | None]:
    """Returns the additive prediction of an assignment and that with full cross terms (None where not measured).

    The numbers are nats per token where the metric is; for another metric the profile's default one predicts.
    """
    metric = assignment.metric
    if profile.table(metric).unit_of_measure != NATS:
        metric = default_metric(profile)
    loss = profile.table(metric).loss
    additive = float(pick(loss, assignment.choice).sum())
    if profile.logit_gram is None:
        return additive, None
    return additive, _with_cross_terms(profile, assignment, loss, additive)


def make_plan(
    profile: SensitivityProfile,
    assignment: Assignment,
    budget: Budget,
    tables: Mapping[str, CostTable],
    provenance: Mapping[str, str],
) -> Plan:
    """Returns the plan of an assignment, not verified yet."""
    limits = resolve_limits(profile, budget)
    use = use_of(assignment.choice, {name: tables[name] for name in dict.fromkeys([MEMORY, *limits])})
    additive, with_interactions = predicted_kl(profile, assignment)
    result = assignment.result
    memory_bytes = round(use[MEMORY])
    return Plan(
        name=assignment.name,
        metric=assignment.metric,
        weights=assignment.formats_by_weight(profile.candidates),
        units=_unit_plans(profile, assignment, tables[MEMORY]),
        budget=budget.describe(),
        predicted_kl=additive,
        predicted_kl_with_interactions=with_interactions,
        objective=additive if result is None else result.objective,
        lower_bound=-math.inf if result is None else result.lower_bound,
        relative_gap=math.inf if result is None else result.relative_gap,
        termination="uniform rule" if result is None else result.termination.value,
        solver="none" if result is None else f"{result.solver}: {result.detail}",
        solve_s=0.0 if result is None else result.seconds,
        use=use,
        limits=limits,
        shadow_prices={} if result is None else _shadow_prices(result),
        memory_bytes=memory_bytes,
        bits_per_weight=bits_per_weight(profile, memory_bytes),
        reference_memory_bytes=profile.reference_bytes,
        provenance={**profile.provenance, **provenance},
    )


def _build_interacting(
    profile: SensitivityProfile,
    loss: np.ndarray,
    limits: Mapping[str, float],
    tables: Mapping[str, CostTable],
    sketch: np.ndarray,
    shrinkage: float,
) -> AllocationProblem:
    return build_problem(profile, loss, limits, tables, sketch=sketch, interaction_scale=shrinkage)


def _with_cross_terms(profile: SensitivityProfile, assignment: Assignment, loss: np.ndarray, additive: float) -> float:
    assert profile.logit_gram is not None
    units = np.arange(len(assignment.choice))
    flat = units * len(profile.candidates.formats) + assignment.choice
    gram = profile.logit_gram.mean(axis=0)[np.ix_(flat, flat)].astype(np.float64)
    norms = np.sqrt(np.maximum(np.diagonal(gram), 1e-30))
    scale = np.sqrt(2.0 * np.maximum(pick(loss, assignment.choice), 0.0)) / norms
    scaled = gram * scale[:, None] * scale[None, :]
    return additive + 0.5 * float(scaled.sum() - np.trace(scaled))


def _require(
    result: SolveResult, limits: Mapping[str, float], tables: Mapping[str, CostTable], budget: Budget
) -> np.ndarray:
    if result.choice is not None:
        return result.choice
    least = {
        name: float(value) + (tables[name].fixed if name in tables else 0.0)
        for name, value in zip(result.resources, result.least_use, strict=True)
    }
    at_fault = result.resource_at_fault or "the limits together"
    if result.termination is not Termination.INFEASIBLE:
        msg = f"no plan was found for '{budget.describe()}' ({result.solver} stopped: {result.limit_hit}). Loosen it."
        raise InfeasibleBudget(msg, least_use=least)
    reachable = ", ".join(f"{name} {least[name]:.6g}" for name in [*limits, *(n for n in least if n not in limits)])
    msg = (
        f"a budget must be reachable: got '{budget.describe()}', which {at_fault} cannot keep. "
        f"Smallest reachable values: {reachable}. Raise the budget or allow smaller formats."
    )
    raise InfeasibleBudget(msg, least_use=least)


def _shadow_prices(result: SolveResult) -> dict[str, float]:
    return {name: float(price) for name, price in zip(result.resources, result.shadow_price, strict=True)}


def _unit_plans(profile: SensitivityProfile, assignment: Assignment, memory: CostTable) -> tuple[UnitPlan, ...]:
    table = profile.table(assignment.metric)
    rows = zip(
        profile.candidates.units,
        assignment.choice,
        pick(table.loss, assignment.choice),
        pick(table.std_error, assignment.choice),
        pick(memory.cost, assignment.choice),
        strict=True,
    )
    return tuple(
        UnitPlan(
            unit=unit.name,
            role=unit.role,
            layer_index=unit.layer_index,
            expert_index=unit.expert_index,
            format=profile.candidates.formats[int(f)].name,
            bits=profile.candidates.formats[int(f)].bits,
            weights=unit.weight_count,
            memory_bytes=round(float(memory_bytes)),
            predicted_loss=float(loss),
            std_error=float(std_error),
        )
        for unit, f, loss, std_error, memory_bytes in rows
    )
