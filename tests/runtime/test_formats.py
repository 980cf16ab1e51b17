"""A format's bytes are those of the tensors it is packed into."""

import pytest
import torch

from runtime.apply import pack_weight
from runtime.formats import DEFAULT_FORMATS, FORMATS, Format, find_format, find_formats

# One row, one weight, primes, one group, several groups, an odd number of groups, more rows than columns.
SHAPES = [(1, 1), (1, 64), (1, 128), (5, 97), (13, 7), (7, 32), (3, 96), (2, 384), (11, 640), (257, 2)]


@pytest.mark.parametrize("format_", FORMATS.values(), ids=list(FORMATS))
def test_bytes_are_those_of_the_packed_tensors(format_: Format) -> None:
    for shape in SHAPES:
        if format_.fits(shape[1]):
            packed = pack_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), format_)
            assert format_.storage_bytes(shape) == sum(t.nbytes for t in packed.buffers()), shape
            stored = {t.name: (t.shape, getattr(torch, t.dtype)) for t in format_.stored_tensors(shape)}
            assert {name: (t.shape, t.dtype) for name, t in packed.named_buffers()} == stored


@pytest.mark.parametrize(
    ("name", "shape", "expected_bytes"),
    [
        # 64 codes of 4 bits, 2 scales of 2 bytes, 2 zero points of 4 bits: 64 + 4 + 1 a row.
        ("int4_g64", (3, 128), 3 * 69),
        ("int4_g64_sym", (3, 128), 3 * 68),
        # 5 codes of 3 bits in 2 bytes, a scale, a zero point of 3 bits in 1 byte.
        ("int3_channel", (1, 5), 5),
        ("int8_g32", (2, 96), 2 * (96 + 6 + 3)),
        ("bf16", (3, 7), 42),
        # 97 digits five to a byte, and a scale.
        ("ternary_channel", (3, 97), 3 * (20 + 2)),
        # Codes, two scales, two selectors of 2 bits; 1 bit.
        ("bitmod3_g64", (3, 128), 3 * (48 + 4 + 1)),
        ("intfp8_g64", (3, 128), 3 * (128 + 4 + 1)),
        # Codes, a scale for each of three planes of each of two groups: two bytes, or an exponent.
        ("bcq3_g64", (5, 128), 5 * (48 + 12)),
        ("bcq3_g64_pow2", (5, 128), 5 * (48 + 6)),
        # Eight bits in three parts, each padded to a byte, and three scales.
        ("nested8_channel", (2, 97), 2 * (49 + 25 + 25 + 6)),
        # Four bits and their scales as a symmetric integer has them, and the rest of 2 or 4 bits.
        ("nested4_6_channel", (2, 97), 2 * (49 + 2 + 25)),
        ("nested4_8_g32", (3, 64), 3 * (32 + 4 + 32)),
        # Two blocks: a sign a weight, factors of rank 3, which is the number of rows.
        ("bitstack2_r4", (3, 97), 2 * (3 * 13 + 2 * 3 * (3 + 97))),
    ],
)
def test_bytes_by_hand(name: str, shape: tuple[int, int], expected_bytes: int) -> None:
    assert FORMATS[name].storage_bytes(shape) == expected_bytes


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_group_that_does_not_divide_the_row_is_refused(group_size: int) -> None:
    in_features = 3 * group_size + 1
    format_ = FORMATS[f"int4_g{group_size}"]
    assert not format_.fits(in_features)
    assert format_.refusal(in_features) == f"group_size={group_size} does not divide in_features={in_features}"
    assert format_.refusal(2 * group_size) is None
    with pytest.raises(ValueError, match=f"must divide.*group_size={group_size}, in_features={in_features} in format"):
        format_.group_count(in_features)
    with pytest.raises(ValueError, match=f"group_size={group_size}, in_features={in_features}"):
        format_.storage_bytes((2, in_features))


def test_groups_of_a_row() -> None:
    assert FORMATS["int4_g32"].group_count(96) == 3
    assert FORMATS["int4_channel"].group_count(97) == 1
    assert FORMATS["bf16"].fits(97)


def test_names_say_what_the_formats_are() -> None:
    for name, format_ in FORMATS.items():
        assert format_.name == name
    fields = FORMATS["int3_g32_sym"]
    assert (fields.kind, fields.bits, fields.group_size, fields.symmetric) == ("int", 3, 32, True)
    assert FORMATS["int8_channel"].group_size is None
    assert FORMATS["fp16"].bits == 16


def test_find_format() -> None:
    assert find_format("int4_g64") is FORMATS["int4_g64"]
    assert [f.name for f in find_formats(DEFAULT_FORMATS)] == list(DEFAULT_FORMATS)
    with pytest.raises(
        ValueError, match=r"known name: got 'int9_g64'\. Spelled alike: int\d_g64, .*'bitplan formats' lists all \d+"
    ):
        find_format("int9_g64")


@pytest.mark.parametrize("names", [(), ("bf16", "int4_g64", "bf16")], ids=["none", "twice"])
def test_formats_named_not_once_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least one format, each once"):
        find_formats(names)
