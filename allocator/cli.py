"""The command ``bitplan``: parse, call the verb, print. Data on stdout, logs and progress on stderr.

Exit codes: 0 done, 1 failure, 2 usage, 3 infeasible budget. Heavy imports wait until a command runs, so that help
is immediate.
"""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from allocator.budget import InfeasibleBudget, parse_bytes
from allocator.cli_engines import ENGINE_COMMANDS
from allocator.cli_further import FURTHER_COMMANDS
from allocator.cli_generation import GENERATION_COMMANDS
from allocator.cli_options import (
    budget_options,
    cache_options,
    frontier_options,
    json_option,
    low_memory_option,
    make_budget,
    make_request,
    measure_options,
    parse,
    plan_option,
    printed,
    with_progress,
)
from allocator.cli_output import (
    blockwise_text,
    describe_profile,
    plan_text,
    profile_text,
    render,
    table,
)
from allocator.cli_remote import LocalOrRemote
from allocator.cli_reports import REPORT_COMMANDS
from allocator.cli_service import SERVICE_COMMANDS

if TYPE_CHECKING:
    from allocator.artefacts import Model
    from sensitivity.profile import SensitivityProfile

FAILURE, USAGE, INFEASIBLE = 1, 2, 3


@click.group(cls=LocalOrRemote, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bitplan")
@click.option("--server", metavar="URL", help="Let a service do it, such as http://127.0.0.1:8420.")
@click.option("--key", envvar="BITPLAN_KEY", help="API key of the service; better in BITPLAN_KEY.")
def cli(server: str | None, key: str | None) -> None:
    """Choose the storage format of every part of a language model for a memory, latency or quality budget.

    The plan loses least under the budget, with a proof of how near to optimal it is, and is verified on held-out
    text. Exit codes: 0 done, 1 failure, 2 usage, 3 infeasible budget.
    """


@cli.command()
@click.argument("model")
@low_memory_option
@measure_options
@click.option("--out", type=click.Path(path_type=Path), help="Also write the profile to this directory.")
@json_option
@printed
def measure(model: str, low_memory: bool, out: Path | None, as_json: bool, **options: Any) -> str:
    """Measure how much each part of MODEL loses at each format. Interrupted measurements resume."""
    from allocator.pipeline import measure as run
    from sensitivity.profile_files import check_profile_place, save_profile

    request = parse(lambda: make_request(options))
    if out is not None:
        # Before minutes of work, not after.
        check_profile_place(out)
    if low_memory:
        click.echo(blockwise_text(), err=True)
    profile = with_progress(run, _open(model, low_memory), request=request)
    if out is not None:
        save_profile(profile, out)
    return render(describe_profile(profile), as_json, profile_text)


@cli.command()
@click.argument("model")
@low_memory_option
@budget_options
@click.option("--metric", help="Metric to plan with; default: the best the profile holds.")
@click.option("--verify/--no-verify", default=True, help="Measure the plan and its rivals on held-out text.")
@click.option(
    "--refine",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="ROUNDS",
    help="Improve the best measured plan around itself, at most so many rounds. Minutes each; for 4 bits and below.",
)
@click.option(
    "--evolve",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="PASSES",
    help="Improve it by random switches of formats, at most so many passes of one sequence; after --refine.",
)
@click.option("--profile", type=click.Path(path_type=Path), help="Profile directory; default: the model's latest.")
@click.option("--engine", help="Keep the rules of an engine ('bitplan engines' lists them), and say what they cost.")
@click.option("--device", help="Model the latency of this device instead of measuring here ('bitplan devices').")
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan to this file.")
@json_option
@printed
def plan(
    model: str,
    low_memory: bool,
    metric: str | None,
    verify: bool,
    refine: int,
    evolve: int,
    profile: Path | None,
    engine: str | None,
    device: str | None,
    out: Path | None,
    as_json: bool,
    **budget: Any,
) -> str:
    """Find the plan for MODEL that loses least under a budget."""
    from allocator.plan_files import save_plan
    from allocator.plan_query import plan as run

    asked = parse(lambda: make_budget(**budget))
    if out is not None and out.is_dir():
        msg = f"a plan is written to a file: got --out '{out}', a directory. Name a file in it, such as plan.json."
        raise click.UsageError(msg)
    if (refine or evolve) and not verify:
        msg = "refinement and evolution measure: got --refine or --evolve with --no-verify. Leave one of them out."
        raise click.UsageError(msg)
    options = {"verify": verify, "metric": metric, "refine": refine, "evolve": evolve, "engine": engine}
    made = with_progress(run, _open(model, low_memory), asked, **options, device=device, profile=_load_profile(profile))
    if out is not None:
        save_plan(made, out)
    return render(made.to_dict(), as_json, lambda _: plan_text(made))


@cli.command()
@click.argument("model")
@click.option("--points", type=click.IntRange(2), default=33, show_default=True, help="Budgets to solve.")
@click.option("--metric", help="Metric to plan with.")
@frontier_options
@cache_options
@json_option
@printed
def frontier(model: str, points: int, metric: str | None, as_json: bool, **axes: Any) -> str:
    """Print the least loss of MODEL at every size, or at every use of another resource."""
    from allocator.frontiers import frontier as run

    found = with_progress(run, model, points=points, metric=metric, **axes)
    return render({"points": found}, as_json, lambda document: table(document["points"]))


@cli.command()
@click.argument("model")
@low_memory_option
@plan_option
@click.option(
    "--text", help="Held-out text: file, JSONL, directory or dataset; default: the profile's evaluation text."
)
@json_option
@printed
def evaluate(model: str, low_memory: bool, plan_path: Path, text: str | None, as_json: bool) -> str:
    """Measure a plan of MODEL on held-out text, beside the reference and the uniform formats."""
    from dataclasses import asdict

    from allocator.pipeline import evaluate as run
    from allocator.plan_files import load_plan

    opened = _open(model, low_memory)
    evaluations = [asdict(e) for e in with_progress(run, opened, load_plan(plan_path), text=text)]
    return render({"evaluations": evaluations}, as_json, lambda document: table(document["evaluations"]))


@cli.command()
@click.argument("model")
@low_memory_option
@plan_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the packed model.")
@click.option("--prefix", type=click.Path(path_type=Path), help="File of 'bitplan prefix' that ships with the model.")
@json_option
@printed
def apply(model: str, low_memory: bool, plan_path: Path, out: Path, prefix: Path | None, as_json: bool) -> str:
    """Pack MODEL by a plan and write it to a directory."""
    from allocator.pipeline import apply as run
    from allocator.plan_files import load_plan

    applied = run(_open(model, low_memory), load_plan(plan_path), out, prefix=prefix)
    document = {
        "directory": str(applied.directory),
        "file_bytes": applied.file_bytes,
        "predicted_bytes": applied.predicted_bytes,
        "difference_bytes": applied.file_bytes - applied.predicted_bytes,
    }
    return render(document, as_json, lambda d: "\n".join(f"{name}: {value}" for name, value in d.items()))


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--memory", default="70MiB", show_default=True, help="Budget of the demonstration.")
def demo(out: Path, memory: str) -> None:
    """Run the main job on SmolLM2-135M: measure, plan, verify, apply, generate, report."""
    from allocator.demo import run_demo

    with_progress(run_demo, out, parse(lambda: parse_bytes(memory)))


for _command in (*GENERATION_COMMANDS, *REPORT_COMMANDS, *FURTHER_COMMANDS, *ENGINE_COMMANDS, *SERVICE_COMMANDS):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Returns the exit code of the command with these arguments.

    Its messages go to stderr; with ``--json`` a failure is a JSON document on stdout as well.
    """
    try:
        cli.main(args=list(arguments), prog_name="bitplan", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return _fail(arguments, USAGE, error.format_message())
    except InfeasibleBudget as error:
        click.echo(f"infeasible budget: {error}", err=True)
        return _fail(arguments, INFEASIBLE, str(error), least_use=error.least_use)
    except (click.Abort, KeyboardInterrupt):
        message = "interrupted; finished measurements are kept: run the same command again to go on."
        click.echo(message, err=True)
        return _fail(arguments, FAILURE, message)
    except Exception as error:
        from allocator.failures import describe_failure

        described = describe_failure(error)
        if described is None:
            raise
        click.echo(f"error: {described}", err=True)
        return _fail(arguments, FAILURE, described)
    return 0


def _fail(arguments: Sequence[str], code: int, message: str, **details: Any) -> int:
    if "--json" in arguments:
        click.echo(json.dumps({"error": message, **details}))
    return code


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _open(model: str, low_memory: bool) -> "Model":
    from allocator.artefacts import Model

    return Model(model, low_memory=low_memory)


def _load_profile(directory: Path | None) -> "SensitivityProfile | None":
    from sensitivity.profile_files import load_profile

    return None if directory is None else load_profile(directory)


if __name__ == "__main__":
    main()
