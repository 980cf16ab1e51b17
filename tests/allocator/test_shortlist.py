import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from allocator.measuring import MeasureRequest, run_measurement
from allocator.shortlist import (
    MENU,
    NO_ERROR,
    MenuErrors,
    choose_formats,
    find_shortlist,
    hull_excess,
    measure_menu,
    sample_units,
)
from allocator.store import Store
from runtime.candidates import Candidates, list_candidates
from runtime.formats import FORMATS
from runtime.loading import ReferenceModel, load_reference
from runtime.rendering import render
from runtime.stored_weights import load_stored_reference
from runtime.units import find_units, read_weight
from sensitivity.measure_config import FISHER, MeasureConfig
from solvers import AllocationProblem, solve
from tests.tiny_models import sample_text

FEW = ("int2_g64", "int3_g64", "int4_g64", "int4_g64_sym", "int5_g64", "fp4_g64", "mxfp4", "int8_g64", "bf16")


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> ReferenceModel:
    return load_reference(str(tiny_llama_dir))


def make_errors(bits: NDArray[np.float64], error: NDArray[np.float64]) -> MenuErrors:
    return MenuErrors(units=tuple(range(len(bits))), bits=bits, error=error)


@st.composite
def menus(draw: st.DrawFn) -> MenuErrors:
    seed = draw(st.integers(0, 2**32 - 1))
    weights, formats = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(seed)
    bits = np.repeat(rng.integers(1, 9, (1, formats)).astype(np.float64), weights, axis=0)
    error = 4.0**-bits * rng.uniform(0.3, 3.0, bits.shape)
    missing = rng.random(bits.shape) < 0.2
    missing[np.arange(weights), rng.integers(0, formats, weights)] = False
    return make_errors(np.where(missing, np.inf, bits), np.where(missing, np.inf, error))


def relaxed_optimum(errors: MenuErrors, formats: tuple[int, ...], k: NDArray[np.float64], limit: float) -> float:
    """The linear relaxation by SciPy: fractions of formats, whose optimum no rounding of a unit enters."""
    from scipy.optimize import linprog

    pairs = [(w, f) for w in range(len(errors.bits)) for f in formats if np.isfinite(errors.bits[w, f])]
    found = linprog(
        [k[w] * (errors.error[w, f] + NO_ERROR) for w, f in pairs],
        A_ub=[[errors.bits[w, f] for w, f in pairs]],
        b_ub=[limit],
        A_eq=[[float(w == v) for w, _ in pairs] for v in range(len(errors.bits))],
        b_eq=[1.0] * len(errors.bits),
    )
    return float(found.fun) if found.success else np.inf


@given(menus(), st.floats(0.0, 0.5), st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=25)
def test_no_plan_of_the_menu_is_better_by_more_than_the_bound(
    errors: MenuErrors, tolerance: float, seed: int, share: float
) -> None:
    chosen, bound = choose_formats(errors, tolerance=tolerance)
    assert 1.0 <= bound <= 1.0 + tolerance + 1e-9
    # Whatever the units' factors and the budget are.
    k = np.random.default_rng(seed).uniform(0.0, 10.0, len(errors.bits))
    bits = np.where(np.isfinite(errors.bits), errors.bits, np.nan)
    least, most = np.nanmin(bits, axis=1).sum(), np.nanmax(bits, axis=1).sum()
    limit = least + share * (most - least) + 1e-6
    whole = relaxed_optimum(errors, tuple(range(errors.bits.shape[1])), k, limit)
    # linprog is exact to about 1e-7 of numbers of this size.
    assert relaxed_optimum(errors, chosen, k, limit) <= bound * whole + 1e-6


@given(menus())
@settings(deadline=None, max_examples=20)
def test_a_format_that_is_left_is_needed(errors: MenuErrors) -> None:
    chosen, _ = choose_formats(errors, tolerance=0.1)
    for dropped in chosen:
        rest = [f for f in chosen if f != dropped]
        worst = 1.0
        for w, row in enumerate(errors.bits):
            own = np.flatnonzero(np.isfinite(row))
            some = [f for f in rest if f in own]
            worst = max(worst, float(hull_excess(row, errors.error[w] + NO_ERROR, own, some, row[own]).max()))
        assert worst > 1.1


def test_hull_excess_is_that_of_straight_lines() -> None:
    bits, loss = np.array([1.0, 2.0, 3.0]), np.array([9.0, 3.0, 1.0])
    factor = hull_excess(bits, loss, [0, 1, 2], [0, 2], np.array([1.0, 1.5, 2.0, 3.0]))
    np.testing.assert_allclose(factor, [1.0, 7.0 / 6.0, 5.0 / 3.0, 1.0])
    # The cheapest is not among those kept: what is below the others is out of reach.
    assert hull_excess(bits, loss, [0, 1, 2], [1, 2], np.array([1.0, 2.0])).tolist() == [np.inf, 1.0]
    assert hull_excess(bits, loss, [0, 1, 2], [], np.array([1.0])).tolist() == [np.inf]


def list_few(reference: ReferenceModel) -> Candidates:
    return list_candidates(find_units(reference.model), FEW)


def test_the_sample_has_every_kind_of_unit(reference: ReferenceModel) -> None:
    candidates = list_few(reference)
    units = sample_units(candidates)
    kinds = {(u.kind, u.role, u.weights[0].shape) for u in candidates.units}
    assert {
        (candidates.units[u].kind, candidates.units[u].role, candidates.units[u].weights[0].shape) for u in units
    } == kinds
    # Two layers: the first and the last of each.
    roles = [candidates.units[u].role for u in units if candidates.units[u].layer_index is not None]
    assert all(roles.count(role) == 2 for role in roles)


def test_errors_are_those_of_the_rows(reference: ReferenceModel) -> None:
    candidates = list_few(reference)
    shortlist = find_shortlist(reference, candidates, quantizer="rtn")
    units = sample_units(candidates)
    errors = measure_menu(reference, candidates, units, quantizer="rtn")
    for (w, u), f in itertools.product(enumerate(units), range(len(FEW))):
        weight = candidates.units[u].weights[0]
        if not candidates.allowed[u, f]:
            assert errors.bits[w, f] == errors.error[w, f] == np.inf
            continue
        format_ = candidates.formats[f]
        assert errors.bits[w, f] == 8 * format_.storage_bytes(weight.shape) / weight.weight_count
        values = read_weight(reference.model, weight)
        if len(values) > 64:
            continue
        own = (render(values, format_) - values).square().sum() / values.square().sum()
        assert errors.error[w, f] == pytest.approx(float(own), rel=1e-5)
    assert {f.name for f in shortlist.candidates.formats} <= set(FEW)
    assert shortlist.candidates.allowed.any(axis=1).all()
    assert "of 9 formats" in shortlist.describe()


def test_a_model_read_block_by_block_has_the_same_errors(reference: ReferenceModel, tiny_llama_dir: Path) -> None:
    candidates = list_few(reference)
    units = sample_units(candidates)
    stored = load_stored_reference(str(tiny_llama_dir))
    found = [measure_menu(each, candidates, units, quantizer="rtn").error for each in (reference, stored)]
    np.testing.assert_array_equal(*found)


def test_kept_errors_are_read_again(reference: ReferenceModel, tmp_path: Path) -> None:
    candidates = list_few(reference)
    calls: list[tuple[int, int]] = []

    def find() -> tuple[str, ...]:
        found = find_shortlist(
            reference, candidates, quantizer="gptq", kept=tmp_path, progress=lambda *count: calls.append(count)
        )
        return tuple(f.name for f in found.candidates.formats)

    first = find()
    assert calls[-1] == (len(sample_units(candidates)),) * 2
    calls.clear()
    assert find() == first and not calls


def test_measure_takes_the_menu(reference: ReferenceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(9000), encoding="utf-8")
    config = MeasureConfig(
        metrics=(FISHER,),
        fisher_sequences=2,
        sequence_tokens=16,
        fit_plans=None,
        fit_sequences=2,
        logit_sequence_tokens=16,
        selection_sequences=2,
        evaluation_sequences=2,
        evaluation_sequence_tokens=16,
    )
    # Every format of the embedding alone: seconds.
    request = MeasureRequest(calibration=str(text), formats=(MENU,), pins={r"layers": "int8_g64"}, config=config)
    profile = run_measurement(reference, request, Store(tmp_path / "store"), lambda *_: None)
    names = [f.name for f in profile.candidates.formats]
    assert 3 < len(names) < len(FORMATS) // 3
    assert profile.provenance["menu"].startswith(f"{len(names)} of {len(FORMATS)} formats, bound 1.0")
    # What the profile says of the shortlist is what a measurement of these formats says.
    named = run_measurement(
        reference, replace(request, formats=tuple(names)), Store(tmp_path / "other"), lambda *_: None
    )
    np.testing.assert_array_equal(named.losses[FISHER].loss, profile.losses[FISHER].loss)


def test_the_solver_finds_the_hulls_optimum() -> None:
    """One unit: the best format under a limit at a vertex is the same of the menu and of the shortlist."""
    bits = np.array([[2.0, 3.0, 3.5, 4.0, 8.0]])
    error = np.array([[0.25, 0.0625, 0.06, 0.0156, 1e-4]])
    chosen, bound = choose_formats(make_errors(bits, error), tolerance=0.0)
    assert chosen == (0, 1, 3, 4) and bound == 1.0
    for limit in (2.0, 3.0, 4.0, 8.0):
        problems = [
            AllocationProblem(
                loss=error[:, own],
                cost=bits[None][:, :, own],
                limit=np.array([limit]),
                allowed=np.ones((1, len(own)), bool),
                resources=("bits",),
            )
            for own in (list(range(5)), list(chosen))
        ]
        assert solve(problems[0]).objective == solve(problems[1]).objective
