"""What the compiler makes of the experts' launch: a switch over formats costs what its widest member costs.

Each format has a loop of its own, no longer than ``golden_expert_instructions.json`` records. To write it anew:

    python -m tests.gpu_kernels.compiled.test_compiled_experts
"""

import json
from pathlib import Path

import pytest

from runtime.kernels.triton.aot import CompiledProduct, compile_grouped_experts
from runtime.kernels.triton.fragment_layout import TWO_VALUES
from runtime.kernels.triton.grouped_experts import Kind
from runtime.kernels.triton.sass import count_copies

GOLDEN = Path(__file__).with_name("golden_expert_instructions.json")
STAGES = 3
WIDTHS, GATED = "int2-int3-int4-int8", "int4-mxfp4-nvfp4-int1-gated"
LAUNCHES: dict[str, tuple[Kind, ...]] = {
    WIDTHS: tuple((bits, 128, False, 2, "fp16", -1) for bits in (2, 3, 4, 8)),
    # Integers, MXFP4, NVFP4 and one bit of two values: all types of scales, all sizes of groups.
    GATED: (
        (4, 128, False, 2, "fp16", -1),
        (4, 32, True, 1, "e8m0", 1),
        (4, 16, True, 1, "e4m3", 1),
        (1, 64, False, 1, TWO_VALUES, -1),
    ),
}


def compile_launch(name: str) -> CompiledProduct:
    return compile_grouped_experts(LAUNCHES[name], architecture=90, block_m=8, gated=name == GATED)


def count_single_copies(kind: Kind) -> int:
    """Returns how many words of a step may be copied one by one: scales, zero points, and activations of 16 codes."""
    _, group_size, symmetric, *_ = kind
    groups = 64 // group_size if group_size in (16, 32) else 1
    return groups * ((1 if symmetric else 2) + (group_size == 16))


@pytest.mark.parametrize("name", LAUNCHES)
def test_experts_of_four_formats_compile_without_spills(name: str) -> None:
    kinds = LAUNCHES[name]
    code = compile_launch(name).code
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    assert code.spill_bytes == 0
    assert code.registers <= 1.05 * golden["registers"]
    assert code.count("HMMA", "HGMMA") > 0
    assert code.count("STS", "STSM") == 0
    assert not any(instruction.startswith(("I2F", "LDL", "STL")) for instruction in code.whole)
    # Everything else is copied 16 bytes wide in each stage, which an expert's offset read from memory must not spoil.
    assert count_copies(code.whole, 32) <= STAGES * sum(count_single_copies(kind) for kind in kinds)
    assert count_copies(code.whole, 128) >= STAGES * sum(kind[0] * kind[3] for kind in kinds)
    # Gate and up projection go through the same code, one after the other.
    assert len(code.loop_lengths) == len(kinds) + (name == GATED)
    for length, recorded in zip(code.loop_lengths, golden["loops"], strict=True):
        assert length <= 1.01 * recorded


def test_widths_share_the_registers_of_the_widest() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[WIDTHS]
    widest = compile_grouped_experts(LAUNCHES[WIDTHS][-1:], architecture=90, block_m=8, gated=False)
    # A few registers hold what the widths do not share.
    assert golden["registers"] <= 1.05 * widest.code.registers


def write_golden() -> None:
    """Records registers, and the instructions of each loop, for every launch."""
    found = {}
    for name in LAUNCHES:
        code = compile_launch(name).code
        found[name] = {"registers": code.registers, "loops": code.loop_lengths}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
