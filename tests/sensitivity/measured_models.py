"""A small measurement: a model from disk, its candidates, its text, and few settings. Also run in a process of its own.

``python -m tests.sensitivity.measured_models <model directory> <pieces directory> <sequences>`` measures.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates, list_candidates
from runtime.loading import ReferenceModel, load_reference
from runtime.units import find_units
from sensitivity.calibration import TokenSequences, tokenize_documents
from sensitivity.measure import Progress, measure_profile
from sensitivity.measure_config import MeasureConfig, MeasurementText
from sensitivity.profile import SensitivityProfile
from tests.tiny_models import sample_text

FORMATS = ("int2_g64", "int4_g64", "bf16")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything but the pieces and the callback."""

    reference: ReferenceModel
    candidates: Candidates
    text: MeasurementText
    config: MeasureConfig

    def run(self, pieces: Path, progress: Progress) -> SensitivityProfile:
        return measure_profile(
            self.reference, self.candidates, self.text, self.config, pieces=pieces, progress=progress
        )


def make_measurement(model_directory: Path, config: MeasureConfig) -> Measurement:
    reference = load_reference(str(model_directory))
    text = sample_text(20_000)

    def cut(first: int, sequences: int, tokens: int) -> TokenSequences:
        return tokenize_documents(
            [text[first : first + 5000]],
            reference.tokenizer,
            sequences=sequences,
            sequence_tokens=tokens,
            source="test",
        )

    return Measurement(
        reference=reference,
        candidates=list_candidates(find_units(reference.model), FORMATS),
        text=MeasurementText(
            fisher=cut(0, config.fisher_sequences, config.sequence_tokens),
            logit=cut(5000, config.logit_sequences, config.logit_sequence_tokens),
            selection=cut(10_000, config.selection_sequences, config.evaluation_sequence_tokens),
            evaluation=cut(15_000, config.evaluation_sequences, config.evaluation_sequence_tokens),
            fit=cut(2500, config.fit_sequences, config.sequence_tokens),
        ),
        config=config,
    )


def make_config(fisher_sequences: int = 4) -> MeasureConfig:
    return MeasureConfig(
        fisher_sequences=fisher_sequences,
        sequence_tokens=12,
        logit_sequences=4,
        logit_sequence_tokens=8,
        top_tokens=16,
        fit_plans=5,
        fit_sequences=2,
        selection_sequences=2,
        evaluation_sequences=3,
        evaluation_sequence_tokens=10,
    )


def arrays_of(profile: SensitivityProfile) -> dict[str, NDArray[Any]]:
    """Returns every array of a profile that was measured by all metrics."""
    assert profile.fisher_sketch is not None and profile.logit_gram is not None
    tables = {
        f"{kind}.{name}": getattr(t, kind) for name, t in profile.losses.items() for kind in ("loss", "std_error")
    }
    tokens = {name: getattr(profile, f"{name}_tokens") for name in ("calibration", "selection", "evaluation")}
    routing = (
        {} if profile.routing is None else {"visits": profile.routing.visits, "together": profile.routing.together}
    )
    return {**tables, **tokens, **routing, "fisher_sketch": profile.fisher_sketch, "logit_gram": profile.logit_gram}


def assert_same(profile: SensitivityProfile, other: SensitivityProfile) -> None:
    """Asserts that two profiles hold the same numbers, to the last bit."""
    arrays, others = arrays_of(profile), arrays_of(other)
    assert list(arrays) == list(others)
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    assert profile.prediction_fits == other.prediction_fits
    assert profile.fingerprint == other.fingerprint


if __name__ == "__main__":
    make_measurement(Path(sys.argv[1]), make_config(int(sys.argv[3]))).run(Path(sys.argv[2]), lambda *_: None)
