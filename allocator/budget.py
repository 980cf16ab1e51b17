"""Budgets: what the user allows, parsed once and turned into limits of named resources."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_BYTES = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
MEMORY = "memory_bytes"
READ = "read_bytes"
LATENCY = "latency_us"
BIT_OPERATIONS = "bit_operations"
RESOURCES = (MEMORY, READ, LATENCY, BIT_OPERATIONS)
# Those that a frontier can be along.
FRONTIER_RESOURCES = (MEMORY, READ, LATENCY)
# Resources that are not bytes: what it is, its unit of measure, an example.
_PLAIN = {
    LATENCY: ("a latency", "microseconds", "900"),
    BIT_OPERATIONS: ("a limit on bit operations", "operations a token", "8e9"),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One goal, and any number of further limits.

    Args:
        memory_bytes: Most bytes of the packed weight file, everything included; with a context, of file and cache.
        bits_per_weight: Most stored bits of the units (scales and zero points included) / their weights.
        max_kl: Most loss in nats per token; memory is then what is minimised.
        limits: Resource -> most use, besides the goal.
        batch: Sequences decoded together. What a step reads of a mixture of experts grows with it, and so does a cache.
        context: Tokens that each sequence keeps in the cache, whose formats are then part of the plan; None to leave
            the cache out.

    Raises:
        ValueError: Unless exactly one goal is given, all numbers are positive and finite, all resources are known, and
            a context goes with what is known of caches.
    """

    memory_bytes: float | None = None
    bits_per_weight: float | None = None
    max_kl: float | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    batch: int = 1
    context: int | None = None

    def __post_init__(self) -> None:
        goals = {
            name: value
            for name in ("memory_bytes", "bits_per_weight", "max_kl")
            if (value := getattr(self, name)) is not None
        }
        if len(goals) != 1:
            msg = (
                f"a budget must have exactly one of memory, bits_per_weight and max_kl: got {goals or 'none'}. "
                "Give one; further resources go in limits."
            )
            raise ValueError(msg)
        for name, value in {**goals, **self.limits}.items():
            if not 0 < value < math.inf:
                msg = f"a budget must be positive and finite: got {name}={value}. Correct it."
                raise ValueError(msg)
        if self.batch < 1:
            msg = f"a batch must be at least 1 sequence: got batch={self.batch}. Correct it."
            raise ValueError(msg)
        self._check_context()
        unknown = [name for name in self.limits if name not in RESOURCES]
        if unknown:
            msg = f"limits must be of known resources: got {unknown}. Known resources: {', '.join(RESOURCES)}."
            raise ValueError(msg)

    def _check_context(self) -> None:
        if self.context is None:
            return
        if self.context < 1:
            msg = f"a context must be at least 1 token: got context={self.context}. Correct it, or leave it out."
            raise ValueError(msg)
        if self.bits_per_weight is not None or LATENCY in self.limits:
            other = LATENCY if LATENCY in self.limits else "bits_per_weight"
            msg = (
                f"a budget with a context limits bytes or KL: got context={self.context} and {other}, which says "
                "nothing of a cache. Give memory, read_bytes or max_kl, or leave the context out."
            )
            raise ValueError(msg)

    def describe(self) -> str:
        """Returns the budget as a short text."""
        if self.memory_bytes is not None:
            parts = [f"memory <= {self.memory_bytes / 2**20:.2f} MiB"]
        elif self.bits_per_weight is not None:
            parts = [f"bits per weight <= {self.bits_per_weight:g}"]
        else:
            parts = [f"KL <= {self.max_kl:g} nats per token"]
        parts += [f"{name} <= {limit:g}" for name, limit in self.limits.items()]
        if self.context is not None:
            parts.append(f"context {self.context} tokens")
        return ", ".join(parts if self.batch == 1 else [*parts, f"batch {self.batch}"])


class InfeasibleBudget(Exception):
    """No assignment keeps the budget.

    Args:
        message: What was asked and what can be reached.
        least_use: Smallest reachable value of every limited resource.
    """

    def __init__(self, message: str, *, least_use: Mapping[str, float]) -> None:
        super().__init__(message)
        self.least_use = dict(least_use)


def parse_bytes(text: str) -> float:
    """Returns the bytes of a text such as ``70MiB``, ``1.5 GB`` or ``73400320``.

    Raises:
        ValueError: If the text is no size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match.group(2).lower() not in _BYTES:
        msg = f"a size must be a number and a unit of bytes: got '{text}'. Write 70MiB, 1.5GB or plain bytes."
        raise ValueError(msg)
    return float(match.group(1)) * _BYTES[match.group(2).lower()]


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """Returns resource -> limit of texts such as ``latency_us=900`` or ``read_bytes=60MiB``.

    Raises:
        ValueError: If a text has no ``=``, its value is no number, or a resource is there twice.
    """
    limits: dict[str, float] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            msg = f"a limit must be RESOURCE=VALUE: got '{text}'. Known resources: {', '.join(RESOURCES)}."
            raise ValueError(msg)
        name = name.strip()
        if name in limits:
            msg = f"a resource must be limited once: got '{name}' again in '{text}'. Leave one out."
            raise ValueError(msg)
        limits[name] = _parse_plain(name, value) if name in _PLAIN else parse_bytes(value)
    return limits


def _parse_plain(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        what, unit, example = _PLAIN[name]
        msg = f"{what} must be a plain number of {unit}: got '{text}'. Write {name}={example}."
        raise ValueError(msg) from error
