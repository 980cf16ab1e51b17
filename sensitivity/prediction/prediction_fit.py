"""Fitted correction of predictions: what whole plans lose, against the sum of what their units lose alone.

The losses of single units add up only to second order and without cross terms; errors of many units partly cancel at
small losses and compound at large ones. Both show as a power law between the sum and the measured KL of whole plans,

    KL = factor * (sum of losses)^exponent,

fitted by least squares in the logarithm to plans that are drawn from the profile itself, half of them optimised and
half of them random. The error of the fit is that of leaving each plan out in turn, in closed form: e_i / (1 - h_i).

Complexity: as many evaluations as plans; the fit itself is nothing. Limits: plans far smaller or larger than those
fitted to are extrapolated; the law is one curve for all plans, so it orders no two plans otherwise than the sums do.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Mean stored bits per weight that the drawn plans reach for, where the formats allow it.
LEAST_BITS, MOST_BITS = 3.2, 6.2
LEAST_PLANS = 4
_RANDOM_SPREAD = 1.5  # of the logarithm of the losses that a random plan takes for true
_PRICES = (1e-18, 1e6)  # nats per token and byte
_HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class PredictionFit:
    """KL = factor * predicted^exponent, and how well it held.

    Args:
        factor: Nats per token at a predicted loss of 1.
        exponent: 1 where losses add up.
        log_error: Standard deviation of log(measured / corrected) of plans left out of the fit.
        plans: Number of plans it was fitted to.
    """

    factor: float
    exponent: float
    log_error: float
    plans: int

    @property
    def error_factor(self) -> float:
        """exp(log_error): two of three plans measure within this factor of their corrected prediction."""
        return float(np.exp(self.log_error))

    def correct(self, predicted: float) -> float:
        """Returns the KL to expect, nats per token, where the sum of losses is ``predicted``."""
        return float(self.factor * max(predicted, 0.0) ** self.exponent)

    def invert(self, kl: float) -> float:
        """Returns the sum of losses whose corrected prediction is ``kl``, nats per token."""
        return float((max(kl, 0.0) / self.factor) ** (1.0 / self.exponent))


def fit_predictions(predicted: FloatArray, measured: FloatArray) -> PredictionFit:
    """Returns the power law through measured plans.

    Args:
        predicted: [P] sums of losses, positive, not all equal.
        measured: [P] KL of these plans, positive, nats per token.

    Raises:
        ValueError: If there are fewer than 4 plans, or one has no positive loss, or measured falls as predicted rises.
    """
    if len(predicted) < LEAST_PLANS or predicted.min() <= 0 or measured.min() <= 0 or np.ptp(predicted) == 0:
        msg = (
            f"a fit needs at least {LEAST_PLANS} plans with positive losses that differ: got {len(predicted)} "
            f"plans, least predicted {predicted.min(initial=np.inf):g}, least measured "
            f"{measured.min(initial=np.inf):g}. Draw more plans from lossy formats."
        )
        raise ValueError(msg)
    x, y = np.log(predicted), np.log(measured)
    design = np.stack([np.ones_like(x), x], axis=1)
    (intercept, exponent), *_ = np.linalg.lstsq(design, y, rcond=None)
    if exponent <= 0:
        msg = (
            f"measured KL must rise with the prediction: got exponent {exponent:g} over {len(x)} plans. Measure on "
            "more tokens."
        )
        raise ValueError(msg)
    leverage = np.einsum("pi,ij,pj->p", design, np.linalg.inv(design.T @ design), design)
    left_out = (y - design @ np.array([intercept, exponent])) / np.maximum(1.0 - leverage, 1e-9)
    return PredictionFit(
        factor=float(np.exp(intercept)),
        exponent=float(exponent),
        log_error=float(np.sqrt(np.mean(left_out**2))),
        plans=len(x),
    )


def draw_choices(
    loss: FloatArray,
    stored_bytes: FloatArray,
    allowed: NDArray[np.bool_],
    weights: FloatArray,
    *,
    count: int,
    seed: int,
) -> NDArray[np.int64]:
    """Returns plans [count, U] spread over sizes: each unit's format is the least of loss + price * bytes.

    Every second plan takes the losses times log-normal noise, so it is a random mix around the same size.

    Args:
        loss: [U, F] nats per token.
        stored_bytes: [U, F]; not a number, or any, where a pair is not allowed.
        allowed: [U, F] bool.
        weights: [U] number of weights.
        count: Plans to draw.
        seed: Seed of the noise.
    """
    rng = np.random.default_rng(seed)
    targets = np.linspace(LEAST_BITS, MOST_BITS, count)
    # A price is not a number where a pair is not allowed, and would be taken for the least.
    priced = np.where(allowed, stored_bytes, np.inf)
    choices = []
    for i, bits in enumerate(targets):
        noise = rng.lognormal(sigma=_RANDOM_SPREAD, size=loss.shape)
        believed = np.where(allowed, np.maximum(loss, 0.0) * (noise if i % 2 else 1.0), np.inf)
        choices.append(_choose_near(believed, priced, target=bits * weights.sum() / 8.0))
    return np.array(choices, dtype=np.int64)


def _choose_near(loss: FloatArray, stored_bytes: FloatArray, *, target: float) -> NDArray[np.int64]:
    """Returns the choice at the least price whose bytes are at most the target, or at the greatest price."""
    units = np.arange(len(loss))
    low, high = np.log(_PRICES)
    choice = (loss + np.exp(high) * stored_bytes).argmin(axis=1)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        tried = (loss + np.exp(middle) * stored_bytes).argmin(axis=1)
        if stored_bytes[units, tried].sum() <= target:
            high, choice = middle, tried
        else:
            low = middle
    return np.asarray(choice, dtype=np.int64)
