"""Measure a profile, one small finished piece at a time, so that an interrupt loses at most one piece.

Each sequence of the Fisher sketch and each unit of the logit sketch is written to its own file as soon as it is
measured; a second run takes up what is there. The pieces of one directory belong to one fingerprint (weights, text,
formats, settings, code version), so a piece can never be of another measurement.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from runtime.candidates import Candidates
from runtime.checkpoint import fixed_bytes, reference_bytes, rest_bytes
from runtime.files import atomic_path
from runtime.loading import ReferenceModel
from runtime.quantizers import QUANTIZERS
from sensitivity.calibration import TokenSequences
from sensitivity.combination import COMBINED, combine
from sensitivity.fisher_sketch import fisher_loss, measure_fisher_sketch
from sensitivity.logit_sketch import LogitSketch, gram_of
from sensitivity.output_error import measure_output_error
from sensitivity.profile import NATS, LossTable, SensitivityProfile, fingerprint_of
from sensitivity.weight_error import measure_weight_error

# Raised whenever a change makes the same inputs give other numbers.
MEASUREMENT_VERSION = 1

WEIGHT_ERROR = "weight_error"
OUTPUT_ERROR = "output_error"
FISHER = "fisher"
SINGLE_UNIT_KL = "single_unit_kl"
METRICS = (WEIGHT_ERROR, OUTPUT_ERROR, FISHER, SINGLE_UNIT_KL)
_OUTPUT_SEQUENCES = 16  # of those of the Fisher sketch; the output error is an average, not a sample

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured, and on how much text.

    Args:
        metrics: Names in ``METRICS``.
        fisher_sequences: Sequences of the Fisher sketch.
        sequence_tokens: Tokens of each of these.
        logit_sequences: Sequences of the logit sketch, run in one batch; even, as its halves are compared.
        logit_sequence_tokens: Tokens of each of these.
        top_tokens: Most likely tokens of a position that the logit sketch keeps.
        selection_sequences: Sequences that choose between plans.
        evaluation_sequences: Sequences of the final evaluation.
        evaluation_sequence_tokens: Tokens of each selection and evaluation sequence.
        quantizer: Rule that renders the candidates.
        seed: Seed of labels and sampled text.

    Raises:
        ValueError: If a count is not positive, or a name is unknown.
    """

    metrics: tuple[str, ...] = METRICS
    fisher_sequences: int = 96
    sequence_tokens: int = 128
    logit_sequences: int = 4
    logit_sequence_tokens: int = 32
    top_tokens: int = 256
    selection_sequences: int = 8
    evaluation_sequences: int = 10
    evaluation_sequence_tokens: int = 256
    quantizer: str = "rtn"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and name != "seed" and value < 2:
                msg = f"{name} must be at least 2 (a standard error needs two samples): got {value}. Raise it."
                raise ValueError(msg)
        if self.logit_sequences % 2:
            msg = f"logit_sequences must be even (two halves are compared): got {self.logit_sequences}. Add one."
            raise ValueError(msg)
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown or not self.metrics:
            msg = f"metrics must be among {', '.join(METRICS)}: got {list(self.metrics)}. Correct the names."
            raise ValueError(msg)
        if self.quantizer not in QUANTIZERS:
            msg = f"quantizer must be among {', '.join(QUANTIZERS)}: got '{self.quantizer}'. Correct the name."
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class MeasurementText:
    """The text of one measurement; no document serves two purposes.

    Args:
        fisher: Sequences of the Fisher sketch and of the input statistics.
        logit: Sequences of the logit sketch.
        selection: Sequences that choose between plans.
        evaluation: Sequences of the final evaluation.
    """

    fisher: TokenSequences
    logit: TokenSequences
    selection: TokenSequences
    evaluation: TokenSequences


def measurement_fingerprint(
    model_fingerprint: str, candidates: Candidates, text: MeasurementText, config: MeasureConfig
) -> str:
    """Returns the hash of everything that the numbers of a measurement depend on."""
    return fingerprint_of(
        {
            "version": MEASUREMENT_VERSION,
            "model": model_fingerprint,
            "units": [[w.name for w in unit.weights] for unit in candidates.units],
            "formats": [f.name for f in candidates.formats],
            "allowed": candidates.allowed.astype(int).tolist(),
            "text": [part.fingerprint for part in (text.fisher, text.logit, text.selection, text.evaluation)],
            "config": asdict(config),
        }
    )


def measure_profile(
    reference: ReferenceModel,
    candidates: Candidates,
    text: MeasurementText,
    config: MeasureConfig,
    *,
    pieces: Path,
    progress: Progress,
) -> SensitivityProfile:
    """Returns the profile of a model.

    Args:
        reference: The model.
        candidates: Units and formats.
        text: Sequences for each purpose.
        config: Settings.
        pieces: Directory for the finished pieces; those already there are used.
        progress: Called with (stage, pieces done, pieces of the stage).
    """
    started = time.monotonic()
    losses: dict[str, LossTable] = {}
    errors = {
        WEIGHT_ERROR: partial(measure_weight_error, reference.model, candidates),
        OUTPUT_ERROR: partial(
            measure_output_error, reference.model, candidates, text.fisher.tokens[:_OUTPUT_SEQUENCES]
        ),
    }
    for metric, measure in errors.items():
        if metric in config.metrics:
            progress(metric, 0, 1)
            losses[metric] = _error_table(measure, config, pieces / f"{metric}.safetensors")
            progress(metric, 1, 1)
    sketch = gram = None
    if FISHER in config.metrics:
        sketch = _measure_fisher(reference, candidates, text.fisher.tokens, config, pieces / FISHER, progress)
        loss, std_error = fisher_loss(sketch)
        losses[FISHER] = LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS)
    if SINGLE_UNIT_KL in config.metrics:
        losses[SINGLE_UNIT_KL], gram = _measure_logit(
            reference, candidates, text.logit.tokens, config, pieces / "logit", progress
        )
    if FISHER in losses and SINGLE_UNIT_KL in losses:
        losses[COMBINED] = combine(losses[FISHER], losses[SINGLE_UNIT_KL], candidates.allowed)
    return SensitivityProfile(
        candidates=candidates,
        losses=losses,
        fisher_sketch=sketch,
        logit_gram=gram,
        selection_tokens=text.selection.tokens.numpy(),
        evaluation_tokens=text.evaluation.tokens.numpy(),
        fixed_bytes=fixed_bytes(reference.model),
        rest_bytes=rest_bytes(reference.model),
        reference_bytes=reference_bytes(reference.model),
        expert_share=_expert_share(reference.model.config),
        provenance=_provenance(reference, candidates, text, config, time.monotonic() - started),
    )


def _error_table(measure: Callable[..., NDArray[np.float64]], config: MeasureConfig, path: Path) -> LossTable:
    error = _piece(path, lambda: {"error": measure(quantizer=config.quantizer)})["error"]
    return LossTable(loss=error, std_error=np.zeros_like(error), unit_of_measure="squared error")


def _measure_fisher(
    reference: ReferenceModel,
    candidates: Candidates,
    tokens: Tensor,
    config: MeasureConfig,
    pieces: Path,
    progress: Progress,
) -> NDArray[np.float32]:
    def measure(s: int) -> dict[str, NDArray[Any]]:
        [sketch] = measure_fisher_sketch(
            reference.model, candidates, tokens[: s + 1], seed=config.seed, quantizer=config.quantizer, first=s
        )
        return {"sketch": sketch}

    total = len(tokens)
    progress(FISHER, 0, total)
    sketches = []
    for s in range(total):
        sketches.append(_piece(pieces / f"{s:05d}.safetensors", partial(measure, s))["sketch"])
        progress(FISHER, s + 1, total)
    return np.stack(sketches)


def _measure_logit(
    reference: ReferenceModel,
    candidates: Candidates,
    tokens: Tensor,
    config: MeasureConfig,
    pieces: Path,
    progress: Progress,
) -> tuple[LossTable, NDArray[np.float32]]:
    measurer: LogitSketch | None = None

    def measure(u: int) -> dict[str, NDArray[Any]]:
        nonlocal measurer
        # Not before it is needed: it runs the model.
        measurer = measurer or LogitSketch(
            reference.model, candidates, tokens, top_tokens=config.top_tokens, quantizer=config.quantizer
        )
        effect = measurer.measure(u)
        return {"kl": effect.kl, "sketch": effect.sketch}

    total = len(candidates.units)
    progress(SINGLE_UNIT_KL, 0, total)
    kl, sketches = [], []
    for u in range(total):
        piece = _piece(pieces / f"{u:05d}.safetensors", partial(measure, u))
        kl.append(piece["kl"].astype(np.float64))
        sketches.append(piece["sketch"])
        progress(SINGLE_UNIT_KL, u + 1, total)
    # Positions of one sequence are not independent: no sequence is in both halves, and the error is that of the
    # sequences' means.
    half = tokens.shape[0] // 2 * tokens.shape[1]
    halves = (np.concatenate([sketch[:, part] for sketch in sketches]) for part in (slice(half), slice(half, None)))
    gram = np.stack([gram_of(sketch) for sketch in halves]).astype(np.float32)
    per_position = np.stack(kl)
    by_sequence = per_position.reshape(*per_position.shape[:2], tokens.shape[0], -1).mean(axis=-1)
    std_error = by_sequence.std(axis=-1, ddof=1) / np.sqrt(tokens.shape[0])
    return LossTable(loss=per_position.mean(axis=-1), std_error=std_error, unit_of_measure=NATS), gram


def _piece(path: Path, measure: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    piece = _read_piece(path)
    if piece is None:
        piece = measure()
        _write_piece(path, piece)
    return piece


def _read_piece(path: Path) -> dict[str, NDArray[Any]] | None:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _write_piece(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)


def _expert_share(config: Any) -> float:
    used = getattr(config, "num_experts_per_tok", None)
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return used / count if used and count else 1.0


def _provenance(
    reference: ReferenceModel, candidates: Candidates, text: MeasurementText, config: MeasureConfig, seconds: float
) -> dict[str, str]:
    return {
        "model": reference.name,
        "model_fingerprint": reference.fingerprint,
        "profile": measurement_fingerprint(reference.fingerprint, candidates, text, config),
        "calibration": f"{text.fisher.source} ({text.fisher.fingerprint[:16]})",
        "selection": f"{text.selection.source} ({text.selection.fingerprint[:16]})",
        "evaluation": f"{text.evaluation.source} ({text.evaluation.fingerprint[:16]})",
        "quantizer": config.quantizer,
        "seed": str(config.seed),
        "measurement_version": str(MEASUREMENT_VERSION),
        "measured_in_s": f"{seconds:.1f}",
    }
