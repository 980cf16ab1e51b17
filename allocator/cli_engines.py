"""The commands of ``bitplan`` that speak of engines: what they can load, and files for them."""

from pathlib import Path

import click

from allocator.cli_options import json_option, plan_option, printed
from allocator.cli_output import engines_text, exported_text, render


@click.command()
@json_option
@printed
def engines(as_json: bool) -> str:
    """Print what each engine can load: the rules that 'plan --engine' keeps."""
    from runtime.engines import describe_engines

    return render({"engines": describe_engines()}, as_json, engines_text)


@click.command()
@click.argument("model")
@plan_option
@click.option("--engine", required=True, help="What will load it; 'bitplan engines' lists them.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the files.")
@json_option
@printed
def export(model: str, plan_path: Path, engine: str, out: Path, as_json: bool) -> str:
    """Write a plan of MODEL as the files that an engine loads, and print the command that runs them."""
    from allocator.exporting import export as run
    from allocator.plans import load_plan

    exported = run(model, load_plan(plan_path), engine, out)
    document = {**vars(exported), "directory": str(exported.directory)}
    return render(document, as_json, exported_text)


ENGINE_COMMANDS = (engines, export)
