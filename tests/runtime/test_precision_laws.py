"""Laws of time against precision: the papers' ratios, and statistics of codes against sampled ones."""

import math

import pytest
import torch

from runtime.formats import FORMATS
from runtime.precision_laws import (
    LAWS,
    activation_serial_work,
    bit_parallel_work,
    bit_serial_work,
    count_signed_digits,
    detected_bits,
    mean_digits,
    median_greatest,
    operand_widths,
    signed_digit_work,
    tiled_serial_work,
    zero_share,
    zero_skipping_work,
)

SHAPE = (192, 576)
WEIGHTS = math.prod(SHAPE)


def test_sixteen_bits_by_sixteen_are_one_product_each() -> None:
    for name, law in LAWS.items():
        if name not in ("tiled-serial", "zero-skipping"):
            assert law(FORMATS["bf16"], SHAPE, 5.0, 16) == pytest.approx(5 * WEIGHTS, rel=1e-12), name
    # Of sixteen bits hardly a weight is zero.
    assert zero_skipping_work(FORMATS["bf16"], SHAPE, 5.0, 16) == pytest.approx(5 * WEIGHTS, rel=1e-3)


def test_loom_is_proportional_to_the_bits_of_the_weights_alone_for_a_token() -> None:
    for name, bits in [
        ("int4_g64", 4),
        ("int3_channel_sym", 3),
        ("int8_g64", 8),
        ("int1_g64", 1),
        ("fp8_e4m3_channel", 16),
    ]:
        for activation_bits in (4, 8, 16):
            assert bit_serial_work(FORMATS[name], SHAPE, 1.0, activation_bits) == WEIGHTS * bits / 16


def test_loom_is_proportional_to_the_bits_of_both_for_many_tokens() -> None:
    work = bit_serial_work(FORMATS["int4_g64"], SHAPE, 64.0, 8)
    assert work == 64 * WEIGHTS * (4 / 16) * (8 / 16)
    assert bit_serial_work(FORMATS["int8_g64"], SHAPE, 64.0, 4) == work


def test_the_width_of_weights_does_not_matter_where_activations_are_serial_or_nothing_is() -> None:
    for law in (bit_parallel_work, activation_serial_work):
        assert law(FORMATS["int2_g64"], SHAPE, 3.0, 8) == law(FORMATS["bf16"], SHAPE, 3.0, 8)
    assert activation_serial_work(FORMATS["bf16"], SHAPE, 1.0, 8) == WEIGHTS * detected_bits(8, 576) / 16


def test_bitmod_takes_whole_tiles_and_two_bits_a_cycle() -> None:
    # 144 steps along k, 3 rows of tiles, 1 column of them, in 2 cycles of 512 products: int3 takes as long as int4.
    cycles = 144 * 3 * 2
    for name in ("int3_g64", "int4_g64", "bitmod4_g64", "mxfp4"):
        assert tiled_serial_work(FORMATS[name], SHAPE, 1.0, 16) == cycles * 512
    assert tiled_serial_work(FORMATS["int4_g64"], SHAPE, 16.0, 16) == cycles * 512
    assert tiled_serial_work(FORMATS["int4_g64"], SHAPE, 17.0, 16) == 2 * cycles * 512
    assert tiled_serial_work(FORMATS["int2_g64"], (193, 577), 1.0, 16) == 145 * 4 * 512


def test_signed_digits_are_the_fewest_there_are() -> None:
    def fewest(value: int) -> int:
        """Returns the least number of signed powers of two that sum to a value, by search."""
        reached, steps = {0}, 0
        powers = [sign * 2**k for k in range(9) for sign in (1, -1)]
        while value not in reached:
            reached, steps = {a + b for a in reached for b in powers}, steps + 1
        return steps

    assert [count_signed_digits(value) for value in range(-128, 129)] == [fewest(value) for value in range(-128, 129)]


@pytest.mark.parametrize("group", [32, 128, 1024])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_normal_weights(bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**21 // group, group, generator=generator, dtype=torch.float64)
    greatest = x.abs().amax(dim=1)
    # The median is half-way: as many groups have a larger greatest number.
    share = float((greatest > median_greatest(group)).double().mean())
    assert abs(share - 0.5) <= 4 * 0.5 / math.sqrt(len(x))
    largest_code = 2 ** (bits - 1) - 1
    codes = (x * (largest_code / median_greatest(group))).round().clamp(-largest_code, largest_code).long()
    # Four standard errors of a mean over two million codes of up to 5 digits.
    digits = torch.tensor([count_signed_digits(code) for code in range(largest_code + 1)])[codes.abs()].double()
    assert abs(float(digits.mean()) - mean_digits(bits, group)) <= 4 * float(digits.std()) / math.sqrt(x.numel())
    zeros = float((codes == 0).double().mean())
    assert abs(zeros - zero_share(bits, group)) <= 4 * 0.5 / math.sqrt(x.numel())


def test_fewer_digits_and_more_zeros_are_less_work() -> None:
    names = ("int2_g64", "int3_g64", "int4_g64", "int6_g64", "int8_g64", "bf16")
    for law in (signed_digit_work, zero_skipping_work):
        work = [law(FORMATS[name], SHAPE, 1.0, 8) for name in names]
        assert work == sorted(work)
        assert work[0] < work[-1]
    # Two bits hold more zeros than can be skipped.
    assert zero_share(2, 64) > 2 / 3
    assert zero_skipping_work(FORMATS["int2_g64"], SHAPE, 1.0, 16) * 3 == pytest.approx(
        activation_serial_work(FORMATS["int2_g64"], SHAPE, 1.0, 16)
    )
    # One bit has no zero and one digit.
    assert (zero_share(1, 64), mean_digits(1, 64)) == (0.0, 1.0)


def test_what_is_multiplied_by() -> None:
    assert operand_widths(FORMATS["int5_g64"]) == ((5, 1.0),)
    assert operand_widths(FORMATS["q6_k"]) == ((6, 1.0),)
    # No integers: decoded before.
    for name in ("iq4_xs", "nvfp4", "bitmod4_g64", "fp4_g64", "bf16"):
        assert operand_widths(FORMATS[name]) == ((16, 1.0),)
    mixture = FORMATS["int2_mix25int4_g64"]
    assert operand_widths(mixture) == ((4, 0.25), (2, 0.75))
    assert bit_serial_work(mixture, (64, 256), 1.0, 8) == 64 * 256 * 2.5 / 16
