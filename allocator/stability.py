"""When a Fisher sketch is of enough sequences: the plans made of it stop changing for the better.

After a doubling of the sequences, plans for several budgets are made of the sketch before and of that after it, and
compared by the latter:

    regret = mean_s (loss_s(before) - loss_s(after)),      loss_s(c) = 1/2 sum_u sketch[s, u, c_u]^2.

A plan is stable when its regret is within its own standard error over the sequences, or a small share of its loss. The
plan after was made of the same sequences, so the regret is rather too large: more is measured, not less. The budgets
are the bytes of the uniform formats, where plans are compared with them.

Complexity: two solves for each budget, beside minutes of measuring.
"""

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import list_uniform, pick
from runtime.candidates import Candidates
from runtime.costs import memory_cost
from sensitivity.measure_config import FISHER
from sensitivity.sketches.fisher_sketch import fisher_loss, sequence_losses
from solvers import AllocationProblem, solve

BUDGETS = 4
TOLERANCE = 0.01  # of the loss


class PlanStability:
    """Compares plans of a growing sketch.

    Args:
        candidates: Units and formats.
    """

    def __init__(self, candidates: Candidates) -> None:
        self._candidates = candidates
        self._memory = memory_cost(candidates, 0).cost
        allowed = np.where(candidates.allowed, self._memory, np.nan)
        least, most = np.nanmin(allowed, axis=1).sum(), np.nanmax(allowed, axis=1).sum()
        uniform = [float(pick(self._memory, a.choice).sum()) for a in list_uniform(candidates, FISHER)]
        between = sorted({limit for limit in uniform if least < limit < most}) or [float(least)]
        self.limits = [between[i] for i in np.linspace(0, len(between) - 1, min(BUDGETS, len(between))).astype(int)]

    def is_stable(self, earlier: int, sketch: NDArray[np.float32]) -> bool:
        """Returns whether plans of the first ``earlier`` sequences lose as little as those of all.

        Args:
            earlier: Sequences of the step before, at least 2.
            sketch: [S, U, F].
        """
        tables = [fisher_loss(part)[0] for part in (sketch[:earlier], sketch)]
        for limit in self.limits:
            before, after = (sequence_losses(sketch, self._solve(loss, limit)) for loss in tables)
            regret = before - after
            allowance = max(regret.std(ddof=1) / np.sqrt(len(regret)), TOLERANCE * after.mean())
            if regret.mean() > allowance:
                return False
        return True

    def _solve(self, loss: NDArray[np.float64], limit: float) -> NDArray[np.int64]:
        problem = AllocationProblem(
            loss=loss,
            cost=self._memory[None],
            limit=np.array([limit]),
            allowed=self._candidates.allowed,
            resources=("memory_bytes",),
        )
        choice = solve(problem).choice
        assert choice is not None, "a uniform format keeps the limit"
        return choice
