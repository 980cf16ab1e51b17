"""Simulated annealing, seeded: random changes of one or two units, worse ones accepted ever more rarely.

From the greedy choice, a change of loss d is accepted with probability min(1, exp(-d / T)) if the limits still hold,
with T falling geometrically. Half of the proposals change two units, because a choice that uses its budget up can
only improve by exchanging.

Complexity: O(R) per step, at most MAX_STEPS. Limits: no bound of its own; needs a feasible greedy choice.
Source: S. Kirkpatrick, C. Gelatt, M. Vecchi, "Optimization by simulated annealing", Science 220 (1983).
"""

import math
import time

import numpy as np

from solvers.baselines.greedy import build_greedy_choice
from solvers.certification import run_certified
from solvers.check import is_feasible
from solvers.dual_bound import answer_with_dual_bound, find_dual_bound
from solvers.knapsack import check_separable
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer, SolveResult

MAX_STEPS = 200_000
STEPS_PER_UNIT = 2000
STEPS_PER_CLOCK = 4096
FIRST_TEMPERATURE = 0.1
LAST_TEMPERATURE = 1e-5
"""Both in units of the mean change of loss by a single move."""


def solve_annealing(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the best choice met by annealing, with the Lagrangian bound; node_limit limits the steps.

    Raises:
        ValueError: the problem has interactions.
    """
    return run_certified(problem, params, solver="annealing", search=search_annealing)


def search_annealing(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the annealing solver."""
    check_separable(problem, "annealing")
    deadline = params.find_deadline()
    dual = find_dual_bound(problem)
    start = build_greedy_choice(problem)
    if start is None:
        return answer_with_dual_bound(problem, None, dual, detail="no feasible choice to start from")
    n_steps = min(params.node_limit, MAX_STEPS, STEPS_PER_UNIT * problem.n_units)
    choice = anneal(problem, start, n_steps=n_steps, seed=params.seed, deadline=deadline)
    # Running sums round; a choice at the very edge of a limit is checked by exact ones.
    if not is_feasible(problem, choice):
        choice = start
    return answer_with_dual_bound(problem, choice, dual, detail=f"annealing from the greedy choice, {n_steps} steps")


def anneal(
    problem: AllocationProblem, start: IntArray, *, n_steps: int, seed: int, deadline: float = math.inf
) -> IntArray:
    """Returns the best choice [U] met from a feasible start.

    Args:
        start: feasible choice, [U].
        n_steps: proposals to make.
        seed: seed of the proposals and their acceptance.
        deadline: time.perf_counter() value after which to stop.
    """
    rng = np.random.default_rng(seed)
    loss, cost = problem.masked_loss, problem.masked_cost.transpose(1, 2, 0)
    slack = problem.target - cost[np.arange(start.size), start].sum(axis=0)
    choice, temperature = start.copy(), _list_temperatures(loss, n_steps)
    units, formats, doubled, thresholds = _draw_proposals(rng, loss.shape, n_steps)
    above_best, since_best = 0.0, list[tuple[int, int]]()
    for step in range(n_steps):
        if step % STEPS_PER_CLOCK == 0 and time.perf_counter() > deadline:
            break
        (u, v), (f, g) = units[step], formats[step]
        change = loss[u, f] - loss[u, choice[u]]
        used = cost[u, f] - cost[u, choice[u]]
        pair = doubled[step] and u != v
        if pair:
            change = change + loss[v, g] - loss[v, choice[v]]
            used = used + cost[v, g] - cost[v, choice[v]]
        # A candidate that is not allowed has infinite loss, so it is never accepted.
        if change > temperature[step] * thresholds[step] or (used > slack).any():
            continue
        slack -= used
        above_best += change
        since_best += [(u, choice[u])] + ([(v, choice[v])] if pair else [])
        choice[u] = f
        if pair:
            choice[v] = g
        if above_best < 0:
            above_best, since_best = 0.0, []
    for unit, before in reversed(since_best):
        choice[unit] = before
    return choice


def _list_temperatures(loss: FloatArray, n_steps: int) -> FloatArray:
    """Returns the temperature of every step, [n_steps], nats."""
    above = loss - loss.min(axis=1, keepdims=True)
    mean = float(above[np.isfinite(above)].mean())
    return mean * np.geomspace(FIRST_TEMPERATURE, LAST_TEMPERATURE, n_steps)


def _draw_proposals(
    rng: np.random.Generator, shape: tuple[int, ...], n_steps: int
) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """Returns units [n, 2], formats [n, 2], whether both change [n], and -log of the acceptance draws [n]."""
    units = rng.integers(0, shape[0], (n_steps, 2))
    formats = rng.integers(0, shape[1], (n_steps, 2))
    return units, formats, rng.integers(0, 2, n_steps), rng.exponential(size=n_steps)
