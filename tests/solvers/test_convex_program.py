"""Our bounds against those of an independent solver."""

import math
import sys

import numpy as np
import pytest

from solvers import SolverFailure, compute_dual_bound, make_instance, solve
from solvers.convex_program import relax_by_cvxpy
from solvers.dual_bound import find_dual_bound
from solvers.params import SolveParams
from solvers.quadratic import build_tables
from solvers.relaxation import bound_quadratic
from tests.solvers.cases import CASES, Case, build_problem


@pytest.mark.parametrize("n_resources", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_lagrangian_bound_is_the_optimum_of_the_linear_relaxation(n_resources: int, seed: int) -> None:
    problem = make_instance(n_units=60, n_formats=5, n_resources=n_resources, seed=seed)
    relaxed, ours = relax_by_cvxpy(problem), find_dual_bound(problem)
    assert relaxed is not None
    assert ours.bound == pytest.approx(relaxed.objective, rel=1e-6)
    assert relaxed.bound == pytest.approx(relaxed.objective, rel=1e-6)
    assert compute_dual_bound(problem, relaxed.price) == pytest.approx(relaxed.bound, rel=1e-12)
    assert relaxed.bound <= solve(problem).objective
    np.testing.assert_allclose(relaxed.fractions.sum(axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("n_resources", [1, 2])
def test_quadratic_bound_is_the_optimum_of_the_quadratic_relaxation(n_resources: int) -> None:
    problem = make_instance(n_units=40, n_formats=4, n_resources=n_resources, n_sketch=12)
    relaxed = relax_by_cvxpy(problem)
    assert relaxed is not None
    tables = build_tables(problem, SolveParams())
    sketch = tables.sketches[0]
    own = tables.loss - 0.5 * np.sum(sketch * sketch, axis=2)
    ours = bound_quadratic(own, sketch, 1.0, tables.cost, tables.limit, deadline=math.inf)
    # Frank-Wolfe stops at a relative gap of 1e-5, or after its iterations a little above that.
    assert ours.bound <= relaxed.objective * (1 + 1e-6)
    assert ours.bound == pytest.approx(relaxed.objective, rel=1e-4)
    assert relaxed.bound <= relaxed.objective * (1 + 1e-6)
    assert max(relaxed.bound, ours.bound) <= solve(problem).objective


@pytest.mark.parametrize("case", [case for case in CASES if case.optimum is not None], ids=lambda case: case.name)
def test_bound_is_below_the_optimum_of_every_case(case: Case) -> None:
    problem, optimum = case.problem, case.optimum
    relaxed = relax_by_cvxpy(problem)
    assert relaxed is not None
    assert relaxed.bound <= optimum + 1e-9
    assert relaxed.bound == pytest.approx(relaxed.objective, abs=1e-5)


def test_limits_that_cannot_be_kept_together_have_no_relaxation() -> None:
    problem = build_problem(loss=[[1.0, 0.0], [1.0, 0.0]], cost=[[[0, 1], [0, 1]], [[1, 0], [1, 0]]], limit=[0.5, 0.5])
    assert relax_by_cvxpy(problem) is None


def test_a_run_cut_short_is_a_failure() -> None:
    with pytest.raises(SolverFailure, match="Clarabel must end with an optimum: got status="):
        relax_by_cvxpy(make_instance(n_units=20, n_formats=4), max_iterations=1)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is how Python itself marks a module as not importable.
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ImportError, match="the relaxation by CVXPY needs CVXPY: it is not installed"):
        relax_by_cvxpy(CASES[0].problem)
