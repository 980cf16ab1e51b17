"""The texts of all errors about problems, params and calls of solvers."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from solvers import (
    AllocationProblem,
    SolveParams,
    TrustRegion,
    compute_dual_bound,
    make_instance,
    solve,
    solve_frontier,
    solve_least_cost,
)
from tests.solvers.cases import build_problem

ONE = build_problem(loss=[[1.0, 0.0], [2.0, 0.0]], cost=[[[1, 2], [1, 2]]], limit=[3.0])
TWO = make_instance(n_units=12, n_formats=4, n_resources=2)

BAD_PROBLEMS = {
    "loss must be a float64 array": {"loss": np.zeros((2, 2), dtype=np.float32)},
    "limit must be a float64 array: got list": {"limit": [1.0]},
    "sketch must be a float32 or float64": {"sketch": np.zeros((1, 2, 2), dtype=np.int64)},
    r"loss must be \[U, F\]": {"loss": np.zeros(2)},
    "resources must be distinct names": {"resources": ()},
    r"cost must have shape \(1, 2, 2\)": {"cost": np.zeros((2, 2, 2))},
    r"sketch must have shape \(3, 2, 2\)": {"sketch": np.zeros((3, 2, 1))},
    "every unit must have an allowed format": {"allowed": np.array([[True, True], [False, False]])},
    r"loss must be finite .* at \(0, 1\)": {"loss": np.array([[0.0, np.nan], [0.0, 0.0]])},
    r"cost must be finite and at least 0 .* cost=-1.0 at \(0, 0, 1\)": {"cost": np.array([[[0.0, -1.0], [0.0, 0.0]]])},
    "limit must be a number or inf": {"limit": np.array([np.nan])},
    "interaction_scale must be finite and at least 0": {"interaction_scale": -1.0},
    "sketch must be finite": {"sketch": np.full((1, 2, 2), np.nan)},
}


@pytest.mark.parametrize("message", BAD_PROBLEMS)
def test_problem_refuses(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ONE, **BAD_PROBLEMS[message])  # type: ignore[arg-type]


BAD_PARAMS = {
    "relative_gap_tolerance must be": {"relative_gap_tolerance": -1.0},
    "time_limit_s must be": {"time_limit_s": 0.0},
    "node_limit must be": {"node_limit": 0},
    "seed must be": {"seed": -1},
}


@pytest.mark.parametrize("message", BAD_PARAMS)
def test_params_refuse(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolveParams(**BAD_PARAMS[message])  # type: ignore[arg-type]


def test_trust_region_refuses_negative_changes() -> None:
    with pytest.raises(ValueError, match="max_changes must be at least 0"):
        TrustRegion(reference=np.zeros(2, dtype=np.int64), max_changes=-1)


SKETCHED = make_instance(n_units=3, n_formats=2, n_sketch=2)
UNFIT_PARAMS: dict[str, tuple[AllocationProblem, SolveParams]] = {
    "starts must hold one format index per unit": (ONE, SolveParams(starts=(np.array([0, 2]),))),
    "trust_region.reference must hold": (
        ONE,
        SolveParams(trust_region=TrustRegion(reference=np.zeros(3, dtype=np.int64), max_changes=1)),
    ),
    "validation_sketch needs a problem with a sketch": (
        ONE,
        SolveParams(validation_sketch=np.zeros((1, 2, 2))),
    ),
    "validation_sketch must have shape": (SKETCHED, SolveParams(validation_sketch=np.zeros((1, 2, 2)))),
}


@pytest.mark.parametrize("message", UNFIT_PARAMS)
def test_params_must_fit_the_problem(message: str) -> None:
    problem, params = UNFIT_PARAMS[message]
    with pytest.raises(ValueError, match=message):
        solve(problem, params=params)


def test_trust_region_refuses_a_resource_of_its_name() -> None:
    problem = replace(ONE, resources=("changed_units",))
    params = SolveParams(trust_region=TrustRegion(reference=np.zeros(2, dtype=np.int64), max_changes=1))
    with pytest.raises(ValueError, match="no resource may be named 'changed_units'"):
        solve(problem, params=params)


def test_solve_refuses_unknown_and_unsuitable_solvers() -> None:
    with pytest.raises(ValueError, match="solver must be auto or one of knapsack, .* got solver='simplex'"):
        solve(ONE, solver="simplex")
    with pytest.raises(ValueError, match="knapsack must be given at most one limit .* resource0, resource1"):
        solve(TWO, solver="knapsack")
    with pytest.raises(ValueError, match="at most 2000000 choices"):
        solve(make_instance(n_units=30, n_formats=4), solver="exhaustive")
    with pytest.raises(ValueError, match="validation_sketch works with solver quadratic alone"):
        solve(SKETCHED, solver="exhaustive", params=SolveParams(validation_sketch=np.zeros((1, 3, 2))))


@pytest.mark.parametrize(
    ("solver", "package", "title"),
    [("cbc", "pulp", "PuLP"), ("pulp_highs", "pulp", "PuLP"), ("pulp_highs", "highspy", "highspy")],
)
def test_pulp_says_what_to_install(monkeypatch: pytest.MonkeyPatch, solver: str, package: str, title: str) -> None:
    # None in sys.modules is how Python itself marks a module as not importable.
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"solver '{solver}' needs {title}: it is not installed"):
        solve(ONE, solver=solver)


def test_dual_bound_and_least_cost_refuse_interactions() -> None:
    with pytest.raises(ValueError, match="sketch_sum must be given for a problem with interactions: got None"):
        compute_dual_bound(SKETCHED, np.zeros(1))
    with pytest.raises(ValueError, match="least cost must be given a problem without interactions"):
        solve_least_cost(SKETCHED, resource="resource0", max_loss=1.0)


def test_least_cost_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="resource must be one of resource0: got resource='bytes'"):
        solve_least_cost(ONE, resource="bytes", max_loss=1.0)
    with pytest.raises(ValueError, match="no resource may be named 'loss'"):
        solve_least_cost(replace(ONE, resources=("loss",)), resource="loss", max_loss=1.0)
    with pytest.raises(ValueError, match="max_loss must be a number"):
        solve_least_cost(ONE, resource="resource0", max_loss=float("nan"))


def test_frontier_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="resource must be one of resource0, resource1: got resource=None"):
        solve_frontier(TWO, n_points=3)
    with pytest.raises(ValueError, match="exactly one of limits and n_points"):
        solve_frontier(ONE)
    with pytest.raises(ValueError, match="n_points must be at least 2"):
        solve_frontier(ONE, n_points=1)
