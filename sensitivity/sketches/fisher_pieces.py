"""The Fisher sketch as finished pieces: layer by layer, or sequence by sequence where layers cannot be run alone."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from runtime.candidates import Candidates
from runtime.decoder_layers import NotLayerwise
from runtime.rendering import RenderingRule
from runtime.residency import Residency
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.sketches.fisher_sketch import measure_fisher_sketch, measure_streamed_fisher_sketch

Progress = Callable[[int, int], None]


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
) -> NDArray[np.float32]:
    """Returns the Fisher sketch [S, U, F].

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [S, T] int64.
        seed: Seed of the labels.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        pieces: Directory of what is finished: ``sketch.safetensors``, and until that is there the parts of it.
        progress: Called with (parts done, parts in all); not at all where the sketch is there.
        residency: Brings the weights into memory, which they all are without.

    Raises:
        NotLayerwise: If the layers cannot be run one by one though their weights are not in memory together.
    """
    stream, sequences = pieces / "stream", pieces / "sequences"

    def measure() -> Piece:
        # Sequences are there when an earlier run found that the model is not layer-wise.
        if not sequences.exists():
            with suppress(NotLayerwise) if residency is None else nullcontext():
                sketch = measure_streamed_fisher_sketch(
                    model,
                    candidates,
                    tokens,
                    seed=seed,
                    directory=stream,
                    progress=progress,
                    quantizer=quantizer,
                    residency=residency,
                )
                return {"sketch": sketch}
        return {"sketch": _measure_whole(model, candidates, tokens, seed, quantizer, sequences, progress)}

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
) -> NDArray[np.float32]:
    def measure(s: int) -> Piece:
        [sketch] = measure_fisher_sketch(model, candidates, tokens[: s + 1], seed=seed, quantizer=quantizer, first=s)
        return {"sketch": sketch}

    total = len(tokens)
    progress(0, total)
    sketches = []
    for s in range(total):
        sketches.append(read_or_measure(pieces / f"{s:05d}.safetensors", partial(measure, s))["sketch"])
        progress(s + 1, total)
    return np.stack(sketches)
