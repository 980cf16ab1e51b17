"""How to solve: limits, tolerances and starts, the same for every solver."""

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.problem import AllocationProblem, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class TrustRegion:
    """Choices that differ from a reference in few units.

    Args:
        reference: format index per unit, int64 [U].
        max_changes: the most units that may differ from the reference, at least 0.
    """

    reference: IntArray
    max_changes: int

    def __post_init__(self) -> None:
        if self.max_changes < 0:
            msg = f"max_changes must be at least 0: got max_changes={self.max_changes}."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveParams:
    """Settings of one solve.

    Args:
        relative_gap_tolerance: a solve stops, and reports OPTIMAL, once (objective - lower bound) is at
            most this times |objective|. The default of 1e-9 is far below any measurement error of a loss
            and saves the exact search its last, longest part; 0 asks for proof to rounding.
        time_limit_s: seconds after which a solver returns what it has; None for no limit.
        node_limit: the most search states (knapsack) or branch-and-bound nodes (milp) to visit. A limit that
            does not depend on the machine: results under it are reproducible.
        seed: seed of every random step.
        starts: choices, int64 [U] each, to improve on; the result is never worse than the best feasible one.
            With a validation sketch they are places to search from, no more: the one that is best by the
            problem's own sketch may be bad by the other.
        trust_region: only choices near a reference; None for all.
        validation_sketch: a second sketch [S2, U, F] drawn independently of the problem's; the quadratic
            solver then accepts only moves that improve the objective under both. None to go by the
            problem's alone.

    Raises:
        ValueError: a value outside its range.
    """

    relative_gap_tolerance: float = 1e-9
    time_limit_s: float | None = 60.0
    node_limit: int = 20_000_000
    seed: int = 0
    starts: tuple[IntArray, ...] = ()
    trust_region: TrustRegion | None = None
    validation_sketch: NDArray[np.float32] | FloatArray | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.relative_gap_tolerance) and self.relative_gap_tolerance >= 0):
            msg = f"relative_gap_tolerance must be finite and at least 0: got {self.relative_gap_tolerance}."
            raise ValueError(msg)
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            msg = f"time_limit_s must be above 0, or None: got time_limit_s={self.time_limit_s}."
            raise ValueError(msg)
        if self.node_limit < 1:
            msg = f"node_limit must be at least 1: got node_limit={self.node_limit}."
            raise ValueError(msg)
        if self.seed < 0:
            msg = f"seed must be at least 0: got seed={self.seed}."
            raise ValueError(msg)

    def find_deadline(self, share: float = 1.0) -> float:
        """Returns the time.perf_counter() value at which a solve that starts now, or a share of it, must end."""
        return math.inf if self.time_limit_s is None else time.perf_counter() + share * self.time_limit_s

    def check_fits(self, problem: AllocationProblem) -> None:
        """Raises ValueError where starts, trust region or validation sketch do not fit the problem."""
        references = [("starts", start) for start in self.starts]
        if self.trust_region is not None:
            references.append(("trust_region.reference", self.trust_region.reference))
        for name, choice in references:
            fits = np.shape(choice) == (problem.n_units,) and np.issubdtype(np.asarray(choice).dtype, np.integer)
            if not fits or np.any((choice < 0) | (choice >= problem.n_formats)):
                msg = (
                    f"{name} must hold one format index per unit, {problem.n_units} integers from 0 to "
                    f"{problem.n_formats - 1}: got shape {np.shape(choice)}, dtype {np.asarray(choice).dtype}."
                )
                raise ValueError(msg)
        if self.validation_sketch is None:
            return
        if problem.sketch is None:
            msg = "validation_sketch needs a problem with a sketch: got problem.sketch=None. Leave it out."
            raise ValueError(msg)
        shape = self.validation_sketch.shape
        if len(shape) != 3 or shape[1:] != problem.loss.shape:
            expected = ("S2", *problem.loss.shape)
            msg = f"validation_sketch must have shape {expected}: got {shape}."
            raise ValueError(msg)
