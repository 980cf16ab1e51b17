"""The command ``bitplan``: parse, call the verb, print. Data on stdout, logs and progress on stderr.

Exit codes: 0 done, 1 failure, 2 usage, 3 infeasible budget. Heavy imports wait until a command runs, so that help
is immediate.
"""

import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from allocator.budget import Budget, InfeasibleBudget, parse_bytes, parse_limits

if TYPE_CHECKING:
    from allocator.measuring import MeasureRequest
    from allocator.plans import Plan
    from sensitivity.profile import SensitivityProfile

FAILURE, USAGE, INFEASIBLE = 1, 2, 3

_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
_plan_option = click.option("--plan", "plan_path", required=True, type=click.Path(path_type=Path), help="Plan file.")
_Command = Callable[..., Any]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bitplan")
def cli() -> None:
    """Choose the storage format of every part of a language model for a memory, latency or quality budget.

    The plan loses least under the budget, with a proof of how near to optimal it is, and is verified on held-out
    text. Exit codes: 0 done, 1 failure, 2 usage, 3 infeasible budget.
    """


def _measure_options(command: _Command) -> _Command:
    options = [
        click.option(
            "--calibration", help="Text file, JSONL, directory or dataset; default: the model samples its own."
        ),
        click.option("--selection", help="Text that chooses between plans; default: part of the calibration text."),
        click.option("--evaluation", help="Text of the final evaluation; default: another part."),
        click.option("--formats", help="Comma-separated formats (int2_g64,…,bf16)."),
        click.option(
            "--embedding-formats", help="Comma-separated formats of embeddings and head (default: >= 4 bits)."
        ),
        click.option("--fuse", multiple=True, help="Regular expression of weights that share a format; repeatable."),
        click.option("--pin", "pins", multiple=True, metavar="REGEX=FORMAT", help="Fix units to a format; repeatable."),
        click.option("--metrics", help="Comma-separated metrics to measure."),
        click.option("--sequences", type=int, help="Calibration sequences of the Fisher sketch."),
        click.option("--sequence-tokens", type=int, help="Tokens of each calibration sequence."),
        click.option("--logit-sequences", type=int, help="Sequences of the single-unit KL."),
        click.option("--logit-tokens", type=int, help="Tokens of each of these."),
        click.option("--held-out-sequences", type=int, help="Sequences for selection, and as many for evaluation."),
        click.option("--held-out-tokens", type=int, help="Tokens of each of these."),
        click.option("--seed", type=int, help="Seed of labels and sampled text."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _budget_options(command: _Command) -> _Command:
    options = [
        click.option("--memory", help="Most bytes of the weight file, such as 70MiB."),
        click.option("--bits-per-weight", type=float, help="Most stored bits per weight, scales included."),
        click.option("--max-kl", type=float, help="Most KL in nats per token; the smallest plan that keeps it."),
        click.option(
            "--limit", "limits", multiple=True, metavar="RESOURCE=VALUE", help="Further limit: latency_us, read_bytes."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument("model")
@_measure_options
@click.option("--out", type=click.Path(path_type=Path), help="Also write the profile to this directory.")
@_json_option
def measure(model: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure how much each part of MODEL loses at each format. Interrupted measurements resume."""
    from allocator.pipeline import measure as run
    from sensitivity.profile import save_profile

    request = _parse(lambda: _make_request(options))
    profile = _with_progress(run, model, request=request)
    if out is not None:
        save_profile(profile, out)
    _print(_describe_profile(profile), as_json, _profile_text)


@cli.command()
@click.argument("model")
@_budget_options
@click.option("--metric", help="Metric to plan with; default: the best the profile holds.")
@click.option("--verify/--no-verify", default=True, help="Measure the plan and its rivals on held-out text.")
@click.option("--profile", type=click.Path(path_type=Path), help="Profile directory; default: the model's latest.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan to this file.")
@_json_option
def plan(
    model: str, metric: str | None, verify: bool, profile: Path | None, out: Path | None, as_json: bool, **budget: Any
) -> None:
    """Find the plan for MODEL that loses least under a budget."""
    from allocator.pipeline import plan as run
    from allocator.plans import save_plan

    asked = _parse(lambda: _make_budget(**budget))
    made = _with_progress(run, model, asked, verify=verify, metric=metric, profile=_load_profile(profile))
    if out is not None:
        save_plan(made, out)
    _print(made.to_dict(), as_json, lambda _: _plan_text(made))


@cli.command()
@click.argument("model")
@click.option("--points", type=click.IntRange(2), default=33, show_default=True, help="Budgets to solve.")
@click.option("--metric", help="Metric to plan with.")
@_json_option
def frontier(model: str, points: int, metric: str | None, as_json: bool) -> None:
    """Print the least loss of MODEL at every size."""
    from allocator.pipeline import frontier as run

    found = _with_progress(run, model, points=points, metric=metric)
    _print({"points": found}, as_json, lambda document: _table(document["points"]))


@cli.command()
@click.argument("model")
@_plan_option
@click.option(
    "--text", help="Held-out text: file, JSONL, directory or dataset; default: the profile's evaluation text."
)
@_json_option
def evaluate(model: str, plan_path: Path, text: str | None, as_json: bool) -> None:
    """Measure a plan of MODEL on held-out text, beside the reference and the uniform formats."""
    from dataclasses import asdict

    from allocator.pipeline import evaluate as run
    from allocator.plans import load_plan

    evaluations = [asdict(e) for e in _with_progress(run, model, load_plan(plan_path), text=text)]
    _print({"evaluations": evaluations}, as_json, lambda document: _table(document["evaluations"]))


@cli.command()
@click.argument("model")
@_plan_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the packed model.")
@_json_option
def apply(model: str, plan_path: Path, out: Path, as_json: bool) -> None:
    """Pack MODEL by a plan and write it to a directory."""
    from allocator.pipeline import apply as run
    from allocator.plans import load_plan

    applied = run(model, load_plan(plan_path), out)
    document = {
        "directory": str(applied.directory),
        "file_bytes": applied.file_bytes,
        "predicted_bytes": applied.predicted_bytes,
        "difference_bytes": applied.file_bytes - applied.predicted_bytes,
    }
    _print(document, as_json, lambda d: "\n".join(f"{name}: {value}" for name, value in d.items()))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True)
def generate(directory: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> None:
    """Continue a text with the packed model in DIRECTORY."""
    from allocator.generation import generate_text
    from allocator.pipeline import load

    model, tokenizer = load(directory)
    text = generate_text(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    click.echo(text)


@cli.command()
@click.argument("model")
@_plan_option
@click.option("--text", help="Evaluation text; default: the profile's.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the report.")
def report(model: str, plan_path: Path, text: str | None, out: Path) -> None:
    """Write the report of a plan of MODEL: one HTML page and CSV files."""
    from allocator.pipeline import report as run
    from allocator.plans import load_plan

    click.echo(_with_progress(run, model, load_plan(plan_path), out, text=text))


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True)
@click.option("--memory", default="70MiB", show_default=True, help="Budget of the demonstration.")
def demo(out: Path, memory: str) -> None:
    """Run the main job on SmolLM2-135M: measure, plan, verify, apply, generate, report."""
    from allocator.demo import run_demo

    _with_progress(run_demo, out, _parse(lambda: parse_bytes(memory)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its code."""
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Returns the exit code of the command with these arguments; its messages go to stderr."""
    from allocator.failures import describe_failure

    try:
        cli.main(args=list(arguments), prog_name="bitplan", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.exceptions.Exit as error:
        return error.exit_code
    except InfeasibleBudget as error:
        if "--json" in arguments:
            click.echo(json.dumps({"error": str(error), "least_use": error.least_use}))
        click.echo(f"infeasible budget: {error}", err=True)
        return INFEASIBLE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; finished measurements are kept: run the same command again to go on.", err=True)
        return FAILURE
    except Exception as error:
        message = describe_failure(error)
        if message is None:
            raise
        click.echo(f"error: {message}", err=True)
        return FAILURE
    return 0


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _parse(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _with_progress(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    from allocator.progress import shown_progress

    with shown_progress() as progress:
        return function(*arguments, progress=progress, **options)


def _make_budget(
    memory: str | None, bits_per_weight: float | None, max_kl: float | None, limits: Sequence[str]
) -> Budget:
    return Budget(
        memory_bytes=None if memory is None else parse_bytes(memory),
        bits_per_weight=bits_per_weight,
        max_kl=max_kl,
        limits=parse_limits(limits),
    )


def _make_request(options: dict[str, Any]) -> "MeasureRequest":
    from allocator.measuring import MeasureRequest
    from runtime.formats import DEFAULT_FORMATS, find_formats
    from sensitivity.measure import MeasureConfig

    amounts = {
        "metrics": _names(options["metrics"]),
        "fisher_sequences": options["sequences"],
        "sequence_tokens": options["sequence_tokens"],
        "logit_sequences": options["logit_sequences"],
        "logit_sequence_tokens": options["logit_tokens"],
        "selection_sequences": options["held_out_sequences"],
        "evaluation_sequences": options["held_out_sequences"],
        "evaluation_sequence_tokens": options["held_out_tokens"],
        "seed": options["seed"],
    }
    formats = _names(options["formats"]) or DEFAULT_FORMATS
    embedding_formats = _names(options["embedding_formats"])
    find_formats([*formats])
    find_formats([*(embedding_formats or formats)])
    return MeasureRequest(
        **{name: options[name] for name in ("calibration", "selection", "evaluation", "fuse")},
        formats=formats,
        embedding_formats=embedding_formats,
        pins=_make_pins(options["pins"]),
        config=MeasureConfig(**{name: value for name, value in amounts.items() if value is not None}),
    )


def _make_pins(texts: Sequence[str]) -> dict[str, str]:
    pins = {}
    for text in texts:
        pattern, separator, format_name = text.rpartition("=")
        if not separator:
            msg = f"a pin must be REGEX=FORMAT: got '{text}'."
            raise ValueError(msg)
        pins[pattern] = format_name
    return pins


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _load_profile(directory: Path | None) -> "SensitivityProfile | None":
    from sensitivity.profile import load_profile

    return None if directory is None else load_profile(directory)


def _print(document: dict[str, Any], as_json: bool, describe: Callable[[dict[str, Any]], str]) -> None:
    click.echo(json.dumps(document) if as_json else describe(document))


def _describe_profile(profile: "SensitivityProfile") -> dict[str, Any]:
    return {
        "profile": profile.fingerprint,
        "units": len(profile.candidates.units),
        "formats": [f.name for f in profile.candidates.formats],
        "metrics": list(profile.losses),
        "reference_bytes": profile.reference_bytes,
        "provenance": dict(profile.provenance),
    }


def _profile_text(document: dict[str, Any]) -> str:
    return (
        f"profile {document['profile'][:16]}: {document['units']} units x {len(document['formats'])} formats, "
        f"metrics {', '.join(document['metrics'])}, measured in {document['provenance']['measured_in_s']} s"
    )


def _plan_text(made: "Plan") -> str:
    from collections import Counter

    counts = Counter(unit.format for unit in made.units)
    gap = f"{made.relative_gap:.2g}" if made.relative_gap < float("inf") else "not bounded"
    lines = [
        f"plan '{made.name}' for {made.budget}: {made.memory_bytes / 2**20:.2f} MiB, "
        f"{made.bits_per_weight:.3f} bits per weight (reference {made.reference_memory_bytes / 2**20:.1f} MiB)",
        f"predicted KL {made.predicted_kl:.4g} nats per token, relative gap to the best possible {gap} "
        f"({made.termination}, {made.solve_s * 1e3:.1f} ms)",
        "formats: " + ", ".join(f"{name} x {count}" for name, count in counts.most_common()),
        made.verdict,
    ]
    rows = [_brief(vars(evaluation)) for evaluation in made.evaluations]
    return "\n".join(lines + ([_table(rows)] if rows else []))


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("name", "memory_bytes", "predicted_kl", "kl", "kl_low", "kl_high", "shipped")}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "nothing to show"
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
