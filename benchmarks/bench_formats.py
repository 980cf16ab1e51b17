"""Every storage format on one real layer: kinds of bits, error, and who can run it. Writes formats.md.

The README shows the formats of ``SHOWN``. ``--output-error`` adds the output error on inputs that nothing saw, with and
without input statistics.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor

import allocator
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import prepare_text
from allocator.progress import shown_progress
from allocator.store import Store
from runtime.codecs import CODECS
from runtime.formats import FORMATS
from runtime.quantizers import InputStatistics
from runtime.rendering import render
from runtime.units import list_weights, read_weight

WEIGHT = "model.layers.15.mlp.down_proj.weight"
SHOWN = (
    *("int1_g64", "int1_g64_sym_pow2", "int2_g64", "int3_g64", "int4_g64", "int4_g64_sym_pow2", "int8_channel_sym"),
    *("ternary_channel", "ternary_g64", "int1_top20int4_channel", "bitstack2_r4", "bcq2_g64", "dual_binary_g64"),
    *("int2_mix25int4_g64", "int2_mix25int4_g64_outliers", "bitmod3_g64", "bcq3_g64_pow2", "bcq3_g64"),
    *("bitmod4_g64", "intfp4_g32", "int4_top12int8_g64", "nested8_g64"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "iq4_nl"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("fp4_channel", "fp4_g64", "fp6_g64", "fp8_e4m3_channel", "fp8_e5m2_channel"),
    *("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8", "nvfp4", "nvint4", "bf16"),
)
WITH_STATISTICS = (
    *("ternary_g64", "bcq2_g64", "int2_mix25int4_g64_outliers", "bitmod3_g64", "bcq3_g64", "bitmod4_g64"),
    *("int1_top20int4_channel", "dual_binary_g64", "bitstack2_r4", "intfp4_g32", "int4_top12int8_g64", "nested8_g64"),
    *("int1_g64", "int2_g64", "q2_k", "fp3_g64", "int3_g64", "q3_k", "int4_g64", "fp4_g64", "mxfp4", "nvfp4", "nvint4"),
    *("q4_0", "q4_k", "iq4_xs", "q5_k", "fp6_g64", "mxint8"),
)
SEQUENCES = 8
COLUMNS = "| format | family | nominal | entropy | packed | stored | relative error | who can run it |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-error", action="store_true", help="measure output errors on held-out inputs as well")
    arguments = parser.parse_args()
    flag = " --output-error" if arguments.output_error else ""
    store = Store()
    model = allocator.Model(str(prepare_demo_model(store.root)))
    with shown_progress() as progress:
        rows = allocator.list_formats(model, weight=WEIGHT, quantizer="clipping", progress=progress)
    best = {row["format"] for row in rows if is_undominated(row, rows)}
    text = "\n".join(
        [
            "# Storage formats, SmolLM2-135M",
            "",
            f"Made by `python benchmarks/bench_formats.py{flag}`. Machine: {describe_machine()}.",
            "",
            f"`{WEIGHT}`, 576 × 1536. Bits are per weight; stored bits include scales, padding and other metadata.",
            "Entropy is that of the codes. Relative error is ‖W − Ŵ‖ / ‖W‖, integers by `clipping`, all others by",
            "their own search, without statistics. Bold: no other format has both fewer stored bits and less error.",
            "",
            "## One or two of each family",
            "",
            *lay_out([row for row in rows if row["format"] in SHOWN], best, key=lambda row: SHOWN.index(row["format"])),
            "",
            *(lay_out_output_errors(model, store) if arguments.output_error else ()),
            "## All, by stored bits",
            "",
            *lay_out(rows, best, key=lambda row: (row["stored_bits"], row["relative_error"])),
            "",
        ]
    )
    (Path(__file__).parent / "formats.md").write_text(text, encoding="utf-8")


def lay_out_output_errors(model: allocator.Model, store: Store) -> list[str]:
    """Returns the lines of a table of ‖(W − Ŵ)X‖ / ‖WX‖ for X of texts that the statistics are not of."""
    text = prepare_text(model.reference, demo_request(store))
    known, unknown = (
        find_statistics(model.reference.model, tokens[:SEQUENCES])
        for tokens in (text.fisher.tokens, text.selection.tokens)
    )
    weight = read_weight(model.reference.model, list_weights(model.reference.model)[WEIGHT])
    whole = unknown.output_error(weight)
    lines = [
        "## Output error on held-out inputs",
        "",
        f"‖(W − Ŵ)X‖ / ‖WX‖, X the inputs of {unknown.count} tokens; statistics of {known.count} tokens of other text.",
        "",
        "| format | stored | weight alone | importance of columns | GPTQ |",
        "|---|---|---|---|---|",
    ]
    for name in WITH_STATISTICS:
        format_ = FORMATS[name]
        importance = known.hessian().diagonal()
        codec, shape = CODECS[format_.kind], (weight.shape[0], weight.shape[1])
        rendered = (
            render(weight, format_, "clipping"),
            codec.decode(codec.encode(weight, format_, importance), format_, shape, None),
            render(weight, format_, "gptq", statistics=known),
        )
        errors = " | ".join(f"{(unknown.output_error(each - weight) / whole) ** 0.5:.4f}" for each in rendered)
        lines.append(f"| {name} | {8 * format_.storage_bytes(shape) / weight.numel():.3f} | {errors} |")
    return [*lines, ""]


def find_statistics(model: Any, tokens: Tensor) -> InputStatistics:
    """Returns the statistics of the inputs of ``WEIGHT`` on tokens [S, T]."""
    inputs: list[Tensor] = []
    module = model.get_submodule(WEIGHT.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0].flatten(0, 1)))
    with torch.no_grad():
        for sequence in tokens:
            model(sequence.unsqueeze(0), use_cache=False)
    handle.remove()
    x = torch.cat(inputs)
    return InputStatistics(second_moment=x.T @ x, count=len(x))


def is_undominated(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Returns whether no row has fewer stored bits and less error, or as few of one and less of the other."""
    own = (row["stored_bits"], row["relative_error"])
    pairs = [(other["stored_bits"], other["relative_error"]) for other in rows]
    return not any(bits <= own[0] and error <= own[1] and (bits, error) != own for bits, error in pairs)


def lay_out(rows: list[dict[str, Any]], best: set[str], *, key: Any) -> list[str]:
    """Returns the lines of a table."""
    lines = [COLUMNS, "|---" * 8 + "|"]
    for row in sorted(rows, key=key):
        name = f"**{row['format']}**" if row["format"] in best else row["format"]
        bits = " | ".join(f"{row[kind]:.3f}" for kind in ("entropy_bits", "packed_bits", "stored_bits"))
        error, engines = f"{row['relative_error']:.4f}", ", ".join(row["runs_on"])
        lines.append(f"| {name} | {row['kind']} | {row['nominal_bits']} | {bits} | {error} | {engines} |")
    return lines


if __name__ == "__main__":
    main()
