"""What measured plans say about the single changes they are made of.

The local model (`allocator.local_model`) knows each change only so well: its slope comes from a few sequences, and its
curvature is that of the reference. Plans near by that have been measured know sums of changes well. Both together, as a
linear Gaussian model,

    change[u, f] ~ N(slope + factor curvature, std_error^2 + (CURVATURE_ERROR factor curvature)^2),
    measured_c = sum_u (change[u, c_u] - change[u, b_u]) + noise,

for a plan c and the plan b that it was compared with, have a posterior in closed form, of which only a matrix of the
size of the comparisons is inverted. Its mean says what to try next, and draws from it try what is not known yet in
proportion to how likely it is the best, so that a round which found nothing better is followed by one that tries
something else.

Sources: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), section 2.1, the linear model;
Thompson, "On the likelihood that one unknown probability exceeds another" (1933); draws by correction of a draw from
the prior, Wilson et al. 2020 (arXiv:2002.09309), equation 12.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allocator.local_model import FloatArray, IntArray, LocalModel, Observations

CURVATURE_ERROR = 0.5  # relative: the true factor of a single unit differs from the fitted one by as much
CAUTION = 0.5  # standard deviations: an optimizer takes what looks good by chance first
INTERACTION = 0.1  # relative: what plans lose in excess of the sum of their changes


class LocalPosterior:
    """The change of the loss by each change of one unit, given measured plans.

    Args:
        model: The local model.
        observed: Measured plans near its plan.
    """

    def __init__(self, model: LocalModel, observed: Observations) -> None:
        units, formats = model.slope.shape
        self._shape = units, formats
        self._prior: FloatArray = (model.slope + model.factor * model.curvature).ravel()
        error = CURVATURE_ERROR * model.factor * model.curvature
        self._variance: FloatArray = (np.square(model.std_error) + np.square(error)).ravel()
        count = len(observed.choices)
        self._sums = np.zeros((count, units * formats))
        for sign, compared in ((1.0, observed.choices), (-1.0, observed.bases)):
            rows, changed = np.nonzero(compared != model.choice)
            self._sums[rows, changed * formats + compared[rows, changed]] += sign
        self._noise = np.square(observed.std_error) + np.square(INTERACTION * observed.change)
        self._noise += np.finfo(np.float64).eps
        self._change = observed.change
        self._gain = self._sums * self._variance  # [C, U F], prior covariance of sums and single changes
        self._covariance = self._gain @ self._sums.T + np.diag(self._noise)

    @property
    def mean(self) -> FloatArray:
        """Returns [U, F] nats per token, zero at the plan."""
        return self._correct(self._prior, self._change)

    @property
    def cautious(self) -> FloatArray:
        """Returns the mean [U, F] with an allowance for what is not known."""
        return self.mean + CAUTION * self.std

    @property
    def std(self) -> FloatArray:
        """Returns [U, F] standard deviations, zero at the plan."""
        explained = np.einsum("cn,cn->n", self._gain, self._solve(self._gain))
        return np.asarray(np.sqrt(np.maximum(self._variance - explained, 0.0)).reshape(self._shape))

    def draw(self, rng: np.random.Generator) -> FloatArray:
        """Returns a draw [U, F] from the posterior."""
        prior = self._prior + np.sqrt(self._variance) * rng.standard_normal(len(self._prior))
        noise = np.sqrt(self._noise) * rng.standard_normal(len(self._noise))
        return self._correct(prior, self._change + noise)

    def _correct(self, single: FloatArray, change: FloatArray) -> FloatArray:
        corrected = single + self._gain.T @ self._solve(change - self._sums @ single)
        return np.asarray(corrected.reshape(self._shape))

    def _solve(self, right: FloatArray) -> FloatArray:
        return np.asarray(np.linalg.solve(self._covariance, right)) if len(self._noise) else right


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Two plans measured on the same sequences.

    Args:
        choice: [U] format indices.
        base: [U] format indices.
        difference: [S] what the choice loses more than the base on each sequence, nats per token.
    """

    choice: IntArray
    base: IntArray
    difference: FloatArray


def observe(plan: IntArray, comparisons: Sequence[Comparison], within: int) -> Observations:
    """Returns what comparisons say about changes of a plan.

    Args:
        plan: [U] format indices.
        comparisons: Of plans.
        within: Plans with more units changed say nothing of single changes, and are left out.
    """
    near = [c for c in comparisons if max(np.sum(c.choice != plan), np.sum(c.base != plan)) <= within]
    shape = (len(near), len(plan))
    return Observations(
        choices=np.array([c.choice for c in near], dtype=np.int64).reshape(shape),
        bases=np.array([c.base for c in near], dtype=np.int64).reshape(shape),
        change=np.array([c.difference.mean() for c in near]),
        std_error=np.array([c.difference.std(ddof=1) / np.sqrt(len(c.difference)) for c in near]),
    )
