"""Local search on the quadratic objective: single moves and pair exchanges, with incremental updates.

With V = sum_u sketch[:, u, c_u] and rho = interaction_scale, moving unit u to format f changes the
objective by

    table[u, f] - table[u, c_u],    table[u, f] = loss[u, f] + rho <V - sketch[:, u, c_u], sketch[:, u, f]>,

and moving two units at once by the sum of their changes plus rho <d_u, d_v>, d being the change of the
sketch. An exchange frees what another move needs, so it finds what single moves within the slack cannot.
Where a validation sketch is given, a move must lower the objective under both sketches.

Complexity: O(S U F) per single move, O(M^2 (R + S)) per exchange over the M most promising moves.
"""

import time
from dataclasses import dataclass

import numpy as np

from solvers.problem import FloatArray, IntArray
from solvers.products import contract, dot, price_candidates

MAX_EXCHANGE_MOVES = 384
RELATIVE_IMPROVEMENT = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class QuadraticTables:
    """The problem as the local search reads it.

    Args:
        loss: inf where not allowed, [U, F].
        cost: cost of the limited resources, 0 where not allowed, [R, U, F].
        limit: finite, [R].
        sketches: the problem's sketch and any validation sketch, 0 where not allowed, [U, F, S] each.
        scale: interaction scale.
    """

    loss: FloatArray
    cost: FloatArray
    limit: FloatArray
    sketches: tuple[FloatArray, ...]
    scale: float


@dataclass(eq=False)
class SearchState:
    """A choice with everything that moves update: sketch sums, uses and objectives (one per sketch)."""

    choice: IntArray
    sums: list[FloatArray]
    use: FloatArray
    objectives: FloatArray


def start_search(tables: QuadraticTables, choice: IntArray) -> SearchState:
    """Returns the state of a choice [U]."""
    rows = np.arange(choice.size)
    own_loss = float(tables.loss[rows, choice].sum())
    sums, objectives = [], []
    for sketch in tables.sketches:
        chosen = sketch[rows, choice]
        total = chosen.sum(axis=0)
        sums.append(total)
        objectives.append(own_loss + 0.5 * tables.scale * float(dot(total, total) - np.sum(chosen * chosen)))
    use = tables.cost[:, rows, choice].sum(axis=1)
    return SearchState(choice=choice.copy(), sums=sums, use=use, objectives=np.array(objectives))


def improve(tables: QuadraticTables, choice: IntArray, price: FloatArray, deadline: float) -> SearchState:
    """Returns a local optimum reached from a feasible choice; never worse under any of the sketches.

    Args:
        price: prices of the limits, [R]: they rank the moves that exchanges are made of.
        deadline: time.perf_counter() value after which to stop.
    """
    state = start_search(tables, choice)
    while time.perf_counter() < deadline:
        changes = [compute_changes(tables, state, i) for i in range(len(tables.sketches))]
        moves = _find_single(tables, state, changes) or _find_exchange(tables, state, changes, price)
        if not moves:
            break
        _apply(tables, state, moves)
    return start_search(tables, state.choice)


def compute_changes(tables: QuadraticTables, state: SearchState, i: int) -> FloatArray:
    """Returns the change of the objective under sketch i by every single move, [U, F]."""
    rows = np.arange(state.choice.size)
    sketch = tables.sketches[i]
    current = sketch[rows, state.choice]
    linear = contract("ufs,s->uf", sketch, state.sums[i]) - contract("ufs,us->uf", sketch, current)
    table = tables.loss + tables.scale * linear
    return np.asarray(table - table[rows, state.choice][:, None])


def _find_single(tables: QuadraticTables, state: SearchState, changes: list[FloatArray]) -> list[tuple[int, int]]:
    """Returns the best single move that keeps the limits, empty when none improves."""
    slack = tables.limit - state.use
    rows = np.arange(state.choice.size)
    change = np.maximum.reduce(changes) if len(changes) > 1 else changes[0]
    for r in range(slack.size):
        step = tables.cost[r] - tables.cost[r, rows, state.choice][:, None]
        change = np.where(step <= max(slack[r], 0.0), change, np.inf)
    unit, chosen = divmod(int(change.argmin()), change.shape[1])
    return [(unit, chosen)] if change[unit, chosen] < -_least_gain(state) else []


def _find_exchange(
    tables: QuadraticTables, state: SearchState, changes: list[FloatArray], price: FloatArray
) -> list[tuple[int, int]]:
    """Returns the best pair of moves in two units that keeps the limits, empty when none improves."""
    rows = np.arange(state.choice.size)
    slack = np.maximum(tables.limit - state.use, 0.0)
    step = tables.cost - tables.cost[:, rows, state.choice][:, :, None]
    priced = changes[0] + price_candidates(price, step)
    priced[rows, state.choice] = np.inf
    candidates = np.flatnonzero(np.isfinite(priced.ravel()))
    if candidates.size > MAX_EXCHANGE_MOVES:
        nearest = np.argpartition(priced.ravel()[candidates], MAX_EXCHANGE_MOVES)[:MAX_EXCHANGE_MOVES]
        candidates = candidates[np.sort(nearest)]
    if candidates.size < 2:
        return []
    unit, chosen = np.divmod(candidates, priced.shape[1])
    total = np.full((candidates.size, candidates.size), -np.inf)
    for i, sketch in enumerate(tables.sketches):
        moved = sketch[unit, chosen] - sketch[unit, state.choice[unit]]
        alone = changes[i][unit, chosen]
        np.maximum(total, alone[:, None] + alone + tables.scale * contract("is,js->ij", moved, moved), out=total)
    total[unit[:, None] == unit] = np.inf
    for r in range(slack.size):
        used = step[r, unit, chosen]
        total[used[:, None] + used > slack[r]] = np.inf
    first, second = divmod(int(total.argmin()), candidates.size)
    if not total[first, second] < -_least_gain(state):
        return []
    return [(int(unit[k]), int(chosen[k])) for k in (first, second)]


def _apply(tables: QuadraticTables, state: SearchState, moves: list[tuple[int, int]]) -> None:
    for unit, chosen in moves:
        before = int(state.choice[unit])
        for i, sketch in enumerate(tables.sketches):
            state.sums[i] += sketch[unit, chosen] - sketch[unit, before]
        state.use += tables.cost[:, unit, chosen] - tables.cost[:, unit, before]
        state.choice[unit] = chosen


def _least_gain(state: SearchState) -> float:
    """Returns the least improvement worth a move: above rounding, so that the search cannot cycle."""
    return RELATIVE_IMPROVEMENT * max(float(np.abs(state.objectives).max()), 1e-300)
