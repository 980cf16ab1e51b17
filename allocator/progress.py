"""Progress on stderr: one bar a stage where a person watches, a line every so often where nobody does."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]

STAGE_NAMES = {
    "weight_error": "weight error",
    "output_error": "Hessian-weighted output error",
    "fisher": "Fisher sketch",
    "single_unit_kl": "single-unit KL",
    "routing": "routing of the experts",
    "prediction_fit": "whole plans, to correct predictions",
    "evolve": "evolving the plan, in passes",
    "verify": "verifying plans on held-out text",
    "evaluate": "evaluating on held-out text",
    "latency": "timing formats on this device",
}
_LINE_EVERY_S = 15.0


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Gives a callback that shows progress on stderr, as bars on a terminal and as occasional lines elsewhere."""
    if not sys.stderr.isatty():
        yield _line_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, int] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = int(bars.add_task(STAGE_NAMES.get(stage, stage), total=total))
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield update


def _line_progress() -> Progress:
    started: dict[str, float] = {}
    shown: dict[str, float] = {}

    def update(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        started.setdefault(stage, now)
        if done == total or now - shown.get(stage, started[stage]) >= _LINE_EVERY_S:
            shown[stage] = now
            name, seconds = STAGE_NAMES.get(stage, stage), now - started[stage]
            print(f"{name}: {done}/{total} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    return update
