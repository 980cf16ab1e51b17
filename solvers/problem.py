"""What to solve: one format per unit, least summed loss, limits on resources.

    minimise    sum_u loss[u, c_u]  +  interaction_scale * sum_{u<v} <sketch[:, u, c_u], sketch[:, v, c_v]>
    subject to  sum_u cost[r, u, c_u] <= limit[r]     for every resource r
                allowed[u, c_u]                       for every unit u

The second part of the objective is absent without a sketch. The arrays know nothing of language models.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from solvers.extremes import find_least, find_most

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

FEASIBILITY_TOLERANCE = 1e-13
"""Relative rounding allowance of a limit: under one byte for budgets up to ten terabytes."""
SAMPLE_UNITS = 256
FAR_OFF = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class AllocationProblem:
    """Arrays of one allocation problem; checked once, at construction.

    Args:
        loss: predicted loss of every candidate, nats per token, float64 [U, F]. May be negative, and need be
            neither convex nor monotone in the cost.
        cost: use of every resource by every candidate, not negative, float64 [R, U, F].
        limit: the most of every resource that may be used, float64 [R]; `inf` for no limit.
        allowed: candidates that may be chosen, bool [U, F]. Loss, cost and sketch of the others are ignored
            and may be NaN.
        resources: names of the R resources.
        sketch: vectors whose inner products are the pairwise interactions, [S, U, F], scaled so that
            1/2 ||sketch[:, u, f]||^2 is the unit's own loss in nats per token; None for a separable
            objective.
        interaction_scale: factor of the pairwise part, 0 (none) to 1 (as sketched), at least 0.

    Raises:
        ValueError: an array of the wrong type or shape, a value that is not finite where it counts, a unit
            without any allowed format, or resource names that do not fit.
    """

    loss: FloatArray
    cost: FloatArray
    limit: FloatArray
    allowed: BoolArray
    resources: tuple[str, ...]
    sketch: NDArray[np.float32] | FloatArray | None = None
    interaction_scale: float = 1.0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_shapes()
        self._check_values()

    @property
    def n_units(self) -> int:
        """Number of units, U."""
        return int(self.loss.shape[0])

    @property
    def n_formats(self) -> int:
        """Number of formats, F."""
        return int(self.loss.shape[1])

    @property
    def is_separable(self) -> bool:
        """Whether the objective is a plain sum over units."""
        return self.sketch is None or self.interaction_scale == 0.0 or self.sketch.shape[0] == 0

    @cached_property
    def all_allowed(self) -> bool:
        """Whether no candidate is ruled out."""
        return bool(self.allowed.all())

    @cached_property
    def masked_loss(self) -> FloatArray:
        """Loss with `inf` at every candidate that is not allowed, [U, F]."""
        return self.loss if self.all_allowed else np.where(self.allowed, self.loss, np.inf)

    @cached_property
    def masked_cost(self) -> FloatArray:
        """Cost with 0 at every candidate that is not allowed, [R, U, F]; always read beside masked_loss."""
        return self.cost if self.all_allowed else np.where(self.allowed, self.cost, 0.0)

    @cached_property
    def least_use(self) -> FloatArray:
        """Least reachable use of every resource on its own, [R]."""
        cost = self.cost if self.all_allowed else np.where(self.allowed, self.cost, np.inf)
        return np.asarray(find_least(cost).sum(axis=1))

    @cached_property
    def most_use(self) -> FloatArray:
        """Greatest reachable use of every resource on its own, [R]."""
        return np.asarray(find_most(self.masked_cost).sum(axis=1))

    @cached_property
    def ceiling(self) -> FloatArray:
        """Limit plus the rounding allowance, [R]: a use up to here is feasible."""
        return np.asarray(self.limit + FEASIBILITY_TOLERANCE * np.abs(self.limit), dtype=np.float64)

    @cached_property
    def target(self) -> FloatArray:
        """Limit plus half the rounding allowance, [R]: what algorithms aim at, so that sums taken in another
        order still pass the check against `ceiling`."""
        return np.asarray(self.limit + 0.5 * FEASIBILITY_TOLERANCE * np.abs(self.limit), dtype=np.float64)

    @cached_property
    def binding(self) -> tuple[int, ...]:
        """Indices of the resources whose limit matters: some choice exceeds it, and not only such as exceed another
        of them too. The others may be left out."""
        reached = [int(r) for r in np.flatnonzero(self.most_use > self.target)]
        for r in tuple(reached):
            if any(self._implies(s, r) for s in reached if s != r):
                reached.remove(r)
        return tuple(reached)

    def spread_prices(self, price: FloatArray) -> FloatArray:
        """Returns the prices of all resources, [R], from those of `binding`, in its order: the others buy nothing."""
        spread = np.zeros(len(self.resources))
        spread[list(self.binding)] = price
        return spread

    def _implies(self, s: int, r: int) -> bool:
        """Returns whether keeping limit s is seen to keep limit r: cost r is at most a multiple of cost s and a part
        that every choice has."""
        sample = slice(None, None, max(self.n_units // SAMPLE_UNITS, 1))
        cost = np.where(self.allowed[sample], self.cost[:, sample], np.inf)
        steps = np.where(self.allowed[sample], cost - cost.min(axis=2, keepdims=True), 0.0)
        priced = steps[s] > 0
        if not priced.any():
            return False
        multiple = float(np.median(steps[r][priced] / steps[s][priced]))
        # What is far off on a sample is not looked at in whole.
        left = self.target - self.least_use
        most = float(find_most(steps[r] - multiple * steps[s]).sum()) * self.n_units / steps.shape[1]
        if multiple * left[s] + most > left[r] + FAR_OFF * abs(self.target[r]):
            return False
        beyond = np.where(self.allowed, self.masked_cost[r] - multiple * self.masked_cost[s], -np.inf)
        return bool(multiple * self.target[s] + find_most(beyond).sum() <= self.target[r])

    def _check_types(self) -> None:
        expected = {"loss": np.float64, "cost": np.float64, "limit": np.float64, "allowed": np.bool_}
        for name, dtype in expected.items():
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != dtype:
                found = getattr(value, "dtype", type(value).__name__)
                msg = f"{name} must be a {np.dtype(dtype)} array: got {found}. Convert it with np.asarray."
                raise ValueError(msg)
        if self.sketch is not None and self.sketch.dtype not in (np.float32, np.float64):
            msg = f"sketch must be a float32 or float64 array: got {self.sketch.dtype}. Convert it."
            raise ValueError(msg)

    def _check_shapes(self) -> None:
        if self.loss.ndim != 2 or 0 in self.loss.shape:
            msg = f"loss must be [U, F] with at least one unit and one format: got shape {self.loss.shape}."
            raise ValueError(msg)
        names = tuple(self.resources)
        if not names or len(set(names)) != len(names) or any(not isinstance(n, str) or not n for n in names):
            msg = f"resources must be distinct names, at least one: got resources={names!r}."
            raise ValueError(msg)
        n_units, n_formats = self.loss.shape
        expected: dict[str, tuple[int, ...]] = {
            "cost": (len(names), n_units, n_formats),
            "limit": (len(names),),
            "allowed": (n_units, n_formats),
        }
        if self.sketch is not None:
            expected["sketch"] = (self.sketch.shape[0] if self.sketch.ndim else 0, n_units, n_formats)
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                msg = f"{name} must have shape {shape} (from loss and resources): got {found}."
                raise ValueError(msg)

    def _check_values(self) -> None:
        empty = np.flatnonzero(~self.allowed.any(axis=1))
        if empty.size:
            msg = f"every unit must have an allowed format: got {empty.size} without, first unit={empty[0]}."
            raise ValueError(msg)
        tables = {"loss": np.isfinite(self.loss), "cost": (self.cost >= 0) & np.isfinite(self.cost)}
        for name, valid in tables.items():
            bad = np.argwhere(~valid & self.allowed)
            if bad.size:
                place = tuple(int(i) for i in bad[0])
                rule = "finite" if name == "loss" else "finite and at least 0"
                value = getattr(self, name)[place]
                msg = f"{name} must be {rule} for every allowed candidate: got {name}={value} at {place}."
                raise ValueError(msg)
        if np.isnan(self.limit).any():
            msg = f"limit must be a number or inf: got limit={self.limit.tolist()}."
            raise ValueError(msg)
        if not (np.isfinite(self.interaction_scale) and self.interaction_scale >= 0):
            msg = f"interaction_scale must be finite and at least 0: got {self.interaction_scale}."
            raise ValueError(msg)
        if self.sketch is not None and not np.isfinite(self.sketch[:, self.allowed]).all():
            msg = "sketch must be finite for every allowed candidate: got NaN or inf. Mask the candidate."
            raise ValueError(msg)
