"""The loss of plans near a plan: the slope there, the curvature of single changes, and what measured plans make of it.

For a further change of unit u to format f, around a plan,

    change[u, f] = slope[u, f] + factor * curvature[u, f],

the slope of the measured KL at the plan (`sensitivity.sketches.plan_slope`), which holds the interactions with all
units that the plan has changed, and the curvature of the Fisher sketch at the reference,

    curvature[u, f] = 1/2 mean_s (sketch[s, u, f] - sketch[s, u, plan_u])^2.

Around a plan that loses much, the curvature is another than at the reference, and the units that change together
interact with each other as well. Both are nearly the same factor for all plans near by: on SmolLM2-135M at 3 bits, 1.5
for changes of one unit, 1.9 to 2.2 for 5 to 60 at once. So the factor is fitted to the plans that have been measured,

    factor = sum_c curvature_c (measured_c - slope_c) / sum_c curvature_c^2,

with the sums of slope and curvature over the units that plan c changes. What is left of the measured losses corrects
the single changes (`allocator.local_posterior`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FORGETTING = 0.35  # weight of slopes at a plan against those at the plan after it
FIRST_FACTOR = 2.0
LEAST_FACTOR, LARGEST_FACTOR = 1.0, 4.0
# A sequence whose slopes are larger than so many times the median sequence's counts for no more than that: where the
# quantized model fails on one sequence, its slope says little of the others and outweighs them all.
LARGEST_NORM = 4.0

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalModel:
    """The loss around a plan.

    Args:
        choice: [U] format indices of the plan.
        slope: [U, F] nats per token, zero at the plan.
        std_error: [U, F] of the slope.
        curvature: [U, F] nats per token, zero at the plan.
        factor: Of the curvature.
    """

    choice: IntArray
    slope: FloatArray
    std_error: FloatArray
    curvature: FloatArray
    factor: float = FIRST_FACTOR

    def fit(self, observed: "Observations") -> "LocalModel":
        """Returns the model with the factor that measured plans near by give."""
        slopes, curvatures = observed.sum_over(self.slope), observed.sum_over(self.curvature)
        if not curvatures.any():
            return self
        factor = float(curvatures @ (observed.change - slopes) / (curvatures @ curvatures))
        return replace(self, factor=float(np.clip(factor, LEAST_FACTOR, LARGEST_FACTOR)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Observations:
    """What plans lose more than others that were measured on the same sequences, all of them near one plan.

    Args:
        choices: [C, U] format indices.
        bases: [C, U] format indices of what each is compared with.
        change: [C] what each choice loses more than its base, nats per token.
        std_error: [C] of that.
    """

    choices: IntArray
    bases: IntArray
    change: FloatArray
    std_error: FloatArray

    def sum_over(self, single: FloatArray) -> FloatArray:
        """Returns the sum [C] of single changes [U, F] from each base to its choice."""
        units = np.arange(single.shape[0])
        return np.asarray((single[units, self.choices] - single[units, self.bases]).sum(axis=1))


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredSlope:
    """A measured slope.

    Args:
        values: [S, U, F] nats per token of each sequence, relative to the plan it was taken at.
        age: How many times the plan has changed since.
    """

    values: FloatArray
    age: int = 0


def build_local_model(
    choice: IntArray, slopes: Sequence[MeasuredSlope], sketch: NDArray[np.floating], factor: float
) -> LocalModel:
    """Returns the model around a plan.

    Args:
        choice: [U] format indices of the plan.
        slopes: Slopes at it, and at plans before it.
        sketch: Fisher sketch [S, U, F].
        factor: Of the curvature.
    """
    slope, std_error = combine_slopes(slopes, choice)
    units = np.arange(len(choice))
    wide = sketch.astype(np.float64)
    curvature = 0.5 * np.square(wide - wide[:, units, choice][:, :, None]).mean(axis=0)
    return LocalModel(choice=choice, slope=slope, std_error=std_error, curvature=curvature, factor=factor)


def limit_norms(slope: FloatArray) -> FloatArray:
    """Returns slopes [S, U, F] with no sequence's norm above ``LARGEST_NORM`` times the median one."""
    norms = np.sqrt(np.square(slope).sum(axis=(1, 2)))
    most = LARGEST_NORM * np.median(norms)
    scale = np.divide(most, norms, out=np.ones_like(norms), where=norms > most)
    return np.asarray(slope * scale[:, None, None])


def combine_slopes(slopes: Sequence[MeasuredSlope], choice: IntArray) -> tuple[FloatArray, FloatArray]:
    """Returns the mean slope [U, F] at a choice and its standard error [U, F], older slopes weighing less.

    Args:
        slopes: Each relative to a choice of its own.
        choice: [U] format indices that the result is relative to.
    """
    weights = np.concatenate([np.full(len(slope.values), FORGETTING**slope.age) for slope in slopes])
    weights /= weights.sum()
    values = np.concatenate([slope.values for slope in slopes])
    values -= values[:, np.arange(len(choice)), choice][:, :, None]
    mean = np.einsum("s,suf->uf", weights, values)
    variance = np.einsum("s,suf->uf", weights, np.square(values - mean))
    return mean, np.sqrt(variance * np.square(weights).sum())
