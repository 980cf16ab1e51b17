"""What each engine can load, as data, so that legality is settled before any solve.

An engine's rules have four parts: which formats it runs in which kind of weight and at which row lengths, which
weights it fuses (they must agree), how finely experts may differ, and what it would do without a word where a format
does not fit. ``Engine.refusal`` is the reason a pair of unit and format is not a candidate; ``Engine.fusions`` are the
patterns that a model's own weights match. Nothing is promoted or repaired after the solve: a plan made under these
rules loads as it is.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.formats import Format
    from runtime.units import Unit

# Weights that match and are equal once the match is taken out get one format (`runtime.units.find_units`).
QKV = r"\.(q|k|v)_proj(?=\.)"
GATE_UP = r"\.(gate|up)_proj(?=\.)"
LATENT_QKV = r"\.(q_a_proj|kv_a_proj_with_mqa)(?=\.)"
EVERY_LAYER = r"(?<=\.)\d+(?=\.)"

UNQUANTIZED = "bf16|fp16"


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


def _integers(bits: str, groups: str = "g32|g64|g128|channel", suffix: str = "(_sym)?") -> str:
    """Returns the pattern of integer formats: alternatives of bits and groups, and their symmetry."""
    return f"int({bits})_({groups}){suffix}"


_COMPRESSED = _integers("2|3|4|5|6|7|8", groups="g16|g32|g64|g128|g256|channel", suffix="_sym")
_GGUF_KINDS = ("linear", "head", "embedding", "expert")

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            name="llama.cpp",
            reads="GGUF, every tensor in a type of its own",
            rules=(
                FormatRule(formats=r"q[458]_0|q[45]_1|int(4|5|8)_g32_sym", kinds=_GGUF_KINDS, in_multiple=32),
                FormatRule(formats=r"q[23456]_k", kinds=_GGUF_KINDS, in_multiple=256),
            ),
            experts="stack_projection",
            menu=("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16"),
            instead={"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"},
            exporter="llama.cpp",
            command="llama-cli -m {out}/model.gguf -p 'The'",
            checked="loaded by llama.cpp on a CPU; tensors' types and bytes equal, logits compared",
            notes=(
                "All experts of a projection are one tensor of one type; norms, biases and routers stay float32.",
                "tensor-types.txt is for llama-quantize --tensor-type-file, which ignores it under the base types F32, "
                "F16 and BF16: name a quantized one.",
            ),
        ),
        Engine(
            name="transformers",
            reads="compressed-tensors, pack-quantized",
            rules=(FormatRule(formats=_COMPRESSED),),
            menu=(
                "int2_g64_sym",
                "int3_g64_sym",
                "int4_g64_sym",
                "int5_g64_sym",
                "int6_g64_sym",
                "int8_g64_sym",
                "bf16",
            ),
            exporter="compressed-tensors",
            command=(
                "python -c \"from transformers import pipeline; print(pipeline('text-generation', '{out}')('The'))\""
            ),
            checked="loaded by transformers on a CPU; weights equal bit for bit, logits equal",
            notes=(
                "Asymmetric formats are refused: transformers 5.23 expects zero points in another shape than "
                "compressed-tensors 0.20 writes, and stops.",
                "3, 5, 6 and 7 bits need compressed-tensors 0.18 or newer, which packs them densely.",
                "Embeddings, and experts that transformers stores as one 3-D parameter, stay unquantized.",
            ),
        ),
        Engine(
            name="vllm",
            reads="compressed-tensors, pack-quantized",
            rules=(
                FormatRule(formats=_integers("4"), kinds=("linear", "expert"), in_multiple=32, out_multiple=32),
                FormatRule(
                    formats=_integers("8", suffix="_sym"), kinds=("linear", "expert"), in_multiple=32, out_multiple=32
                ),
            ),
            fuse=(QKV, GATE_UP, LATENT_QKV),
            experts="stack",
            menu=("int4_g32", "int4_g64", "int4_g128", "int4_channel", "int8_g64_sym", "int8_channel_sym", "bf16"),
            exporter="compressed-tensors",
            command="vllm serve {out} --dtype float16",
            checked="the files are those that transformers loads; vLLM itself was not run",
            notes=(
                "8 bits without activations' quantization, and all of Marlin, need a GPU.",
                "vLLM reads one scheme for all experts of a layer.",
            ),
        ),
    )
}


def find_engine(name: str) -> Engine:
    """Returns the engine called ``name``.

    Raises:
        ValueError: If there is none; the message lists the known names.
    """
    if name not in ENGINES:
        msg = f"engine must be a known name: got '{name}'. Known engines: {', '.join(ENGINES)}."
        raise ValueError(msg)
    return ENGINES[name]


def describe_engines() -> list[dict[str, Any]]:
    """Returns the table as JSON values, one record an engine."""
    return [
        {
            "name": engine.name,
            "reads": engine.reads,
            "formats": [rule.describe() for rule in engine.rules],
            "menu": list(engine.menu),
            "fuse": list(engine.fuse),
            "experts": engine.experts,
            "exporter": engine.exporter,
            "command": engine.command,
            "instead": dict(engine.instead),
            "checked": engine.checked,
            "notes": list(engine.notes),
        }
        for engine in ENGINES.values()
    ]


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
