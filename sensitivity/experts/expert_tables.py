"""What a measurement adds for a mixture of experts: its routing, and losses that trust rarely taken experts less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from runtime.candidates import Candidates
from runtime.residency import Residency
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.experts.routing_measurement import ALL_TEXT, measure_routing
from sensitivity.experts.shrinkage import shrink_rare_losses
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import LossTable

FISHER_SHRUNK = "fisher_shrunk"
ROUTING = "routing"


def find_routing(
    model: Any,
    candidates: Candidates,
    tokens: Tensor,
    *,
    path: Path,
    progress: Callable[[str, int, int], None],
    residency: Residency | None = None,
) -> RoutingStatistics | None:
    """Returns how often each expert is taken on a text, or None for a model without expert units.

    Args:
        model: The reference model.
        candidates: Units and formats.
        tokens: [S, T] int64 calibration text.
        path: File of the finished piece.
        progress: Called with (stage, done, total).
        residency: Brings the weights into memory; None where they all are.
    """
    if not any(unit.kind == "expert" for unit in candidates.units):
        return None

    def measure() -> Piece:
        found = measure_routing(model, tokens, residency=residency)
        return {
            "layers": np.array(found.layers, dtype=np.int64),
            "tokens": found.tokens,
            "visits": found.visits,
            "gate_weight": found.gate_weight,
            "together": found.together,
        }

    progress(ROUTING, 0, 1)
    piece = read_or_measure(path, measure)
    progress(ROUTING, 1, 1)
    return RoutingStatistics(
        layers=tuple(piece["layers"].tolist()),
        domains=(ALL_TEXT,),
        **{name: piece[name] for name in ("tokens", "visits", "gate_weight", "together")},
    )


def shrink_table(table: LossTable, routing: RoutingStatistics, candidates: Candidates) -> LossTable:
    """Returns a table with the losses of rarely taken experts shrunk towards their layer's."""
    shrunk = shrink_rare_losses(table.loss, table.std_error, routing, candidates)
    return LossTable(loss=shrunk.loss, std_error=shrunk.std_error, unit_of_measure=table.unit_of_measure)
