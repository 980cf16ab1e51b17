"""The Fisher sketch as finished pieces: layer by layer, or sequence by sequence where layers cannot be run alone."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.candidates import Candidates
from runtime.decoder_layers import NotLayerwise
from runtime.rendering import RenderingRule
from runtime.residency import Residency
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.sketches.fisher_sketch import measure_fisher_sketch, measure_streamed_fisher_sketch
from sensitivity.streaming.gradient_probes import SampledScore

Progress = Callable[[int, int], None]
# (sequences of the step before, sketch [S, U, F]) -> whether plans of the two are as good as the same.
IsStable = Callable[[int, NDArray[np.float32]], bool]
FIRST_SEQUENCES = 16


def measure_sketch(
    model: Any,
    candidates: Candidates,
    tokens: Tensor,
    *,
    seed: int,
    quantizer: RenderingRule,
    pieces: Path,
    progress: Progress,
    residency: Residency | None = None,
    first: int = 0,
    last: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> NDArray[np.float32]:
    """Returns the Fisher sketch [S, U, F] of the sequences from ``first`` to ``last``.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [S, T] int64.
        seed: Seed of the labels.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        pieces: Directory of what is finished: ``sketch.safetensors``, and until that is there the parts of it.
        progress: Called with (parts done, parts in all); not at all where the sketch is there.
        residency: Brings the weights into memory, which they all are without.
        first: Index of the first sequence.
        last: Index after that of the last; None for all.
        dtype: Type that products are computed in.

    Raises:
        NotLayerwise: If the layers cannot be run one by one though their weights are not in memory together.
    """
    stream, sequences = pieces / "stream", pieces / "sequences"
    last = len(tokens) if last is None else last

    def measure() -> Piece:
        # Sequences are there when an earlier run found that the model is not layer-wise.
        if not sequences.exists():
            with suppress(NotLayerwise) if residency is None else nullcontext():
                sketch = measure_streamed_fisher_sketch(
                    model,
                    candidates,
                    tokens[first:last],
                    seed=seed,
                    loss=SampledScore(seed, first=first),
                    directory=stream,
                    progress=progress,
                    quantizer=quantizer,
                    residency=residency,
                    dtype=dtype,
                )
                return {"sketch": sketch}
        return {
            "sketch": _measure_whole(
                model, candidates, tokens[:last], seed, quantizer, sequences, progress, first, dtype
            )
        }

    sketch = read_or_measure(pieces / "sketch.safetensors", measure)["sketch"]
    for parts in (stream, sequences):
        shutil.rmtree(parts, ignore_errors=True)
    return sketch


def _measure_whole(
    model: Any,
    candidates: Candidates,
    tokens: Tensor,
    seed: int,
    quantizer: RenderingRule,
    pieces: Path,
    progress: Progress,
    first: int,
    dtype: torch.dtype,
) -> NDArray[np.float32]:
    def measure(s: int) -> Piece:
        [sketch] = measure_fisher_sketch(
            model, candidates, tokens[: s + 1], seed=seed, quantizer=quantizer, first=s, dtype=dtype
        )
        return {"sketch": sketch}

    total = len(tokens) - first
    progress(0, total)
    sketches = []
    for s in range(first, len(tokens)):
        sketches.append(read_or_measure(pieces / f"{s:05d}.safetensors", partial(measure, s))["sketch"])
        progress(s + 1 - first, total)
    return np.stack(sketches)


def measure_growing_sketch(
    measure: Callable[..., NDArray[np.float32]], most: int, *, is_stable: IsStable, pieces: Path
) -> NDArray[np.float32]:
    """Returns the Fisher sketch [S, U, F] of as many sequences as it takes until plans made of it are stable.

    The sequences are doubled from step to step, and only the new ones measured; the stable sketch is one of the steps.

    Args:
        measure: ``measure_sketch`` but for ``first``, ``last`` and ``pieces``.
        most: The most sequences.
        is_stable: Asked after every doubling.
        pieces: Directory of what is finished, a part of it for each step.
    """
    counts = [FIRST_SEQUENCES * 2**k for k in range(most.bit_length()) if FIRST_SEQUENCES * 2**k < most]
    sketch = np.zeros((0, 0, 0), dtype=np.float32)
    for first, last in pairwise([0, *counts, most]):
        part = measure(first=first, last=last, pieces=pieces / f"{first:05d}-{last:05d}")
        sketch = np.concatenate([sketch, part]) if first else part
        if first and is_stable(first, sketch):
            break
    return sketch
