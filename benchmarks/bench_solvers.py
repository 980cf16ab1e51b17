"""Our solvers beside scipy's HiGHS and PuLP's CBC on the same instances, in one run; writes a table.

    OMP_NUM_THREADS=1 python benchmarks/bench_solvers.py                       all, limit 120 s: up to half an hour
    OMP_NUM_THREADS=1 python benchmarks/bench_solvers.py --instances dense --time-limit 5 --sections one_budget

Instances are drawn by seed: log-normal losses that are not convex in the cost, unequal sizes in bytes. Every choice
is recomputed (`solvers.check`); gaps are (objective - bound) / objective. Times include handing the program to the
backend, its limit does not. CBC's bound is not handed out by PuLP, so
an unfinished run of it is rated against our bound.
"""

import argparse
import os
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from machine import describe_machine

from solvers import (
    AllocationProblem,
    SolveParams,
    SolverFailure,
    check_result,
    compute_objective,
    is_feasible,
    solve,
    solve_frontier,
)

INSTANCES = {"tiny": (24, 4), "dense": (224, 6), "experts": (44_544, 6), "large": (350_000, 8)}
SECTIONS = ("one_budget", "three_budgets", "quadratic", "frontier", "growth")
GAPS = (1e-4, 1e-6)
GLANCE_S = 1.0
OBJECTIVE_SCALE = 1e6
"""HiGHS and CBC have absolute tolerances; objectives are scaled to this size for them."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Seconds of one run, its relative gap (None: no choice), whether the solver itself proved it, and a note."""

    seconds: float
    gap: float | None
    proven: bool = True
    note: str = ""


def make_instance(
    n_units: int, n_formats: int, *, n_resources: int = 1, seed: int, n_sketch: int = 0
) -> AllocationProblem:
    """Returns an instance shaped like a model's, at half of the range of every resource."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, n_formats)
    weights = rng.integers(2**18, 2**24, n_units)[:, None]
    factor = rng.uniform(0.5, 1.5, (n_resources, n_units, 1)) * rng.uniform(
        0.95, 1.1, (n_resources, n_units, n_formats)
    )
    cost = np.floor(weights * bits / 8 * factor)
    loss = 0.1 * rng.lognormal(0, 1.5, (n_units, 1)) * 4.0**-bits * rng.lognormal(0, 0.5, (n_units, n_formats))
    sketch = None
    if n_sketch:
        # A direction common to all units makes the errors add up, as they do in models.
        direction = 0.3 * rng.normal(size=(n_sketch, 1, 1)) + rng.normal(size=(n_sketch, n_units, 1))
        direction = direction + 0.5 * rng.normal(size=(n_sketch, n_units, n_formats))
        sketch = direction / np.linalg.norm(direction, axis=0) * np.sqrt(2 * loss)
    return AllocationProblem(
        loss=loss,
        cost=cost,
        limit=np.floor(0.5 * (cost.min(axis=2) + cost.max(axis=2)).sum(axis=1)),
        allowed=np.ones(loss.shape, dtype=bool),
        resources=tuple(f"resource{r}" for r in range(n_resources)),
        sketch=sketch,
    )


def run_ours(problem: AllocationProblem, gap: float, time_limit_s: float) -> tuple[Measurement, float]:
    """Returns the measurement of `solve`, and the bound it proved."""
    started = time.perf_counter()
    result = solve(problem, params=SolveParams(relative_gap_tolerance=gap, time_limit_s=time_limit_s))
    seconds = time.perf_counter() - started
    violations = check_result(problem, result, relative_gap_tolerance=gap)
    if violations:
        msg = f"result must hold: got {'; '.join(violations)}."
        raise SolverFailure(msg)
    return Measurement(seconds=seconds, gap=result.relative_gap), result.lower_bound


def run_highs(problem: AllocationProblem, gap: float, time_limit_s: float, lower_bound: float) -> Measurement:
    """Returns the measurement of scipy.optimize.milp on the plain binary program; its own bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n_units, n_formats = problem.loss.shape
    scale = OBJECTIVE_SCALE / lower_bound
    started = time.perf_counter()
    unit = np.repeat(np.arange(n_units), n_formats)
    one_each = csr_array((np.ones(unit.size), (unit, np.arange(unit.size))))
    row_scale = 1e4 / problem.limit
    limits = problem.cost.reshape(problem.limit.size, -1) * row_scale[:, None]
    found = milp(
        problem.loss.ravel() * scale,
        integrality=np.ones(unit.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(limits, -np.inf, problem.limit * row_scale)],
        options={"mip_rel_gap": gap, "time_limit": time_limit_s},
    )
    seconds = time.perf_counter() - started
    if found.x is None:
        return Measurement(seconds=seconds, gap=None)
    choice = found.x.reshape(problem.loss.shape).argmax(axis=1)
    objective = compute_objective(problem, choice)
    bound = -np.inf if found.mip_dual_bound is None else found.mip_dual_bound / scale
    note = "" if is_feasible(problem, choice) else "limit exceeded within its tolerance"
    return Measurement(seconds=seconds, gap=max(objective - bound, 0.0) / objective, note=note)


def run_cbc(problem: AllocationProblem, gap: float, time_limit_s: float, lower_bound: float) -> Measurement:
    """Returns the measurement of CBC through PuLP on the plain binary program; rated against our bound."""
    import pulp

    n_units, n_formats = problem.loss.shape
    scale = OBJECTIVE_SCALE / lower_bound
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        variables = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(n_units * n_formats)]
        program = pulp.LpProblem("allocation", pulp.LpMinimize)
        losses = (problem.loss.ravel() * scale).tolist()
        program += pulp.LpAffineExpression(list(zip(variables, losses, strict=True)))
        for u in range(n_units):
            program += pulp.lpSum(variables[u * n_formats : (u + 1) * n_formats]) == 1
        for cost, limit in zip(problem.cost, problem.limit, strict=True):
            terms = (cost.ravel() * (1e4 / limit)).tolist()
            program += pulp.LpAffineExpression(list(zip(variables, terms, strict=True))) <= 1e4
        program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=gap, timeLimit=time_limit_s))
    seconds = time.perf_counter() - started
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Measurement(seconds=seconds, gap=None)
    values = np.array([variable.value() or 0.0 for variable in variables])
    choice = values.reshape(problem.loss.shape).argmax(axis=1)
    objective = compute_objective(problem, choice)
    proven = program.sol_status == pulp.LpSolutionOptimal
    note = "limit exceeded within its tolerance"
    if is_feasible(problem, choice):
        note = "" if proven else "against our bound"
    return Measurement(seconds=seconds, gap=max(objective - lower_bound, 0.0) / objective, proven=proven, note=note)


def run(backend: str, problem: AllocationProblem, gap: float, time_limit_s: float, bound: float) -> Measurement:
    """Returns the measurement of a backend by name."""
    if backend == "ours":
        return run_ours(problem, gap, time_limit_s)[0]
    return {"HiGHS": run_highs, "CBC": run_cbc}[backend](problem, gap, time_limit_s, bound)


def format_time(measurement: Measurement, gap: float) -> str:
    """Returns the seconds where the gap was proved, else the gap that was reached."""
    if measurement.gap is None:
        return f"none in {measurement.seconds:.1f} s"
    note = f" ({measurement.note})" if measurement.note else ""
    if measurement.proven and measurement.gap <= gap * (1 + 1e-6):
        return f"{measurement.seconds:.4g} s{note}"
    return f"{measurement.gap:.1e} after {measurement.seconds:.0f} s{note}"


def format_gap(measurement: Measurement) -> str:
    """Returns the gap of a run that was given one second, and the time it took."""
    if measurement.gap is None:
        return f"none in {measurement.seconds:.1f} s"
    note = f", {measurement.note}" if measurement.note else ""
    return f"{measurement.gap:.1e} ({measurement.seconds:.2g} s{note})"


def bench_one_budget(options: argparse.Namespace) -> list[str]:
    """Returns the table of all solvers on one budget."""
    lines = ["| instance | solver | to 1e-4 | to 1e-6 | gap at 1 s |", "|---|---|---|---|---|"]
    for name in options.instances:
        problem = make_instance(*INSTANCES[name], seed=options.seed)
        _, bound = run_ours(problem, GAPS[-1], options.time_limit)
        for backend in options.backends:
            label = f"| {name}, {problem.n_units:,} x {problem.n_formats} | {backend} "
            if backend == "CBC" and problem.loss.size > options.most_cbc_candidates:
                lines.append(f"{label}| not run | not run | not run |")
                continue
            runs = [(gap, options.time_limit) for gap in GAPS]
            cells = [format_time(run(backend, problem, *limits, bound), limits[0]) for limits in runs]
            cells.append(format_gap(run(backend, problem, 0.0, GLANCE_S, bound)))
            lines.append(f"{label}| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def bench_three_budgets(options: argparse.Namespace) -> list[str]:
    """Returns the table of our solver on three budgets, to a gap of 1e-4."""
    lines = ["| instance | seconds | gap |", "|---|---|---|"]
    for name in options.instances:
        problem = make_instance(*INSTANCES[name], n_resources=3, seed=options.seed)
        measured, _ = run_ours(problem, 1e-4, options.time_limit)
        label = f"{name}, {problem.n_units:,} x {problem.n_formats}"
        lines.append(f"| {label} | {measured.seconds:.3g} | {measured.gap:.1e} |")
        print(lines[-1], flush=True)
    return lines


def bench_quadratic(options: argparse.Namespace) -> list[str]:
    """Returns the table of the quadratic solver: seconds, gap, and its gain over the diagonal optimum."""
    lines = ["| U x F, S | seconds | gap | objective over that of the diagonal optimum |", "|---|---|---|---|"]
    for n_units in options.quadratic_units:
        problem = make_instance(n_units, 6, seed=options.seed, n_sketch=128)
        diagonal = solve(replace(problem, sketch=None)).choice
        result = solve(problem, params=SolveParams(time_limit_s=options.time_limit))
        ratio = np.nan if diagonal is None else result.objective / compute_objective(problem, diagonal)
        lines.append(f"| {n_units} x 6, 128 | {result.seconds:.3g} | {result.relative_gap:.1e} | {ratio:.4f} |")
        print(lines[-1], flush=True)
    return lines


def bench_frontier(options: argparse.Namespace) -> list[str]:
    """Returns the table of 100-point frontiers, each point certified."""
    lines = ["| instance | points | seconds | largest gap |", "|---|---|---|---|"]
    for name in options.instances:
        problem = make_instance(*INSTANCES[name], seed=options.seed)
        started = time.perf_counter()
        results = solve_frontier(problem, n_points=100, params=SolveParams(relative_gap_tolerance=1e-6))
        seconds = time.perf_counter() - started
        worst = max(result.relative_gap for result in results)
        lines.append(f"| {name}, {problem.n_units:,} x {problem.n_formats} | 100 | {seconds:.3g} | {worst:.1e} |")
        print(lines[-1], flush=True)
    return lines


def bench_growth(options: argparse.Namespace) -> list[str]:
    """Returns the time to 1e-6 for doubling numbers of units, median of the repeats."""
    lines = ["| U x 6 | seconds to 1e-6 | microseconds / (U log2 U) |", "|---|---|---|"]
    n_units = 1000
    while n_units <= options.most_growth_units:
        problem = make_instance(n_units, 6, seed=options.seed)
        runs = [run_ours(problem, 1e-6, options.time_limit)[0].seconds for _ in range(options.repeats)]
        seconds = statistics.median(runs)
        lines.append(f"| {n_units:,} | {seconds:.4g} | {1e6 * seconds / (n_units * np.log2(n_units)):.3g} |")
        print(lines[-1], flush=True)
        n_units *= 4
    return lines


def describe_run(options: argparse.Namespace) -> list[str]:
    """Returns what the numbers depend on: the machine, versions, threads and flags."""
    return [
        f"Machine: {describe_machine(('numpy', 'scipy', 'pulp'))} (HiGHS is scipy's, CBC is PuLP's).",
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, time limit {options.time_limit:g} s a run, "
        f"seed {options.seed}, load at the start {os.getloadavg()[0]:.1f}.",
    ]


def parse_options() -> argparse.Namespace:
    """Returns the command line's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", nargs="+", choices=list(INSTANCES), default=["dense", "experts", "large"])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--backends", nargs="+", choices=["ours", "HiGHS", "CBC"], default=["ours", "HiGHS", "CBC"])
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds a run")
    parser.add_argument("--most-cbc-candidates", type=int, default=300_000, help="larger programs are not given to CBC")
    parser.add_argument("--quadratic-units", type=int, nargs="+", default=[224, 2000])
    parser.add_argument("--most-growth-units", type=int, default=256_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs a median is taken of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("solvers.md"))
    return parser.parse_args()


def main() -> None:
    """Runs the sections asked for and writes the table."""
    options = parse_options()
    benches = {
        "one_budget": ("One budget: time to a proven relative gap", bench_one_budget),
        "three_budgets": ("Three budgets, to a gap of 1e-4", bench_three_budgets),
        "quadratic": ("With interactions", bench_quadratic),
        "frontier": ("Frontier", bench_frontier),
        "growth": ("Growth of the time with the number of units", bench_growth),
    }
    lines = ["# Solvers", "", "Written by `benchmarks/bench_solvers.py`.", "", *describe_run(options)]
    for name in options.sections:
        title, bench = benches[name]
        lines += ["", f"## {title}", "", *bench(options)]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
