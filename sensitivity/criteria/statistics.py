"""Input statistics: all that the one-pass criteria need to know about the inputs of every weight, from one pass.

Beside the second moments of ``InputSecondMoments`` the collector keeps, for each weight that a linear layer reads,
per input channel the mean, the variance and the largest magnitude, and per sequence how far the largest token stands
above the median one,

    s_t = max_j |x_tj|,        outlier ratio = mean over sequences of max_t s_t / median_t s_t,

and for each decoder layer the cosine between a token's input and output, averaged over all tokens. Sums are float64.
Experts are read one by one: their statistics are those of the tokens routed to them. Memory beyond the second
moments: three vectors for each weight.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runtime.units import list_weights
from sensitivity.criteria.output_error import InputSecondMoments, run_under

_LAYER = re.compile(r"^(.*?\.(\d+))\.")


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelStatistics:
    """The inputs of one weight.

    Args:
        rows: Number of inputs.
        mean: [in_features] float64.
        variance: [in_features] float64, divided by ``rows``.
        largest: [in_features] float64, the largest magnitude.
        outlier_ratio: Largest over median token, averaged over the sequences; at least 1.
    """

    rows: int
    mean: Tensor
    variance: Tensor
    largest: Tensor
    outlier_ratio: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelStatistics:
    """What one pass over the calibration text says about a model.

    Args:
        moments: Second moments of the inputs, and how often each row of an embedding was read.
        inputs: Weight name -> statistics, of the weights that a linear layer read.
        layer_cosine: Decoder layer -> mean cosine between its input and its output.
        token_count: Tokens of the pass.
    """

    moments: InputSecondMoments
    inputs: Mapping[str, ChannelStatistics]
    layer_cosine: Mapping[int, float]
    token_count: int


def measure_statistics(model: Any, tokens: Tensor) -> ModelStatistics:
    """Returns the statistics of a model's inputs from one pass.

    Args:
        model: The reference model in float32.
        tokens: [S, T] int64.
    """
    collector = _Collector(model)
    with _layer_cosines(model) as cosines:
        run_under(collector, model, tokens)
    return ModelStatistics(
        moments=collector,
        inputs={name: total.finish() for name, total in collector.totals.items()},
        layer_cosine={layer: float(torch.cat(parts).mean()) for layer, parts in cosines.items()},
        token_count=tokens.numel(),
    )


@dataclass
class _Totals:
    rows: int = 0
    sum: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    largest: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    outlier_ratios: list[float] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        magnitude = x.abs()
        self.rows += x.shape[0]
        self.sum = self.sum + x.sum(dim=0)
        self.squares = self.squares + x.square().sum(dim=0)
        self.largest = torch.maximum(self.largest, magnitude.amax(dim=0))
        per_token = magnitude.amax(dim=1)
        median = float(per_token.quantile(0.5))
        # Where most rows are zero there is nothing to stand out from.
        self.outlier_ratios.append(float(per_token.max()) / median if median > 0.0 else 1.0)

    def finish(self) -> ChannelStatistics:
        mean, squares = torch.as_tensor(self.sum) / self.rows, torch.as_tensor(self.squares) / self.rows
        return ChannelStatistics(
            rows=self.rows,
            mean=mean,
            variance=(squares - mean.square()).clamp_(min=0.0),
            largest=self.largest,
            outlier_ratio=sum(self.outlier_ratios) / len(self.outlier_ratios),
        )


class _Collector(InputSecondMoments):
    """Adds the statistics of single channels and tokens to the second moments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.totals: dict[str, _Totals] = {}

    def _add_linear(self, name: str, x: Tensor) -> None:
        super()._add_linear(name, x)
        rows = x.reshape(-1, x.shape[-1]).to(torch.float64)
        if len(rows):
            self.totals.setdefault(name, _Totals()).add(rows)


@contextmanager
def _layer_cosines(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """Collects the cosine of every token at every decoder layer, while open."""
    cosines: dict[int, list[Tensor]] = {}

    def keep(layer: int, inputs: Tensor, output: Any) -> None:
        outputs = output[0] if isinstance(output, tuple) else output
        cosine = nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
        cosines.setdefault(layer, []).append(cosine.flatten())

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, layer=layer: keep(layer, (*args, *kwargs.values())[0], output),
            with_kwargs=True,
        )
        for layer, name in _find_layers(model).items()
    ]
    try:
        yield cosines
    finally:
        for handle in handles:
            handle.remove()


def _find_layers(model: nn.Module) -> dict[int, str]:
    found = (_LAYER.search(weight.parameter) for weight in list_weights(model).values())
    return {int(match.group(2)): match.group(1) for match in found if match}
