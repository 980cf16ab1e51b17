"""Several quality metrics at once: losses of single units by metric and text, and tables that combine them.

MixDQ measures each group of units by the metric that it hurts (content by one, image quality by another). Here a
metric is a rule on logits and a text, so that prose, code or a task each have their own [U, F] losses, and a plan can
be made for a weighted sum, for the worst case, or with each group of units under its own metric. Metrics have
different sizes, so each is normalised first by its loss of the whole model at one format,

    share[k, u, f] = loss[k, u, f] / sum_v loss[k, v, reference format]       (units that may have that format).

A sum of shares is comparable between metrics, and under the additive model a choice's shares by metric k sum to its
loss over that of the uniform choice. MixDQ splits one budget between the groups by a ratio and sweeps it; a factor on
a group's shares moves the same split under one shared budget.

The worst case is the largest share of each candidate, an upper bound of the largest sum: max_k sum_u <= sum_u max_k.

Complexity: U F passes from the unit's layer on for each text; a unit is rendered once for all texts.
Paper: Zhao et al. 2024, MixDQ (arXiv:2405.17873). It adds decibels, which minimises the product of errors; losses
here are added as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.apply import simulated_formats
from runtime.candidates import Candidates
from runtime.rendering import RenderingRule
from sensitivity.profile import LossTable
from sensitivity.sketches.joint_kl import kl_by_position
from sensitivity.streaming.suffix import SuffixRunner

SHARE = "share of the uniform loss"

KL = "kl"
NEXT_TOKEN = "next_token"


@dataclass(frozen=True, kw_only=True)
class MetricLosses:
    """Losses of single candidates by several metrics, higher is worse.

    Args:
        names: K names.
        loss: [K, U, F]; zero where the pair is not allowed.
        std_error: [K, U, F].
    """

    names: tuple[str, ...]
    loss: NDArray[np.float64]
    std_error: NDArray[np.float64]

    def index(self, name: str) -> int:
        """Returns the row of a metric.

        Raises:
            ValueError: If there is none of this name.
        """
        if name not in self.names:
            msg = f"metric must be one of {', '.join(self.names)}: got '{name}'. Correct the name."
            raise ValueError(msg)
        return self.names.index(name)


class _Text:
    """One text with the reference's predictions on it."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self._tokens = tokens
        self._runner = SuffixRunner(model, tokens)
        self._log_p = torch.log_softmax(self._runner.reference_logits.flatten(0, 1), dim=-1)
        self._p = self._log_p.exp()

    def measure(self, layer_index: int | None, metrics: Sequence[str]) -> list[NDArray[np.float64]]:
        """Returns each metric [S] of the model as it is now, which differs from this layer on."""
        logits = self._runner.logits(layer_index)
        return [METRICS[metric](self, logits).numpy() for metric in metrics]

    def kl(self, logits: Tensor) -> Tensor:
        """Returns the KL to the reference, nats per token, [S]."""
        kl = kl_by_position(self._log_p, self._p, logits.flatten(0, 1))
        return kl.double().reshape(len(self._tokens), -1).mean(dim=1)

    def next_token(self, logits: Tensor) -> Tensor:
        """Returns the increase of the loss of the text's next tokens, nats per token, [S]: may be negative."""
        change = self._log_p.view_as(logits) - torch.log_softmax(logits, dim=-1)
        return change[:, :-1].gather(-1, self._tokens[:, 1:, None])[..., 0].double().mean(dim=1)


METRICS: dict[str, Callable[[_Text, Tensor], Tensor]] = {KL: _Text.kl, NEXT_TOKEN: _Text.next_token}


@torch.no_grad()
def measure_metrics(
    model: nn.Module,
    candidates: Candidates,
    texts: Mapping[str, Tensor],
    *,
    metrics: Sequence[str] = (KL,),
    quantizer: RenderingRule = "rtn",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MetricLosses:
    """Returns the losses of every allowed candidate, by every metric on every text, named ``text/metric``.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        texts: Name -> tokens [S, T] int64, S >= 2 and T >= 2.
        metrics: Names in ``METRICS``.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        progress: Called with (units done, units in all).

    Raises:
        ValueError: If there is no text, one is too short, or a metric is unknown.
    """
    _check_texts(texts, metrics)
    prepared = [_Text(model, tokens) for tokens in texts.values()]
    shape = (len(texts) * len(metrics), *candidates.allowed.shape)
    loss, std_error = np.zeros(shape), np.zeros(shape)
    for u, unit in enumerate(candidates.units):
        for f in np.flatnonzero(candidates.allowed[u]):
            formats = {weight.name: candidates.formats[f].name for weight in unit.weights}
            with simulated_formats(model, formats, quantizer=quantizer):
                samples = [s for text in prepared for s in text.measure(unit.layer_index, metrics)]
            loss[:, u, f] = [sample.mean() for sample in samples]
            std_error[:, u, f] = [sample.std(ddof=1) / np.sqrt(len(sample)) for sample in samples]
        progress(u + 1, len(candidates.units))
    names = tuple(f"{text}/{metric}" for text in texts for metric in metrics)
    return MetricLosses(names=names, loss=loss, std_error=std_error)


def normalise(losses: MetricLosses, candidates: Candidates, *, reference_format: str) -> MetricLosses:
    """Returns every metric as shares of its own loss of the whole model at one format.

    Args:
        losses: Losses in the metrics' own units of measure.
        candidates: Units and formats.
        reference_format: Name of the format, one at which every metric loses.

    Raises:
        ValueError: If the format is not among the candidates, or a metric does not lose at it.
    """
    f = candidates.format_index(reference_format)
    totals = losses.loss[:, :, f].sum(axis=1)
    for k in np.flatnonzero(~(totals > 0.0)).tolist():
        msg = (
            f"a metric must lose at reference_format='{reference_format}': got a total of {totals[k]:g} by "
            f"'{losses.names[k]}'. Use a lower format, more text, or leave the metric out."
        )
        raise ValueError(msg)
    scale = totals[:, None, None]
    return MetricLosses(names=losses.names, loss=losses.loss / scale, std_error=losses.std_error / scale)


def combine_weighted(shares: MetricLosses, weights: Mapping[str, float]) -> LossTable:
    """Returns the weighted sum of metrics, its weights brought to a sum of 1; errors as of independent texts.

    Args:
        shares: Normalised losses.
        weights: Metric -> weight, not negative; metrics not named have none.

    Raises:
        ValueError: If a metric is unknown, or the weights are negative or all zero.
    """
    values = np.zeros(len(shares.names))
    for name, weight in weights.items():
        values[shares.index(name)] = weight
    if not (np.isfinite(values).all() and (values >= 0.0).all() and values.any()):
        msg = f"weights must be at least 0 and one of them positive: got {dict(weights)}. Correct the weights."
        raise ValueError(msg)
    values /= values.sum()
    return LossTable(
        loss=np.tensordot(values, shares.loss, axes=1),
        std_error=np.sqrt(np.tensordot(values**2, shares.std_error**2, axes=1)),
        unit_of_measure=SHARE,
    )


def combine_worst(shares: MetricLosses) -> LossTable:
    """Returns the largest share of each candidate, with that metric's standard error.

    Args:
        shares: Normalised losses.
    """
    worst = shares.loss.argmax(axis=0)[None]
    return LossTable(
        loss=np.take_along_axis(shares.loss, worst, axis=0)[0],
        std_error=np.take_along_axis(shares.std_error, worst, axis=0)[0],
        unit_of_measure=SHARE,
    )


def combine_by_group(
    shares: MetricLosses, metric_by_unit: Sequence[str], *, factors: Mapping[str, float] | None = None
) -> LossTable:
    """Returns each unit's share by the metric of its group.

    Args:
        shares: Normalised losses.
        metric_by_unit: [U] name of the metric that judges each unit.
        factors: Metric -> positive factor on the shares of its group (more of it, more bits); 1 where not named.

    Raises:
        ValueError: If the names are not one a unit, a metric is unknown, or a factor is not positive.
    """
    if len(metric_by_unit) != shares.loss.shape[1]:
        msg = (
            f"metric_by_unit must name one metric for each of {shares.loss.shape[1]} units: got {len(metric_by_unit)}."
        )
        raise ValueError(msg)
    factor_by_metric = np.ones(len(shares.names))
    for name, factor in (factors or {}).items():
        if not (np.isfinite(factor) and factor > 0.0):
            msg = f"factors must be positive: got {factor} for '{name}'. Leave a group out by pinning its units."
            raise ValueError(msg)
        factor_by_metric[shares.index(name)] = factor
    rows = np.array([shares.index(name) for name in metric_by_unit])
    units, scale = np.arange(len(rows)), factor_by_metric[rows][:, None]
    return LossTable(
        loss=shares.loss[rows, units] * scale,
        std_error=shares.std_error[rows, units] * scale,
        unit_of_measure=SHARE,
    )


def _check_texts(texts: Mapping[str, Tensor], metrics: Sequence[str]) -> None:
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        msg = f"metrics must be among {', '.join(METRICS)}: got {list(metrics)}. Correct the names."
        raise ValueError(msg)
    if not texts:
        msg = "texts must hold at least one text: got none. Name a text and its tokens."
        raise ValueError(msg)
    for name, tokens in texts.items():
        if min(tokens.shape) < 2:
            msg = (
                f"a text must be at least 2 sequences of 2 tokens: got shape {tuple(tokens.shape)} for '{name}'. "
                "Cut it into more sequences."
            )
            raise ValueError(msg)
