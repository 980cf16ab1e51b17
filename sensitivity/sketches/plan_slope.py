"""Slope of the measured KL at a quantized model: what one more change does, with all the changes already made.

At the reference the KL divergence has no slope, and interactions are products of errors that must be estimated pair by
pair. At a plan it has one, and the slope holds the interactions of a unit with *all* others at once:

    slope[s, u, f] = <grad KL_s(W_plan), render(W_u, f) - render(W_u, plan_u)>,    KL_s in nats per token of sequence s.

KL_s is an average over every token of the vocabulary at every position, no sample of labels, so the slope is known
far better from the same text than the cross terms of any sketch. Together with the curvature of single changes it
gives the loss of every candidate around the plan (see `allocator.refinement`).

Cost: one forward and one backward pass a sequence, beside one forward pass of the reference. Disk, while it runs: the
reference's log-probabilities, 4 S T V bytes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.apply import simulated_formats
from runtime.candidates import Candidates
from runtime.rendering import RenderingRule
from runtime.units import read_weight
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.sketches.fisher_sketch import measure_streamed_fisher_sketch


def measure_plan_slope(
    model: Any,
    candidates: Candidates,
    choice: NDArray[np.int64],
    tokens: Tensor,
    *,
    directory: Path,
    progress: Callable[[int, int], None],
    quantizer: RenderingRule = "rtn",
) -> NDArray[np.float64]:
    """Returns slope [S, U, F] at a plan, nats per token; zero for the plan's own formats and those not allowed.

    Args:
        model: The reference model in float32, which it is again afterwards.
        candidates: Units and formats.
        choice: [U] format indices of the plan.
        tokens: [S, T] int64.
        directory: Where the files of this measurement are, and of no other; an interrupted one goes on.
        progress: Called with (steps done, steps in all).
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        NotLayerwise: If the layers of the model cannot be run one by one.
    """
    loss = _DivergenceFrom(model, tokens, directory / "reference")
    formats = {
        weight.name: candidates.formats[int(f)].name
        for unit, f in zip(candidates.units, choice, strict=True)
        for weight in unit.weights
    }
    # Views of the reference's values: the model holds others while it is quantized.
    own = {weight: read_weight(model, weight) for unit in candidates.units for weight in unit.weights}
    with simulated_formats(model, formats, quantizer=quantizer):
        slope = measure_streamed_fisher_sketch(
            model,
            candidates,
            tokens,
            seed=0,
            directory=directory / "stream",
            progress=progress,
            quantizer=quantizer,
            loss=loss,
            base=own.__getitem__,
        )
    return np.where(candidates.allowed, slope, 0.0).astype(np.float64)


class _DivergenceFrom:
    """KL divergence to the reference, summed over a sequence, over sqrt(T): the stream divides by another sqrt(T)."""

    def __init__(self, model: Any, tokens: Tensor, directory: Path) -> None:
        self._directory = directory
        for s in range(len(tokens)):
            read_or_measure(self._path(s), partial(self._reference, model, tokens[s : s + 1]))

    def __call__(self, logits: Tensor, index: int) -> Tensor:
        log_p = torch.from_numpy(read_or_measure(self._path(index), self._missing)["log_p"])
        log_q = torch.log_softmax(logits, dim=-1)
        scaled: Tensor = (log_p.exp() * (log_p - log_q)).sum() / float(np.sqrt(logits.shape[0]))
        return scaled

    def _path(self, s: int) -> Path:
        return self._directory / f"{s:05d}.safetensors"

    @torch.no_grad()
    def _reference(self, model: Any, tokens: Tensor) -> Piece:
        logits = model(tokens, use_cache=False).logits[0].float()
        return {"log_p": torch.log_softmax(logits, dim=-1).numpy()}

    def _missing(self) -> Piece:
        msg = f"the reference's log-probabilities must be in '{self._directory}': one is gone. Run again."
        raise FileNotFoundError(msg)
