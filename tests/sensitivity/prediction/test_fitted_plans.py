"""Corrections fitted to measured plans, against plans built, run and added up one by one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.candidates import list_candidates
from sensitivity.measure_config import FISHER, OUTPUT_ERROR, SINGLE_UNIT_KL, WEIGHT_ERROR
from sensitivity.prediction.fitted_plans import fit_profile
from sensitivity.prediction.prediction_fit import PredictionFit, draw_choices, fit_predictions
from sensitivity.profile import NATS, LossTable, SensitivityProfile
from sensitivity.sketches.combination import COMBINED
from tests.sensitivity.changed_models import joint_kl
from tests.sensitivity.measured_models import Measurement

COUNT = 6


class Fit:
    """Fits the plans of a measurement, and counts the runs of its model; ends when so many plans are measured."""

    def __init__(
        self,
        measurement: Measurement,
        losses: Mapping[str, LossTable],
        pieces: Path,
        *,
        count: int = COUNT,
        end: int | None = None,
    ) -> None:
        self.calls: list[tuple[int, int]] = []
        self.model_runs = 0
        self.fits: dict[str, PredictionFit] | None = None
        self._end = end
        model = measurement.reference.model
        hook = model.lm_head.register_forward_hook(self._count)
        try:
            self.fits = fit_profile(
                model,
                measurement.candidates,
                losses,
                measurement.text.fit.tokens,
                count=count,
                quantizer="rtn",
                seed=3,
                pieces=pieces,
                progress=self._call,
            )
        except KeyboardInterrupt:
            assert end is not None
        finally:
            hook.remove()

    def _count(self, *_: object) -> None:
        self.model_runs += 1

    def _call(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if done == self._end:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("metrics", "guide"),
    [((WEIGHT_ERROR, FISHER, SINGLE_UNIT_KL, COMBINED), COMBINED), ((SINGLE_UNIT_KL, FISHER), SINGLE_UNIT_KL)],
    ids=["combined", "first"],
)
def test_fits_are_those_of_plans_measured_one_by_one(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, metrics: tuple[str, ...], guide: str
) -> None:
    model, candidates = measurement.reference.model, measurement.candidates
    assert not candidates.allowed.all()
    losses = {metric: whole.table(metric) for metric in metrics}
    stored = np.full(candidates.allowed.shape, np.nan)
    for u, f in np.argwhere(candidates.allowed):
        stored[u, f] = sum(candidates.formats[f].storage_bytes(w.shape) for w in candidates.units[u].weights)
    sizes = np.array([sum(np.prod(w.shape) for w in unit.weights) for unit in candidates.units], dtype=np.float64)
    choices = draw_choices(losses[guide].loss, stored, candidates.allowed, sizes, count=COUNT, seed=3)
    plans = [{u: int(f) for u, f in enumerate(choice)} for choice in choices]
    assert all(candidates.allowed[u, f] for plan in plans for u, f in plan.items())
    measured = np.array([joint_kl(model, candidates, plan, measurement.text.fit.tokens).mean() for plan in plans])
    found = Fit(measurement, losses, tmp_path)
    assert found.fits is not None
    assert set(found.fits) == {metric for metric, table in losses.items() if table.unit_of_measure == NATS}
    for metric, fit in found.fits.items():
        predicted = np.array([sum(losses[metric].loss[u, f] for u, f in plan.items()) for plan in plans])
        expected = fit_predictions(predicted, measured)
        assert fit.plans == expected.plans == COUNT
        # The KL is measured in float32, that of the least plan to some 1e-5.
        for name in ("factor", "exponent", "log_error"):
            assert getattr(fit, name) == pytest.approx(getattr(expected, name), rel=1e-3)
    # Four plans and two, each time beside the reference.
    assert found.calls == [(0, COUNT), (4, COUNT), (6, COUNT)]
    assert found.model_runs == 5 + 3


def test_interrupted_fit_is_taken_up(measurement: Measurement, whole: SensitivityProfile, tmp_path: Path) -> None:
    expected = Fit(measurement, whole.losses, tmp_path / "whole")
    interrupted = Fit(measurement, whole.losses, tmp_path / "taken_up", end=4)
    assert interrupted.fits is None and interrupted.model_runs == 5
    rest = Fit(measurement, whole.losses, tmp_path / "taken_up")
    assert rest.fits == expected.fits
    assert rest.model_runs == 3
    again = Fit(measurement, whole.losses, tmp_path / "taken_up")
    assert again.fits == expected.fits
    assert (again.model_runs, again.calls) == (0, expected.calls)


def test_no_metric_in_nats_no_fit(measurement: Measurement, whole: SensitivityProfile, tmp_path: Path) -> None:
    losses = {metric: whole.table(metric) for metric in (WEIGHT_ERROR, OUTPUT_ERROR)}
    found = Fit(measurement, losses, tmp_path)
    assert (found.fits, found.calls, found.model_runs) == ({}, [], 0)
    assert not list(tmp_path.iterdir())


def test_plans_that_are_all_the_same_give_no_fit(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path
) -> None:
    one = replace(measurement, candidates=list_candidates(measurement.candidates.units, ("int4_g64",)))
    losses = {FISHER: LossTable(loss=np.ones((15, 1)), std_error=np.zeros((15, 1)), unit_of_measure=NATS)}
    found = Fit(one, losses, tmp_path, count=4)
    assert (found.fits, found.model_runs) == ({}, 5)


def test_fit_leaves_the_model_as_it_was(measurement: Measurement, whole: SensitivityProfile, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in measurement.reference.model.state_dict().items()}
    Fit(measurement, whole.losses, tmp_path, end=4)
    after = measurement.reference.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_predictions_are_fitted_to_the_text_of_the_fit(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path
) -> None:
    config = measurement.config
    assert config.fit_plans is not None
    fits = fit_profile(
        measurement.reference.model,
        measurement.candidates,
        whole.losses,
        measurement.text.fit.tokens,
        count=config.fit_plans,
        quantizer=config.quantizer,
        seed=config.seed,
        pieces=tmp_path,
        progress=lambda *_: None,
    )
    assert set(fits) == {FISHER, SINGLE_UNIT_KL, COMBINED}
    assert whole.prediction_fits == fits
