"""Ties and further constraints, against enumeration of every choice."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from solvers import (
    AllocationProblem,
    Termination,
    check_result,
    compute_objective,
    is_feasible,
    make_instance,
    solve,
)
from solvers.constraints import (
    Constraint,
    CountLimit,
    GroupBudget,
    MeanWidth,
    add_constraints,
    fix_units,
    solve_constrained,
)
from solvers.problem import IntArray
from solvers.ties import expand_choice, merge_choice, merge_ties, solve_tied
from tests.solvers.cases import (
    HAWQ_CASES,
    HAWQ_TIES,
    HawqCase,
    build_hawq_layers,
    build_problem,
)

PROBLEM = make_instance(n_units=6, n_formats=3, seed=5)
FIRST = np.arange(6) < 4
BITS = np.array([2.0, 5.0, 8.0])
N_WEIGHTS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def has_counts(choice: IntArray) -> bool:
    return int(np.sum(choice[FIRST] == 2)) >= 1 and int(np.sum(choice[FIRST] == 1)) <= 1


def has_group_budget(choice: IntArray) -> bool:
    used = PROBLEM.cost[0, np.arange(6), choice][FIRST].sum()
    return bool(used <= 0.45 * PROBLEM.limit[0])


def has_widths(choice: IntArray) -> bool:
    mean = N_WEIGHTS[FIRST] @ BITS[choice[FIRST]] / N_WEIGHTS[FIRST].sum()
    return bool(4.75 <= mean <= 5.25)


CONSTRAINED = {
    "counts": (
        has_counts,
        (
            CountLimit(name="best", units=FIRST, format_index=2, at_least=1),
            CountLimit(name="middle", units=FIRST, format_index=1, at_most=1),
        ),
    ),
    "group_budget": (
        has_group_budget,
        (GroupBudget(name="first block", units=FIRST, resource="resource0", limit=0.45 * float(PROBLEM.limit[0])),),
    ),
    "widths": (
        has_widths,
        (MeanWidth(name="width", units=FIRST, bits=BITS, n_weights=N_WEIGHTS, at_least=4.75, at_most=5.25),),
    ),
}


def list_feasible(problem: AllocationProblem) -> list[IntArray]:
    choices = (np.array(choice) for choice in itertools.product(range(problem.n_formats), repeat=problem.n_units))
    return [choice for choice in choices if is_feasible(problem, choice)]


@pytest.mark.parametrize("solver", ["auto", "lagrangian", "milp", "exhaustive"])
@pytest.mark.parametrize("kind", CONSTRAINED)
def test_constrained_optimum_is_that_of_enumeration(kind: str, solver: str) -> None:
    holds, constraints = CONSTRAINED[kind]
    kept = [choice for choice in list_feasible(PROBLEM) if holds(choice)]
    assert 0 < len(kept) < len(list_feasible(PROBLEM))
    best = min(compute_objective(PROBLEM, choice) for choice in kept)
    result = solve_constrained(PROBLEM, constraints, solver=solver)
    assert result.choice is not None
    assert holds(result.choice)
    assert result.termination is Termination.OPTIMAL
    assert result.objective == pytest.approx(best, rel=1e-9)
    assert result.objective > solve(PROBLEM).objective
    assert (result.use.shape, result.resources) == ((1,), ("resource0",))
    assert check_result(PROBLEM, result) == []


def test_constraints_hold_with_interactions_too() -> None:
    problem = make_instance(n_units=6, n_formats=3, n_sketch=4, seed=5)
    holds, constraints = CONSTRAINED["counts"]
    result = solve_constrained(problem, constraints)
    assert result.solver == "quadratic"
    assert result.choice is not None
    assert holds(result.choice)
    best = min(compute_objective(problem, choice) for choice in list_feasible(problem) if holds(choice))
    assert result.lower_bound <= best <= result.objective * (1 + 1e-12)


def test_a_constraint_out_of_reach_is_named() -> None:
    constraints = (CountLimit(name="best", units=FIRST, format_index=2, at_least=5),)
    result = solve_constrained(PROBLEM, constraints)
    assert result.termination is Termination.INFEASIBLE
    assert result.resource_at_fault == "best at least"


def test_no_constraints_change_nothing() -> None:
    assert add_constraints(PROBLEM, ()) is PROBLEM
    vacuous = (MeanWidth(name="width", units=FIRST, bits=BITS, n_weights=N_WEIGHTS),)
    assert add_constraints(PROBLEM, vacuous) is PROBLEM


def test_fixed_units_keep_their_format() -> None:
    fixed = fix_units(PROBLEM, {0: 0, 5: 2})
    result = solve(fixed)
    assert result.choice is not None
    assert (result.choice[0], result.choice[5]) == (0, 2)
    kept = [choice for choice in list_feasible(PROBLEM) if choice[0] == 0 and choice[5] == 2]
    assert result.objective == pytest.approx(min(compute_objective(PROBLEM, choice) for choice in kept), rel=1e-9)


@pytest.mark.parametrize("n_sketch", [0, 5])
def test_merged_and_expanded_choices_have_one_objective(n_sketch: int) -> None:
    problem = replace(make_instance(n_units=6, n_formats=3, n_sketch=n_sketch), interaction_scale=0.7)
    ties = ((4, 0, 2), (1, 5))
    tied = merge_ties(problem, ties)
    assert tied.merged_unit.tolist() == [0, 1, 0, 2, 0, 1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        merged = rng.integers(0, 3, 3)
        choice = expand_choice(tied, merged)
        assert merge_choice(tied, choice).tolist() == merged.tolist()
        expected = compute_objective(problem, choice)
        assert compute_objective(tied.problem, merged) == pytest.approx(expected, rel=1e-12)
    agreeing = [c for c in list_feasible(problem) if all(len({c[u] for u in tie}) == 1 for tie in ties)]
    result = solve_tied(problem, ties)
    best = min(compute_objective(problem, choice) for choice in agreeing)
    assert result.objective == pytest.approx(best, rel=1e-9)
    assert check_result(problem, result) == []


@pytest.mark.parametrize("hawq", HAWQ_CASES, ids=lambda case: f"{case.resource}-{case.limit}")
def test_hawq_ties_give_the_published_bits(hawq: HawqCase) -> None:
    result = solve_tied(build_hawq_layers(hawq), HAWQ_TIES)
    assert result.choice is not None
    assert "".join("48"[chosen] for chosen in result.choice) == hawq.bits


def test_ties_without_a_plan_report_the_least_use() -> None:
    problem = build_problem(loss=[[1.0, 0.0]] * 2, cost=[[[1, 2], [1, 2]]], limit=[1.0])
    result = solve_tied(problem, ((0, 1),))
    assert result.termination is Termination.INFEASIBLE
    assert result.least_use.tolist() == [2.0]


def test_bad_ties_and_fixed_units_are_refused() -> None:
    masked = replace(PROBLEM, allowed=PROBLEM.allowed & (np.arange(3) == np.arange(6)[:, None] % 2))
    with pytest.raises(ValueError, match=r"tied units must have a format in common: got none for units \[0, 1\]"):
        merge_ties(masked, ((0, 1),))
    for ties in (((0, 6),), ((0, 1), (1, 2)), ((0, 0),)):
        with pytest.raises(ValueError, match="ties must name each unit from 0 to 5 once at most"):
            merge_ties(PROBLEM, ties)
    for fixed in ({6: 0}, {0: 3}):
        with pytest.raises(ValueError, match="fixed must name an allowed format of a unit"):
            fix_units(PROBLEM, fixed)
    with pytest.raises(ValueError, match="got format=1 in unit=0"):
        fix_units(masked, {0: 1})


BAD_CONSTRAINTS: dict[str, Constraint] = {
    "units must be bool of shape": CountLimit(name="n", units=np.ones(5, dtype=bool), format_index=0),
    "format_index must be from 0 to 2: got format_index=3": CountLimit(name="n", units=FIRST, format_index=3),
    "resource must be one of resource0: got resource='bytes'": GroupBudget(
        name="n", units=FIRST, resource="bytes", limit=1.0
    ),
    r"bits must be \[F\] or \[U, F\]": MeanWidth(name="n", units=FIRST, bits=BITS[:2], n_weights=N_WEIGHTS),
}


@pytest.mark.parametrize("message", BAD_CONSTRAINTS)
def test_bad_constraints_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_constraints(PROBLEM, (BAD_CONSTRAINTS[message],))
