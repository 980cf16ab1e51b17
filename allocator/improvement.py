"""What the ways to improve a plan by measurement share: how they are called, their passes counted, their result named.

An improvement takes the best measured assignment and returns a better one, or the same. It measures on calibration
text; whether its result ships is decided on selection text, like any rival's (`allocator.competition`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import Assignment, pick
from allocator.budget import Budget
from sensitivity.profile import SensitivityProfile
from solvers import Termination

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


def make_improved(profile: SensitivityProfile, start: Assignment, choice: NDArray[np.int64], *, how: str) -> Assignment:
    """Returns the assignment of an improved choice, with the bound of the additive optimum where the start has one.

    Args:
        profile: The profile.
        start: What was improved.
        choice: [U] format indices.
        how: One word for the way, a part of the name.
    """
    name = f"{start.name}, {how}"
    if start.result is None:
        return replace(start, name=name, kind="plan", choice=choice)
    result = replace(
        start.result,
        choice=choice,
        objective=float(pick(profile.table(start.metric).loss, choice).sum()),
        termination=Termination.FEASIBLE,
        detail=f"{start.result.detail}; then {how} by measurement, away from the additive optimum",
    )
    return replace(start, name=name, choice=choice, result=result)
