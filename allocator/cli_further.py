"""The commands of ``bitplan`` beside the main way: formats, devices, the store, prefix tokens."""

from pathlib import Path

import click

from allocator.cli_options import json_option, plan_option, printed, with_progress
from allocator.cli_output import devices_text, formats_text, render, table


@click.command()
@click.argument("model")
@plan_option
@click.option("--length", type=click.IntRange(1), default=3, show_default=True, help="Most tokens of the prefix.")
@click.option("--candidates", type=click.IntRange(1), default=12, show_default=True, help="Tokens tried at each place.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Write the prefix to this file.")
@json_option
@printed
def prefix(model: str, plan_path: Path, length: int, candidates: int, out: Path, as_json: bool) -> str:
    """Find tokens before every text that lower the loss of a plan of MODEL, and measure what they do."""
    from allocator.cli_output import describe_prefix, prefix_text
    from allocator.plan_files import load_plan
    from allocator.prefixes import find_prefix
    from runtime.transforms.prefix_tokens import save_prefix

    found = with_progress(find_prefix, model, load_plan(plan_path), length=length, candidates=candidates)
    if found.prefix is not None:
        save_prefix(found.prefix, out)
    return render(describe_prefix(found), as_json, prefix_text)


@click.command()
@click.option("--prune", is_flag=True, help="Delete what no profile needs any more; no measurement may be running.")
@json_option
@printed
def store(prune: bool, as_json: bool) -> str:
    """Show what the store keeps of measurements, and how many bytes it takes."""
    from allocator.store import Store

    kept = Store()
    freed_bytes = kept.prune() if prune else 0
    rows = [{"kind": kind, "entries": n, "bytes": size} for kind, (n, size) in kept.list_kinds().items()]
    document = {"root": str(kept.root), "freed_bytes": freed_bytes, "kinds": rows}
    return render(document, as_json, lambda d: f"{d['root']}, freed {freed_bytes} bytes\n{table(d['kinds'])}")


@click.command()
@click.argument("model", required=False)
@click.option("--formats", help="Comma-separated formats; default: all.")
@click.option("--weight", help="Weight of MODEL to try them on; default: one in the middle.")
@click.option("--quantizer", default="rtn", show_default=True, help="For integers: rtn, clipping or hqq.")
@json_option
@printed
def formats(model: str | None, formats: str | None, weight: str | None, quantizer: str, as_json: bool) -> str:
    """List the storage formats: bits per weight and who can run them; with MODEL, their error on one of its weights."""
    from allocator.format_table import list_formats as run

    names = None if formats is None else tuple(formats.split(","))
    found = with_progress(run, model, formats=names, weight=weight, quantizer=quantizer)
    return render({"formats": found}, as_json, lambda document: formats_text(document["formats"]))


@click.command()
@json_option
@printed
def devices(as_json: bool) -> str:
    """List the devices whose latency 'plan --device' models, with the figures and where these are from."""
    from runtime.device_models import describe_devices

    return render({"devices": describe_devices()}, as_json, devices_text)


FURTHER_COMMANDS = (formats, devices, store, prefix)
