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
@click.option("--imatrix", is_flag=True, help="Write an importance matrix for llama-quantize too.")
@json_option
@printed
def export(model: str, plan_path: Path, engine: str, out: Path, imatrix: bool, as_json: bool) -> str:
    """Write a plan of MODEL as the files that an engine loads, and print the command that runs them."""
    from allocator.exporting import export as run
    from allocator.plan_files import load_plan

    exported = run(model, load_plan(plan_path), engine, out, imatrix=imatrix)
    document = {**vars(exported), "directory": str(exported.directory)}
    return render(document, as_json, exported_text)


@click.command()
@click.argument("model")
@click.option("--recipe", required=True, type=click.Path(path_type=Path), help="File with the formats of all weights.")
@click.option("--metric", help="Metric that predicts; default: the best the profile holds.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the recipe as a plan to this file.")
@json_option
@printed
def price(model: str, recipe: Path, metric: str | None, out: Path | None, as_json: bool) -> str:
    """Compare a recipe for MODEL with the best plans of the same bytes.

    A recipe is a file of llama.cpp's tensor types, a GGUF file, a quantize_config.json of GPTQModel, a
    layer_config.json of AutoRound, a FqnToConfig of torchao, a hf_quant_config.json of ModelOpt, or a config.json of
    AutoRound, compressed-tensors, MLX-LM or torchao.
    """
    from allocator.plan_files import save_plan
    from allocator.pricing import price as run

    priced = run(model, recipe, metric=metric)
    if out is not None:
        save_plan(priced.recipe, out)
    named = {name: getattr(priced, name) for name in ("recipe", "best", "best_legal")}
    plans = {name: made and made.to_dict() for name, made in named.items()}
    return render({"kind": priced.kind, **plans}, as_json, lambda _: priced.describe())


ENGINE_COMMANDS = (engines, export, price)
