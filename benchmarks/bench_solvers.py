"""Our solvers beside scipy's HiGHS and PuLP's CBC on the same instances, in one run; writes a table.

    OMP_NUM_THREADS=1 python benchmarks/bench_solvers.py
    OMP_NUM_THREADS=1 python benchmarks/bench_solvers.py --instances dense --time-limit 5 --sections one_budget

A full run takes about ten minutes: at most two runs to the limit of 120 s for each of HiGHS and CBC at 44,544 units
(one each, if they fail at the larger gap: the smaller one is then not tried), two minutes for writing their programs
down, and one for all of ours. Instances are drawn by seed: log-normal losses that are not
convex in the cost, unequal sizes in bytes. Our times are medians of the repeats, the others' of one run.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import describe_machine
from solver_runs import Measurement, run, run_ours

from solvers import AllocationProblem, SolveParams, compute_objective, make_instance, solve, solve_frontier

INSTANCES = {
    "tiny": {"n_units": 24, "n_formats": 4},
    "dense": {"n_units": 224, "n_formats": 6},
    "experts": {"n_units": 44_544, "n_formats": 6},
    "large": {"n_units": 350_000, "n_formats": 8},
}
SECTIONS = ("one_budget", "three_budgets", "quadratic", "frontier", "growth")
GAPS = (1e-4, 1e-6)
GLANCE_S = 1.0


def format_run(measured: Measurement, gap: float, ours: Measurement) -> str:
    """Returns what a run came to, and how many times as long as ours it took; at least, where it was cut short."""
    note = f"; {measured.note}" if measured.note else ""
    ratio = measured.seconds / ours.seconds
    if measured.reached(gap):
        times = "" if measured is ours else f", {ratio:.3g} times ours"
        return f"{measured.seconds:.4g} s{times}{note}"
    state = "no choice" if measured.gap is None else f"gap {measured.gap:.1e}"
    if not measured.hit_limit:
        return f"not proved: ended by itself after {measured.seconds:.4g} s, {state}{note}"
    times = "" if measured is ours or not ours.reached(gap) else f", so at least {ratio:.3g} times ours"
    return f"not reached: HIT ITS LIMIT after {measured.seconds:.0f} s, {state}{times}{note}"


def format_gap(measured: Measurement) -> str:
    """Returns the gap of a run that was given one second, and the time it took."""
    state = "no choice" if measured.gap is None else f"{measured.gap:.1e}"
    note = f"; {measured.note}" if measured.note else ""
    return f"{state} ({'hit its limit, ' if measured.hit_limit else ''}{measured.seconds:.2g} s{note})"


def run_ours_repeatedly(problem: AllocationProblem, gap: float, options: argparse.Namespace) -> Measurement:
    """Returns our run of median time."""
    runs = [run("ours", problem, gap, options.time_limit, 0.0) for _ in range(options.repeats)]
    return sorted(runs, key=lambda measured: measured.seconds)[len(runs) // 2]


def list_cells(
    backend: str, problem: AllocationProblem, ours: dict[float, Measurement], bound: float, options: argparse.Namespace
) -> list[str]:
    """Returns the cells of one backend: time to every gap, and the gap at one second."""
    if backend == "CBC" and problem.loss.size > options.most_cbc_candidates:
        return [f"not run: over {options.most_cbc_candidates:,} candidates PuLP takes minutes to write them"] * 3
    if backend == "HiGHS" and problem.loss.size > options.most_highs_candidates:
        most = options.most_highs_candidates
        return [f"not run: over {most:,} candidates it has not come back in 30 minutes from a limit of 2"] * 3
    cells, cut_short = [], False
    for gap in GAPS:
        if cut_short:
            # The same run with a smaller gap cannot end earlier.
            cells.append("not run: the larger gap was not reached")
            continue
        measured = ours[gap] if backend == "ours" else run(backend, problem, gap, options.time_limit, bound)
        cut_short = measured.hit_limit
        cells.append(format_run(measured, gap, ours[gap]))
    return [*cells, format_gap(run(backend, problem, 0.0, min(GLANCE_S, options.time_limit), bound))]


def bench_one_budget(options: argparse.Namespace) -> list[str]:
    """Returns the table of all solvers on one budget."""
    lines = ["| instance | solver | to 1e-4 | to 1e-6 | gap at 1 s |", "|---|---|---|---|---|"]
    for name in options.instances:
        problem = make_instance(**INSTANCES[name], seed=options.seed)
        _, bound = run_ours(problem, GAPS[-1], options.time_limit)
        ours = {gap: run_ours_repeatedly(problem, gap, options) for gap in GAPS}
        for backend in options.backends:
            cells = list_cells(backend, problem, ours, bound, options)
            lines.append(f"| {name}, {problem.n_units:,} x {problem.n_formats} | {backend} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def bench_three_budgets(options: argparse.Namespace) -> list[str]:
    """Returns the table of our solver on three budgets, to a gap of 1e-4."""
    lines = ["| instance | seconds | gap |", "|---|---|---|"]
    for name in sorted(set(options.instances) - {"large"}):
        problem = make_instance(**INSTANCES[name], n_resources=3, seed=options.seed)
        measured, _ = run_ours(problem, 1e-4, options.time_limit)
        label = f"{name}, {problem.n_units:,} x {problem.n_formats}"
        lines.append(f"| {label} | {format_run(measured, 1e-4, measured)} | {measured.gap:.1e} |")
        print(lines[-1], flush=True)
    return lines


def bench_quadratic(options: argparse.Namespace) -> list[str]:
    """Returns the table of the quadratic solver: seconds, gap, and its gain over the diagonal optimum."""
    lines = ["| U x F, S | seconds | gap | objective over that of the diagonal optimum |", "|---|---|---|---|"]
    for n_units in options.quadratic_units:
        problem = make_instance(n_units=n_units, n_formats=6, seed=options.seed, n_sketch=128)
        diagonal = solve(replace(problem, sketch=None)).choice
        result = solve(problem, params=SolveParams(time_limit_s=options.time_limit))
        ratio = np.nan if diagonal is None else result.objective / compute_objective(problem, diagonal)
        lines.append(f"| {n_units} x 6, 128 | {result.seconds:.3g} | {result.relative_gap:.1e} | {ratio:.4f} |")
        print(lines[-1], flush=True)
    return lines


def bench_frontier(options: argparse.Namespace) -> list[str]:
    """Returns the table of 100-point frontiers, each point certified."""
    lines = ["| instance | points | seconds | largest gap |", "|---|---|---|---|"]
    for name in sorted(set(options.instances) - {"large"}):
        problem = make_instance(**INSTANCES[name], seed=options.seed)
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
        problem = make_instance(n_units=n_units, n_formats=6, seed=options.seed)
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
    parser.add_argument("--most-highs-candidates", type=int, default=1_000_000, help="the same for HiGHS")
    parser.add_argument("--quadratic-units", type=int, nargs="+", default=[224, 2000])
    parser.add_argument("--most-growth-units", type=int, default=256_000)
    parser.add_argument("--repeats", type=int, default=3, help="runs a median is taken of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("solvers.md"))
    return parser.parse_args()


def main() -> None:
    """Runs the sections asked for and writes the table."""
    options, started = parse_options(), time.perf_counter()
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
    lines += ["", f"The whole run took {(time.perf_counter() - started) / 60:.1f} minutes."]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
