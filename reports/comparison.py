"""Two plans of one model, side by side: the comparison as a value."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from reports.report import check_table

# Columns of the parts' table; "first" and "second" are the plans. Losses are by one metric for both.
PART_COLUMNS = {
    "unit": "text",
    "role": "text",
    "layer_index": "integer?",
    "expert_index": "integer?",
    "first_format": "text",
    "second_format": "text",
    "first_bits": "number",
    "second_bits": "number",
    "first_bytes": "number",
    "second_bytes": "number",
    "first_loss": "number",
    "second_loss": "number",
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two plans.

    Sizes are bytes on the device; KL is in nats per token, None where it is not known; the interval is that of the
    measurement.
    """

    name: str
    budget_text: str
    memory_bytes: float
    bits_per_weight: float
    predicted_kl: float | None
    measured_kl: float | None
    measured_kl_low: float | None
    measured_kl_high: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Everything that the page about two plans shows.

    Args:
        title: heading of the page.
        model_name: name of the model.
        first: one plan.
        second: the other; its name is another.
        parts: one row per unit (columns: `PART_COLUMNS`).
        loss_unit: unit of the losses.
        frontier: one row per solved size, as in a report; may be empty.
        measured_on: which text both were measured on; None where they were not.
        notes: plain sentences that the reader should know.
    """

    title: str
    model_name: str
    first: Side
    second: Side
    parts: pd.DataFrame
    loss_unit: str
    frontier: pd.DataFrame
    measured_on: str | None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.first.name == self.second.name:
            msg = f"the two plans must have names of their own: got '{self.first.name}' twice. Rename one."
            raise ValueError(msg)
        check_table("parts", self.parts, PART_COLUMNS)
