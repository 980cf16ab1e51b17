"""What the ways to improve a plan by measurement share: how they are called, their passes counted, their result named.

An improvement takes the best measured assignment and returns a better one, or the same. It measures on calibration
text; whether its result ships is decided on selection text, like any rival's (`allocator.competition`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import Assignment, pick
from allocator.budget import Budget
from runtime.costs import CostTable
from sensitivity.profile import SensitivityProfile
from solvers import SolveResult, Termination

Improve = Callable[[Assignment], Assignment]


@dataclass(kw_only=True)
class PassCount:
    """Passes of one sequence through the model, by which improvements are compared.

    A forward pass counts one, a backward pass two, a pass of the reference beside them one. What is taken from the
    store counts as if it were measured, so that an interrupted improvement counts as one made in one go.

    Args:
        passes: Passes so far.
    """

    passes: int = 0

    def add_scores(self, assignments: int, sequences: int) -> None:
        """Counts the scores of some assignments, and of the reference beside them, on some sequences."""
        self.passes += (assignments + 1) * sequences

    def add_slope(self, sequences: int) -> None:
        """Counts the slope at an assignment: the reference, the assignment forward and backward."""
        self.passes += 4 * sequences


def check_lowers_loss(budget: Budget, what: str) -> None:
    """Checks that a budget has limits under which a loss can be lowered.

    Args:
        budget: The budget.
        what: What lowers it, for the message.

    Raises:
        ValueError: If it is a ceiling on the KL.
    """
    if budget.max_kl is not None:
        msg = (
            f"{what} lowers the loss under limits: got '{budget.describe()}', a ceiling on the loss. Give "
            "the memory that the plan for this ceiling needs, and improve under that."
        )
        raise ValueError(msg)


def make_improved(
    profile: SensitivityProfile,
    tables: Mapping[str, CostTable],
    start: Assignment,
    choice: NDArray[np.int64],
    *,
    how: str,
) -> Assignment:
    """Returns the assignment of an improved choice, with the bound of the additive optimum where the start has one.

    Args:
        profile: The profile.
        tables: Resource -> cost table.
        start: What was improved.
        choice: [U] format indices.
        how: One word for the way, a part of the name.
    """
    detail = "" if start.result is None else f"{start.result.detail}; then {how} by measurement"
    result = bound_by(profile, tables, start, choice, detail=f"{detail}, away from the additive optimum")
    return replace(start, name=f"{start.name}, {how}", kind="plan", choice=choice, result=result)


def bound_by(
    profile: SensitivityProfile,
    tables: Mapping[str, CostTable],
    optimum: Assignment,
    choice: NDArray[np.int64],
    *,
    detail: str,
) -> SolveResult | None:
    """Returns what the proof of an optimum says about another choice under the same limits; None without a proof.

    Args:
        profile: The profile.
        tables: Resource -> cost table.
        optimum: The solver's answer by the metric that is to predict the choice as well.
        choice: [U] format indices within the limits.
        detail: Where the choice comes from.
    """
    if optimum.result is None:
        return None
    return replace(
        optimum.result,
        choice=choice,
        objective=float(pick(profile.table(optimum.metric).loss, choice).sum()),
        use=np.array([pick(tables[name].cost, choice).sum() for name in optimum.result.resources]),
        termination=Termination.FEASIBLE,
        detail=detail,
    )
