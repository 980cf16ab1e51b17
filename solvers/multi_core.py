"""Exact search under several limits over the few units whose format the prices leave in doubt.

The search of `knapsack_core` with a vector of slacks: a state is (slack left of every limit [R], summed loss_step),
units are taken up in order of reduced cost per priced size of the change, and a state is dropped when its bound
reaches the incumbent. The bound is the Lagrangian one of the units not yet taken up, at the best of several prices q,

    max over q of  loss - q . slack + sum over the units left of min(0, min_f (loss_step + q . cost_step)),

the relaxation's own and prices around it: where a state's slack is far from what the units left can use up at little
loss, some of them see it. Of states that cannot differ in what they allow, the one of least loss is kept: slack beyond
what the units left can use counts as no more than that.

Complexity: pseudo-polynomial; in practice some thousand states over some dozen units for two or three limits. Limits:
`max_states` in all and `width` at once; what is dropped beyond them lowers the bound that is returned.
Sources: D. Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995), for the core;
H. Weingartner and D. Ness, "Methods for the solution of the multidimensional 0/1 knapsack problem", Operations
Research 15 (1967), for dominance among states.
"""

import time
from dataclasses import dataclass

import numpy as np

from solvers.dual import LEAST_SHARE, surround
from solvers.knapsack_core import CoreOutcome, Incumbent, Stage, expand_ranges, trace_changes
from solvers.problem import BoolArray, FloatArray, IntArray
from solvers.products import contract, price_candidates

PRICE_DISTANCES = (0.1, 0.3)
BLOCK_PRICES = 6
USE_MARGIN = 1e-12
"""Relative: what the units left can use, whatever order it is summed in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MultiCore:
    """Changes that may improve on the prices' choice, grouped by unit in the order of the search.

    Args:
        unit: unit of every group, [G].
        start: first change of every group, and the end, [G + 1].
        format: format that every change leads to, [M].
        cost_step: change of use, [R, M].
        loss_step: change of loss, [M].
        reduced_cost: loss_step + price . cost_step, at least 0, [M].
        slack: slack of the prices' choice, negative where it exceeds a limit, [R].
        price: the relaxation's prices, [R].
        prices: these and others around them, [K, R].
        tails: what the groups from here on may still lower the bound by at every price, at most 0, [K, G + 1].
        most_use: the most that the groups from here on can add to the use, [R, G + 1].
    """

    unit: IntArray
    start: IntArray
    format: IntArray
    cost_step: FloatArray
    loss_step: FloatArray
    reduced_cost: FloatArray
    slack: FloatArray
    price: FloatArray
    prices: FloatArray
    tails: FloatArray
    most_use: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class _States:
    """States: slack [R, N], loss [N], bound [N], and their number among the new ones of their stage, [N]."""

    slack: FloatArray
    loss: FloatArray
    bound: FloatArray
    origin: IntArray

    def take(self, index: IntArray | BoolArray) -> "_States":
        return _States(
            slack=self.slack[:, index], loss=self.loss[index], bound=self.bound[index], origin=self.origin[index]
        )


def measure_changes(
    loss: FloatArray, cost: FloatArray, price: FloatArray, choice: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Returns the reduced cost of every candidate against the choice, and the priced size of the change, [U, F]."""
    rows = np.arange(choice.size)
    priced = loss + price_candidates(price, cost)
    sizes = np.abs(cost - cost[:, rows, choice][:, :, None])
    return priced - priced[rows, choice][:, None], price_candidates(_balance_prices(price, sizes), sizes)


def build_multi_core(
    loss: FloatArray, cost: FloatArray, limit: FloatArray, price: FloatArray, choice: IntArray, useful: BoolArray
) -> MultiCore:
    """Returns the core of a minimiser [U] at some prices [R]: the useful changes [U, F] of its formats."""
    rows = np.arange(choice.size)
    reduced, size = measure_changes(loss, cost, price, choice)
    changes = useful & np.isfinite(loss)
    changes[rows, choice] = False
    unit, formats = np.nonzero(changes)
    ratio = np.maximum(reduced[unit, formats], 0.0) / np.maximum(size[unit, formats], 1e-300)
    first = np.flatnonzero(np.diff(unit, prepend=-1))
    counts = np.diff(first, append=unit.size)
    order = np.argsort(np.minimum.reduceat(ratio, first), kind="stable") if unit.size else first
    flat = expand_ranges(first[order], counts[order])
    unit, formats = unit[flat], formats[flat]
    start = np.concatenate([[0], np.cumsum(counts[order])])
    cost_step = cost[:, unit, formats] - cost[:, unit, choice[unit]]
    loss_step = loss[unit, formats] - loss[unit, choice[unit]]
    prices = _list_prices(price, np.abs(cost_step))
    priced = contract("kr,rm->km", prices, cost_step) + loss_step
    return MultiCore(
        unit=unit[start[:-1]],
        start=start,
        format=formats,
        cost_step=cost_step,
        loss_step=loss_step,
        reduced_cost=np.maximum(reduced[unit, formats], 0.0),
        slack=limit - cost[:, rows, choice].sum(axis=1),
        price=price,
        prices=prices,
        tails=-_sum_from_here(-priced, start),
        most_use=_sum_from_here(cost_step, start) * (1.0 + USE_MARGIN),
    )


def search_multi_core(
    core: MultiCore, *, incumbent: float, tolerance: float, width: int, max_states: int, deadline: float
) -> CoreOutcome:
    """Returns the best set of changes, one per unit at most, and a bound of what any set changes the loss by.

    Args:
        incumbent: summed loss_step of a known feasible set of changes, inf for none.
        tolerance: improvements of up to this are not looked for, nats.
        width: the most states to keep at once.
        max_states: the most states to visit.
        deadline: time.perf_counter() value after which to stop.
    """
    best, changed = Incumbent(loss=incumbent), False
    if np.all(core.slack >= 0) and best.loss > 0.0:
        best.loss, changed = 0.0, True
    states = _States(
        slack=core.slack[:, None], loss=np.zeros(1), bound=np.full(1, -np.inf), origin=np.zeros(1, dtype=np.int64)
    )
    stages: list[Stage] = []
    dropped, n_states, limit_hit = np.inf, 0, None
    for group in range(core.unit.size):
        if n_states > max_states or time.perf_counter() > deadline:
            limit_hit = "nodes" if n_states > max_states else "time"
            dropped = min(dropped, float(states.bound.min()))
            break
        worth = float((states.loss - contract("r,rn->n", core.price, states.slack)).min()) + core.reduced_cost
        changes = np.arange(core.start[group], core.start[group + 1])
        changes = changes[worth[changes] < best.loss - tolerance]
        if not changes.size:
            continue
        n_parents = states.loss.size
        states = _expand(core, changes, states)
        n_states += states.loss.size
        formats = np.concatenate([[-1], core.format[changes]])
        _improve(best, states, formats, len(stages), int(core.unit[group]), n_parents)
        states = _prune(core, group, states, best.loss - tolerance)
        if states.loss.size > width:
            states, lost = _narrow(states, width)
            dropped, limit_hit = min(dropped, lost), "nodes"
        formats = formats[states.origin // n_parents].astype(np.int32)
        stages.append(Stage(int(core.unit[group]), (states.origin % n_parents).astype(np.int32), formats))
        if not states.loss.size:
            break
    found = trace_changes(best, stages)
    return CoreOutcome(
        loss_step=best.loss,
        lower_bound=min(best.loss - tolerance, dropped),
        changes=[] if found is None and changed else found,
        limit_hit=limit_hit if dropped < best.loss - tolerance else None,
        n_states=n_states,
    )


def _balance_prices(price: FloatArray, sizes: FloatArray) -> FloatArray:
    """Returns the prices [R] with those near 0 raised, so that no change has no size."""
    typical = sizes.reshape(sizes.shape[0], -1).mean(axis=1) if sizes.size else np.ones(price.size)
    value = price * typical
    raised = np.maximum(value, LEAST_SHARE * value.max()) if value.any() else np.ones(price.size)
    return raised / np.where(typical > 0, typical, 1.0)


def _list_prices(price: FloatArray, sizes: FloatArray) -> FloatArray:
    """Returns the relaxation's price and others around it, [K, R], the first where no price is above 0."""
    if not sizes.size or not price.any():
        return price[None]
    typical = np.where(sizes.mean(axis=1) > 0, sizes.mean(axis=1), 1.0)
    return surround(price * typical, PRICE_DISTANCES) / typical


def _sum_from_here(steps: FloatArray, start: IntArray) -> FloatArray:
    """Returns the greatest sums, at least 0 a group, of steps [K, M] of the groups from here on, [K, G + 1]."""
    total = np.zeros((steps.shape[0], start.size))
    if steps.shape[1]:
        per_group = np.maximum(np.maximum.reduceat(steps, start[:-1], axis=1), 0.0)
        total[:, :-1] = np.cumsum(per_group[:, ::-1], axis=1)[:, ::-1]
    return total


def _expand(core: MultiCore, changes: IntArray, states: _States) -> _States:
    """Returns all new states, unchanged ones first, then change by change."""
    n_resources = core.slack.size
    slack = states.slack[:, None, :] - core.cost_step[:, changes][:, :, None]
    slack = np.concatenate([states.slack[:, None, :], slack], axis=1).reshape(n_resources, -1)
    loss = np.concatenate([states.loss[None], states.loss + core.loss_step[changes][:, None]]).ravel()
    return _States(slack=slack, loss=loss, bound=np.full(loss.size, -np.inf), origin=np.arange(loss.size))


def _improve(best: Incumbent, states: _States, formats: IntArray, n_stages: int, unit: int, n_parents: int) -> None:
    """Replaces the incumbent by the best feasible new state, if that is better."""
    feasible_loss = np.where((states.slack >= 0).all(axis=0), states.loss, np.inf)
    state = int(feasible_loss.argmin())
    if feasible_loss[state] < best.loss:
        best.loss = float(feasible_loss[state])
        best.n_stages, best.state = n_stages, state % n_parents
        best.last = (unit, int(formats[state // n_parents]))


def _prune(core: MultiCore, group: int, states: _States, cutoff: float) -> _States:
    """Returns the states whose bound is below the cutoff and that no other makes superfluous."""
    for first in range(0, core.prices.shape[0], BLOCK_PRICES):
        prices = core.prices[first : first + BLOCK_PRICES]
        bound = core.tails[first : first + BLOCK_PRICES, group + 1][:, None] - contract(
            "kr,rn->kn", prices, states.slack
        )
        bound = np.maximum(states.bound, bound.max(axis=0) + states.loss)
        alive = np.flatnonzero(bound < cutoff)
        states = _States(
            slack=states.slack[:, alive], loss=states.loss[alive], bound=bound[alive], origin=states.origin[alive]
        )
    return states.take(_find_undominated(states, core.most_use[:, group + 1])) if states.loss.size > 1 else states


def _find_undominated(states: _States, most_use: FloatArray) -> IntArray:
    """Returns the states to keep, by falling slack: those that others are seen to dominate are left out.

    Seen is what the state of least loss with more of the first slack dominates, and what another does with equal
    slacks but the last.
    """
    slack = np.minimum(states.slack, most_use[:, None])
    order = np.lexsort((states.loss, *(-slack[::-1])))
    slack, loss = slack[:, order], states.loss[order]
    n_states = loss.size
    rank = np.empty(n_states, dtype=np.int64)
    rank[np.argsort(loss, kind="stable")] = np.arange(n_states)
    least = np.minimum.accumulate(rank)
    champion = np.flatnonzero(rank == least)[np.cumsum(rank == least) - 1]
    dominated = (champion < np.arange(n_states)) & (slack[:, champion] >= slack).all(axis=0)
    # Segments of equal slacks but the last: lowering the ranks by whole ranges starts the minimum anew in each.
    segment = np.append(0, np.cumsum((slack[:-1, 1:] != slack[:-1, :-1]).any(axis=0)))
    rank -= segment * n_states
    dominated[1:] |= rank[1:] > np.minimum.accumulate(rank)[:-1]
    return np.asarray(order[~dominated])


def _narrow(states: _States, width: int) -> tuple[_States, float]:
    """Returns the states of least bound, and the least bound of the others."""
    by_bound = np.argpartition(states.bound, width)
    return states.take(np.sort(by_bound[:width])), float(states.bound[by_bound[width:]].min())
