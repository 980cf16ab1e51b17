"""Level switches: random changes of a choice that keep every limit.

The formats of a unit are ordered by their use of the first resource; one place in this order is a level. A switch goes
either way. Upwards it raises a unit drawn at random by one level and lowers others, drawn at random among those that
help, until every limit is kept: what one unit gains is paid for by others, and bytes left over are spent without a
payment. Downwards it lowers a unit by one level and raises another, drawn at random among those that then fit, if any.
"""

import numpy as np
from numpy.typing import NDArray

from solvers import AllocationProblem, is_feasible

MOST_SWITCHES = 3

Choice = NDArray[np.int64]


class LevelSwitches:
    """Draws choices near another one.

    Args:
        problem: Costs, limits and allowed formats; its losses are not looked at.
    """

    def __init__(self, problem: AllocationProblem) -> None:
        self._problem = problem
        # [U] format indices each, the least use first; formats of equal use are a level each.
        self._levels = [
            np.flatnonzero(allowed)[np.argsort(problem.cost[0, u, allowed], kind="stable")]
            for u, allowed in enumerate(problem.allowed)
        ]

    def mutate(self, parent: Choice, rng: np.random.Generator) -> Choice | None:
        """Returns a choice [U] a few switches away that keeps every limit, or None where this draw led to none.

        Args:
            parent: [U] format indices, within the limits.
            rng: Draws the number of switches, one to three and rather few, and the units.
        """
        choice = parent.copy()
        for _ in range(min(rng.integers(1, MOST_SWITCHES + 1, size=2))):
            switch = self._switch_up if rng.integers(2) else self._switch_down
            if not switch(choice, rng):
                return None
        return None if np.array_equal(choice, parent) else choice

    def _switch_up(self, choice: Choice, rng: np.random.Generator) -> bool:
        """Raises a unit and lowers others, in place; returns whether every limit is kept."""
        raised = self._draw(choice, rng, step=1)
        return raised is not None and self._mend(choice, raised, rng)

    def _switch_down(self, choice: Choice, rng: np.random.Generator) -> bool:
        """Lowers a unit and raises another, in place, where one fits; returns whether every limit is kept."""
        lowered = self._draw(choice, rng, step=-1)
        if lowered is None:
            return False
        for u in rng.permutation(len(choice)):
            own = choice[u]
            if u == lowered or own == self._levels[u][-1]:
                continue
            choice[u] = self._levels[u][self._level(u, choice) + 1]
            if is_feasible(self._problem, choice):
                return True
            choice[u] = own
        # A lower level may use more of another resource than the first.
        return is_feasible(self._problem, choice)

    def _draw(self, choice: Choice, rng: np.random.Generator, *, step: int) -> int | None:
        """Moves a unit by a level, in place, and returns it; None where none can move."""
        end = -1 if step > 0 else 0
        able = [u for u, levels in enumerate(self._levels) if choice[u] != levels[end]]
        if not able:
            return None
        u = int(rng.choice(able))
        choice[u] = self._levels[u][self._level(u, choice) + step]
        return u

    def _mend(self, choice: Choice, raised: int, rng: np.random.Generator) -> bool:
        """Lowers units other than the raised one, in place, until every limit is kept; returns whether it is."""
        while not is_feasible(self._problem, choice):
            use = self._problem.cost[:, np.arange(len(choice)), choice].sum(axis=1)
            over = np.flatnonzero(use > self._problem.target)
            drawn = (int(u) for u in rng.permutation(len(choice)) if u != raised)
            lowered = next(((u, f) for u in drawn if (f := self._find_lower(u, choice, over)) is not None), None)
            if lowered is None:
                return False
            choice[lowered[0]] = lowered[1]
        return True

    def _find_lower(self, u: int, choice: Choice, over: NDArray[np.int64]) -> int | None:
        """Returns the nearest level of a unit below its own that uses less of what there is too much of."""
        below = self._levels[u][: self._level(u, choice)][::-1]
        saved = self._problem.cost[over, u, choice[u]][:, None] - self._problem.cost[over, u][:, below]
        # No use of an exceeded resource may grow, or mending would go round in circles.
        helping = (saved >= 0).all(axis=0) & (saved > 0).any(axis=0)
        return int(below[np.argmax(helping)]) if helping.any() else None

    def _level(self, u: int, choice: Choice) -> int:
        return int(np.flatnonzero(self._levels[u] == choice[u])[0])
