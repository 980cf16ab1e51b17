"""The convex relaxation by CVXPY and Clarabel: an independent check of our own bounds.

    minimise  sum a[u, f] x[u, f] + rho/2 || sum_u,f sketch[:, u, f] x[u, f] ||^2
    subject to  sum_f x[u, f] = 1,   sum cost[r, u, f] x[u, f] <= limit[r],   x >= 0

with a = loss - rho/2 ||sketch||^2 (loss alone without interactions: then it is a linear program, and its optimum is
the best Lagrangian bound). The values of an interior-point method hold to its tolerance only; the bound that is
reported is recomputed from its prices and its W = sum sketch x, and holds exactly.

Complexity: that of an interior-point method; a second for a thousand candidates with interactions. Limits: slow
beyond some ten thousand candidates, where `dual` and `relaxation` are the way.
Source: S. Diamond and S. Boyd, "CVXPY", JMLR 17 (2016); P. Goulart and Y. Chen, "Clarabel", arXiv 2405.12762.
"""

import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.dual import evaluate_dual
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.products import dot
from solvers.result import SolverFailure


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvexOptimum:
    """Optimum of the relaxation.

    Args:
        fractions: fraction of every candidate, [U, F].
        objective: value of the relaxation, to the tolerance of the method.
        bound: recomputed lower bound of the problem's objective.
        price: prices of the limits, at least 0, [R].
    """

    fractions: FloatArray
    objective: float
    bound: float
    price: FloatArray


def relax_by_cvxpy(problem: AllocationProblem, *, max_iterations: int = 200) -> ConvexOptimum | None:
    """Returns the optimum of the convex relaxation, None where it proves that no choice keeps every limit.

    Args:
        problem: with or without interactions.
        max_iterations: the most iterations of the interior-point method.

    Raises:
        ImportError: CVXPY is not installed.
        SolverFailure: Clarabel ends without an optimum and without a proof that there is none.
    """
    cvxpy = _import_cvxpy()
    unit, formats = np.nonzero(problem.allowed)
    own, vectors = _build_objective(problem)
    least = own.min(axis=1)
    linear = own[unit, formats] - least[unit]
    # The linear part is 0 where the sketch is all of the loss.
    size = max(float(linear.max()), 0.5 * float(np.sum(vectors * vectors, axis=1).max(initial=0.0)), 1e-300)
    fraction = cvxpy.Variable(unit.size, nonneg=True)
    objective = (linear / size) @ fraction
    if vectors.shape[1]:
        objective = objective + 0.5 * cvxpy.sum_squares((vectors[unit, :, formats].T / np.sqrt(size)) @ fraction)
    limits, scale, binding = _build_limits(problem, fraction)
    program = cvxpy.Problem(cvxpy.Minimize(objective), [_sum_by_unit(unit.astype(np.int64)) @ fraction == 1, *limits])
    if not _solve(cvxpy, program, max_iterations):
        return None
    fractions = np.zeros(own.shape)
    fractions[unit, formats] = fraction.value
    price = np.zeros(problem.limit.size)
    price[binding] = [max(float(limit.dual_value), 0.0) for limit in limits]
    price[binding] *= size * scale
    return ConvexOptimum(
        fractions=fractions,
        objective=float(program.value) * size + float(least.sum()),
        bound=_bound(problem, own, vectors, fractions, price),
        price=price,
    )


def _build_objective(problem: AllocationProblem) -> tuple[FloatArray, FloatArray]:
    """Returns the linear part [U, F] (inf where not allowed) and the scaled sketches [U, S, F]."""
    if problem.is_separable or problem.sketch is None:
        return problem.masked_loss, np.zeros((problem.n_units, 0, problem.n_formats))
    masked = np.where(problem.allowed, problem.sketch, 0.0).astype(np.float64)
    vectors = np.sqrt(problem.interaction_scale) * masked.transpose(1, 0, 2)
    return problem.masked_loss - 0.5 * np.sum(vectors * vectors, axis=1), vectors


def _build_limits(problem: AllocationProblem, fraction: Any) -> tuple[list[Any], FloatArray, list[int]]:
    """Returns one constraint per binding limit, the factors [R'] that they were scaled by, and their indices."""
    binding = list(problem.binding)
    rows = problem.masked_cost[binding][:, problem.allowed]
    limit = problem.target[binding]
    scale = 1.0 / np.maximum(np.maximum(np.abs(limit), rows.max(axis=1, initial=0.0)), 1e-300)
    limits = [(rows[i] * scale[i]) @ fraction <= limit[i] * scale[i] for i in range(len(binding))]
    return limits, scale, binding


def _solve(cvxpy: Any, program: Any, max_iterations: int) -> bool:
    """Solves the program, in place; False when it is proved infeasible."""
    with warnings.catch_warnings():
        # CVXPY warns of what the status says as well.
        warnings.simplefilter("ignore", UserWarning)
        try:
            program.solve(solver=cvxpy.CLARABEL, max_iter=max_iterations)
            status = program.status
        except cvxpy.error.SolverError:
            status = "solver_error"
    if status in (cvxpy.INFEASIBLE, cvxpy.INFEASIBLE_INACCURATE):
        return False
    if status not in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
        msg = f"Clarabel must end with an optimum: got status={status}, max_iterations={max_iterations}. Allow more."
        raise SolverFailure(msg)
    return True


def _sum_by_unit(unit: IntArray) -> Any:
    """Returns the matrix that sums the candidates of every unit."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(unit.size), (unit, np.arange(unit.size))))


def _bound(
    problem: AllocationProblem, own: FloatArray, vectors: FloatArray, fractions: FloatArray, price: FloatArray
) -> float:
    """Returns the lower bound at the relaxation's prices and W; holds whatever they are."""
    binding = list(problem.binding)
    total = np.einsum("usf,uf->s", vectors, fractions)
    linear = own + np.einsum("usf,s->uf", vectors, total)
    value, _, _ = evaluate_dual(linear, problem.masked_cost[binding], problem.ceiling[binding], price[binding])
    return value - 0.5 * dot(total, total)


def _import_cvxpy() -> Any:
    try:
        return importlib.import_module("cvxpy")
    except ImportError as error:
        msg = "the relaxation by CVXPY needs CVXPY: it is not installed. Run pip install cvxpy."
        raise ImportError(msg) from error
