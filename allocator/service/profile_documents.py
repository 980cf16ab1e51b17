"""Profiles, their frontiers and their experts as JSON."""

from typing import Any

import numpy as np

from allocator.assignments import bits_per_weight, cache_use, pick
from allocator.budget import MEMORY
from allocator.frontiers import frontier_along
from allocator.json_values import jsonable
from allocator.planning import default_metric, predicting_metric
from allocator.service.priced_profiles import PricedProfile
from sensitivity.experts.routing import RoutingStatistics


def profile_document(priced: PricedProfile, *, model_id: str, created_at: str, timed: bool) -> dict[str, Any]:
    """Returns a profile: its units, what each format costs and loses in them, and the uniform formats.

    Args:
        priced: The profile.
        model_id: The model.
        created_at: When it was measured.
        timed: Whether its candidates were timed.
    """
    profile = priced.profile
    metric = default_metric(profile)
    document = {
        "id": profile.fingerprint,
        "model_id": model_id,
        "created_at": created_at,
        "metric_names": list(profile.losses),
        "default_metric": metric,
        "metric_units": {name: table.unit_of_measure for name, table in profile.losses.items()},
        "unit_of_measure": profile.table(metric).unit_of_measure,
        "resources": list(priced.tables),
        "formats": [f.name for f in profile.candidates.formats],
        "units": _units(priced, metric),
        "fixed_bytes": profile.fixed_bytes,
        "reference_bytes": profile.reference_bytes,
        "has_cache": profile.cache is not None,
        "has_latency": timed,
        "uniform": _uniform(priced, metric),
        "experts": None if profile.routing is None else _experts(profile.routing),
        "provenance": dict(profile.provenance),
    }
    cleaned = jsonable(document)
    assert isinstance(cleaned, dict)
    return cleaned


def frontier_document(priced: PricedProfile, *, metric: str | None, points: int, along: str = MEMORY) -> dict[str, Any]:
    """Returns the least predicted loss at each size, or at each use of another resource.

    Args:
        priced: The profile.
        metric: Metric to plan with; None for the best one held.
        points: Budgets to solve.
        along: Name of the resource.

    Raises:
        ValueError: If the metric is not in the profile.
    """
    found = frontier_along(priced.profile, priced.tables, resource=along, points=points, metric=metric)
    rows = [
        {
            "use": point[along],
            "bytes": point["memory_bytes"],
            "bits_per_weight": point["bits_per_weight"],
            "predicted_loss": point["predicted_loss"],
            "gap": point["predicted_loss"] - point["lower_bound"],
        }
        for point in found
    ]
    document = {
        "profile_id": priced.profile.fingerprint,
        "resource": "bytes" if along == MEMORY else along,
        "metric": metric or default_metric(priced.profile),
        "points": rows,
    }
    cleaned = jsonable(document)
    assert isinstance(cleaned, dict)
    return cleaned


def _units(priced: PricedProfile, metric: str) -> list[dict[str, Any]]:
    profile = priced.profile
    candidates, table = profile.candidates, profile.table(metric)
    sampled = bool(table.std_error.any())
    cost = priced.tables[MEMORY].cost
    rows = []
    for u, unit in enumerate(candidates.units):
        allowed = [(f, candidates.formats[f].name) for f in np.flatnonzero(candidates.allowed[u]).tolist()]
        errors = {name: float(table.std_error[u, f]) for f, name in allowed} if sampled else None
        rows.append(
            {
                "name": unit.name,
                "layer": unit.layer_index,
                "role": unit.role,
                "expert": unit.expert_index,
                "parameters": unit.weight_count,
                "bytes_by_format": {name: round(float(cost[u, f])) for f, name in allowed},
                "loss_by_format": {name: float(table.loss[u, f]) for f, name in allowed},
                "standard_error_by_format": errors,
            }
        )
    return rows


def _uniform(priced: PricedProfile, metric: str) -> list[dict[str, Any]]:
    table = priced.profile.table(predicting_metric(priced.profile, metric))
    candidates, memory = priced.profile.candidates, priced.tables[MEMORY]
    return [
        {
            "format": name.removeprefix("uniform "),
            "bytes": size_bytes,
            "bits_per_weight": bits_per_weight(priced.profile, size_bytes - cache_use(candidates, choice, memory)),
            "predicted_loss": float(pick(table.loss, choice).sum()),
            "measured_kl": None,
        }
        for name, choice, size_bytes in priced.uniform
    ]


def _experts(routing: RoutingStatistics) -> dict[str, Any]:
    """Returns the routing of each layer; coverage is the number of calibration tokens that took an expert."""
    return {
        "layers": [
            {
                "layer": layer,
                "frequency": routing.frequency[row].tolist(),
                "coverage": routing.expert_visits[row].tolist(),
                "gate_weight": routing.gate_weight_mean[row].tolist(),
                "affinity": [[a, b, edge["weight"]] for a, b, edge in routing.affinity_graph(layer).edges(data=True)],
                "communities": [list(group) for group in routing.communities(layer, seed=0)],
            }
            for row, layer in enumerate(routing.layers)
        ]
    }
