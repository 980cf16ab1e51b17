"""The sensitivity profile: everything measured about a model, as one frozen value that can be saved and queried.

On disk a profile is a directory: ``profile.json`` (units, formats, provenance) and ``arrays.safetensors``.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from runtime.activation_formats import find_activation_formats
from runtime.cache_formats import CacheLoad, find_cache_formats
from runtime.candidates import Candidates
from runtime.files import atomic_directory, check_replaceable, write_text
from runtime.formats import Format, find_formats
from runtime.units import Unit, Weight
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.prediction.prediction_fit import PredictionFit
from sensitivity.profile_html import profile_html

SCHEMA_VERSION = 2
NATS = "nats/token"
_SCALE = "activations.scale/"
_ROUTING_ARRAYS = ("tokens", "visits", "gate_weight", "together")


@dataclass(frozen=True, kw_only=True)
class LossTable:
    """One metric's table.

    Args:
        loss: [U, F] float64; zero where the pair is not allowed.
        std_error: [U, F] float64 of the same unit, zero where the metric is not a sample.
        unit_of_measure: ``nats/token`` for predictions of KL, otherwise the metric's own.
        measured: [U, F] bool, False where the loss of an allowed pair was not measured but completed from others;
            None where every one was measured.
    """

    loss: NDArray[np.float64]
    std_error: NDArray[np.float64]
    unit_of_measure: str
    measured: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True)
class CacheLosses:
    """What was measured of the caches of a model.

    Args:
        candidates: Cache units, formats, allowed pairs.
        table: Measured KL of each pair, in nats per token.
    """

    candidates: Candidates
    table: LossTable


@dataclass(frozen=True, kw_only=True)
class ActivationLosses:
    """What was measured of the activations of a model.

    Args:
        candidates: Activation units, formats, allowed pairs.
        table: Loss of each pair, in nats per token.
        scales: Linear layer -> static format -> its scale, [1] or [in_features] float32.
    """

    candidates: Candidates
    table: LossTable
    scales: Mapping[str, Mapping[str, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class SensitivityProfile:
    """Losses of every candidate by every metric, with what is needed to price and to verify a plan.

    Args:
        candidates: Units, formats, allowed pairs.
        losses: Metric -> table.
        fisher_sketch: [S, U, F] float32, or None when not measured.
        logit_gram: [2, U * F, U * F] float32 inner products of the logit sketches on two halves of the positions,
            or None where not every pair was measured.
        prediction_fits: Metric -> correction of its predictions, where plans were measured to fit it to.
        calibration_tokens: [S, T] int64 that the sketch was taken on.
        selection_tokens: [S, T] int64 that choose between plans; neither calibration nor evaluation.
        evaluation_tokens: [S, T] int64 that nothing but the final evaluation sees.
        fixed_bytes: Bytes of the packed file that no choice changes.
        rest_bytes: Bytes of the unquantized rest among these.
        reference_bytes: Bytes of the reference model.
        expert_share: Experts a token visits / experts of a layer; 1 without experts.
        routing: How often each expert is taken on the calibration text, or None without experts.
        provenance: Names and fingerprints of what the profile was measured from.
        cache: What was measured of the caches, or None where no formats of theirs were asked for.
        cache_load: How full the caches among the candidates are (``sensitivity.cache_losses.join_cache``); None in a
            profile as it is measured, whose candidates are weights alone.
        activations: What was measured of the activations, or None where no formats of theirs were asked for.
        activations_joined: Whether they are among the candidates (``sensitivity.activation_losses.join_activations``).
        exporter: Who writes the file that bytes are counted of (``runtime.file_bytes``), ``fixed_bytes`` included; None
            for the packed file, as in a profile that is measured.
    """

    candidates: Candidates
    losses: Mapping[str, LossTable]
    fisher_sketch: NDArray[np.float32] | None
    logit_gram: NDArray[np.float32] | None
    prediction_fits: Mapping[str, PredictionFit]
    calibration_tokens: NDArray[np.int64]
    selection_tokens: NDArray[np.int64]
    evaluation_tokens: NDArray[np.int64]
    fixed_bytes: int
    rest_bytes: int
    reference_bytes: int
    expert_share: float
    routing: RoutingStatistics | None
    provenance: Mapping[str, str]
    cache: CacheLosses | None = None
    cache_load: CacheLoad | None = None
    activations: ActivationLosses | None = None
    activations_joined: bool = False
    exporter: str | None = None

    def table(self, metric: str) -> LossTable:
        """Returns the table of a metric.

        Raises:
            ValueError: If the profile does not hold it.
        """
        if metric not in self.losses:
            msg = (
                f"metric must be one the profile holds: got '{metric}', held are {', '.join(self.losses)}. "
                "Measure again with this metric."
            )
            raise ValueError(msg)
        return self.losses[metric]

    def _repr_html_(self) -> str:
        """Returns the profile as a notebook shows it, by the last metric that predicts KL."""
        predicting = [name for name, table in self.losses.items() if table.unit_of_measure == NATS]
        metric = predicting[-1] if predicting else next(iter(self.losses))
        lines = [
            f"{len(self.candidates.units)} units, {len(self.candidates.formats)} formats, {', '.join(self.losses)}",
            f"Mean loss of a unit by '{metric}', {self.losses[metric].unit_of_measure}:",
        ]
        title = f"Sensitivity profile of {self.provenance['model']}"
        return profile_html(title, lines, self.candidates, self.losses[metric].loss)

    @property
    def fingerprint(self) -> str:
        """Hash of what the profile was measured from (the key it is stored under)."""
        return self.provenance["profile"]


def save_profile(profile: SensitivityProfile, directory: Path) -> None:
    """Writes a profile to a directory, whole or not at all.

    Raises:
        ValueError: If the directory holds anything else.
    """
    assert profile.cache_load is None and not profile.activations_joined, "what is saved is what was measured"
    check_profile_place(directory)
    arrays: dict[str, NDArray[Any]] = {
        "allowed": profile.candidates.allowed,
        "calibration_tokens": profile.calibration_tokens,
        "selection_tokens": profile.selection_tokens,
        "evaluation_tokens": profile.evaluation_tokens,
    }
    for name, table in profile.losses.items():
        arrays[f"loss.{name}"] = table.loss
        arrays[f"std_error.{name}"] = table.std_error
        if table.measured is not None:
            arrays[f"measured.{name}"] = table.measured
    if profile.fisher_sketch is not None:
        arrays["fisher_sketch"] = profile.fisher_sketch
    if profile.logit_gram is not None:
        arrays["logit_gram"] = profile.logit_gram
    if profile.routing is not None:
        arrays |= {f"routing.{name}": getattr(profile.routing, name) for name in _ROUTING_ARRAYS}
    if profile.cache is not None:
        arrays |= {
            "cache.allowed": profile.cache.candidates.allowed,
            "cache.loss": profile.cache.table.loss,
            "cache.std_error": profile.cache.table.std_error,
        }
    if profile.activations is not None:
        arrays |= _activation_arrays(profile.activations)
    document = {
        "schema_version": SCHEMA_VERSION,
        **_candidate_record(profile.candidates),
        "metrics": {name: table.unit_of_measure for name, table in profile.losses.items()},
        "prediction_fits": {metric: dataclasses.asdict(fit) for metric, fit in profile.prediction_fits.items()},
        "fixed_bytes": profile.fixed_bytes,
        "rest_bytes": profile.rest_bytes,
        "reference_bytes": profile.reference_bytes,
        "expert_share": profile.expert_share,
        "routing": profile.routing and {"layers": profile.routing.layers, "domains": profile.routing.domains},
        "provenance": dict(profile.provenance),
        **({} if profile.cache is None else {"cache": _candidate_record(profile.cache.candidates)}),
        **({} if profile.activations is None else {"activations": _candidate_record(profile.activations.candidates)}),
    }
    with atomic_directory(directory) as temporary:
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary / "arrays.safetensors"
        )
        write_text(temporary / "profile.json", json.dumps(document, indent=1) + "\n")


def check_profile_place(directory: Path) -> None:
    """Checks that a profile may be written to a directory: it is free, empty, or holds a profile.

    Raises:
        ValueError: If something else is there.
    """
    check_replaceable(directory, is_own=_is_profile, content="a profile")


def _is_profile(directory: Path) -> bool:
    # By its names, not its content: a damaged profile may be replaced.
    return {p.name for p in directory.iterdir()} <= {"profile.json", "arrays.safetensors"}


def load_profile(directory: Path) -> SensitivityProfile:
    """Returns the profile in a directory.

    Raises:
        ValueError: If there is none, it is damaged, or a newer version wrote it.
    """
    try:
        document = json.loads((directory / "profile.json").read_text(encoding="utf-8"))
        arrays = load_file(directory / "arrays.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        msg = f"a profile must be a directory that 'bitplan measure' wrote: got '{directory}' ({error}). Measure again."
        raise ValueError(msg) from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        msg = (
            f"a profile must have schema_version={SCHEMA_VERSION}: got {version} in '{directory}'. "
            "Use the version of bitplan that wrote it, or measure again."
        )
        raise ValueError(msg)
    try:
        return _profile(document, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = (
            f"a profile must be complete: got '{directory}', which is damaged ({type(error).__name__}: {error}). "
            "Measure again."
        )
        raise ValueError(msg) from error


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Returns a hash of named JSON values, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _candidate_record(candidates: Candidates) -> dict[str, Any]:
    return {
        "units": [dataclasses.asdict(unit) for unit in candidates.units],
        "formats": [f.name for f in candidates.formats],
        "reasons": [[u, f, reason] for (u, f), reason in candidates.reasons.items()],
    }


def _candidates(record: dict[str, Any], formats: tuple[Format, ...], allowed: NDArray[np.bool_]) -> Candidates:
    return Candidates(
        units=tuple(_unit(unit) for unit in record["units"]),
        formats=formats,
        allowed=allowed,
        reasons={(u, f): reason for u, f, reason in record["reasons"]},
    )


def _profile(document: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> SensitivityProfile:
    candidates = _candidates(document, find_formats(document["formats"]), arrays["allowed"])
    losses = {
        name: LossTable(
            loss=arrays[f"loss.{name}"],
            std_error=arrays[f"std_error.{name}"],
            unit_of_measure=unit_of_measure,
            measured=arrays.get(f"measured.{name}"),
        )
        for name, unit_of_measure in document["metrics"].items()
    }
    shape = (len(candidates.units), len(candidates.formats))
    masks = (table.measured for table in losses.values() if table.measured is not None)
    for table in (candidates.allowed, *(table.loss for table in losses.values()), *masks):
        if table.shape != shape:
            msg = f"tables must be [U, F]: got {table.shape} for {shape[0]} units and {shape[1]} formats"
            raise ValueError(msg)
    return SensitivityProfile(
        candidates=candidates,
        losses=losses,
        fisher_sketch=arrays.get("fisher_sketch"),
        logit_gram=arrays.get("logit_gram"),
        prediction_fits={metric: PredictionFit(**fit) for metric, fit in document["prediction_fits"].items()},
        calibration_tokens=arrays["calibration_tokens"],
        selection_tokens=arrays["selection_tokens"],
        evaluation_tokens=arrays["evaluation_tokens"],
        fixed_bytes=document["fixed_bytes"],
        rest_bytes=document["rest_bytes"],
        reference_bytes=document["reference_bytes"],
        expert_share=document["expert_share"],
        routing=_routing(document["routing"], arrays),
        provenance=document["provenance"],
        cache=_cache(document.get("cache"), arrays),
        activations=_activations(document.get("activations"), arrays),
    )


def _cache(record: dict[str, Any] | None, arrays: Mapping[str, NDArray[Any]]) -> CacheLosses | None:
    if record is None:
        return None
    table = LossTable(loss=arrays["cache.loss"], std_error=arrays["cache.std_error"], unit_of_measure=NATS)
    candidates = _candidates(record, find_cache_formats(record["formats"]), arrays["cache.allowed"])
    return CacheLosses(candidates=candidates, table=table)


def _activation_arrays(activations: ActivationLosses) -> dict[str, NDArray[Any]]:
    return {
        "activations.allowed": activations.candidates.allowed,
        "activations.loss": activations.table.loss,
        "activations.std_error": activations.table.std_error,
        **{
            f"{_SCALE}{module}/{name}": scale
            for module, own in activations.scales.items()
            for name, scale in own.items()
        },
    }


def _activations(record: dict[str, Any] | None, arrays: Mapping[str, NDArray[Any]]) -> ActivationLosses | None:
    if record is None:
        return None
    scales: dict[str, dict[str, NDArray[Any]]] = {}
    for key in (key for key in arrays if key.startswith(_SCALE)):
        module, _, name = key.removeprefix(_SCALE).rpartition("/")
        scales.setdefault(module, {})[name] = arrays[key]
    table = LossTable(loss=arrays["activations.loss"], std_error=arrays["activations.std_error"], unit_of_measure=NATS)
    candidates = _candidates(record, find_activation_formats(record["formats"]), arrays["activations.allowed"])
    return ActivationLosses(candidates=candidates, table=table, scales=scales)


def _routing(names: dict[str, Any] | None, arrays: Mapping[str, NDArray[Any]]) -> RoutingStatistics | None:
    if names is None:
        return None
    return RoutingStatistics(
        layers=tuple(names["layers"]),
        domains=tuple(names["domains"]),
        **{name: arrays[f"routing.{name}"] for name in _ROUTING_ARRAYS},
    )


def _unit(record: dict[str, Any]) -> Unit:
    weights = tuple(
        Weight(**{**weight, "shape": tuple(weight["shape"]), "aliases": tuple(weight["aliases"])})
        for weight in record["weights"]
    )
    shape = record.get("cache_shape")
    modules = tuple(record.get("modules", ()))
    return Unit(**{**record, "weights": weights, "cache_shape": shape and tuple(shape), "modules": modules})
