"""What came back: a choice, the proof of how good it is, and why the solver stopped."""

import enum
import math
from dataclasses import dataclass

from solvers.problem import FloatArray, IntArray


class Termination(enum.Enum):
    """Why a solve ended."""

    OPTIMAL = "optimal"
    """A feasible choice whose gap to the lower bound is within the tolerance asked for."""
    FEASIBLE = "feasible"
    """A feasible choice; the gap is larger than asked for. `limit_hit` says which limit stopped the
    search."""
    INFEASIBLE = "infeasible"
    """Proved: no choice keeps every limit."""
    NO_SOLUTION_FOUND = "no_solution_found"
    """A limit was hit before any feasible choice was found, and none was proved impossible."""


class SolverFailure(RuntimeError):
    """A solver's answer did not survive recomputation: a defect of the solver, never of the problem."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SolveResult:
    """Outcome of one solve. No field has a default, so none can claim success unasked.

    Args:
        choice: format index per unit, int64 [U]; None when no feasible choice is known.
        objective: recomputed objective of the choice, nats per token (units of the minimised resource for
            `solve_least_cost`); inf without a choice.
        lower_bound: no feasible choice has an objective below this; -inf when nothing is known.
        use: recomputed use of every resource, [R], in the order of `resources`; NaN without a choice.
        shadow_price: decrease of the optimal objective per added unit of every limit, at least 0, [R], from
            the Lagrangian dual; NaN when unknown.
        resources: names of the R resources.
        termination: why the solve ended.
        limit_hit: "time", "nodes" or "iterations" when a limit ended the search, else None.
        solver: name of the solver that produced this.
        seconds: wall time.
        detail: why this solver, and what it did, in one or two sentences.
        least_use: least reachable use of every resource on its own, [R].
        resource_at_fault: when infeasible, the resource whose limit cannot be kept (given the others).
        sketch_sum: with interactions, the W at which the shadow prices prove a bound (`check.compute_dual_bound`),
            [S]; else None.
    """

    choice: IntArray | None
    objective: float
    lower_bound: float
    use: FloatArray
    shadow_price: FloatArray
    resources: tuple[str, ...]
    termination: Termination
    limit_hit: str | None
    solver: str
    seconds: float
    detail: str
    least_use: FloatArray
    resource_at_fault: str | None
    sketch_sum: FloatArray | None

    @property
    def gap(self) -> float:
        """Objective minus lower bound; inf when either is unknown."""
        if self.choice is None or math.isinf(self.lower_bound):
            return math.inf
        return max(self.objective - self.lower_bound, 0.0)

    @property
    def relative_gap(self) -> float:
        """Gap over |objective|; 0 for a gap of 0, inf when unknown."""
        if self.gap == 0.0 or math.isinf(self.gap):
            return self.gap
        return self.gap / abs(self.objective) if self.objective else math.inf


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What an algorithm claims, before anything is recomputed.

    Args:
        choice: format index per unit, [U], or None.
        lower_bound: claimed lower bound of the objective.
        shadow_price: [R], or None when the algorithm has no dual.
        limit_hit: as in SolveResult.
        detail: what was done.
        resource_at_fault: set when the algorithm proved that no choice keeps every limit.
        sketch_sum: as in SolveResult.
    """

    choice: IntArray | None
    lower_bound: float
    shadow_price: FloatArray | None
    limit_hit: str | None
    detail: str
    resource_at_fault: str | None = None
    sketch_sum: FloatArray | None = None
