"""The options of the command ``bitplan``, and from their texts to budgets and requests."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from allocator.budget import FRONTIER_RESOURCES, MEMORY, Budget, parse_bytes, parse_limits
from allocator.cli_output import stray_output_to_stderr

if TYPE_CHECKING:
    from allocator.measuring import MeasureRequest

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
low_memory_option = click.option(
    "--low-memory",
    is_flag=True,
    help="Read the model's weights from its files block by block: it may be larger than memory; takes longer.",
)
plan_option = click.option("--plan", "plan_path", required=True, type=click.Path(path_type=Path), help="Plan file.")


def printed(command: Command) -> Command:
    """Prints the text that a command returns, and keeps everything else off stdout while it runs."""

    @functools.wraps(command)
    def print_text(*arguments: Any, **options: Any) -> None:
        with stray_output_to_stderr():
            text = command(*arguments, **options)
        click.echo(text)

    return print_text


def measure_options(command: Command) -> Command:
    options = [
        click.option(
            "--calibration",
            help="Text file, JSONL, directory or dataset; 'self-balanced' for text that the model samples to use its "
            "experts evenly; default: the model samples its own.",
        ),
        click.option("--selection", help="Text that chooses between plans; default: part of the calibration text."),
        click.option("--evaluation", help="Text of the final evaluation; default: another part."),
        click.option(
            "--formats",
            help="Comma-separated formats (int2_g64,…,bf16), or 'menu': the few that do nearly as well as all.",
        ),
        click.option("--engine", help="Measure the formats that an engine is planned with ('bitplan engines')."),
        click.option(
            "--embedding-formats", help="Comma-separated formats of embeddings and head (default: >= 4 bits)."
        ),
        click.option(
            "--cache-formats",
            help="Comma-separated formats of the KV cache (int8_channel,int4_g32,…,bf16; int4_t32: along blocks of 32 "
            "tokens), measured for the keys and the values of each layer; default: the cache is left out.",
        ),
        click.option(
            "--activation-formats",
            help="Comma-separated formats of what linear layers read (int8_token,int8_tensor_static,fp8_token,…,bf16), "
            "measured for every layer; default: activations are left out.",
        ),
        click.option("--fuse", multiple=True, help="Regular expression of weights that share a format; repeatable."),
        click.option(
            "--experts",
            type=click.Choice(["projection", "expert", "stack_projection", "stack"]),
            help="What of a mixture of experts gets one format: each expert's projection (default), each expert, a "
            "projection of all experts of a layer, all experts of a layer.",
        ),
        click.option("--quantize-routers", "routers", is_flag=True, help="Let routers take formats too."),
        click.option("--pin", "pins", multiple=True, metavar="REGEX=FORMAT", help="Fix units to a format; repeatable."),
        click.option(
            "--quantizer",
            help="Rule that renders the candidates: rtn (default), clipping, hqq; drawn_clipping, weighted by what "
            "random tokens put into each channel; weighted_clipping, gptq, coordinate_descent, learned_rounding and "
            "auto (the best of several), which read the calibration text.",
        ),
        click.option(
            "--transform",
            "transforms",
            metavar="NAME[,NAME]",
            help="Rewrite the reference model first, its function unchanged: smoothquant, outliertune, mergequant, "
            "awq, equalize (reads no text), exponent_bias, hadamard, random_rotation, pca, head_hadamard, untie, "
            "random_rescaling. Options as in smoothquant:alpha=0.7.",
        ),
        click.option("--metrics", help="Comma-separated metrics to measure."),
        click.option("--sequences", type=int, help="Calibration sequences of the Fisher sketch."),
        click.option(
            "--until-stable",
            is_flag=True,
            help="Take only as many of these sequences as it takes until plans stop changing, and at least 32.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "auto"]),
            default="float32",
            show_default=True,
            help="Type of the products in the Fisher sketch's passes; auto is bfloat16 where the processor has it.",
        ),
        click.option("--sequence-tokens", type=int, help="Tokens of each calibration sequence."),
        click.option("--logit-sequences", type=int, help="Sequences of the single-unit KL."),
        click.option("--logit-tokens", type=int, help="Tokens of each of these."),
        click.option(
            "--logit-passes",
            metavar="N|all",
            help="Most pairs of unit and format whose single-unit KL is measured (default: 512); the others are "
            "completed. Cross terms need all.",
        ),
        click.option(
            "--fit-plans",
            metavar="N|none",
            help="Whole plans measured on calibration text to correct the predictions (default: 12); none to leave "
            "predictions as they are.",
        ),
        click.option("--fit-sequences", type=int, help="Sequences these are measured on, none of the Fisher sketch's."),
        click.option("--held-out-sequences", type=int, help="Sequences for selection, and as many for evaluation."),
        click.option("--held-out-tokens", type=int, help="Tokens of each of these."),
        click.option("--seed", type=int, help="Seed of labels and sampled text."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def budget_options(command: Command) -> Command:
    options = [
        click.option(
            "--memory", help="Most bytes of the weight file, such as 70MiB; with --context, of file and cache."
        ),
        click.option("--bits-per-weight", type=float, help="Most stored bits per weight, scales included."),
        click.option("--max-kl", type=float, help="Most KL in nats per token; the smallest plan that keeps it."),
        click.option(
            "--limit",
            "limits",
            multiple=True,
            metavar="RESOURCE=VALUE",
            help="Further limit: latency_us, read_bytes, bit_operations (which "
            "lets activations take formats; needs a profile measured with --activation-formats).",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return cache_options(command)


def frontier_options(command: Command) -> Command:
    known = click.Choice(FRONTIER_RESOURCES)
    options = [
        click.option("--resource", type=known, default=MEMORY, show_default=True, help="What is limited."),
        click.option("--engine", help="Keep the rules of an engine at every point ('bitplan engines' lists them)."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def cache_options(command: Command) -> Command:
    options = [
        click.option(
            "--batch",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Sequences decoded together: a step of a mixture reads the experts that any of them takes, and each "
            "has a cache.",
        ),
        click.option(
            "--context",
            type=click.IntRange(1),
            help="Tokens that each sequence keeps in the KV cache: its formats become part of the plan, its bytes "
            "of the budget. Needs a profile measured with --cache-formats.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def parse(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def make_budget(
    memory: str | None,
    bits_per_weight: float | None,
    max_kl: float | None,
    limits: Sequence[str],
    batch: int = 1,
    context: int | None = None,
) -> Budget:
    return Budget(
        memory_bytes=None if memory is None else parse_bytes(memory),
        bits_per_weight=bits_per_weight,
        max_kl=max_kl,
        limits=parse_limits(limits),
        batch=batch,
        context=context,
    )


def make_request(options: dict[str, Any]) -> "MeasureRequest":
    from allocator.measuring import MeasureRequest
    from allocator.shortlist import MENU
    from runtime.activation_formats import find_activation_formats
    from runtime.cache_formats import find_cache_formats
    from runtime.device_types import choose_dtype
    from runtime.engines import find_engine
    from runtime.formats import DEFAULT_FORMATS, FORMATS, find_formats
    from runtime.transforms import parse_transform
    from sensitivity.measure_config import MeasureConfig

    amounts = {
        "metrics": _names(options["metrics"]),
        "fisher_sequences": options["sequences"],
        "sequence_tokens": options["sequence_tokens"],
        "logit_sequences": options["logit_sequences"],
        "logit_sequence_tokens": options["logit_tokens"],
        "fit_sequences": options["fit_sequences"],
        "selection_sequences": options["held_out_sequences"],
        "evaluation_sequences": options["held_out_sequences"],
        "evaluation_sequence_tokens": options["held_out_tokens"],
        "quantizer": options["quantizer"],
        "seed": options["seed"],
        "gradient_dtype": choose_dtype() if options["dtype"] == "auto" else options["dtype"],
        "until_stable": options["until_stable"] or None,
    }
    set_amounts = {name: value for name, value in amounts.items() if value is not None}
    for name, word in (("logit_passes", "all"), ("fit_plans", "none")):
        if options[name] is not None:
            set_amounts[name] = _parse_count(options[name], name, word)
    menu = DEFAULT_FORMATS if options["engine"] is None else find_engine(options["engine"]).menu
    formats = _names(options["formats"]) or menu
    embedding_formats = _names(options["embedding_formats"])
    known = tuple(FORMATS) if formats == (MENU,) else formats
    find_formats([*known])
    find_formats([*(embedding_formats or known)])
    transforms = _names(options["transforms"]) or ()
    for transform in transforms:
        parse_transform(transform)
    cache_formats = _names(options["cache_formats"]) or ()
    if cache_formats:
        find_cache_formats(cache_formats)
    activation_formats = _names(options["activation_formats"]) or ()
    if activation_formats:
        find_activation_formats(activation_formats)
    return MeasureRequest(
        **{name: options[name] for name in ("calibration", "selection", "evaluation", "fuse")},
        formats=formats,
        embedding_formats=embedding_formats,
        experts=options["experts"] or "projection",
        routers=options["routers"],
        pins=_make_pins(options["pins"]),
        transforms=transforms,
        cache_formats=cache_formats,
        activation_formats=activation_formats,
        config=MeasureConfig(**set_amounts),
    )


def _parse_count(text: str, name: str, word: str) -> int | None:
    """Returns a whole number, or None for the word."""
    if text == word:
        return None
    try:
        return int(text)
    except ValueError as error:
        msg = f"--{name.replace('_', '-')} must be a whole number or '{word}': got '{text}'."
        raise ValueError(msg) from error


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


def with_progress(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Returns what a function returns that is given a progress bar on stderr."""
    from allocator.progress import shown_progress

    with shown_progress() as progress:
        return function(*arguments, progress=progress, **options)
