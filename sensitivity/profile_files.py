"""Profiles on disk: a directory of ``profile.json`` (units, formats, provenance) and ``arrays.safetensors``."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from runtime.activation_formats import find_activation_formats
from runtime.cache_formats import find_cache_formats
from runtime.candidates import Candidates
from runtime.files import atomic_directory, check_replaceable, write_text
from runtime.formats import Format, find_formats
from runtime.units import Unit, Weight
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.prediction.prediction_fit import PredictionFit
from sensitivity.profile import NATS, ActivationLosses, CacheLosses, LossTable, SensitivityProfile

SCHEMA_VERSION = 2
_SCALE = "activations.scale/"
_ROUTING_ARRAYS = ("tokens", "visits", "gate_weight", "together")


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
