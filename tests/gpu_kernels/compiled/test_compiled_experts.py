"""What the compiler makes of the experts' launch: a switch over widths costs what its widest member costs."""

from runtime.kernels.triton.aot import compile_grouped_experts
from runtime.kernels.triton.sass import count_copies

WIDTHS = (2, 3, 4, 8)


def test_experts_of_four_widths_compile_without_spills() -> None:
    kinds = tuple((bits, 128, False, 2, "fp16") for bits in WIDTHS)
    product = compile_grouped_experts(kinds, architecture=90, block_m=8, gated=False)
    widest = compile_grouped_experts(kinds[-1:], architecture=90, block_m=8, gated=False)
    code = product.code
    assert code.spill_bytes == 0
    # A few registers hold what the widths do not share.
    assert code.registers <= 1.05 * widest.code.registers
    assert code.count("HMMA", "HGMMA") > 0
    assert code.count("STS", "STSM") == 0
    assert not any(name.startswith("I2F") for name in code.whole)
    # Each width copies scales and zero points as single words in three stages; everything else is 16 bytes wide, which
    # an expert's offset read from memory must not spoil.
    assert count_copies(code.whole, 32) <= len(WIDTHS) * 2 * 3
    assert count_copies(code.whole, 128) >= sum(WIDTHS) * 2 * 3
