"""CLADO's matrix through the quadratic solver: a known quadratic is recovered against brute force."""

import itertools

import numpy as np
import pytest

from solvers import check_result, compute_objective, is_feasible, solve
from solvers.pairwise import build_pairwise_matrix, project_pairwise
from solvers.problem import FloatArray, IntArray
from tests.solvers.cases import build_problem

N_UNITS, N_FORMATS = 6, 3


def evaluate(matrix: FloatArray, choice: IntArray) -> float:
    """Returns 1/2 x' G x of the one-hot x of a choice."""
    x = np.zeros(matrix.shape[0])
    x[np.arange(N_UNITS) * N_FORMATS + choice] = 1.0
    return float(0.5 * x @ matrix @ x)


def measure_quadratic(seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Returns weight errors [UF, n], the single losses [U, F] and pair losses [UF, UF] of 1/2 d' H d."""
    rng = np.random.default_rng(seed)
    n_parameters = 40
    root = rng.normal(size=(n_parameters, n_parameters)) / 6
    hessian = root @ root.T
    errors = np.zeros((N_UNITS, N_FORMATS, n_parameters))
    for u in range(N_UNITS):
        own = slice(6 * u, 6 * u + 6)
        # Every unit has parameters of its own; the error halves with every format.
        errors[u, :, own] = rng.normal(size=(N_FORMATS, 6)) * 2.0 ** -np.arange(N_FORMATS)[:, None]
    flat = errors.reshape(-1, n_parameters)
    alone = 0.5 * np.einsum("ip,pq,iq->i", flat, hessian, flat)
    pair = alone[:, None] + alone + flat @ hessian @ flat.T
    return flat @ hessian @ flat.T, alone.reshape(N_UNITS, N_FORMATS), pair


def list_choices() -> list[IntArray]:
    return [np.array(choice) for choice in itertools.product(range(N_FORMATS), repeat=N_UNITS)]


@pytest.mark.parametrize("seed", range(3))
def test_known_quadratic_is_recovered(seed: int) -> None:
    exact, single, pair = measure_quadratic(seed)
    # The matrix in full is positive semidefinite, within a unit too.
    pairwise = project_pairwise(exact, n_formats=N_FORMATS)
    assert pairwise.relative_distortion <= 1e-12
    np.testing.assert_allclose(pairwise.loss, single, rtol=1e-9)
    cost = np.tile([2.0, 4.0, 8.0], (N_UNITS, 1))
    problem = build_problem(loss=pairwise.loss, cost=[cost], limit=[26.0], sketch=pairwise.sketch)
    feasible = [choice for choice in list_choices() if is_feasible(problem, choice)]
    measured = build_pairwise_matrix(single, pair)
    for choice in feasible[::37]:
        assert compute_objective(problem, choice) == pytest.approx(evaluate(measured, choice), rel=1e-9)
    best = min(evaluate(measured, choice) for choice in feasible)
    result = solve(problem)
    assert result.solver == "quadratic"
    assert result.objective == pytest.approx(best, rel=1e-9)
    assert check_result(problem, result) == []


def test_projection_is_the_nearest_and_its_distortion_is_reported() -> None:
    _, single, pair = measure_quadratic(0)
    noisy = pair + 0.05 * np.random.default_rng(1).normal(size=pair.shape)
    matrix = build_pairwise_matrix(single, 0.5 * (noisy + noisy.T))
    pairwise = project_pairwise(matrix, n_formats=N_FORMATS)
    factor = pairwise.sketch.reshape(pairwise.sketch.shape[0], -1)
    projected = factor.T @ factor
    values = np.linalg.eigvalsh(matrix)
    assert values[0] < 0
    assert pairwise.least_eigenvalue == pytest.approx(values[0], rel=1e-9)
    change = np.linalg.norm(matrix - projected)
    assert pairwise.relative_distortion == pytest.approx(change / np.linalg.norm(matrix), rel=1e-9)
    assert change == pytest.approx(np.linalg.norm(np.minimum(values, 0)), rel=1e-9)
    np.testing.assert_allclose(pairwise.loss.ravel(), np.diag(projected) / 2, rtol=1e-9)
    assert pairwise.most_loss_change == pytest.approx(np.abs(pairwise.loss - single).max(), rel=1e-9)
    kept = project_pairwise(matrix, n_formats=N_FORMATS, keep_losses=True)
    np.testing.assert_allclose(kept.loss, single, rtol=1e-12)


def test_solver_finds_the_optimum_of_the_projected_matrix() -> None:
    _, single, pair = measure_quadratic(4)
    pairwise = project_pairwise(build_pairwise_matrix(single, pair), n_formats=N_FORMATS)
    factor = pairwise.sketch.reshape(pairwise.sketch.shape[0], -1)
    cost = np.tile([2.0, 4.0, 8.0], (N_UNITS, 1))
    problem = build_problem(loss=pairwise.loss, cost=[cost], limit=[26.0], sketch=pairwise.sketch)
    best = min(evaluate(factor.T @ factor, choice) for choice in list_choices() if is_feasible(problem, choice))
    assert solve(problem).objective == pytest.approx(best, rel=1e-9)


def test_candidates_that_are_not_allowed_are_never_read() -> None:
    exact, _, _ = measure_quadratic(0)
    allowed = np.ones((N_UNITS, N_FORMATS), dtype=bool)
    allowed[2, 1] = False
    exact[2 * N_FORMATS + 1] = np.nan
    pairwise = project_pairwise(exact, n_formats=N_FORMATS, allowed=allowed)
    assert np.isfinite(pairwise.sketch).all()
    assert not pairwise.sketch[:, 2, 1].any()


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pair must have shape \(4, 4\)"):
        build_pairwise_matrix(np.zeros((2, 2)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"matrix must be \[UF, UF\] with n_formats=3: got shape \(4, 4\)"):
        project_pairwise(np.eye(4), n_formats=3)
    with pytest.raises(ValueError, match="matrix must be finite and symmetric: got entries that differ by 1.0"):
        project_pairwise(np.array([[1.0, 1.0], [0.0, 1.0]]), n_formats=1)
    with pytest.raises(ValueError, match="matrix must be finite and symmetric: got entries that differ by nan"):
        project_pairwise(np.full((2, 2), np.nan), n_formats=1)
