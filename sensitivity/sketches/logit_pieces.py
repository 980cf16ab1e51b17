"""The single-unit KL as finished pieces, one a unit: of all pairs with their cross terms, or of some without.

Kept sketches grow with units times formats, and so do the passes. Where only some pairs are measured the sketches
are not kept, as the cross terms of the others would be missing, and a unit without a pair costs nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import NATS, LossTable
from sensitivity.sketches.logit_sketch import LogitSketch, gram_of


def measure_single_unit_kl(
    model: nn.Module,
    candidates: Candidates,
    tokens: Tensor,
    *,
    pairs: NDArray[np.bool_],
    cross_terms: bool,
    top_tokens: int,
    quantizer: RenderingRule,
    pieces: Path,
    progress: Callable[[int, int], None],
) -> tuple[LossTable, NDArray[np.float32] | None]:
    """Returns the KL of each pair, zero where it is not measured, and the inner products on both halves of the text.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [B, T] int64, B even.
        pairs: [U, F] bool, the allowed pairs to measure.
        cross_terms: Whether the inner products [2, U * F, U * F] are kept.
        top_tokens: Most likely tokens of a position that the sketches keep.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        pieces: Directory for the finished units; those already there are used.
        progress: Called with (units done, units with a pair).
    """
    measurer: LogitSketch | None = None

    def measure(u: int) -> Piece:
        nonlocal measurer
        # Not before it is needed: it runs the model.
        measurer = measurer or LogitSketch(
            model, replace(candidates, allowed=pairs), tokens, top_tokens=top_tokens, quantizer=quantizer
        )
        effect = measurer.measure(u)
        return {"kl": effect.kl, "sketch": effect.sketch} if cross_terms else {"kl": effect.kl}

    units = np.flatnonzero(pairs.any(axis=1)).tolist()
    progress(0, len(units))
    loss, std_error = np.zeros(pairs.shape), np.zeros(pairs.shape)
    sketches = []
    for done, u in enumerate(units, start=1):
        piece = read_or_measure(pieces / f"{u:05d}.safetensors", partial(measure, u))
        loss[u], std_error[u] = _mean_and_error(piece["kl"].astype(np.float64), tokens.shape[0])
        if cross_terms:
            sketches.append(piece["sketch"])
        progress(done, len(units))
    gram = _gram_of_halves(sketches, units, pairs.shape, tokens) if cross_terms else None
    return LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS), gram


def _mean_and_error(kl: NDArray[np.float64], sequences: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # Positions of one sequence are not independent: the error is that of the sequences' means.
    by_sequence = kl.reshape(len(kl), sequences, -1).mean(axis=-1)
    return kl.mean(axis=-1), by_sequence.std(axis=-1, ddof=1) / np.sqrt(sequences)


def _gram_of_halves(
    sketches: list[NDArray[np.float16]], units: list[int], shape: tuple[int, ...], tokens: Tensor
) -> NDArray[np.float32]:
    """Returns [2, U * F, U * F], zero for units without a sketch; no sequence is in both halves."""
    gram = np.zeros((2, shape[0] * shape[1], shape[0] * shape[1]), dtype=np.float32)
    if not units:
        return gram
    half = tokens.shape[0] // 2 * tokens.shape[1]
    rows = (np.array(units)[:, None] * shape[1] + np.arange(shape[1])).ravel()
    for own, part in zip(gram, (slice(half), slice(half, None)), strict=True):
        own[np.ix_(rows, rows)] = gram_of(np.concatenate([sketch[:, part] for sketch in sketches]))
    return gram
