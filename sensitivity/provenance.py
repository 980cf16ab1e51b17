"""What a profile was measured from: its fingerprint, and names for people."""

from dataclasses import asdict

from runtime.candidates import Candidates
from runtime.loading import ReferenceModel
from sensitivity.measure_config import MeasureConfig, MeasurementText
from sensitivity.profile import fingerprint_of

# Raised whenever a change makes the same inputs give other numbers.
MEASUREMENT_VERSION = 3
# Settings that came later, with what they then stood at: profiles measured before keep their fingerprints.
_LATER_SETTINGS = {"until_stable": False, "gradient_dtype": "float32"}


def measurement_fingerprint(
    weights_fingerprint: str, candidates: Candidates, text: MeasurementText, config: MeasureConfig
) -> str:
    """Returns the hash of everything that the numbers of a measurement depend on."""
    return fingerprint_of(
        {
            "version": MEASUREMENT_VERSION,
            "model": weights_fingerprint,
            "units": [[w.name for w in unit.weights] for unit in candidates.units],
            "formats": [f.name for f in candidates.formats],
            "allowed": candidates.allowed.astype(int).tolist(),
            "text": [part.fingerprint for part in (text.fisher, text.logit, text.selection, text.evaluation, text.fit)],
            "config": {k: v for k, v in asdict(config).items() if k not in _LATER_SETTINGS or v != _LATER_SETTINGS[k]},
        }
    )


def make_provenance(
    reference: ReferenceModel,
    candidates: Candidates,
    text: MeasurementText,
    config: MeasureConfig,
    *,
    sketched: int,
    seconds: float,
) -> dict[str, str]:
    """Returns the names, fingerprints and amounts of a measurement.

    Args:
        reference: The model.
        candidates: Units and formats.
        text: Sequences for each purpose.
        config: Settings.
        sketched: Sequences of the Fisher sketch, 0 without one.
        seconds: How long the last run took.
    """
    return {
        "model": reference.name,
        "model_fingerprint": reference.fingerprint,
        "profile": measurement_fingerprint(reference.weights_fingerprint, candidates, text, config),
        "calibration": f"{text.fisher.source} ({text.fisher.fingerprint[:16]})",
        "selection": f"{text.selection.source} ({text.selection.fingerprint[:16]})",
        "evaluation": f"{text.evaluation.source} ({text.evaluation.fingerprint[:16]})",
        "quantizer": config.quantizer,
        "seed": str(config.seed),
        "fisher_sequences": str(sketched),
        "measurement_version": str(MEASUREMENT_VERSION),
        "measured_in_s": f"{seconds:.1f}",
        **_transform_provenance(reference),
    }


def _transform_provenance(reference: ReferenceModel) -> dict[str, str]:
    made = reference.transforms
    if made is None:
        return {}
    return {
        "transforms": ",".join(made.names),
        "transforms_recipe": made.recipe,
        "transforms_content": made.content,
        "transforms_added_weights": str(made.added_weights),
        "reference_bits_per_weight": f"{made.reference_bits_per_weight:.6g}",
    }
