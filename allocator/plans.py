"""The plan: a named outcome of a solve, with its proof, its measurements and where it came from."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from allocator.json_values import jsonable
from allocator.notebook import plan_html
from runtime.activation_names import module_of

SCHEMA_VERSION = 3
# Of the 8 KiB that runtime/checkpoint.py sets aside for all metadata besides the formats.
_HEADER_BYTES = 6 * 1024
_SHORTENED_CHARACTERS = (1000, 300, 100, 30, 10)
# Parts that only some plans have.
OPTIONAL_PARTS = {"cache", "activations"}


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """One unit's part of a plan; losses in nats per token, or the metric's own unit where no metric has this one."""

    unit: str
    role: str
    layer_index: int | None
    expert_index: int | None
    format: str
    bits: int
    weights: int
    memory_bytes: int
    predicted_loss: float
    std_error: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measured quality of one assignment on held-out text, with 95 % intervals over sequences.

    Args:
        name: Name of the assignment.
        kind: ``reference``, ``plan`` or ``uniform``.
        memory_bytes: Bytes of its weight file, and of its full cache where that has formats.
        bits_per_weight: Stored bits of its units per weight.
        predicted_kl: Loss its own metric predicted, nats per token, or None.
        kl: Mean KL divergence to the reference in nats per token, with ``kl_low`` and ``kl_high``.
        perplexity: exp of the mean negative log-likelihood, with its interval.
        tokens: Positions measured.
        shipped: Whether this is the assignment that ships.
    """

    name: str
    kind: str
    memory_bytes: int
    bits_per_weight: float
    predicted_kl: float | None
    kl: float
    kl_low: float
    kl_high: float
    perplexity: float
    perplexity_low: float
    perplexity_high: float
    tokens: int
    shipped: bool = False


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The cache's part of a plan.

    Args:
        context: Tokens that each sequence keeps.
        batch: Sequences.
        memory_bytes: Bytes of the full cache.
        formats: Cache unit (the keys, or the values, of one layer) -> format name.
    """

    context: int
    batch: int
    memory_bytes: int
    formats: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ActivationPlan:
    """The activations' part of a plan.

    Args:
        formats: Input of a linear layer -> format name.
        scales: Input -> scale of its format where that is static: one number, or one for each channel.
        bit_operations: Bit operations of one token, weights that read unquantized inputs included.
        predicted_loss: What the activations add to the predicted KL, nats per token.
    """

    formats: Mapping[str, str]
    scales: Mapping[str, Sequence[float]]
    bit_operations: float
    predicted_loss: float

    def describe(self) -> str:
        """Returns the formats, the operations and the loss as one sentence."""
        counts = Counter(self.formats.values()).most_common()
        return (
            f"activations: {', '.join(f'{name} x {count}' for name, count in counts)}; {self.bit_operations:.4g} bit "
            f"operations a token; {self.predicted_loss:.4g} nats per token of the prediction"
        )

    @property
    def scheme(self) -> dict[str, tuple[str, list[float] | None]]:
        """Linear layer -> format of its input, and its scale where that is static."""
        return {
            module_of(name): (format_, [float(x) for x in self.scales[name]] if name in self.scales else None)
            for name, format_ in self.formats.items()
        }


@dataclass(frozen=True, kw_only=True)
class RulesPrice:
    """What the rules of an engine cost under a plan's budget: the optimum under them beside the one without.

    Args:
        engine: Name of the engine.
        predicted_kl: Loss of the optimum under its rules, nats per token.
        memory_bytes: Bytes of that optimum's weight file.
        unrestricted_kl: Loss of the optimum without them.
        unrestricted_bytes: Bytes of that optimum's weight file.
        exporter: Who writes the file whose bytes the plan counts, the engine's; None where it counts the packed one.
    """

    engine: str
    predicted_kl: float
    memory_bytes: int
    unrestricted_kl: float
    unrestricted_bytes: int
    exporter: str | None = None

    def describe(self) -> str:
        """Returns the price as one sentence."""
        return (
            f"Rules of {self.engine}: the best plan under them is predicted to lose {self.predicted_kl:.4g} nats per "
            f"token in {self.memory_bytes / 2**20:.2f} MiB; without them {self.unrestricted_kl:.4g} in "
            f"{self.unrestricted_bytes / 2**20:.2f} MiB."
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Formats of all weights, and what is known about this choice.

    Args:
        name: Name of the plan, such as ``combined``.
        metric: Metric whose predictions were minimised.
        weights: Weight name -> format name.
        units: One entry a unit.
        budget: The budget, as text.
        predicted_kl: Sum of the units' losses in nats per token; NaN where no metric predicts them.
        predicted_std_error: Standard error of this sum over the calibration text, of the same unit; None where the
            metric is no sample.
        predicted_kl_with_interactions: The same with the cross terms, or None when they were not measured.
        corrected_kl: KL to expect, nats per token: the prediction corrected by measured plans (power law); None where
            none were measured.
        correction_error: Two of three plans measure within this factor of their corrected prediction; None likewise.
        objective: What was minimised: nats per token (the metric's own unit where that is another), or, under a
            ceiling on the loss, bytes of memory.
        lower_bound: No assignment has a smaller objective.
        relative_gap: (objective - lower_bound) / |objective|.
        termination: Why the solver stopped.
        solver: Its name and why it was taken.
        solve_s: Seconds of the solve.
        use: Resource -> use.
        limits: Resource -> limit.
        shadow_prices: Limit -> decrease of the objective that one more unit of it buys, where known.
        memory_bytes: Bytes of the weight file, and of the full cache where that is part of the plan.
        bits_per_weight: Stored bits of the units per weight.
        reference_memory_bytes: Bytes of the reference model, and of its full 16-bit cache likewise.
        evaluations: Measurements on selection text, this plan and its rivals.
        verdict: What the verification found, in one sentence.
        rules: What the rules of the engine it was made for cost; None where it was made for none.
        provenance: Names, fingerprints and versions.
        cache: Formats of the cache, or None where the budget named no context.
        activations: Formats of the activations, or None where the budget named no bit operations.
    """

    name: str
    metric: str
    weights: Mapping[str, str]
    units: Sequence[UnitPlan]
    budget: str
    predicted_kl: float
    predicted_std_error: float | None
    predicted_kl_with_interactions: float | None
    corrected_kl: float | None
    correction_error: float | None
    objective: float
    lower_bound: float
    relative_gap: float
    termination: str
    solver: str
    solve_s: float
    use: Mapping[str, float]
    limits: Mapping[str, float]
    shadow_prices: Mapping[str, float]
    memory_bytes: int
    bits_per_weight: float
    reference_memory_bytes: int
    evaluations: Sequence[Evaluation] = field(default_factory=tuple)
    verdict: str = "Not verified by measurement."
    rules: RulesPrice | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    cache: CachePlan | None = None
    activations: ActivationPlan | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight file alone."""
        return self.memory_bytes - (0 if self.cache is None else self.cache.memory_bytes)

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the weight file that are not those of the units."""
        caches = {} if self.cache is None else self.cache.formats
        return self.file_bytes - sum(unit.memory_bytes for unit in self.units if unit.unit not in caches)

    @property
    def minimises_memory(self) -> bool:
        """Whether the objective is bytes, not a loss."""
        return self.objective == self.use["memory_bytes"]

    @property
    def latency_text(self) -> str | None:
        """What a decode step takes, measured or modelled, and where; None where no latency was limited."""
        if "latency" not in self.provenance:
            return None
        use, limit = self.use["latency_us"], self.limits["latency_us"]
        return f"a decode step takes {use:.4g} us of {limit:.4g} us allowed, {self.provenance['latency']}"

    @property
    def shipped(self) -> Evaluation | None:
        """The measurement of what ships, or None before verification."""
        return next((e for e in self.evaluations if e.shipped), None)

    def _repr_html_(self) -> str:
        """Returns the plan as a notebook shows it."""
        measured = self.shipped
        lines = [
            f"{self.memory_bytes / 2**20:.2f} MiB of {self.reference_memory_bytes / 2**20:.1f} MiB, "
            f"{self.bits_per_weight:.3f} bits per weight",
            f"predicted KL {self.predicted_kl:.4g} nats per token, gap to the best possible {self.relative_gap:.2g}",
            *([f"measured KL {measured.kl:.4g} [{measured.kl_low:.4g}, {measured.kl_high:.4g}]"] if measured else []),
            self.verdict,
        ]
        return plan_html(f"Plan '{self.name}' for {self.budget}", lines, self.units)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values; infinite and unknown numbers become null. Parts it lacks are not named."""
        cleaned = jsonable(dataclasses.asdict(self))
        assert isinstance(cleaned, dict)
        return {name: value for name, value in cleaned.items() if name not in OPTIONAL_PARTS or value is not None}

    def header_metadata(self) -> dict[str, str]:
        """Returns the part of the plan that the packed file's header carries, besides the formats.

        Long texts (paths of calibration files, for one) are shortened as far as the header's reserve demands.
        """
        record = self.to_dict()
        kept = {k: v for k, v in record.items() if k not in ("weights", "units", "evaluations", *OPTIONAL_PARTS)}
        text = _compact(kept)
        for most in _SHORTENED_CHARACTERS:
            # The header is JSON itself, so the text is escaped once more.
            if len(json.dumps(text)) <= _HEADER_BYTES:
                break
            text = _compact(_shorten(kept, most))
        return {"bitplan.plan": text}


def _compact(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def _shorten(value: Any, most: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= most else f"{value[: most // 2]}…{value[-(most // 2) :]}"
    if isinstance(value, dict):
        return {name: _shorten(part, most) for name, part in value.items()}
    return value
