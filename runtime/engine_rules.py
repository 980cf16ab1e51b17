"""The rules of an engine as values: formats, fusions, granularity, and why a pair of unit and format is refused.

``runtime/engines.py`` puts the table together; ``runtime/candidates.py`` applies it. Nothing is promoted or repaired
after the solve: a plan made under these rules loads as it is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.formats import Format
    from runtime.units import Unit

UNQUANTIZED = "bf16|fp16"
# Weights that match and are equal once the match is taken out get one format (`runtime.units.find_units`).
QKV = r"\.(q|k|v)_proj(?=\.)"
GATE_UP = r"\.(gate|up)_proj(?=\.)"
LATENT_QKV = r"\.(q_a_proj|kv_a_proj_with_mqa)(?=\.)"
EVERY_LAYER = r"(?<=\.)\d+(?=\.)"
SYMMETRIC_MENU = (*(f"int{bits}_g64_sym" for bits in (2, 3, 4, 5, 6, 8)), "bf16")


def integer_formats(bits: str, groups: str = "g32|g64|g128|channel", suffix: str = "(_sym)?") -> str:
    """Returns the pattern of integer formats: alternatives of bits and groups, and their symmetry."""
    return f"int({bits})_({groups}){suffix}"


@dataclass(frozen=True, kw_only=True)
class FormatRule:
    """Formats that an engine runs in some kinds of weights.

    Args:
        formats: Regular expression that the whole name of a format matches.
        kinds: Kinds of units, as in ``runtime.units.UnitKind``.
        in_multiple: What in_features must be a multiple of.
        out_multiple: What out_features must be a multiple of.
    """

    formats: str
    kinds: tuple[str, ...] = ("linear", "head")
    in_multiple: int = 1
    out_multiple: int = 1

    def describe(self) -> str:
        """Returns the rule in words."""
        divisors = [(self.in_multiple, "in_features"), (self.out_multiple, "out_features")]
        where = " and ".join(f"{multiple} divides {axis}" for multiple, axis in divisors if multiple > 1)
        return f"{self.formats} in {', '.join(self.kinds)}" + (f" where {where}" if where else "")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One deployment target and its rules.

    Args:
        name: Key in ``ENGINES``.
        reads: What it loads, in a few words.
        rules: Formats that it runs; unquantized 16-bit weights are allowed everywhere without a rule.
        fuse: Patterns of weights that must agree.
        experts: Finest granularity at which experts may differ, as in ``runtime.units.EXPERT_GRANULARITIES``.
        menu: Formats to measure for it when none are named.
        exporter: Name in ``runtime.exporters.EXPORTERS``.
        command: What runs the exported directory ``{out}``.
        instead: Format -> what the engine stores in its place, silently, where rows do not divide into its blocks.
        checked: How its exports are checked here.
        notes: What else a user must know, one sentence each.
    """

    name: str
    reads: str
    rules: tuple[FormatRule, ...]
    fuse: tuple[str, ...] = ()
    experts: str = "projection"
    menu: tuple[str, ...]
    exporter: str
    command: str
    instead: Mapping[str, str] = field(default_factory=dict)
    checked: str
    notes: tuple[str, ...] = ()

    def refusal(self, unit: "Unit", format_: "Format") -> str | None:
        """Returns why the engine cannot run a unit in a format, or None if it can."""
        if re.fullmatch(UNQUANTIZED, format_.name):
            return None
        named = [rule for rule in self.rules if re.fullmatch(rule.formats, format_.name)]
        if not named:
            return f"{self.name} cannot run {format_.name}"
        rule = next((rule for rule in named if unit.kind in rule.kinds), None)
        if rule is None:
            return f"{self.name} never quantizes a weight of kind '{unit.kind}' to {format_.name}"
        for weight in unit.weights:
            for axis, found, multiple in (
                ("out_features", weight.shape[0], rule.out_multiple),
                ("in_features", weight.shape[1], rule.in_multiple),
            ):
                if found % multiple:
                    return self._misfit(format_.name, axis, found, multiple)
        return None

    def fusions(self, weight_names: Iterable[str]) -> tuple[str, ...]:
        """Returns the patterns of ``fuse`` that some of these weights match."""
        names = list(weight_names)
        return tuple(pattern for pattern in self.fuse if any(re.search(pattern, name) for name in names))

    def _misfit(self, format_name: str, axis: str, found: int, multiple: int) -> str:
        stored = self.instead.get(format_name)
        silently = f", where it would store {stored} without a word" if stored else ""
        return f"{self.name} runs {format_name} where {multiple} divides {axis}: got {axis}={found}{silently}"


def check_legal(engine: Engine, units: Sequence["Unit"], formats_by_weight: Mapping[str, str]) -> None:
    """Checks that an engine can load weights in these formats.

    Args:
        engine: The engine.
        units: The model's units under the engine's own fusions and granularity.
        formats_by_weight: Weight name -> format name.

    Raises:
        ValueError: If it cannot; the message counts the units at fault and explains the first.
    """
    from runtime.formats import find_format

    faults: list[str] = []
    for unit in units:
        names = sorted({formats_by_weight[weight.name] for weight in unit.weights})
        if len(names) > 1:
            faults.append(f"'{unit.name}' must have one format, got {', '.join(names)}")
            continue
        reason = engine.refusal(unit, find_format(names[0]))
        if reason is not None:
            faults.append(f"'{unit.name}': {reason}")
    if faults:
        msg = (
            f"a plan must keep the rules of the engine it is exported to: got {len(faults)} units that {engine.name} "
            f"cannot load, first {faults[0]}. Plan with --engine {engine.name}."
        )
        raise ValueError(msg)
