"""Solves every case and some larger problems with every solver and prints what came out, exactly, as JSON.

Run by `test_threads` in processes of their own: the number of threads is read when numpy is loaded.
"""

import json
import sys

from solvers import SOLVERS, AllocationProblem, SolveParams, make_instance, solve, solve_frontier
from tests.solvers.cases import CASES, takes

# The clock decides nothing here.
PARAMS = SolveParams(time_limit_s=None, relative_gap_tolerance=1e-4, seed=5)
# Large enough for BLAS to split products among threads.
LARGER: dict[str, AllocationProblem] = {
    "one limit": make_instance(n_units=300, n_formats=6),
    "three limits": make_instance(n_units=200, n_formats=6, n_resources=3),
    "interactions": make_instance(n_units=224, n_formats=6, n_sketch=128),
    "interactions, two limits": make_instance(n_units=40, n_formats=4, n_resources=2, n_sketch=16),
}


def list_results() -> dict[str, list[object]]:
    """Returns choice, objective and bound of every solver and problem; floats in hexadecimal."""
    problems = {**{case.name: case.problem for case in CASES}, **LARGER}
    results = {
        f"{solver}, {name}": solve(problem, solver=solver, params=PARAMS)
        for name, problem in problems.items()
        for solver in SOLVERS
        if takes(solver, problem) and not (solver == "exhaustive" and name in LARGER)
    }
    for i, result in enumerate(solve_frontier(LARGER["one limit"], n_points=5, params=PARAMS)):
        results[f"frontier, point {i}"] = result
    return {
        name: [
            None if result.choice is None else result.choice.tolist(),
            result.objective.hex(),
            result.lower_bound.hex(),
            result.termination.value,
        ]
        for name, result in results.items()
    }


if __name__ == "__main__":
    json.dump(list_results(), sys.stdout)
