"""Every storage format on one real layer: kinds of bits, error, and who can run it. Writes formats.md.

The README shows the formats of ``SHOWN``.
"""

from pathlib import Path
from typing import Any

from machine import describe_machine

import allocator
from allocator.demo_model import prepare_demo_model
from allocator.progress import shown_progress
from allocator.store import Store

WEIGHT = "model.layers.15.mlp.down_proj.weight"
SHOWN = (
    *("int1_g64", "int1_g64_sym_pow2", "int2_g64", "int3_g64", "int4_g64", "int4_g64_sym_pow2", "int8_channel_sym"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("fp4_channel", "fp4_g64", "fp6_g64", "fp8_e4m3_channel", "fp8_e5m2_channel"),
    *("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8", "nvfp4", "nvint4", "bf16"),
)
COLUMNS = "| format | family | nominal | entropy | packed | stored | relative error | who can run it |"


def main() -> None:
    store = Store()
    model = allocator.Model(str(prepare_demo_model(store.root)))
    with shown_progress() as progress:
        rows = allocator.list_formats(model, weight=WEIGHT, progress=progress)
    best = {row["format"] for row in rows if is_undominated(row, rows)}
    text = "\n".join(
        [
            "# Storage formats, SmolLM2-135M",
            "",
            f"Made by `python benchmarks/bench_formats.py`. Machine: {describe_machine()}.",
            "",
            f"`{WEIGHT}`, 576 × 1536. Bits are per weight; stored bits include scales, padding and all other metadata.",
            "Entropy is that of the codes. Relative error is ‖W − Ŵ‖ / ‖W‖, integers rounded to nearest, all other",
            "formats by their own search, without input statistics. Bold: no other format has both fewer stored bits",
            "and less error.",
            "",
            "## One or two of each family",
            "",
            *lay_out([row for row in rows if row["format"] in SHOWN], best, key=lambda row: SHOWN.index(row["format"])),
            "",
            "## All, by stored bits",
            "",
            *lay_out(rows, best, key=lambda row: (row["stored_bits"], row["relative_error"])),
            "",
        ]
    )
    (Path(__file__).parent / "formats.md").write_text(text, encoding="utf-8")


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
