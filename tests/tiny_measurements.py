"""Measurements of the tiny models: few formats, few and short sequences, and profiles cut down to a few units."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.budget import Budget
from allocator.measuring import MeasureRequest
from sensitivity.measure_config import MeasureConfig
from sensitivity.profile import LossTable, SensitivityProfile

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int8_g64", "bf16")
CONFIG = MeasureConfig(
    fisher_sequences=6,
    sequence_tokens=16,
    logit_sequences=4,
    logit_sequence_tokens=12,
    fit_plans=6,
    fit_sequences=2,
    selection_sequences=4,
    evaluation_sequences=4,
    evaluation_sequence_tokens=24,
)
# The same for the command.
FLAGS = (
    *("--formats", ",".join(FORMATS)),
    *("--sequences", "6", "--sequence-tokens", "16"),
    *("--logit-sequences", "4", "--logit-tokens", "12"),
    *("--fit-plans", "6", "--fit-sequences", "2"),
    *("--held-out-sequences", "4", "--held-out-tokens", "24"),
)

# Heads of 16 numbers take whole-head formats only.
CACHE_FORMATS = ("int2_channel", "int4_channel", "int8_channel", "bf16")
CONTEXT, BATCH = 96, 4
CACHE_BUDGET = Budget(memory_bytes=150_000, context=CONTEXT, batch=BATCH)


# The small trained mixture of experts, and how much of its text is measured.
SMALL_MOE = Path(__file__).parent / "data" / "small_moe"
_MOE_CONFIG = replace(
    CONFIG,
    metrics=("weight_error",),
    fit_plans=None,
    sequence_tokens=64,
    evaluation_sequences=8,
    evaluation_sequence_tokens=64,
)


def make_moe_request(formats: tuple[str, ...]) -> MeasureRequest:
    """Returns the request of a quick measurement of the small mixture, on its own texts."""
    calibration, evaluation = (str(SMALL_MOE / f"{name}.jsonl") for name in ("calibration", "evaluation"))
    return MeasureRequest(calibration=calibration, evaluation=evaluation, formats=formats, config=_MOE_CONFIG)


def make_request(text: Path, **changes: Any) -> MeasureRequest:
    """Returns the request of a tiny measurement on a text."""
    return replace(MeasureRequest(calibration=str(text), formats=FORMATS, config=CONFIG), **changes)


def keep_units(profile: SensitivityProfile, count: int) -> SensitivityProfile:
    """Returns a profile of every so many units, so that all choices can be listed."""
    candidates = profile.candidates
    kept = np.linspace(0, len(candidates.units) - 1, count).round().astype(int)
    formats = len(candidates.formats)
    flat = (kept[:, None] * formats + np.arange(formats)).ravel()
    return replace(
        profile,
        candidates=replace(
            candidates, units=tuple(candidates.units[u] for u in kept), allowed=candidates.allowed[kept], reasons={}
        ),
        losses={
            name: LossTable(
                loss=table.loss[kept], std_error=table.std_error[kept], unit_of_measure=table.unit_of_measure
            )
            for name, table in profile.losses.items()
        },
        fisher_sketch=None if profile.fisher_sketch is None else profile.fisher_sketch[:, kept],
        logit_gram=None if profile.logit_gram is None else profile.logit_gram[:, flat][:, :, flat],
    )


def list_choices(profile: SensitivityProfile) -> NDArray[np.int64]:
    """Returns every allowed choice, [N, U]."""
    grids = np.meshgrid(*[np.flatnonzero(row) for row in profile.candidates.allowed], indexing="ij")
    return np.stack([grid.ravel() for grid in grids], axis=1).astype(np.int64)
