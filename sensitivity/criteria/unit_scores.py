"""Criteria that rank units but say nothing of formats, and the rule that makes a table of them.

    score_u                          larger is more sensitive               what it looks at
    z_distribution    1 - |{|z| > 1}| / N,  z = (w - mean) / std            weights
    kurtosis          E z^4 (3 for a Gaussian)                              weights
    layer_influence   1 - cos(input, output) of the unit's decoder layer    one pass
    outlier_ratio     mean over sequences of max_t s_t / median_t s_t       one pass
    mean_variance     mean over channels of the inputs' variance            one pass
    max_variance      largest over channels                                 one pass

The rule: **loss_uf = score_u x error_uf**. The error is the noise-to-signal power ratio of the rendered candidate,
or, for the two variances, its squared weight error: variance x ||D||^2 is the output error of inputs whose channels
are independent. Published policies cut the ranking instead (the k lowest units get fewer bits), which no budget in
bytes can be given to. The unit of the tables is the score's times the error's, not nats; only ratios mean something.

A unit of several weights has the mean of the scores they have, weighted by their counts. A unit without any score
(outside of the decoder layers, or an expert that no token visited) takes the largest score of all: nothing says that
it can be spared.

Papers: z-score distribution and layer influence, Dumitru et al. 2024 (arXiv:2406.17415), who call the *smaller* share
and the *smaller* cosine more important; theirs are the share and the negative cosine, we take 1 minus these so that
scores are positive, and count both tails. Kurtosis: Zhang et al. 2025 (arXiv:2503.06518). Outlier ratio: Yang et al.
2024 (arXiv:2405.14428), there of activations that are quantized. Variances: the criteria of NNCF.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.units import Unit, Weight, read_weight
from sensitivity.criteria.statistics import ChannelStatistics, ModelStatistics

_Float = NDArray[np.float64]


def score_z_distribution(model: nn.Module, units: Sequence[Unit]) -> _Float:
    """Returns the share [U] of weights within one standard deviation of their mean."""
    return _mean_over_weights(units, lambda weight: _share_within_one_deviation(read_weight(model, weight)))


def score_kurtosis(model: nn.Module, units: Sequence[Unit]) -> _Float:
    """Returns the kurtosis [U] of the weights: E z^4, at least 1."""
    return _mean_over_weights(units, lambda weight: _kurtosis(read_weight(model, weight)))


def score_layer_influence(units: Sequence[Unit], statistics: ModelStatistics) -> _Float:
    """Returns 1 minus the cosine [U] between input and output of the unit's layer; NaN outside of the layers."""
    cosine = statistics.layer_cosine
    return np.array([np.nan if u.layer_index is None else 1.0 - cosine[u.layer_index] for u in units])


def score_outlier_ratio(units: Sequence[Unit], statistics: ModelStatistics) -> _Float:
    """Returns the ratio [U] of the largest token to the median one; NaN where no token came.

    The one-hot inputs of an embedding are all of one size.
    """
    return _mean_over_weights(units, _of_readers(statistics, lambda inputs: inputs.outlier_ratio, lambda _: 1.0, max))


def score_mean_variance(units: Sequence[Unit], statistics: ModelStatistics) -> _Float:
    """Returns the variance [U] of the inputs, averaged over their channels; NaN where no token came."""
    return _score_variance(units, statistics, torch.mean)


def score_max_variance(units: Sequence[Unit], statistics: ModelStatistics) -> _Float:
    """Returns the largest variance [U] of an input channel; NaN where no token came."""
    return _score_variance(units, statistics, torch.max)


def spread_over_formats(score: _Float, error: _Float) -> _Float:
    """Returns the table [U, F] of a score by the rule above.

    Args:
        score: [U], not negative; NaN where a unit has none.
        error: [U, F].

    Raises:
        ValueError: If no unit has a score.
    """
    known = np.isfinite(score)
    if not known.any():
        msg = f"at least one unit must have a score: got none among {len(score)} units. Use another estimator."
        raise ValueError(msg)
    table: _Float = np.where(known, score, score[known].max())[:, None] * error
    return table


def _mean_over_weights(units: Sequence[Unit], score: Callable[[Weight], float]) -> _Float:
    def mean(unit: Unit) -> float:
        scores = [(weight.weight_count, score(weight)) for weight in unit.weights]
        known = [(count, value) for count, value in scores if np.isfinite(value)]
        total = sum(count for count, _ in known)
        return sum(count * value for count, value in known) / total if known else np.nan

    return np.array([mean(unit) for unit in units])


def _share_within_one_deviation(values: Tensor) -> float:
    deviation, mean = torch.std_mean(values, correction=0)
    return float(((values - mean).abs() <= deviation).double().mean())


def _kurtosis(values: Tensor) -> float:
    centred = values - values.mean()
    square = centred.square_()
    variance = float(square.mean())
    # A constant weight has no tails.
    return float(square.square_().mean()) / variance**2 if variance > 0.0 else 1.0


def _score_variance(units: Sequence[Unit], statistics: ModelStatistics, reduce: Callable[[Tensor], Tensor]) -> _Float:
    def of_one_hot(counts: Tensor) -> float:
        share = counts.double() / statistics.token_count
        return float(reduce(share * (1.0 - share)))

    def of_linear(inputs: ChannelStatistics) -> float:
        return float(reduce(inputs.variance))

    # The errors of two outputs add up.
    return _mean_over_weights(units, _of_readers(statistics, of_linear, of_one_hot, sum))


def _of_readers(
    statistics: ModelStatistics,
    of_linear: Callable[[ChannelStatistics], float],
    of_embedding: Callable[[Tensor], float],
    combine: Callable[[list[float]], float],
) -> Callable[[Weight], float]:
    """Returns the score of a weight by the inputs of its readers, of which a tied embedding has two."""
    counts: Mapping[str, Tensor] = statistics.moments.embedding

    def score(weight: Weight) -> float:
        found = []
        if (inputs := statistics.inputs.get(weight.name)) is not None:
            found.append(of_linear(inputs))
        if (rows := counts.get(weight.name)) is not None:
            found.append(of_embedding(rows))
        return combine(found) if found else np.nan

    return score
