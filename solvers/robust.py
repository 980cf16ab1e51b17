"""Regret: how much a plan loses because the losses that it was made from are estimates.

The losses are drawn anew, loss + std_error * N(0, 1) for every candidate by itself (parametric bootstrap); for every
draw d the problem is solved again, and

    regret[p, d] = objective_d(plan p) - optimum_d.

The optimum of a draw is known to lie between its bound and the best choice found, so the regret comes as a pair.

Complexity: one solve per draw. Limits: errors of different candidates are taken as independent and normal; those of
a shared calibration text are not. Interactions, where there are any, stay as they are.
Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
"""

from dataclasses import dataclass, replace

import numpy as np

from solvers.check import compute_objective, is_feasible
from solvers.dispatch import solve
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Regret:
    """Regret of every plan under every draw, nats per token.

    Args:
        least: against the best choice found for the draw (the plans are among those tried), at least 0, [P, D].
        most: against the lower bound of the draw, [P, D].
    """

    least: FloatArray
    most: FloatArray

    @property
    def mean(self) -> FloatArray:
        """Mean of the greater regret over the draws, [P]."""
        return np.asarray(self.most.mean(axis=1))

    def quantile(self, level: float) -> FloatArray:
        """Returns a quantile of the greater regret over the draws, [P].

        Args:
            level: 0..1; 1 for the worst draw.
        """
        return np.asarray(np.quantile(self.most, level, axis=1))


def measure_regret(
    problem: AllocationProblem,
    std_error: FloatArray,
    plans: tuple[IntArray, ...],
    *,
    n_draws: int = 100,
    seed: int = 0,
    solver: str = "auto",
    params: SolveParams | None = None,
) -> Regret:
    """Returns the regret of plans under bootstrap draws of the losses.

    Args:
        problem: the problem that the plans were made for.
        std_error: standard error of every loss, at least 0, nats per token, [U, F]; ignored where not allowed.
        plans: feasible choices, int64 [U] each, at least one.
        n_draws: number of draws, at least 1.
        seed: seed of the draws.
        solver: as `solve`, for every draw.
        params: as `solve`, for every draw.

    Raises:
        ValueError: standard errors or plans that do not fit the problem, or no plan or draw.
    """
    _check(problem, std_error, plans, n_draws)
    params = params or SolveParams()
    params = replace(params, starts=(*params.starts, *plans))
    rng = np.random.default_rng(seed)
    spread = np.where(problem.allowed, std_error, 0.0)
    least, most = np.empty((len(plans), n_draws)), np.empty((len(plans), n_draws))
    for d in range(n_draws):
        drawn = replace(problem, loss=problem.loss + spread * rng.standard_normal(spread.shape))
        best = solve(drawn, solver=solver, params=params)
        objectives = np.array([compute_objective(drawn, plan) for plan in plans])
        least[:, d] = np.maximum(objectives - best.objective, 0.0)
        most[:, d] = np.maximum(objectives - best.lower_bound, 0.0)
    return Regret(least=least, most=most)


def _check(problem: AllocationProblem, std_error: FloatArray, plans: tuple[IntArray, ...], n_draws: int) -> None:
    if std_error.shape != problem.loss.shape:
        msg = f"std_error must have shape {problem.loss.shape}: got {std_error.shape}."
        raise ValueError(msg)
    valid = std_error[problem.allowed]
    if not (np.isfinite(valid).all() and np.all(valid >= 0)):
        msg = f"std_error must be finite and at least 0 for every allowed candidate: got {valid.min()}..{valid.max()}."
        raise ValueError(msg)
    if not plans or n_draws < 1:
        msg = f"plans and n_draws must be at least 1: got {len(plans)} plans, n_draws={n_draws}."
        raise ValueError(msg)
    SolveParams(starts=plans).check_fits(problem)
    for p, plan in enumerate(plans):
        if not is_feasible(problem, plan):
            msg = f"plans must keep every limit and mask: got an infeasible one at index {p}."
            raise ValueError(msg)
