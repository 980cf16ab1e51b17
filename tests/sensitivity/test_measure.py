"""Measuring: what is in a profile, how it is counted, which settings are refused, and what the fingerprint covers."""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.candidates import list_candidates
from runtime.checkpoint import fixed_bytes, reference_bytes, rest_bytes
from runtime.units import find_units
from sensitivity import provenance
from sensitivity.calibration import TokenSequences
from sensitivity.criteria.estimator_input import EstimatorInput
from sensitivity.criteria.output_error import measure_output_error
from sensitivity.criteria.weight_error import measure_weight_error
from sensitivity.estimators import find_estimator
from sensitivity.experts.expert_tables import FISHER_SHRUNK
from sensitivity.experts.routing_measurement import measure_routing
from sensitivity.experts.shrinkage import shrink_rare_losses
from sensitivity.measure_config import FISHER, METRICS, OUTPUT_ERROR, SINGLE_UNIT_KL, WEIGHT_ERROR, MeasureConfig
from sensitivity.profile import NATS, SensitivityProfile
from sensitivity.profile_files import load_profile, save_profile
from sensitivity.provenance import measurement_fingerprint
from sensitivity.sketches.combination import COMBINED, combine
from sensitivity.sketches.fisher_sketch import fisher_loss, measure_streamed_fisher_sketch
from sensitivity.sketches.logit_sketch import LogitSketch, gram_of
from tests.sensitivity.measured_models import (
    FORMATS,
    Measurement,
    arrays_of,
    assert_same,
    make_config,
    make_measurement,
)

Calls = list[tuple[str, int, int]]


def test_profile_holds_what_the_estimators_measure(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path
) -> None:
    model, candidates, text = measurement.reference.model, measurement.candidates, measurement.text
    config = measurement.config
    assert list(whole.losses) == [*METRICS, COMBINED]
    np.testing.assert_array_equal(whole.table(WEIGHT_ERROR).loss, measure_weight_error(model, candidates))
    output_error = measure_output_error(model, candidates, text.fisher.tokens)
    np.testing.assert_array_equal(whole.table(OUTPUT_ERROR).loss, output_error)
    for metric in (WEIGHT_ERROR, OUTPUT_ERROR):
        assert not whole.table(metric).std_error.any()
        assert whole.table(metric).unit_of_measure == "squared error"
    sketch = measure_streamed_fisher_sketch(
        model, candidates, text.fisher.tokens, seed=config.seed, directory=tmp_path, progress=lambda *_: None
    )
    np.testing.assert_array_equal(whole.fisher_sketch, sketch)
    for part, expected in zip(("loss", "std_error"), fisher_loss(sketch), strict=True):
        np.testing.assert_array_equal(getattr(whole.table(FISHER), part), expected)
    combined = combine(whole.table(FISHER), whole.table(SINGLE_UNIT_KL), candidates.allowed)
    np.testing.assert_array_equal(whole.table(COMBINED).loss, combined.loss)
    np.testing.assert_array_equal(whole.table(COMBINED).std_error, combined.std_error)
    assert all(whole.table(metric).unit_of_measure == NATS for metric in (FISHER, SINGLE_UNIT_KL, COMBINED))
    for table in whole.losses.values():
        assert not table.loss[~candidates.allowed].any()
        assert (table.loss[candidates.allowed] > 0).mean() > 0.9


def test_single_unit_kl_and_halves_of_the_gram(measurement: Measurement, whole: SensitivityProfile) -> None:
    model, candidates, tokens = measurement.reference.model, measurement.candidates, measurement.text.logit.tokens
    measurer = LogitSketch(model, candidates, tokens, top_tokens=measurement.config.top_tokens)
    effects = [measurer.measure(u) for u in range(len(candidates.units))]
    kl = np.stack([effect.kl for effect in effects]).astype(np.float64)
    np.testing.assert_array_equal(whole.table(SINGLE_UNIT_KL).loss, kl.mean(axis=-1))
    means = np.stack([kl[..., 8 * s : 8 * s + 8].mean(axis=-1) for s in range(4)])
    np.testing.assert_allclose(whole.table(SINGLE_UNIT_KL).std_error, means.std(axis=0, ddof=1) / 4**0.5, rtol=1e-12)
    # Four sequences of 8 positions: two in each half.
    sketches = np.concatenate([effect.sketch for effect in effects])
    assert whole.logit_gram is not None and whole.logit_gram.dtype == np.float32
    np.testing.assert_array_equal(whole.logit_gram[0], gram_of(sketches[:, :16]).astype(np.float32))
    np.testing.assert_array_equal(whole.logit_gram[1], gram_of(sketches[:, 16:]).astype(np.float32))


def test_profile_says_where_it_comes_from(measurement: Measurement, whole: SensitivityProfile, tmp_path: Path) -> None:
    reference, text = measurement.reference, measurement.text
    np.testing.assert_array_equal(whole.calibration_tokens, text.fisher.tokens.numpy())
    np.testing.assert_array_equal(whole.selection_tokens, text.selection.tokens.numpy())
    np.testing.assert_array_equal(whole.evaluation_tokens, text.evaluation.tokens.numpy())
    assert whole.fixed_bytes == fixed_bytes(reference.model)
    assert whole.rest_bytes == rest_bytes(reference.model)
    assert whole.reference_bytes == reference_bytes(reference.model)
    assert whole.expert_share == 1.0
    assert whole.provenance["model"] == reference.name
    assert whole.provenance["model_fingerprint"] == reference.fingerprint
    assert whole.provenance["calibration"] == f"test ({text.fisher.fingerprint[:16]})"
    assert whole.fingerprint == measurement_fingerprint(
        reference.fingerprint, measurement.candidates, text, measurement.config
    )
    save_profile(whole, tmp_path / "profile")
    assert_same(load_profile(tmp_path / "profile"), whole)


@pytest.mark.parametrize("name", ["tiny_mixtral_dir", "tiny_qwen_moe_dir"])
def test_mixtures_of_experts(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    measurement = make_measurement(request.getfixturevalue(name), make_config(fisher_sequences=2))
    profile = measurement.run(tmp_path, lambda *_: None)
    # Two of four experts see a token.
    assert profile.expert_share == 0.5
    assert list(profile.losses) == [WEIGHT_ERROR, OUTPUT_ERROR, FISHER, FISHER_SHRUNK, SINGLE_UNIT_KL, COMBINED]
    routing = measure_routing(measurement.reference.model, measurement.text.fisher.tokens)
    assert profile.routing is not None and profile.routing.layers == routing.layers == (0, 1)
    np.testing.assert_array_equal(profile.routing.visits, routing.visits)
    np.testing.assert_array_equal(profile.routing.together, routing.together)
    fisher = profile.table(FISHER)
    shrunk = shrink_rare_losses(fisher.loss, fisher.std_error, routing, measurement.candidates)
    np.testing.assert_array_equal(profile.table(FISHER_SHRUNK).loss, shrunk.loss)
    np.testing.assert_array_equal(profile.table(FISHER_SHRUNK).std_error, shrunk.std_error)
    # The piece of the routing is taken up like any other.
    again = replace(measurement, reference=replace(measurement.reference, model=nan_model(measurement.reference.model)))
    assert_same(again.run(tmp_path, lambda *_: None), profile)
    assert all(np.isfinite(array).all() for array in arrays_of(profile).values())


@pytest.mark.parametrize(
    ("metrics", "held"),
    [
        ((WEIGHT_ERROR,), [WEIGHT_ERROR]),
        ((FISHER, OUTPUT_ERROR), [OUTPUT_ERROR, FISHER]),
        ((SINGLE_UNIT_KL,), [SINGLE_UNIT_KL]),
        ((SINGLE_UNIT_KL, FISHER), [FISHER, SINGLE_UNIT_KL, COMBINED]),
        (("kurtosis", WEIGHT_ERROR), [WEIGHT_ERROR, "kurtosis"]),
    ],
    ids="+".join,
)
def test_only_the_metrics_asked_for_are_measured(
    measurement: Measurement, tmp_path: Path, metrics: tuple[str, ...], held: list[str]
) -> None:
    calls: Calls = []
    few = replace(measurement, config=replace(measurement.config, metrics=metrics))
    profile = few.run(tmp_path, lambda *call: calls.append(call))
    assert list(profile.losses) == held
    assert (profile.fisher_sketch is not None) == (FISHER in metrics)
    assert (profile.logit_gram is not None) == (SINGLE_UNIT_KL in metrics)
    predicting = {metric for metric in held if profile.table(metric).unit_of_measure == NATS}
    assert {stage for stage, _, _ in calls} == {*metrics, *(["prediction_fit"] if predicting else [])}
    # Of metrics that are unlike the measured KL there may be none.
    assert set(profile.prediction_fits) == predicting


def test_further_estimators(measurement: Measurement, whole: SensitivityProfile, tmp_path: Path) -> None:
    metrics = (FISHER, "kurtosis", "linearity")
    more = replace(measurement, config=replace(measurement.config, metrics=metrics, seed=1))
    profile = more.run(tmp_path, lambda *_: None)
    assert list(profile.losses) == [*metrics]
    given = EstimatorInput(
        model=more.reference.model, candidates=more.candidates, tokens=more.text.fisher.tokens, seed=1
    )
    for name in metrics[1:]:
        expected = find_estimator(name).estimate(given)
        np.testing.assert_array_equal(profile.table(name).loss, expected.loss)
        np.testing.assert_array_equal(profile.table(name).std_error, expected.std_error)
        assert profile.table(name).unit_of_measure == expected.unit_of_measure
    # One that predicts the KL is corrected like the others.
    assert set(profile.prediction_fits) == {FISHER, "linearity"}
    save_profile(profile, tmp_path / "profile")
    loaded = load_profile(tmp_path / "profile")
    assert list(loaded.losses) == [*metrics] and loaded.prediction_fits == profile.prediction_fits
    # Taken up, it is not measured again.
    calls: Calls = []
    again = replace(more, reference=replace(more.reference, model=nan_model(more.reference.model)))
    np.testing.assert_array_equal(
        again.run(tmp_path, lambda *call: calls.append(call)).table("linearity").loss, profile.table("linearity").loss
    )
    assert [call for call in calls if call[0] == "linearity"] == [("linearity", 0, 1), ("linearity", 1, 1)]


def nan_model(model: Any) -> Any:
    """Returns a model with which nothing can be measured."""
    broken = copy.deepcopy(model)
    for parameter in broken.parameters():
        parameter.fill_(float("nan"))
    return broken


def test_progress_counts_every_piece(measurement: Measurement, tmp_path: Path) -> None:
    calls: Calls = []
    measurement.run(tmp_path, lambda *call: calls.append(call))
    # Of the sketch: hidden states of three places, the head, two layers, all outside of the layers.
    totals = {WEIGHT_ERROR: 1, OUTPUT_ERROR: 1, FISHER: 7, SINGLE_UNIT_KL: len(measurement.candidates.units)}
    one_by_one = [(stage, done, total) for stage, total in totals.items() for done in range(total + 1)]
    # Plans are measured four at a time.
    assert calls == [*one_by_one, *(("prediction_fit", done, 5) for done in (0, 4, 5))]


BOUNDS = r"must be at least 2 \(a standard error needs two samples\): got "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({name: 1}, f"{name} {BOUNDS}1")
            for name, value in asdict(MeasureConfig()).items()
            if type(value) is int and value
        ),
        ({"fisher_sequences": -3}, f"fisher_sequences {BOUNDS}-3"),
        ({"logit_sequences": 3}, r"logit_sequences must be even \(two halves are compared\): got 3"),
        ({"fit_plans": 3}, r"fit_plans must be at least 4, or None: got 3\. Raise it"),
        (
            {"metrics": ()},
            r"metrics must be among weight_error, output_error, fisher, single_unit_kl, .*kurtosis.*: got \[\]",
        ),
        ({"metrics": ("fisher", "hessian")}, r"metrics must be among .*: got \['fisher', 'hessian'\]"),
        ({"gradient_dtype": "float16"}, "gradient_dtype must be among float32, bfloat16: got 'float16'"),
        ({"quantizer": "magic"}, "quantizer must be among .*rtn.*: got 'magic'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_are_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasureConfig(**change)  # type: ignore[arg-type]


def other_text(part: TokenSequences) -> TokenSequences:
    tokens = part.tokens.clone()
    tokens[-1, -1] += 1
    return replace(part, tokens=tokens)


def change_text(name: str) -> Callable[[Measurement], Measurement]:
    return lambda m: replace(m, text=replace(m.text, **{name: other_text(getattr(m.text, name))}))


def change_config(**changes: object) -> Callable[[Measurement], Measurement]:
    return lambda m: replace(m, config=replace(m.config, **changes))  # type: ignore[arg-type]


def change_candidates(**changes: object) -> Callable[[Measurement], Measurement]:
    options = {"format_names": FORMATS, "fuse": (), **changes}
    fuse = options.pop("fuse")

    def change(m: Measurement) -> Measurement:
        units = find_units(m.reference.model, fuse=fuse)  # type: ignore[arg-type]
        return replace(m, candidates=list_candidates(units, **options))  # type: ignore[arg-type]

    return change


CHANGES: dict[str, Callable[[Measurement], Measurement]] = {
    "weights": lambda m: replace(m, reference=replace(m.reference, fingerprint="other")),
    "formats": change_candidates(format_names=("int2_g64", "int3_g64", "bf16")),
    "order_of_formats": change_candidates(format_names=FORMATS[::-1]),
    "allowed": change_candidates(pins={"o_proj": "int4_g64"}),
    "embedding_formats": change_candidates(embedding_formats=("bf16",)),
    "units": change_candidates(fuse=(r"self_attn\.(q|k|v)_proj",)),
    "fisher_text": change_text("fisher"),
    "logit_text": change_text("logit"),
    "fit_text": change_text("fit"),
    "selection_text": change_text("selection"),
    "evaluation_text": change_text("evaluation"),
    "seed": change_config(seed=1),
    "top_tokens": change_config(top_tokens=17),
    "logit_passes": change_config(logit_passes=17),
    "all_logit_passes": change_config(logit_passes=None),
    "fit_plans": change_config(fit_plans=6),
    "no_fit": change_config(fit_plans=None),
    "metrics": change_config(metrics=(FISHER,)),
    "until_stable": change_config(until_stable=True),
    "gradient_dtype": change_config(gradient_dtype="bfloat16"),
}


def fingerprint(m: Measurement) -> str:
    return measurement_fingerprint(m.reference.fingerprint, m.candidates, m.text, m.config)


def test_fingerprint_covers_whatever_changes_the_numbers(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = {name: fingerprint(change(measurement)) for name, change in CHANGES.items()}
    own = fingerprint(measurement)
    monkeypatch.setattr(provenance, "MEASUREMENT_VERSION", provenance.MEASUREMENT_VERSION + 1)
    fingerprints["version"] = fingerprint(measurement)
    assert len({own, *fingerprints.values()}) == len(CHANGES) + 2
    monkeypatch.undo()
    # Names of the text and of the model are for people.
    renamed = replace(
        measurement,
        reference=replace(measurement.reference, name="other"),
        text=replace(measurement.text, fisher=replace(measurement.text.fisher, source="elsewhere")),
    )
    assert fingerprint(renamed) == own == fingerprint(change_candidates()(measurement))
