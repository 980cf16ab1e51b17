"""Budgets: one goal, positive numbers, known resources, sizes as people write them."""

import math
from typing import Any

import pytest

from allocator.budget import Budget, parse_bytes, parse_limits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("73400320", 73400320),
        ("70MiB", 70 * 2**20),
        ("70 mib", 70 * 2**20),
        ("1.5GB", 1.5e9),
        (".5KiB", 512),
        ("2e3b", 2000),
        ("1TiB", 2**40),
        (" 3 TB ", 3e12),
    ],
)
def test_sizes(text: str, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "70 MiX", "-3MiB", "1,5GB", "70 Mi B", "nan", "1..5GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"a size must be a number and a unit of bytes: got '.*'\. Write 70MiB"):
        parse_bytes(text)


def test_limits() -> None:
    assert parse_limits(["latency_us=900.5", "read_bytes = 60MiB"]) == {
        "latency_us": 900.5,
        "read_bytes": 60 * 2**20,
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["latency_us"], r"a limit must be RESOURCE=VALUE: got 'latency_us'"),
        (["latency_us=900MiB"], r"a plain number of microseconds: got '900MiB'"),
        (["read_bytes=a lot"], r"a size must be a number"),
        (["read_bytes=1", "read_bytes=2"], r"limited once: got 'read_bytes' again"),
    ],
)
def test_limits_that_are_none(texts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_limits(texts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"exactly one of memory, bits_per_weight and max_kl: got none"),
        ({"memory_bytes": 5, "max_kl": 0.1}, r"exactly one .* got \{'memory_bytes': 5, 'max_kl': 0.1\}"),
        ({"memory_bytes": 0}, r"positive and finite: got memory_bytes=0"),
        ({"max_kl": -1.0}, r"positive and finite: got max_kl=-1"),
        ({"bits_per_weight": math.nan}, r"positive and finite: got bits_per_weight=nan"),
        ({"memory_bytes": math.inf}, r"positive and finite: got memory_bytes=inf"),
        ({"max_kl": 1, "limits": {"read_bytes": 0.0}}, r"positive and finite: got read_bytes=0"),
        ({"max_kl": 1, "context": 0}, r"a context must be at least 1 token: got context=0"),
        ({"bits_per_weight": 4, "context": 9}, r"limits bytes or KL: got context=9 and bits_per_weight"),
        ({"max_kl": 1, "limits": {"latency_us": 3}, "context": 9}, r"got context=9 and latency_us, which says nothing"),
        ({"max_kl": 1, "limits": {"joules": 3.0}}, r"known resources: got \['joules'\].*memory_bytes, read_bytes"),
    ],
)
def test_budgets_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"memory_bytes": 70 * 2**20}, "memory <= 70.00 MiB"),
        ({"bits_per_weight": 3.5, "limits": {"latency_us": 900}}, "bits per weight <= 3.5, latency_us <= 900"),
        ({"max_kl": 0.05}, "KL <= 0.05 nats per token"),
        ({"max_kl": 0.05, "context": 2048, "batch": 8}, "KL <= 0.05 nats per token, context 2048 tokens, batch 8"),
    ],
)
def test_description(fields: dict[str, Any], text: str) -> None:
    assert Budget(**fields).describe() == text


def test_a_batch_is_named_where_it_is_not_one() -> None:
    assert Budget(bits_per_weight=4).describe() == "bits per weight <= 4"
    assert Budget(bits_per_weight=4, limits={"read_bytes": 9}, batch=8).describe() == (
        "bits per weight <= 4, read_bytes <= 9, batch 8"
    )
    with pytest.raises(ValueError, match="a batch must be at least 1 sequence: got batch=0"):
        Budget(bits_per_weight=4, batch=0)
