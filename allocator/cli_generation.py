"""The commands of ``bitplan`` about running a packed model: generate, and experts that are skipped."""

from pathlib import Path
from typing import Any

import click

from allocator.cli_options import json_option, plan_option, printed, with_progress
from allocator.cli_output import render, skipping_text


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--width", type=click.IntRange(1, 8), help="Bits at which nested weights are read; default: all.")
@click.option("--draft-tokens", type=click.IntRange(1), help="Draft so many at the lowest width of nested weights.")
@click.option("--skip-experts", help="Skip experts of small weights: a file of 'skip-experts', or a ratio, 0 to 1.")
@printed
def generate(
    directory: Path,
    prompt: str,
    width: int | None,
    draft_tokens: int | None,
    skip_experts: str | None,
    **sampling: Any,
) -> str:
    """Continue a text with the packed model in DIRECTORY, behind its prefix if it has one."""
    from allocator.generation import generate_by_drafts, generate_text
    from allocator.pipeline import load
    from runtime.compiled_decoder import find_obstacle
    from runtime.packed_decoding import find_cache_obstacle
    from runtime.packed_model import make_packed_cache
    from runtime.transforms.prefix_tokens import PREFIX_FILE, load_prefix

    model, tokenizer = load(directory, width=width, skip_experts=skip_experts)
    obstacle, cache = find_obstacle(model), make_packed_cache(model)
    if obstacle is None and cache is not None:
        obstacle = find_cache_obstacle(cache)
    if obstacle is not None:
        click.echo(f"generating module by module, which is slower. {obstacle}", err=True)
    path = directory / PREFIX_FILE
    sampling["prefix"] = load_prefix(path) if path.exists() else None
    if draft_tokens is None:
        return generate_text(model, tokenizer, prompt, **sampling)
    text, count = generate_by_drafts(model, tokenizer, prompt, draft_tokens=draft_tokens, **sampling)
    click.echo(f"drafts: {count.describe()}", err=True)
    return text


@click.command("skip-experts")
@click.argument("model")
@plan_option
@click.option("--quantile", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Tokens that skip one.")
@click.option("--protect", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Tokens that skip none.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Write what is skipped to this file.")
@json_option
@printed
def skip_experts(model: str, plan_path: Path, quantile: float, protect: float, out: Path, as_json: bool) -> str:
    """Find experts of small weights in the mixture MODEL under a plan, and measure what skipping them does."""
    from allocator.plan_files import load_plan
    from allocator.skipping import find_skipping
    from runtime.expert_skipping import save_skipping

    options = {"quantile": quantile, "protected_share": protect}
    found = with_progress(find_skipping, model, load_plan(plan_path), **options)
    save_skipping(found.skipping, out)
    document = {"skipping": vars(found.skipping), "scores": [vars(score) for score in found.scores]}
    return render(document, as_json, skipping_text)


GENERATION_COMMANDS = (generate, skip_experts)
