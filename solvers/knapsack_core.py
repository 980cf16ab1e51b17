"""Exact search over the few units whose format the relaxation leaves in doubt.

Around the relaxation's choice at price p, a change of unit u to format f has

    cost_step = cost[u, f] - cost[u, c_u],   loss_step = loss[u, f] - loss[u, c_u],
    reduced cost = loss_step + p * cost_step >= 0.

Only changes whose reduced cost is below the gap can be part of a better choice. Their units are taken up
one by one in order of reduced cost per |cost_step|; a state is (slack left, summed loss_step). A state is
dropped when another has at least its slack and no more loss, or when its bound

    loss - p * slack + b * |slack|

reaches the incumbent, b being the least ratio reduced cost / |cost_step| among the units not yet taken up,
on the side that the slack points to. States over the limit are kept: later changes may win the use back.

Complexity: pseudo-polynomial; in practice a few thousand states over some dozen units. Limits: `node_limit`
states in all, `MAX_STATES` at once; what is dropped beyond them lowers the bound that is returned.
Source: D. Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995); here on
arrays of states rather than lists.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers.convex_hull import ConvexHull, Relaxation
from solvers.problem import FloatArray, IntArray

MAX_STATES = 65_536
STEEP = 1e150


@dataclass(frozen=True, kw_only=True, eq=False)
class Core:
    """Changes that may improve on the relaxation's choice, grouped by unit in the order of the search.

    Args:
        unit: unit of every group, [G].
        start: first change of every group, and the end, [G + 1].
        format: format that every change leads to, [M].
        cost_step: change of use, [M].
        loss_step: change of loss, [M].
        reduced_cost: loss_step + price * cost_step, at least 0, [M].
        ratio_up: least reduced_cost / cost_step among groups from here on that add use, [G + 1].
        ratio_down: the same among those that free use; STEEP where there is none, [G + 1].
        slack: slack of the relaxation's choice.
        price: price of the relaxation.
    """

    unit: IntArray
    start: IntArray
    format: IntArray
    cost_step: FloatArray
    loss_step: FloatArray
    reduced_cost: FloatArray
    ratio_up: FloatArray
    ratio_down: FloatArray
    slack: float
    price: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CoreOutcome:
    """Best set of changes found.

    Args:
        loss_step: summed loss_step of the best changes (or of the incumbent that was given).
        lower_bound: no choice changes the loss by less.
        changes: (unit, format) pairs to apply; None when the given incumbent was not improved.
        limit_hit: "nodes" or "time" when a limit cut the search, else None.
        n_states: states visited.
    """

    loss_step: float
    lower_bound: float
    changes: list[tuple[int, int]] | None
    limit_hit: str | None
    n_states: int


@dataclass(frozen=True, eq=False)
class Stage:
    """How the states after one group arose: the group's unit, and per state its parent and format (-1: as
    it was)."""

    unit: int
    parent: NDArray[np.int32]
    format: NDArray[np.int32]


@dataclass(eq=False)
class Incumbent:
    """Best feasible state so far: its loss, and the changes that lead to it as (stages, state) plus a last
    one."""

    loss: float
    n_stages: int = -1
    state: int = -1
    last: tuple[int, int] | None = None


def build_core(hull: ConvexHull, relaxed: Relaxation, gap: float) -> Core:
    """Returns the core of a relaxation: every change with reduced cost below the gap."""
    rows = np.arange(hull.loss.shape[0])
    cost_step = hull.cost - hull.cost[rows, relaxed.choice][:, None]
    loss_step = hull.loss - hull.loss[rows, relaxed.choice][:, None]
    reduced = loss_step + relaxed.price * cost_step
    useful = (reduced < gap) & ((cost_step < 0) | ((cost_step > 0) & (loss_step < 0)))
    unit, formats = np.nonzero(useful)
    cost_step, loss_step = cost_step[unit, formats], loss_step[unit, formats]
    reduced = np.maximum(reduced[unit, formats], 0.0)
    ratio = reduced / np.abs(cost_step)
    first = np.flatnonzero(np.diff(unit, prepend=-1))
    counts = np.diff(first, append=unit.size)
    group_order = np.argsort(np.minimum.reduceat(ratio, first), kind="stable") if unit.size else first
    up = np.where(cost_step > 0, ratio, relaxed.price)
    down = np.where(cost_step < 0, ratio, STEEP)
    flat = expand_ranges(first[group_order], counts[group_order])
    return Core(
        unit=unit[first][group_order],
        start=np.concatenate([[0], np.cumsum(counts[group_order])]),
        format=formats[flat],
        cost_step=cost_step[flat],
        loss_step=loss_step[flat],
        reduced_cost=reduced[flat],
        ratio_up=_least_from_here(up, first, group_order, relaxed.price),
        ratio_down=_least_from_here(down, first, group_order, STEEP),
        slack=relaxed.slack,
        price=relaxed.price,
    )


def search_core(core: Core, *, incumbent: float, tolerance: float, node_limit: int, deadline: float) -> CoreOutcome:
    """Returns the best set of changes, one per unit at most.

    Args:
        incumbent: summed loss_step of a known feasible set of changes; 0 for none.
        tolerance: stop once incumbent - lower bound is at most this, nats.
        node_limit: the most states to visit.
        deadline: time.perf_counter() value after which to stop.
    """
    slack, loss = np.array([core.slack]), np.zeros(1)
    best = Incumbent(loss=incumbent)
    stages: list[Stage] = []
    dropped, live, n_states, limit_hit = np.inf, -core.price * core.slack, 0, None
    for group in range(core.unit.size):
        if best.loss - min(live, dropped) <= tolerance or not slack.size:
            break
        if n_states > node_limit or time.perf_counter() > deadline:
            limit_hit = "nodes" if n_states > node_limit else "time"
            break
        n_parents = slack.size
        slack, loss, formats = _expand(core, group, slack, loss, best.loss)
        n_states += slack.size
        _improve(best, slack, loss, formats, len(stages), int(core.unit[group]), n_parents)
        kept, bound, lost = _prune(
            slack, loss, core.price, core.ratio_up[group + 1], core.ratio_down[group + 1], best.loss
        )
        dropped = min(dropped, lost)
        live = float(bound.min(initial=np.inf))
        change = formats[kept // n_parents].astype(np.int32)
        stages.append(Stage(int(core.unit[group]), (kept % n_parents).astype(np.int32), change))
        slack, loss = slack[kept], loss[kept]
    return CoreOutcome(
        loss_step=best.loss,
        lower_bound=min(live, dropped, best.loss),
        changes=trace_changes(best, stages),
        limit_hit=limit_hit or ("nodes" if dropped < best.loss - tolerance else None),
        n_states=n_states,
    )


def _expand(
    core: Core, group: int, slack: FloatArray, loss: FloatArray, incumbent: float
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Returns slack and loss of all new states, format by format, and the formats (-1: as it was)."""
    changes = slice(core.start[group], core.start[group + 1])
    keep = core.reduced_cost[changes] < incumbent + core.price * core.slack
    formats = np.concatenate([[-1], core.format[changes][keep]])
    new_slack = slack - np.concatenate([[0.0], core.cost_step[changes][keep]])[:, None]
    new_loss = loss + np.concatenate([[0.0], core.loss_step[changes][keep]])[:, None]
    return new_slack.ravel(), new_loss.ravel(), formats


def _improve(
    best: Incumbent,
    slack: FloatArray,
    loss: FloatArray,
    formats: IntArray,
    n_stages: int,
    unit: int,
    n_parents: int,
) -> None:
    """Replaces the incumbent by the best feasible new state, if that is better."""
    feasible_loss = np.where(slack >= 0, loss, np.inf)
    state = int(feasible_loss.argmin())
    if feasible_loss[state] < best.loss:
        best.loss = float(feasible_loss[state])
        best.n_stages, best.state = n_stages, state % n_parents
        best.last = (unit, int(formats[state // n_parents]))


def _prune(
    slack: FloatArray, loss: FloatArray, price: float, ratio_up: float, ratio_down: float, incumbent: float
) -> tuple[IntArray, FloatArray, float]:
    """Returns the indices of the states worth keeping, by falling slack, their bounds, and the least bound
    dropped for want of room."""
    bound = loss - price * slack + np.maximum(ratio_up * slack, -ratio_down * slack)
    alive = np.flatnonzero(bound < incumbent)
    lost = np.inf
    order = alive[np.argsort(-slack[alive], kind="stable")]
    ordered = loss[order]
    undominated = np.ones(order.size, dtype=bool)
    undominated[1:] = ordered[1:] < np.minimum.accumulate(ordered)[:-1]
    order = order[undominated]
    # Of equal slacks the last has the least loss.
    order = order[np.append(np.diff(slack[order]) != 0, True)] if order.size else order
    if order.size > MAX_STATES:
        by_bound = np.argpartition(bound[order], MAX_STATES)
        lost = float(bound[order][by_bound[MAX_STATES:]].min())
        order = order[np.sort(by_bound[:MAX_STATES])]
    return order, bound[order], lost


def trace_changes(best: Incumbent, stages: list[Stage]) -> list[tuple[int, int]] | None:
    """Returns the (unit, format) changes that lead to the incumbent, None when it is the one given."""
    if best.last is None:
        return None
    changes, state = [best.last], best.state
    for stage in reversed(stages[: best.n_stages]):
        changes.append((stage.unit, int(stage.format[state])))
        state = int(stage.parent[state])
    return [(unit, chosen) for unit, chosen in changes if chosen >= 0]


def expand_ranges(first: IntArray, counts: IntArray) -> IntArray:
    """Returns the concatenation of arange(first[i], first[i] + counts[i])."""
    ends = np.cumsum(counts)
    offset = np.repeat(first - (ends - counts), counts)
    return np.asarray(np.arange(int(counts.sum())) + offset)


def _least_from_here(ratio: FloatArray, first: IntArray, group_order: IntArray, after_last: float) -> FloatArray:
    """Returns, for every position in the search order, the least ratio of the groups from there on, [G +
    1]."""
    if not first.size:
        return np.array([after_last])
    per_group = np.append(np.minimum.reduceat(ratio, first)[group_order], after_last)
    return np.asarray(np.minimum.accumulate(per_group[::-1])[::-1])
