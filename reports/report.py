"""The report as a value: headline numbers and tables, checked once when it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import pandas as pd

EVALUATION_KINDS = ("reference", "plan", "uniform")

# Columns of each table and what they hold. A trailing "?" allows missing values.
COLUMNS: dict[str, dict[str, str]] = {
    "plan": {
        "unit": "text",
        "role": "text",
        "layer_index": "integer?",
        "expert_index": "integer?",
        "format": "text",
        "bits": "number",
        "bits_per_weight": "number",
        "weights": "number",
        "memory_bytes": "number",
        "predicted_loss": "number?",
        "std_error": "number?",
    },
    "frontier": {
        "memory_bytes": "number",
        "bits_per_weight": "number",
        "predicted_loss": "number",
        "lower_bound": "number?",
        "shadow_price_per_mib": "number?",
    },
    "evaluations": {
        "name": "text",
        "kind": "text",
        "memory_bytes": "number",
        "bits_per_weight": "number",
        "predicted_kl": "number?",
        "measured_kl": "number",
        "kl_low": "number?",
        "kl_high": "number?",
        "perplexity": "number?",
        "perplexity_low": "number?",
        "perplexity_high": "number?",
        "shipped": "boolean",
    },
    "sensitivities": {
        "unit": "text",
        "role": "text",
        "layer_index": "integer?",
        "expert_index": "integer?",
        "format": "text",
        "bits": "number",
        "loss": "number",
        "std_error": "number?",
        "metric": "text",
    },
    "experts": {
        "layer_index": "integer",
        "expert_index": "integer",
        "tokens": "number",
        "frequency": "number",
        "community": "integer",
        "bits": "number",
        "bits_per_weight": "number",
        "weights": "number",
        "memory_bytes": "number",
        "formats": "text",
    },
    "affinity": {
        "layer_index": "integer",
        "expert_index": "integer",
        "other_index": "integer",
        "tokens": "number",
    },
    "rule_prices": {
        "rule": "text",
        "against": "text?",
        "units": "number",
        "predicted_loss": "number?",
        "memory_bytes": "number?",
    },
}
# Tables that many reports have no use for.
OPTIONAL_TABLES = ("experts", "affinity", "rule_prices")

_IS_KIND = {
    "text": lambda column: pd.api.types.infer_dtype(column, skipna=True) == "string",
    "number": lambda column: pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column),
    "integer": pd.api.types.is_integer_dtype,
    "boolean": pd.api.types.is_bool_dtype,
}
_HOW_TO_CONVERT = {
    "text": "astype('str')",
    "number": "pd.to_numeric(...)",
    "integer": "astype('Int64'), which allows missing values",
    "boolean": "astype(bool)",
}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The numbers of the first screen.

    Sizes are bytes on the device. `predicted_kl`, `measured_kl` and its interval are nats per token
    of KL divergence to the reference; `predicted_kl` is NaN where no metric predicted it. `objective` and
    `lower_bound` are of what was minimised, in `objective_unit`; `relative_gap` is (objective - lower_bound) /
    objective as a fraction, infinite where no bound was proven. `verdict` is one sentence that says what was found.
    """

    shipped_plan_name: str
    memory_bytes: float
    reference_memory_bytes: float
    bits_per_weight: float
    budget_text: str
    predicted_kl: float
    measured_kl: float
    measured_kl_low: float
    measured_kl_high: float
    best_uniform_name: str | None
    best_uniform_kl: float | None
    perplexity: float
    reference_perplexity: float
    objective: float
    lower_bound: float
    relative_gap: float
    verdict: str
    objective_unit: str = "nats per token"

    def __post_init__(self) -> None:
        for named in fields(self):
            value = getattr(self, named.name)
            if named.name != "predicted_kl" and isinstance(value, float) and math.isnan(value):
                msg = f"every headline number must be known: got {named.name}=nan. Measure it first."
                raise ValueError(msg)
        for name in ("memory_bytes", "reference_memory_bytes"):
            if getattr(self, name) <= 0:
                msg = f"{name} must be positive: got {name}={getattr(self, name)} in the headline."
                raise ValueError(msg)
        if self.relative_gap < 0:
            msg = (
                f"relative_gap must be 0 or more: got relative_gap={self.relative_gap}, "
                f"objective={self.objective}, lower_bound={self.lower_bound}. Check the solver's bound."
            )
            raise ValueError(msg)
        if (self.best_uniform_name is None) != (self.best_uniform_kl is None):
            msg = (
                "best_uniform_name and best_uniform_kl must be given together: got "
                f"best_uniform_name={self.best_uniform_name!r}, best_uniform_kl={self.best_uniform_kl}."
            )
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What whole plans, measured on calibration text, said of the predictions: KL = factor * predicted^exponent.

    Two of three such plans measured within `error_factor` of that law, which was fitted to `plans` of them.
    """

    factor: float
    exponent: float
    error_factor: float
    plans: int

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.error_factor < 1:
            msg = (
                f"factor must be positive and error_factor 1 or more: got factor={self.factor}, "
                f"error_factor={self.error_factor}. Fit the predictions again."
            )
            raise ValueError(msg)


def empty_table(name: str) -> pd.DataFrame:
    """Returns a table of no rows with the columns of `COLUMNS[name]`."""
    return pd.DataFrame(columns=list(COLUMNS[name]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Everything that the page and the CSV files show.

    Args:
        title: heading of the page.
        model_name: name of the model that was measured.
        headline: the numbers of the first screen.
        plan: one row per unit, the format it gets (columns: `COLUMNS["plan"]`).
        frontier: one row per budget that was solved; may be empty.
        evaluations: one row per measured model: the reference, the plans, the uniform baselines;
            exactly one row has shipped=True.
        sensitivities: one row per measured candidate (unit, format); may be empty.
        provenance: where the numbers come from, name to value.
        notes: plain sentences that the reader should know.
        experts: one row per expert of a mixture: how often it is taken, with which others, what it is stored in.
        affinity: one row per pair of experts of a layer that tokens take together.
        rule_prices: one row per rule on which parts share a format: the least loss under it at the plan's bytes;
            the first row is without rules.
        calibration: how predictions were corrected by measured plans; None where none were measured.
    """

    title: str
    model_name: str
    headline: Headline
    plan: pd.DataFrame
    frontier: pd.DataFrame
    evaluations: pd.DataFrame
    sensitivities: pd.DataFrame
    provenance: dict[str, str]
    notes: tuple[str, ...] = ()
    experts: pd.DataFrame = field(default_factory=lambda: empty_table("experts"))
    affinity: pd.DataFrame = field(default_factory=lambda: empty_table("affinity"))
    rule_prices: pd.DataFrame = field(default_factory=lambda: empty_table("rule_prices"))
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        for table_name in COLUMNS:
            check_table(table_name, getattr(self, table_name), COLUMNS[table_name])
        if self.plan.empty:
            msg = "plan must have at least one unit: got an empty table. Pass one row per unit."
            raise ValueError(msg)
        _check_evaluations(self.evaluations)
        _check_rule_prices(self.rule_prices)


def check_table(table_name: str, table: pd.DataFrame, columns: dict[str, str]) -> None:
    """Checks that a table has certain columns of certain kinds, as in `COLUMNS`.

    Raises:
        ValueError: if a column is missing, of another kind, or lacks a value that must be known.
    """
    missing = [column for column in columns if column not in table.columns]
    if missing:
        msg = f"{table_name} must have the columns {', '.join(columns)}: got no {', '.join(missing)}. Add them."
        raise ValueError(msg)
    if table.empty:
        return
    for column, spec in columns.items():
        kind = spec.removesuffix("?")
        if not _IS_KIND[kind](table[column]):
            msg = (
                f"{table_name}.{column} must be of kind {kind}: got dtype={table[column].dtype}. "
                f"Use {_HOW_TO_CONVERT[kind]}."
            )
            raise ValueError(msg)
        if not spec.endswith("?") and table[column].isna().any():
            row = int(table[column].isna().to_numpy().argmax())
            msg = f"{table_name}.{column} must be known in every row: got a missing value in row {row}."
            raise ValueError(msg)


def _check_rule_prices(rule_prices: pd.DataFrame) -> None:
    unknown = sorted(set(rule_prices["against"].dropna()) - set(rule_prices["rule"]))
    if unknown:
        msg = (
            f"rule_prices.against must name rules of the table: got {', '.join(unknown)}, known are "
            f"{', '.join(rule_prices['rule'])}. Add their rows."
        )
        raise ValueError(msg)


def _check_evaluations(evaluations: pd.DataFrame) -> None:
    unknown = sorted(set(evaluations["kind"]) - set(EVALUATION_KINDS))
    if unknown:
        msg = f"evaluations.kind must be one of {', '.join(EVALUATION_KINDS)}: got {', '.join(unknown)}."
        raise ValueError(msg)
    shipped = [str(name) for name in evaluations.loc[evaluations["shipped"].astype(bool), "name"]]
    if len(shipped) != 1:
        msg = (
            f"exactly one evaluation must be shipped: got {len(shipped)} ({', '.join(shipped) or 'none'}). "
            "Set shipped=True on the plan that is delivered."
        )
        raise ValueError(msg)
