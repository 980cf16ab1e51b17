"""A profile comes back from disk as it went, and anything else is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from runtime.candidates import list_candidates
from runtime.units import find_units
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.prediction.prediction_fit import PredictionFit
from sensitivity.profile import NATS, LossTable, SensitivityProfile
from sensitivity.profile_files import SCHEMA_VERSION, load_profile, save_profile
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g64", "int4_g128", "int8_channel_sym", "bf16")


def make_profile(*, tied: bool = False, sketches: bool = True) -> SensitivityProfile:
    model = build_tiny_llama(tied=True) if tied else build_tiny_mixtral()
    units = find_units(model, fuse=[r"self_attn\.(q|k|v)_proj"])
    candidates = list_candidates(units, FORMATS, pins={r"layers\.0\.self_attn\.o_proj": "bf16"})
    shape = candidates.allowed.shape
    generator = np.random.default_rng(0)

    def make_table(unit_of_measure: str, measured: NDArray[np.bool_] | None = None) -> LossTable:
        return LossTable(
            loss=generator.exponential(size=shape) * candidates.allowed,
            std_error=generator.exponential(size=shape) * candidates.allowed,
            unit_of_measure=unit_of_measure,
            measured=measured,
        )

    size = shape[0] * shape[1]
    return SensitivityProfile(
        candidates=candidates,
        losses={
            "fisher": make_table(NATS),
            "single_unit_kl": make_table(NATS, generator.random(shape) < 0.5),
            "weight_error": make_table("squared error"),
        },
        fisher_sketch=generator.normal(size=(3, *shape)).astype(np.float32) if sketches else None,
        # Transposed: safetensors would write such an array in the order of its memory.
        logit_gram=generator.normal(size=(size, size, 2)).astype(np.float32).T if sketches else None,
        prediction_fits={
            "fisher": PredictionFit(factor=1 / 3, exponent=1.1, log_error=0.123456789012345, plans=12),
            "single_unit_kl": PredictionFit(factor=2.0, exponent=0.9, log_error=1e-17, plans=4),
        },
        calibration_tokens=generator.integers(0, 320, (5, 6)),
        selection_tokens=generator.integers(0, 320, (2, 8)),
        evaluation_tokens=generator.integers(0, 320, (3, 4)),
        fixed_bytes=2**40 + 1,
        rest_bytes=12345,
        reference_bytes=2**41,
        expert_share=1 / 3,
        routing=None
        if tied
        else RoutingStatistics(
            layers=(0, 1),
            domains=("tëxt", "code"),
            tokens=generator.integers(1, 99, 2),
            visits=generator.integers(0, 99, (2, 2, 4)),
            gate_weight=generator.random((2, 2, 4)),
            together=generator.integers(0, 99, (2, 4, 4)),
        ),
        provenance={"model": "tïny", "profile": "f" * 64},
    )


def assert_equal(loaded: Any, saved: Any) -> None:
    if dataclasses.is_dataclass(saved):
        assert type(loaded) is type(saved)
        for field in dataclasses.fields(saved):
            assert_equal(getattr(loaded, field.name), getattr(saved, field.name))
    elif isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for key, value in saved.items():
            assert_equal(loaded[key], value)
    elif isinstance(saved, tuple):
        assert isinstance(loaded, tuple) and len(loaded) == len(saved)
        for one, other in zip(loaded, saved, strict=True):
            assert_equal(one, other)
    elif isinstance(saved, np.ndarray):
        assert loaded.dtype == saved.dtype
        np.testing.assert_array_equal(loaded, saved)
    else:
        assert type(loaded) is type(saved) and loaded == saved


@pytest.mark.parametrize("tied", [False, True], ids=["experts", "tied"])
@pytest.mark.parametrize("sketches", [False, True], ids=["no_sketches", "sketches"])
def test_every_field_comes_back(tmp_path: Path, tied: bool, sketches: bool) -> None:
    profile = make_profile(tied=tied, sketches=sketches)
    assert profile.candidates.reasons and not profile.candidates.allowed.all()
    save_profile(profile, tmp_path / "deep" / "profile")
    assert_equal(load_profile(tmp_path / "deep" / "profile"), profile)


def test_later_profile_replaces_the_earlier_one(tmp_path: Path) -> None:
    save_profile(make_profile(sketches=True), tmp_path / "profile")
    later = make_profile(tied=True, sketches=False)
    save_profile(later, tmp_path / "profile")
    assert_equal(load_profile(tmp_path / "profile"), later)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def test_failure_while_saving_leaves_what_was_there(tmp_path: Path) -> None:
    profile = make_profile()
    save_profile(profile, tmp_path / "profile")
    for broken in (
        dataclasses.replace(profile, provenance={"profile": object()}),  # type: ignore[dict-item]
        dataclasses.replace(profile, selection_tokens=np.array([object()])),
    ):
        for name in ("profile", "another"):
            with pytest.raises((TypeError, SafetensorError)):
                save_profile(broken, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    assert_equal(load_profile(tmp_path / "profile"), profile)


def edit_document(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        document = json.loads((directory / "profile.json").read_text(encoding="utf-8"))
        document = change(document) or document
        (directory / "profile.json").write_text(json.dumps(document), encoding="utf-8")

    return edit


def edit_arrays(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        arrays = load_file(directory / "arrays.safetensors")
        change(arrays)
        save_file(arrays, directory / "arrays.safetensors")

    return edit


def truncate(name: str, share: float) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return edit


NOT_A_PROFILE = "must be a directory that 'bitplan measure' wrote: got "
DAMAGED = "a profile must be complete: got .* damaged"
VERSION = f"must have schema_version={SCHEMA_VERSION}: got "


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda directory: (directory / "profile.json").unlink(), NOT_A_PROFILE),
        (lambda directory: (directory / "arrays.safetensors").unlink(), NOT_A_PROFILE),
        (lambda directory: (directory / "profile.json").write_bytes(b"\xff\xfe"), NOT_A_PROFILE),
        (truncate("profile.json", 0.5), NOT_A_PROFILE),
        (truncate("profile.json", 0.0), NOT_A_PROFILE),
        (truncate("arrays.safetensors", 0.5), NOT_A_PROFILE),
        (truncate("arrays.safetensors", 0.0), NOT_A_PROFILE),
        (edit_document(lambda document: [document]), VERSION + "None"),
        (edit_document(lambda document: document.pop("schema_version") and None), VERSION + "None"),
        (edit_document(lambda document: {**document, "schema_version": 1}), VERSION + "1 in .* Use the version"),
        (edit_document(lambda document: {**document, "schema_version": 3}), VERSION + "3 in .* Use the version"),
        (edit_document(lambda document: document.pop("units") and None), DAMAGED + ".*KeyError: 'units'"),
        (edit_document(lambda document: {**document, "units": document["units"][1:]}), DAMAGED + r".*must be \[U, F\]"),
        (edit_document(lambda document: {**document, "units": [{"name": "x"}]}), DAMAGED),
        (edit_document(lambda document: {**document, "metrics": ["fisher"]}), DAMAGED),
        (edit_document(lambda document: {**document, "metrics": {"unknown": NATS}}), DAMAGED + ".*loss.unknown"),
        (edit_document(lambda document: {**document, "formats": ["int9"]}), DAMAGED + ".*got 'int9'"),
        (edit_document(lambda document: document.pop("prediction_fits") and None), DAMAGED + ".*'prediction_fits'"),
        (edit_document(lambda document: {**document, "prediction_fits": {"fisher": {"factor": 1.0}}}), DAMAGED),
        (edit_document(lambda document: document.pop("routing") and None), DAMAGED + ".*KeyError: 'routing'"),
        (edit_arrays(lambda arrays: arrays.pop("routing.visits")), DAMAGED + ".*routing.visits"),
        (edit_arrays(lambda arrays: arrays.pop("calibration_tokens")), DAMAGED + ".*'calibration_tokens'"),
        (edit_arrays(lambda arrays: arrays.pop("allowed")), DAMAGED + ".*KeyError: 'allowed'"),
        (edit_arrays(lambda arrays: arrays.pop("std_error.fisher")), DAMAGED + ".*std_error.fisher"),
        (edit_arrays(lambda arrays: arrays.update({"loss.fisher": np.zeros((1, 1))})), DAMAGED + r".*got \(1, 1\) for"),
        (
            edit_arrays(lambda arrays: arrays.update({"measured.single_unit_kl": np.zeros((1, 2), dtype=bool)})),
            DAMAGED + r".*got \(1, 2\) for",
        ),
    ],
    ids=[
        *("no_document", "no_arrays", "no_text", "half_a_document", "empty_document", "half_the_arrays", "no_bytes"),
        *("list", "no_version", "older", "newer", "no_units", "a_unit_less", "foreign_unit", "metrics_are_a_list"),
        *(
            "metric_without_table",
            "unknown_format",
            "no_fits",
            "half_a_fit",
            "no_routing",
            "half_a_routing",
            "no_calibration",
            "no_mask",
            "no_std_error",
            "table_of_another_model",
            "mask_of_another_model",
        ),
    ],
)
def test_damaged_profile_is_refused(tmp_path: Path, edit: Callable[[Path], None], message: str) -> None:
    save_profile(make_profile(), tmp_path / "profile")
    edit(tmp_path / "profile")
    with pytest.raises(ValueError, match=message):
        load_profile(tmp_path / "profile")


def test_missing_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=NOT_A_PROFILE + ".*nowhere"):
        load_profile(tmp_path / "nowhere")
