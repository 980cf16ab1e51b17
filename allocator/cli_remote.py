"""The commands of ``bitplan --server URL``: the same verbs, done by a service. MODEL and texts are paths there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from allocator.cli_options import (
    budget_options,
    cache_options,
    frontier_options,
    json_option,
    make_budget,
    make_request,
    measure_options,
    parse,
    printed,
)
from allocator.cli_output import render, table

if TYPE_CHECKING:
    from allocator.client import Client

plan_id_option = click.option("--plan", "plan_id", required=True, help="Id of a plan, which 'plan' prints.")


@click.command()
@click.argument("model")
@measure_options
@json_option
@printed
def measure(model: str, as_json: bool, **options: Any) -> str:
    """Measure MODEL on the server, or find its profile there."""
    request = parse(lambda: make_request(options))
    with _client() as client:
        profile = client.measure(model, request=request)
    document = {"profile": profile.id, "model": profile.model_id, "units": len(profile.document["units"])}
    return render(document, as_json, _lines)


@click.command()
@click.argument("model")
@budget_options
@click.option("--metric", help="Metric to plan with; default: the best the profile holds.")
@click.option("--engine", help="Keep the rules of an engine, and say what they cost.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the plan to this file.")
@json_option
@printed
def plan(model: str, metric: str | None, engine: str | None, out: Path | None, as_json: bool, **budget: Any) -> str:
    """Find the plan for MODEL that loses least under a budget, predicted and not verified."""
    import json

    from runtime.files import write_text

    asked = parse(lambda: make_budget(**budget))
    with _client() as client:
        made = client.plan(model, asked, metric=metric, engine=engine)
        if out is not None:
            write_text(out, json.dumps(client.plan_file(made), indent=1) + "\n")
    return render(dict(made.document), as_json, _plan_text)


@click.command()
@click.argument("model")
@click.option("--points", type=click.IntRange(2, 257), default=33, show_default=True, help="Budgets to solve.")
@click.option("--metric", help="Metric to plan with.")
@frontier_options
@cache_options
@json_option
@printed
def frontier(model: str, points: int, metric: str | None, as_json: bool, **axes: Any) -> str:
    """Print the least loss of MODEL at every size, or at every use of another resource."""
    with _client() as client:
        found = client.frontier(model, points=points, metric=metric, **axes)
    return render({"points": found}, as_json, lambda document: table(document["points"]))


@click.command()
@plan_id_option
@click.option("--text", help="Held-out text on the server; default: the profile's evaluation text.")
@json_option
@printed
def evaluate(plan_id: str, text: str | None, as_json: bool) -> str:
    """Measure a plan on held-out text, beside the reference and the uniform formats."""
    from dataclasses import asdict

    with _client() as client:
        rows = [asdict(row) for row in client.evaluate(_plan(plan_id), text=text)]
    return render({"evaluations": rows}, as_json, lambda document: table(document["evaluations"]))


@click.command()
@plan_id_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the packed model.")
@printed
def apply(plan_id: str, out: Path) -> str:
    """Fetch the model packed by a plan."""
    with _client() as client:
        return str(client.apply(_plan(plan_id), out))


@click.command()
@plan_id_option
@click.option("--engine", required=True, help="What will load it.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the files.")
@printed
def export(plan_id: str, engine: str, out: Path) -> str:
    """Fetch a plan as the files that an engine loads, and print the command that runs them."""
    with _client() as client:
        return client.export(_plan(plan_id), engine, out)


@click.command()
@click.option("--plan", "plan_id", help="Id of a plan, which 'plan' prints.")
@click.option("--compare", "compared", nargs=2, metavar="A B", help="Ids of two plans of one model, side by side.")
@click.option("--text", help="Evaluation text on the server; default: the profile's.")
@click.option("--parquet", is_flag=True, help="Parquet files beside the CSV files.")
@click.option("--pdf", is_flag=True, help="One page as report.pdf, where the server has a Chromium.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the report.")
@printed
def report(
    plan_id: str | None, compared: tuple[str, str] | None, text: str | None, parquet: bool, pdf: bool, out: Path
) -> str:
    """Fetch the report of a plan, or the comparison of two."""
    if (plan_id is None) == (compared is None):
        msg = f"one of --plan and --compare must be given: got {'neither' if plan_id is None else 'both'}. Name one."
        raise click.UsageError(msg)
    if compared is not None and (parquet or pdf):
        msg = "--parquet and --pdf belong to --plan: got one of them with --compare. Leave it out."
        raise click.UsageError(msg)
    with _client() as client:
        if compared is not None:
            first, second = map(_plan, compared)
            return str(client.compare(first, second, out, text=text))
        return str(client.report(_plan(str(plan_id)), out, text=text, parquet=parquet, pdf=pdf))


REMOTE_COMMANDS: dict[str, click.Command] = {
    str(command.name): command for command in (measure, plan, frontier, evaluate, apply, export, report)
}


class LocalOrRemote(click.Group):
    """The commands, or with ``--server`` those that a service does."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns a command by its name."""
        if ctx.params.get("server") is None:
            return super().get_command(ctx, cmd_name)
        if cmd_name not in REMOTE_COMMANDS:
            msg = f"a command with --server must be among {', '.join(REMOTE_COMMANDS)}: got '{cmd_name}'."
            raise click.UsageError(msg)
        return REMOTE_COMMANDS[cmd_name]


def _client() -> "Client":
    from allocator.client import Client

    options = click.get_current_context().find_root().params
    return Client(options["server"], options["key"], show_progress=True)


def _plan(plan_id: str) -> Any:
    from allocator.client_verbs import RemotePlan

    return RemotePlan(id=plan_id, model_id="", document={})


def _plan_text(document: dict[str, Any]) -> str:
    from collections import Counter

    counts = Counter(document["choice"].values())
    shown = ("id", "bytes", "bits_per_weight", "predicted_loss", "standard_error", "termination", "gap")
    formats = ", ".join(f"{name} x {count}" for name, count in counts.most_common())
    return "\n".join([_lines({name: document[name] for name in shown}), f"formats: {formats}"])


def _lines(document: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in document.items())
