"""The experts of a mixture as tables of a report: what each is stored in, how often it is taken, and with which."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from allocator.plans import Plan
from runtime.formats import Format
from runtime.units import Weight
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.profile import SensitivityProfile

COMMUNITY_SEED = 0


def expert_table(profile: SensitivityProfile, plan: Plan) -> pd.DataFrame:
    """Returns one row per expert, by layer; no rows where the profile has no routing statistics.

    Args:
        profile: The profile the plan was made from.
        plan: The plan.
    """
    routing = profile.routing
    if routing is None:
        return pd.DataFrame()
    rows = []
    for (layer, expert), stored in _weights_by_expert(profile, plan).items():
        row = routing.row_of(layer)
        rows.append(
            {
                "layer_index": layer,
                "expert_index": expert,
                "tokens": int(routing.expert_visits[row, expert]),
                "frequency": float(routing.frequency[row, expert]),
                "gate_weight": float(routing.gate_weight_mean[row, expert]),
                **_stored(stored),
            }
        )
    table = pd.DataFrame(rows).sort_values(["layer_index", "expert_index"], ignore_index=True)
    groups = {(layer, e): group for layer, e, group in _list_communities(routing)}
    keys = zip(table["layer_index"], table["expert_index"], strict=True)
    table.insert(4, "community", [groups[key] for key in keys])
    return table


def affinity_table(routing: RoutingStatistics | None) -> pd.DataFrame:
    """Returns one row per pair of experts of a layer that some token takes together; no rows without routing."""
    if routing is None:
        return pd.DataFrame()
    parts = []
    for layer, counts in zip(routing.layers, routing.together, strict=True):
        first, second = np.nonzero(np.triu(counts, k=1))
        columns = {"layer_index": layer, "expert_index": first, "other_index": second, "tokens": counts[first, second]}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _weights_by_expert(profile: SensitivityProfile, plan: Plan) -> dict[tuple[int, int], list[tuple[Weight, Format]]]:
    formats = {f.name: f for f in profile.candidates.formats}
    found: dict[tuple[int, int], list[tuple[Weight, Format]]] = {}
    for unit in profile.candidates.units:
        for weight in unit.weights:
            if unit.kind == "expert" and unit.layer_index is not None and weight.expert_index is not None:
                key = (unit.layer_index, weight.expert_index)
                found.setdefault(key, []).append((weight, formats[plan.weights[weight.name]]))
    return found


def _stored(stored: list[tuple[Weight, Format]]) -> dict[str, Any]:
    """Returns what an expert's matrices are stored in; bits are means over its weights."""
    weights = sum(weight.weight_count for weight, _ in stored)
    memory_bytes = sum(format_.storage_bytes(weight.shape) for weight, format_ in stored)
    counts = Counter(format_.name for _, format_ in stored)
    return {
        "bits": sum(format_.bits * weight.weight_count for weight, format_ in stored) / weights,
        "bits_per_weight": 8 * memory_bytes / weights,
        "weights": weights,
        "memory_bytes": memory_bytes,
        "formats": ", ".join(name if len(counts) == 1 else f"{name} × {count}" for name, count in counts.items()),
    }


def _list_communities(routing: RoutingStatistics) -> Iterator[tuple[int, int, int]]:
    for layer in routing.layers:
        for number, group in enumerate(routing.communities(layer, seed=COMMUNITY_SEED)):
            for expert in group:
                yield layer, expert, number
