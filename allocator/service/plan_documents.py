"""Plans as JSON: the plan, one unit's curve, and its measured quality."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import cache_use, pick, use_of
from allocator.budget import LATENCY, MEMORY, Budget
from allocator.json_values import jsonable
from allocator.planning import predicted_kl, predicted_std_error, predicting_metric
from allocator.service.plan_answers import Answer, memory_price
from allocator.service.priced_profiles import PricedProfile, role_rows
from allocator.service.times import iso_time
from solvers.convex_hull import build_hull


def plan_document(answer: Answer, evaluation: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Returns a plan.

    Args:
        answer: The plan.
        evaluation: Its measured quality, or None.
    """
    priced, assignment = answer.priced, answer.assignment
    result = assignment.result
    assert result is not None, "plans are solved"
    use, weights = use_of(assignment.choice, priced.tables), priced.weight_count
    memory = pick(priced.tables[MEMORY].cost, assignment.choice)
    cache_bytes = cache_use(priced.profile.candidates, assignment.choice, priced.tables[MEMORY])
    formats = [f.name for f in priced.profile.candidates.formats]
    units = priced.profile.candidates.units
    # Under a ceiling the solver counts the units alone; a plan counts the file.
    fixed = priced.tables[MEMORY].fixed if answer.question.budget.max_kl is not None else 0.0
    measured = next((row for row in evaluation or () if row["shipped"]), None)
    document = {
        "id": answer.plan_id,
        "profile_id": answer.question.profile_id,
        "model_id": answer.model_id,
        "created_at": None if answer.created_at is None else iso_time(answer.created_at),
        "budget": budget_document(answer.question.budget),
        "engine": answer.question.engine,
        "metric": assignment.metric,
        "predicted_loss": predicted_kl(priced.profile, assignment)[0],
        "standard_error": predicted_std_error(priced.profile, assignment),
        "measured_kl": measured and measured["kl"],
        "interval": measured and [measured["kl_low"], measured["kl_high"]],
        "bytes": round(use[MEMORY]),
        "bits_per_weight": 8.0 * (round(use[MEMORY]) - round(cache_bytes) - priced.profile.fixed_bytes) / weights,
        "latency_us": use.get(LATENCY),
        "termination": result.termination.value,
        "lower_bound": result.lower_bound + fixed,
        "gap": result.gap,
        "shadow_price": memory_price(answer),
        "solve_ms": result.seconds * 1e3,
        "bytes_by_role": role_rows(priced, memory),
        "baselines": _baselines(priced, assignment.metric),
        "engine_price": _engine_price(answer),
    }
    cleaned = jsonable(document)
    assert isinstance(cleaned, dict)
    # Names need no cleaning, and are most of the document.
    choice = {unit.name: formats[f] for unit, f in zip(units, assignment.choice.tolist(), strict=True)}
    return {**cleaned, "choice": choice}


def budget_document(budget: Budget) -> dict[str, Any]:
    """Returns a budget as a request for it would be written."""
    given = {
        "bytes": budget.memory_bytes,
        "bits_per_weight": budget.bits_per_weight,
        "max_kl": budget.max_kl,
        "latency_us": budget.limits.get(LATENCY),
        "context": budget.context,
        "batch": None if budget.batch == 1 else budget.batch,
    }
    return {name: value for name, value in given.items() if value is not None}


def unit_document(answer: Answer, unit_name: str) -> dict[str, Any] | None:
    """Returns why a unit got its format: every format's bytes, loss and price; None where there is no such unit."""
    priced = answer.priced
    candidates = priced.profile.candidates
    index = next((u for u, unit in enumerate(candidates.units) if unit.name == unit_name), None)
    if index is None:
        return None
    table = priced.profile.table(predicting_metric(priced.profile, answer.assignment.metric))
    allowed = candidates.allowed[index]
    cost = priced.tables[MEMORY].cost[index]
    price = memory_price(answer)
    hull = _on_hull(table.loss[index], cost, allowed)
    curve = [
        {
            "format": format_.name,
            "bytes": float(cost[f]) if allowed[f] else None,
            "loss": float(table.loss[index, f]) if allowed[f] else None,
            "standard_error": float(table.std_error[index, f]) if allowed[f] and table.std_error.any() else None,
            "price": float(table.loss[index, f] + price * cost[f]) if allowed[f] else None,
            "chosen": int(answer.assignment.choice[index]) == f,
            "on_hull": f in hull,
            "allowed": bool(allowed[f]),
            "reason": candidates.reasons.get((index, f)),
        }
        for f, format_ in enumerate(candidates.formats)
    ]
    chosen = candidates.formats[int(answer.assignment.choice[index])].name
    document = jsonable({"unit": unit_name, "chosen": chosen, "shadow_price": price, "curve": curve})
    assert isinstance(document, dict)
    return document


def _on_hull(loss: NDArray[np.float64], cost: NDArray[np.float64], allowed: NDArray[np.bool_]) -> set[int]:
    """Returns the formats on the lower convex hull of loss over bytes."""
    hull = build_hull(np.where(allowed, loss, np.inf)[None], np.where(allowed, cost, 0.0)[None])
    return set(hull.vertices[0].tolist())


def _baselines(priced: PricedProfile, metric: str) -> list[dict[str, Any]]:
    table = priced.profile.table(predicting_metric(priced.profile, metric))
    latency = priced.tables.get(LATENCY)
    return [
        {
            "name": name,
            "bytes": size_bytes,
            "predicted_loss": float(pick(table.loss, choice).sum()),
            "latency_us": None if latency is None else float(pick(latency.cost, choice).sum()) + latency.fixed,
        }
        for name, choice, size_bytes in priced.uniform
    ]


def _engine_price(answer: Answer) -> dict[str, Any] | None:
    if answer.rules is None:
        return None
    return {
        "unrestricted_loss": answer.rules.unrestricted_kl,
        "unrestricted_bytes": answer.rules.unrestricted_bytes,
        "refusals": [{"reason": reason, "candidates": count} for reason, count in answer.priced.refusals.items()],
    }
