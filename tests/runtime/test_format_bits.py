"""Kinds of bits: by hand, against each other, and entropies in closed form."""

import numpy as np
import pytest
import torch

from runtime.format_bits import code_entropy, describe_format
from runtime.formats import FORMATS, Format
from runtime.rendering import render


@pytest.mark.parametrize(
    ("name", "shape", "packed", "stored"),
    [
        # 64 codes of 3 bits in 24 bytes, a scale of 16 bits, a zero point padded to 8.
        ("int3_g64", (5, 64), 3.0, 3 + 24 / 64),
        # 5 codes of 3 bits in 2 bytes.
        ("int3_channel_sym", (2, 5), 16 / 5, 32 / 5),
        ("mxfp4", (1, 64), 4.0, 4.25),
        # E4M3 scales of 16 weights each, and 32 bits for the whole weight.
        ("nvfp4", (2, 64), 4.0, 4.5 + 32 / 128),
        ("q2_k", (3, 256), 2.0, 2.625),
        ("q6_k", (3, 512), 6.0, 6.5625),
        ("fp4_channel", (3, 100), 4.0, 4 + 24 / 100),
        ("int1_g32_sym_pow2", (3, 64), 1.0, 1.25),
        ("bf16", (3, 7), 16.0, 16.0),
    ],
)
def test_bits_by_hand(name: str, shape: tuple[int, int], packed: float, stored: float) -> None:
    bits = describe_format(FORMATS[name], shape)
    assert (bits.packed, bits.stored) == pytest.approx((packed, stored), abs=1e-12)
    assert (bits.entropy, bits.relative_error) == (None, None)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=list(FORMATS))
def test_kinds_of_bits_are_ordered(format_: Format) -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    bits = describe_format(format_, (3, 256), weight)
    assert bits.entropy is not None and bits.relative_error is not None
    assert bits.entropy <= bits.nominal <= bits.packed <= bits.stored
    assert bits.stored == pytest.approx(8 * format_.storage_bytes((3, 256)) / 768)
    error = np.linalg.norm(render(weight, format_).double() - weight.double()) / np.linalg.norm(weight.double())
    assert bits.relative_error == pytest.approx(float(error), rel=1e-9)


def test_entropy() -> None:
    assert code_entropy(torch.arange(64).remainder(16)) == pytest.approx(4.0)
    assert code_entropy(torch.zeros(9)) == 0.0
    shares = np.array([1, 2, 5]) / 8
    assert code_entropy(torch.tensor([[3, 1, 1, 0], [0, 0, 0, 0]])) == pytest.approx(-(shares * np.log2(shares)).sum())


def test_weight_of_zeros_has_no_error() -> None:
    bits = describe_format(FORMATS["int4_g64"], (2, 64), torch.zeros(2, 64))
    assert (bits.relative_error, bits.entropy) == (0.0, 0.0)


def test_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size=256, in_features=64 in format 'q4_k'"):
        describe_format(FORMATS["q4_k"], (2, 64))
