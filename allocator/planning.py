"""Answer a budget from a profile: solve, name the outcome, say what cannot be reached. No model is touched here."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from allocator.assignments import Assignment, bits_per_weight, pick, use_of
from allocator.budget import MEMORY, Budget, InfeasibleBudget
from allocator.interactions import candidates_near, choose_shrinkage, sketch_from_gram
from allocator.plan_parts import make_activation_plan, make_cache_plan, make_unit_plans
from allocator.plans import Plan
from allocator.problems import build_problem, pose_problem, resolve_limits
from allocator.reachable import MAX_KL, find_least_values
from runtime.costs import CostTable
from sensitivity.experts.expert_tables import FISHER_SHRUNK
from sensitivity.measure_config import FISHER, OUTPUT_ERROR, SINGLE_UNIT_KL, WEIGHT_ERROR
from sensitivity.profile import NATS, SensitivityProfile
from sensitivity.sketches.combination import COMBINED
from sensitivity.sketches.fisher_sketch import sequence_losses
from solvers import AllocationProblem, SolveParams, SolveResult, Termination, solve, solve_least_cost
from solvers.least_cost import LOSS

# The first of these that a profile holds predicts and plans when nothing else is asked for.
METRIC_PREFERENCE = (FISHER_SHRUNK, COMBINED, SINGLE_UNIT_KL, FISHER, OUTPUT_ERROR, WEIGHT_ERROR)
INTERACTIONS = "interactions"
UNIFORM_RULE = "uniform rule"
# Some 20 ms of search; a number of states, not a time, so that the same question has the same answer.
DRAFT_STATES = 6_000


def default_metric(profile: SensitivityProfile) -> str:
    """Returns the metric that predicts best among those the profile holds."""
    return next((metric for metric in METRIC_PREFERENCE if metric in profile.losses), next(iter(profile.losses)))


def find_assignment(
    profile: SensitivityProfile,
    budget: Budget,
    tables: Mapping[str, CostTable],
    *,
    metric: str,
    max_loss: float | None = None,
    draft: bool = False,
) -> Assignment:
    """Returns the assignment that loses least under a budget, or the smallest one under a ceiling on loss.

    Args:
        profile: The profile.
        budget: The budget.
        tables: Resource -> cost table.
        metric: Metric to minimise.
        max_loss: Overrides the budget's ceiling on loss.
        draft: Whether an answer within milliseconds is worth more than the last part of the proof where several
            limits bind: rarely needed, then a gap of some thousandths is left, and stated.

    Raises:
        InfeasibleBudget: If no assignment keeps the budget.
        ValueError: If the metric says nothing of caches that are among the units, or cannot keep a ceiling on KL.
    """
    table = profile.table(metric)
    beside = profile.cache_load is not None or profile.activations_joined
    if beside and table.unit_of_measure != NATS:
        msg = (
            f"a plan with a cache or activations needs a metric in {NATS}: got '{metric}' in {table.unit_of_measure}, "
            f"which says nothing of them. Plan with {FISHER} or {SINGLE_UNIT_KL}, or for weights alone."
        )
        raise ValueError(msg)
    limits = resolve_limits(profile, budget)
    posed = pose_problem(profile, table.loss, limits, tables)
    problem = posed.problem
    ceiling = None
    if budget.max_kl is None:
        several = draft and len(problem.binding) > 1
        result = solve(problem, params=SolveParams(node_limit=DRAFT_STATES) if several else None)
        if several and result.termination is Termination.NO_SOLUTION_FOUND:
            result = solve(problem)
    else:
        if table.unit_of_measure != NATS:
            msg = (
                f"a ceiling on KL must be asked of a metric in {NATS}: got '{metric}' in {table.unit_of_measure}. "
                f"Measure with {FISHER} or {SINGLE_UNIT_KL}."
            )
            raise ValueError(msg)
        ceiling = budget.max_kl if max_loss is None else max_loss
        result = solve_least_cost(problem, resource=MEMORY, max_loss=ceiling)
    # The least memory is found without a limit on memory.
    over = ceiling is not None and result.objective > problem.ceiling[problem.resources.index(MEMORY)]
    if result.choice is None or over:
        raise _infeasible(profile, budget, find_least_values(problem, limits, tables, max_loss=ceiling))
    return Assignment(name=metric, kind="plan", metric=metric, choice=posed.read(result.choice), result=result)


def find_least_loss(
    profile: SensitivityProfile, budget: Budget, tables: Mapping[str, CostTable], *, metric: str
) -> Assignment:
    """Returns the assignment that loses least under a budget's limits, whatever its ceiling on the loss.

    Raises:
        InfeasibleBudget: If no assignment keeps the limits.
    """
    limits = resolve_limits(profile, budget)
    posed = pose_problem(profile, profile.table(metric).loss, limits, tables)
    result = solve(posed.problem)
    if result.choice is None:
        raise _infeasible(profile, budget, find_least_values(posed.problem, limits, tables))
    choice = posed.read(result.choice)
    return Assignment(name=f"{metric}, least loss", kind="plan", metric=metric, choice=choice, result=result)


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
            f"cross terms must have been measured: the profile holds none. Measure with the metric '{SINGLE_UNIT_KL}' "
            "on every pair (logit_passes=None, --logit-passes all)."
        )
        raise ValueError(msg)
    loss = profile.table(metric).loss
    limits = resolve_limits(profile, budget)
    additive = build_problem(profile, loss, limits, tables)
    start = solve(additive).choice
    if start is None:
        raise _infeasible(profile, budget, find_least_values(additive, limits, tables))
    solver = partial(solve, solver="quadratic")
    near = candidates_near(additive, start)

    def build(sketch: np.ndarray, shrinkage: float, allowed: np.ndarray = near) -> AllocationProblem:
        return replace(additive, allowed=allowed, sketch=sketch, interaction_scale=shrinkage)

    halves = [sketch_from_gram(half, loss) for half in profile.logit_gram]
    shrinkage = choose_shrinkage(halves, loss, build, solver)
    sketch = sketch_from_gram(profile.logit_gram.mean(axis=0), loss)
    result = solver(build(sketch, shrinkage, additive.allowed))
    assert result.choice is not None, "the additive optimum is feasible here too"
    name = f"{metric} + {INTERACTIONS} x {shrinkage:g}"
    return Assignment(name=name, kind="plan", metric=metric, choice=result.choice, result=result), shrinkage


def predicting_metric(profile: SensitivityProfile, metric: str) -> str:
    """Returns the metric itself if it is in nats per token, otherwise the profile's default one."""
    return metric if profile.table(metric).unit_of_measure == NATS else default_metric(profile)


def predicted_kl(profile: SensitivityProfile, assignment: Assignment) -> tuple[float, float | None]:
    """Returns the additive prediction of an assignment and that with full cross terms (None where not measured).

    For a metric that is not in nats per token the profile's default one predicts; NaN if that is not either.
    """
    table = profile.table(predicting_metric(profile, assignment.metric))
    if table.unit_of_measure != NATS:
        return math.nan, None
    loss = table.loss
    additive = float(pick(loss, assignment.choice).sum())
    if profile.logit_gram is None:
        return additive, None
    return additive, _with_cross_terms(profile, assignment, loss, additive)


def predicted_std_error(profile: SensitivityProfile, assignment: Assignment) -> float | None:
    """Returns the standard error of the additive prediction of an assignment; None where its metric is no sample.

    Units that are measured on one text err together. For the Fisher sketch that is seen in the sums over all units by
    each sequence; for other metrics the units count as independent, which is rather too little.
    """
    metric = predicting_metric(profile, assignment.metric)
    if metric == FISHER and profile.fisher_sketch is not None:
        losses = sequence_losses(profile.fisher_sketch, assignment.choice)
        return float(losses.std(ddof=1) / math.sqrt(len(losses)))
    std_error = pick(profile.table(metric).std_error, assignment.choice)
    return float(math.hypot(*std_error)) if std_error.any() else None


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
    memory_bytes = round(use[MEMORY])
    cache = make_cache_plan(profile, assignment, budget, tables[MEMORY])
    metric = predicting_metric(profile, assignment.metric)
    predicting, fit = profile.table(metric), profile.prediction_fits.get(metric)
    return Plan(
        name=assignment.name,
        metric=assignment.metric,
        weights=assignment.formats_by_weight(profile.candidates),
        units=make_unit_plans(profile, assignment, predicting, tables[MEMORY]),
        budget=budget.describe(),
        predicted_kl=additive,
        predicted_std_error=predicted_std_error(profile, assignment),
        predicted_kl_with_interactions=with_interactions,
        corrected_kl=None if fit is None else fit.correct(additive),
        correction_error=None if fit is None else fit.error_factor,
        **_proof(assignment, budget, additive, use[MEMORY], tables[MEMORY].fixed),
        use=use,
        limits=limits,
        memory_bytes=memory_bytes,
        bits_per_weight=bits_per_weight(profile, memory_bytes - (cache.memory_bytes if cache else 0)),
        reference_memory_bytes=profile.reference_bytes,
        provenance={**profile.provenance, **provenance},
        cache=cache,
        activations=make_activation_plan(profile, assignment, predicting, tables),
    )


def _with_cross_terms(profile: SensitivityProfile, assignment: Assignment, loss: np.ndarray, additive: float) -> float:
    assert profile.logit_gram is not None
    units = np.arange(len(assignment.choice))
    flat = units * len(profile.candidates.formats) + assignment.choice
    gram = profile.logit_gram[:, flat[:, None], flat].mean(axis=0, dtype=np.float64)
    norms = np.sqrt(np.maximum(np.diagonal(gram), 1e-30))
    scale = np.sqrt(2.0 * np.maximum(pick(loss, assignment.choice), 0.0)) / norms
    scaled = gram * scale[:, None] * scale[None, :]
    return additive + 0.5 * float(scaled.sum() - np.trace(scaled))


def _infeasible(profile: SensitivityProfile, budget: Budget, least: dict[str, float]) -> InfeasibleBudget:
    """Returns the exception, with the numbers in the terms that the budget was given in."""
    if budget.bits_per_weight is not None:
        least = {"bits_per_weight": bits_per_weight(profile, least[MEMORY]), **least}
    reachable = ", ".join(f"{name} {value:.10g}" for name, value in least.items())
    msg = (
        f"a budget must be reachable: got '{budget.describe()}', which no plan keeps. Smallest reachable values, each "
        f"with the other limits kept where they can be: {reachable}. Raise the budget or allow smaller formats."
    )
    return InfeasibleBudget(msg, least_use=least)


def _proof(
    assignment: Assignment, budget: Budget, additive: float, memory_bytes: float, fixed_bytes: float
) -> dict[str, Any]:
    """Returns the fields of a plan that say how good it is and how this is known."""
    result = assignment.result
    minimises_memory = budget.max_kl is not None
    if result is None:
        return {
            "objective": memory_bytes if minimises_memory else additive,
            "lower_bound": -math.inf,
            "relative_gap": math.inf,
            "termination": UNIFORM_RULE,
            "solver": "none",
            "solve_s": 0.0,
            "shadow_prices": {},
        }
    # The solver counts the units alone; a plan counts the file.
    fixed = fixed_bytes if minimises_memory else 0.0
    objective, lower_bound = result.objective + fixed, result.lower_bound + fixed
    return {
        "objective": objective,
        "lower_bound": lower_bound,
        "relative_gap": result.gap / objective if minimises_memory else result.relative_gap,
        "termination": result.termination.value,
        "solver": f"{result.solver}: {result.detail}",
        "solve_s": result.seconds,
        "shadow_prices": _shadow_prices(result),
    }


def _shadow_prices(result: SolveResult) -> dict[str, float]:
    prices = zip(result.resources, result.shadow_price, strict=True)
    return {MAX_KL if name == LOSS else name: float(price) for name, price in prices if math.isfinite(price)}
