"""Formats of caches: their bytes against numbers worked out by hand, and the most bytes against every length."""

import pytest

from runtime.cache_formats import (
    CACHE_FORMATS,
    CacheLoad,
    TokenBlockFormat,
    cache_bytes,
    find_cache_formats,
    most_cache_bytes,
)
from runtime.formats import FORMATS, INTEGER_BITS


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        # 3 heads of 64 numbers, a token: 32 bytes of codes a head, 2 scales, 2 zero points of half a byte.
        ("int4_g32", 7, 7 * 3 * (32 + 4 + 1)),
        ("bf16", 7, 7 * 3 * 64 * 2),
        # 192 channels a block: 32 codes of 3 bits, a scale, a zero point; the rest in float16.
        ("int3_t32", 31, 31 * 192 * 2),
        ("int3_t32", 32, 192 * (12 + 2 + 1)),
        ("int3_t32", 100, 3 * 192 * (12 + 2 + 1) + 4 * 192 * 2),
        ("int8_t128", 129, 192 * (128 + 2 + 1) + 192 * 2),
    ],
)
def test_bytes_of_a_sequence(name: str, tokens: int, expected: int) -> None:
    assert cache_bytes(CACHE_FORMATS[name], (3, 64), tokens) == expected


@pytest.mark.parametrize("name", ["int4_g32", "bf16", "int2_t32", "int8_t32", "int3_t64", "int4_t128"])
def test_the_most_bytes_are_those_of_the_worst_length(name: str) -> None:
    format_, most = CACHE_FORMATS[name], 0
    for tokens in range(1, 300):
        most = max(most, 5 * cache_bytes(format_, (2, 32), tokens))
        assert most_cache_bytes(format_, (2, 32), CacheLoad(context=tokens, batch=5)) == most


def test_every_format_of_weights_is_one_of_caches_and_no_other_way_round() -> None:
    assert FORMATS.items() <= CACHE_FORMATS.items()
    own = {name for name in CACHE_FORMATS if name not in FORMATS}
    assert own == {f"int{bits}_t{block}" for bits in INTEGER_BITS for block in (32, 64, 128)}
    for name in own:
        format_ = CACHE_FORMATS[name]
        assert isinstance(format_, TokenBlockFormat) and format_.name == name
        assert format_.row_format.name == f"int{format_.bits}_channel"
    assert CacheLoad(context=3, batch=4).token_count == 12


def test_formats_by_name() -> None:
    assert [f.name for f in find_cache_formats(["bf16", "int2_t32"])] == ["bf16", "int2_t32"]
    with pytest.raises(ValueError, match="must be a known name: got 'int9_t32'. Spelled alike: int"):
        find_cache_formats(["bf16", "int9_t32"])
    for names in ([], ["bf16", "bf16"]):
        with pytest.raises(ValueError, match="cache formats must name at least one format, each once: got"):
            find_cache_formats(names)
