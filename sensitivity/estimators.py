"""The estimators of the field behind one signature: from a model, its candidates and some text to a table [U, F].

Every estimator is a function ``EstimatorInput -> (loss [U, F], std_error [U, F])``; the table below names it, its
unit of measure and what it needs. Smaller is better in every table, and only those in nats per token predict KL (the
others can be converted, see ``conversion``).

To add one: a function in a file of its own, and a row in ``ESTIMATORS``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensitivity.criteria.column_loss import measure_column_loss, score_inverse_hessian
from sensitivity.criteria.crest_factor import predict_grid_noise
from sensitivity.criteria.estimator import Estimator
from sensitivity.criteria.estimator_input import EstimatorInput
from sensitivity.criteria.gradient_errors import (
    measure_absolute_slope,
    measure_fisher_trace,
    measure_hessian_trace,
    measure_output_fisher,
)
from sensitivity.criteria.linearity import measure_linearity_coefficients
from sensitivity.criteria.output_error import weigh_output_error
from sensitivity.criteria.unit_scores import (
    score_kurtosis,
    score_layer_influence,
    score_max_variance,
    score_mean_variance,
    score_outlier_ratio,
    score_z_distribution,
    spread_over_formats,
)
from sensitivity.experts.affinity import measure_affinity_error
from sensitivity.profile import NATS

_Float = NDArray[np.float64]
_LINEARITY_SEQUENCES, _LINEARITY_TOKENS = 4, 32  # one pass for each unit: as much text as the logit sketch has


def find_estimator(name: str) -> Estimator:
    """Returns the estimator called ``name``.

    Raises:
        ValueError: If there is none; the message lists the known names.
    """
    if name not in ESTIMATORS:
        msg = f"estimator must be a known name: got '{name}'. Known estimators: {', '.join(ESTIMATORS)}."
        raise ValueError(msg)
    return ESTIMATORS[name]


def _exact(measure: Callable[[EstimatorInput], _Float]) -> Callable[[EstimatorInput], tuple[_Float, _Float]]:
    """Gives a table that is no sample its standard error, zero."""

    def function(given: EstimatorInput) -> tuple[_Float, _Float]:
        loss = measure(given)
        return loss, np.zeros_like(loss)

    return function


def _ranking(score: Callable[[EstimatorInput], _Float], error: Callable[[EstimatorInput], _Float]) -> dict[str, Any]:
    """Returns the fields of a criterion that ranks units: its score, and its table by the rule of ``unit_scores``."""
    return {"score": score, "function": _exact(lambda given: spread_over_formats(score(given), error(given)))}


def _output_error(given: EstimatorInput) -> _Float:
    return weigh_output_error(
        given.model,
        given.candidates,
        given.statistics.moments,
        token_count=given.statistics.token_count,
        quantizer=given.quantizer,
    )


def _affinity_error(given: EstimatorInput) -> _Float:
    if not any(unit.kind == "expert" for unit in given.candidates.units):
        return _output_error(given)
    return measure_affinity_error(given.model, given.candidates, given.text, quantizer=given.quantizer)


def _linearity(given: EstimatorInput) -> tuple[_Float, _Float]:
    tokens = given.text[:_LINEARITY_SEQUENCES, :_LINEARITY_TOKENS]
    coefficients, std_error = measure_linearity_coefficients(
        given.model, given.candidates.units, tokens, seed=given.seed
    )
    return coefficients[:, None] * given.noise_to_signal, std_error[:, None] * given.noise_to_signal


def _with_gradients(
    measure: Callable[..., tuple[_Float, _Float]],
) -> Callable[[EstimatorInput], tuple[_Float, _Float]]:
    return lambda given: measure(given.model, given.candidates, given.text, seed=given.seed, quantizer=given.quantizer)


ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Estimator(
            name="weight_error",
            inputs="weights",
            unit_of_measure="squared weight",
            description="squared Frobenius norm of the error",
            paper="-",
            function=_exact(lambda given: given.weight_error),
        ),
        Estimator(
            name="noise_to_signal",
            inputs="weights",
            unit_of_measure="noise / signal power",
            description="relative weight error; the linearity theorem with all coefficients one",
            paper="Malinovskii et al. 2024 (arXiv:2411.17525)",
            function=_exact(lambda given: given.noise_to_signal),
        ),
        Estimator(
            name="crest_factor",
            inputs="weights",
            unit_of_measure="noise / signal power",
            description="relative weight error as predicted from the range of each group; nothing is rendered",
            paper="Chen et al. 2025 (arXiv:2510.25602)",
            function=_exact(lambda given: predict_grid_noise(given.model, given.candidates)),
        ),
        Estimator(
            name="z_distribution",
            inputs="weights",
            unit_of_measure="share x noise / signal power",
            description="share of weights within one standard deviation, times relative weight error",
            paper="Dumitru et al. 2024 (arXiv:2406.17415)",
            **_ranking(
                lambda given: score_z_distribution(given.model, given.candidates.units),
                lambda given: given.noise_to_signal,
            ),
        ),
        Estimator(
            name="kurtosis",
            inputs="weights",
            unit_of_measure="kurtosis x noise / signal power",
            description="kurtosis of the weights, times relative weight error",
            paper="Zhang et al. 2025 (arXiv:2503.06518)",
            **_ranking(
                lambda given: score_kurtosis(given.model, given.candidates.units),
                lambda given: given.noise_to_signal,
            ),
        ),
        Estimator(
            name="output_error",
            inputs="forward",
            unit_of_measure="squared activation/token",
            description="Hessian-weighted output error",
            paper="Frantar et al. 2022 (arXiv:2210.17323)",
            function=_exact(_output_error),
        ),
        Estimator(
            name="column_loss",
            inputs="forward",
            unit_of_measure="squared activation/token",
            description="error weighted by the conditional second moments of the columns (BAQ)",
            paper="Zhang et al. 2025 (arXiv:2506.05664)",
            function=_exact(
                lambda given: measure_column_loss(
                    given.model, given.candidates, given.curvatures, quantizer=given.quantizer
                )
            ),
        ),
        Estimator(
            name="inverse_hessian",
            inputs="forward",
            unit_of_measure="activation^3 x noise / signal power",
            description="norm and spread of the weights over the inverse Hessian, times relative weight error",
            paper="You et al. 2024 (arXiv:2406.05981)",
            **_ranking(
                lambda given: score_inverse_hessian(given.model, given.candidates.units, given.curvatures),
                lambda given: given.noise_to_signal,
            ),
        ),
        Estimator(
            name="layer_influence",
            inputs="forward",
            unit_of_measure="(1 - cosine) x noise / signal power",
            description="how far a decoder layer turns its input, times relative weight error",
            paper="Dumitru et al. 2024 (arXiv:2406.17415)",
            **_ranking(
                lambda given: score_layer_influence(given.candidates.units, given.statistics),
                lambda given: given.noise_to_signal,
            ),
        ),
        Estimator(
            name="outlier_ratio",
            inputs="forward",
            unit_of_measure="max / median x noise / signal power",
            description="largest over median token of the inputs, times relative weight error",
            paper="Yang et al. 2024 (arXiv:2405.14428)",
            **_ranking(
                lambda given: score_outlier_ratio(given.candidates.units, given.statistics),
                lambda given: given.noise_to_signal,
            ),
        ),
        Estimator(
            name="mean_variance",
            inputs="forward",
            unit_of_measure="squared activation x squared weight",
            description="variance of the inputs averaged over channels, times weight error",
            paper="NNCF",
            **_ranking(
                lambda given: score_mean_variance(given.candidates.units, given.statistics),
                lambda given: given.weight_error,
            ),
        ),
        Estimator(
            name="max_variance",
            inputs="forward",
            unit_of_measure="squared activation x squared weight",
            description="largest variance of an input channel, times weight error",
            paper="NNCF",
            **_ranking(
                lambda given: score_max_variance(given.candidates.units, given.statistics),
                lambda given: given.weight_error,
            ),
        ),
        Estimator(
            name="affinity_error",
            inputs="forward",
            unit_of_measure="squared activation/token",
            description="output error, each token of an expert weighted by its gate weight (MoEQuant)",
            paper="Chen et al. 2025 (arXiv:2505.03804)",
            function=_exact(_affinity_error),
        ),
        Estimator(
            name="output_fisher",
            inputs="gradients",
            unit_of_measure=NATS,
            description="diagonal Fisher information of the outputs, times squared output error (ModelOpt)",
            paper="NVIDIA ModelOpt AutoQuantize",
            function=_with_gradients(measure_output_fisher),
        ),
        Estimator(
            name="absolute_slope",
            inputs="gradients",
            unit_of_measure="absolute nats/token",
            description="sum of |gradient x error| of every weight (AutoRound)",
            paper="Intel AutoRound AutoScheme",
            function=_with_gradients(measure_absolute_slope),
        ),
        Estimator(
            name="fisher_trace",
            inputs="gradients",
            unit_of_measure=NATS,
            description="mean diagonal of the unit's Fisher information, times weight error (HAWQ, Gauss-Newton)",
            paper="Yao et al. 2021 (arXiv:2011.10680)",
            function=_with_gradients(measure_fisher_trace),
        ),
        Estimator(
            name="hessian_trace",
            inputs="gradients",
            unit_of_measure=NATS,
            description="mean diagonal of the unit's Hessian by Hutchinson's probes, times weight error (HAWQ-V3)",
            paper="Yao et al. 2021 (arXiv:2011.10680)",
            function=_with_gradients(measure_hessian_trace),
        ),
        Estimator(
            name="linearity",
            inputs="measured",
            unit_of_measure=NATS,
            description="relative weight error times a coefficient measured with Gaussian noise on each unit",
            paper="Malinovskii et al. 2024 (arXiv:2411.17525)",
            function=_linearity,
        ),
    )
}
