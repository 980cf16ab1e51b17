"""The input statistics that quantizers render with: collected once, kept in a file, the same whenever they are needed.

A plan is measured, verified and applied at different times, and all of them must render the same weights. So the sums
are kept as they were collected; where the file is gone they are collected again, from the same tokens.

For a weight that a linear layer reads they are the second moment M of its inputs; for the weights of an expert, that of
the tokens routed to it. An embedding reads one row for each token, an input of ones and zeros that says nothing about
columns: isotropic. A tied one is the head too, over T tokens and V rows:

    M + T / V * I.

Complexity: one pass of the model. Memory and file: one float32 matrix in_features^2 for each distinct input.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.drawn_tokens import draw_tokens
from runtime.quantizers import STATISTICAL, TEXTLESS, InputStatistics
from runtime.rendered_files import RenderedFiles
from runtime.rendering import Rendering
from runtime.units import Weight, list_weights
from sensitivity.criteria.output_error import InputSecondMoments, run_under
from sensitivity.pieces import Piece, read_or_measure

_INPUTS = "inputs.safetensors"
_COUNT = "count"
# Between the names of weights that read one input, in the name of its sum; no name of a parameter has it.
_AND = "\n"


def find_rendering(model: Any, quantizer: str, tokens: Tensor | None, *, directory: Path | None) -> Rendering:
    """Returns the rule that a quantizer renders a model's candidates with.

    Args:
        model: The reference model in float32.
        quantizer: Name in ``QUANTIZERS``.
        tokens: [S, T] int64 of calibration text that the statistics are of; None where only their file is left. A
            quantizer in ``TEXTLESS`` reads drawn tokens instead.
        directory: What is kept of this quantizer, model and text: the statistics, and what was rendered with them.
            What is absent is made again; None to keep nothing.

    Raises:
        ValueError: If statistics are needed and there is neither their file nor their text.
    """
    files = None if directory is None else RenderedFiles(directory / "rendered")
    if quantizer not in STATISTICAL:
        return Rendering(quantizer=quantizer, statistics={}, files=files)
    if quantizer in TEXTLESS:
        tokens = draw_tokens(model)
    return Rendering(quantizer=quantizer, statistics=find_statistics(model, tokens, directory=directory), files=files)


def find_statistics(model: Any, tokens: Tensor | None, *, directory: Path | None) -> dict[str, InputStatistics]:
    """Returns weight name -> statistics of its inputs, read where they are kept or collected now.

    Args:
        model: The reference model in float32.
        tokens: [S, T] int64 of calibration text that they are of; None where only their file is left.
        directory: Where they are kept; None to keep nothing.

    Raises:
        ValueError: If there is neither their file nor their text.
    """

    def collect() -> Piece:
        if tokens is None:
            msg = (
                "what was known of the inputs must be kept, or the text it was collected on: got neither the profile "
                f"nor '{directory}'. Measure again with the same settings."
            )
            raise ValueError(msg)
        return _collect(model, tokens)

    piece = read_or_measure(None if directory is None else directory / _INPUTS, collect)
    return _make_statistics(list_weights(model, routers=True), piece)


def _collect(model: Any, tokens: Tensor) -> Piece:
    """Returns the sum of each distinct input, under its readers' names, and the number of inputs under theirs."""
    moments = InputSecondMoments(model)
    run_under(moments, model, tokens)
    readers: dict[int, list[str]] = {}
    for name, moment in moments.linear.items():
        readers.setdefault(id(moment), []).append(name)
    sums = {_AND.join(names): moments.linear[names[0]].numpy() for names in readers.values()}
    counts = {f"{_COUNT}{_AND}{name}": np.array([count]) for name, count in moments.rows.items()}
    return {**sums, **counts}


def _make_statistics(weights: Mapping[str, Weight], piece: Piece) -> dict[str, InputStatistics]:
    """Returns weight name -> statistics; weights that read one input share them."""
    known: dict[str, InputStatistics] = {}
    for key, moment in piece.items():
        first, *others = key.split(_AND)
        count = 0 if first == _COUNT else int(piece[f"{_COUNT}{_AND}{first}"][0])
        if count:
            # In memory of its own: sums over numbers at other alignments may round differently.
            statistics = InputStatistics(second_moment=torch.from_numpy(moment).clone(), count=count)
            known |= dict.fromkeys([first, *others], statistics)
    isotropic = {width: InputStatistics.isotropic(width) for width in {w.shape[1] for w in weights.values()}}
    return {
        name: _with_embedding(weight, known[name]) if name in known else isotropic[weight.shape[1]]
        for name, weight in weights.items()
    }


def _with_embedding(weight: Weight, statistics: InputStatistics) -> InputStatistics:
    """Returns the statistics of a head with those of the embedding that it is tied to, if it is."""
    if weight.kind != "embedding":
        return statistics
    rows_read = torch.eye(weight.shape[1]) * (statistics.count / weight.shape[0])
    return InputStatistics(second_moment=statistics.second_moment + rows_read, count=statistics.count)
