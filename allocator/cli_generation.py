"""The command of ``bitplan`` that runs a packed model."""

from pathlib import Path
from typing import Any

import click

from allocator.cli_options import printed


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--width", type=click.IntRange(1, 8), help="Bits at which nested weights are read; default: all.")
@click.option("--draft-tokens", type=click.IntRange(1), help="Draft so many at the lowest width of nested weights.")
@printed
def generate(directory: Path, prompt: str, width: int | None, draft_tokens: int | None, **sampling: Any) -> str:
    """Continue a text with the packed model in DIRECTORY, behind its prefix if it has one."""
    from allocator.generation import generate_by_drafts, generate_text
    from allocator.pipeline import load
    from runtime.compiled_decoder import find_obstacle
    from runtime.transforms.prefix_tokens import PREFIX_FILE, load_prefix

    model, tokenizer = load(directory, width=width)
    obstacle = find_obstacle(model)
    if obstacle is not None:
        click.echo(f"generating module by module, which is slower. {obstacle}", err=True)
    path = directory / PREFIX_FILE
    sampling["prefix"] = load_prefix(path) if path.exists() else None
    if draft_tokens is None:
        return generate_text(model, tokenizer, prompt, **sampling)
    text, count = generate_by_drafts(model, tokenizer, prompt, draft_tokens=draft_tokens, **sampling)
    click.echo(f"drafts: {count.describe()}", err=True)
    return text


GENERATION_COMMANDS = (generate,)
