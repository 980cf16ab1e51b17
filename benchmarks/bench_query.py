"""Time of a budget query on a cached profile, inside Python, and of ``bitplan plan --help``. Writes query.md."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_allocation import measured_demo
from machine import describe_machine

import allocator
from allocator.progress import shown_progress
from allocator.store import Store

ROUNDS = 15


def main() -> None:
    store = Store()
    with shown_progress() as progress:
        _, profile = measured_demo(store, progress)
    queries = {
        "memory 70 MiB": allocator.Budget(memory_bytes=70 * 2**20),
        "3.5 bits per weight": allocator.Budget(bits_per_weight=3.5),
        "KL <= 0.05": allocator.Budget(max_kl=0.05),
        "memory 80 MiB, read <= 75 MiB": allocator.Budget(memory_bytes=80 * 2**20, limits={"read_bytes": 75 * 2**20}),
    }
    # A latency limit below what the memory alone would give, so that both bind.
    for mib in (60, 70, 90):
        free = allocator.plan(
            profile, allocator.Budget(memory_bytes=mib * 2**20, limits={"latency_us": 1e9}), verify=False
        )
        for share in (0.98, 0.95, 0.9):
            limits = {"latency_us": share * free.use["latency_us"]}
            queries[f"memory {mib} MiB, latency {share:g} of its plan's"] = allocator.Budget(
                memory_bytes=mib * 2**20, limits=limits
            )
    lines = [
        "# Time of a budget query",
        "",
        f"Made by `python benchmarks/bench_query.py`. Machine: {describe_machine()}.",
        f"Medians of {ROUNDS} (minimum, maximum).",
        "",
        "| query on a cached profile of 211 units × 7 formats, in Python | ms |",
        "|---|---|",
    ]
    for name, budget in queries.items():
        try:
            allocator.plan(profile, budget, verify=False)
        except allocator.InfeasibleBudget:
            lines.append(f"| {name} | infeasible |")
            continue
        times = [_timed(lambda b=budget: allocator.plan(profile, b, verify=False)) for _ in range(ROUNDS)]  # type: ignore[misc]
        lines.append(f"| {name} | {_spread(times)} |")
    frontier = [_timed(lambda: allocator.frontier(profile)) for _ in range(3)]
    lines.append(f"| frontier of 33 points | {_spread(frontier)} |")
    command = [sys.executable, "-m", "allocator.cli", "plan", "--help"]
    helps = [_timed(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(ROUNDS)]
    lines += ["", f"`bitplan plan --help`, whole process: {_spread(helps)} ms."]
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "query.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _timed(call: object) -> float:
    started = time.perf_counter()
    call()  # type: ignore[operator]
    return (time.perf_counter() - started) * 1e3


def _spread(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} ({min(times):.1f}, {max(times):.1f})"


if __name__ == "__main__":
    main()
