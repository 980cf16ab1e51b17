"""One contract for every estimator, on a tied dense model and on mixtures of experts."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.criteria.estimator_input import EstimatorInput
from sensitivity.criteria.output_error import measure_output_error
from sensitivity.criteria.weight_error import measure_weight_error
from sensitivity.estimators import ESTIMATORS, find_estimator
from sensitivity.profile import NATS
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g64", "int4_g64", "int8_g64", "int4_g128", "bf16")
TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
SIGNED = {"hessian_trace"}  # a Hessian has negative directions
OWN_PASSES = {"affinity_error"}  # gate weights are not among the shared statistics
RANKINGS = [name for name, estimator in ESTIMATORS.items() if estimator.score]


def make_candidates(model: PreTrainedModel) -> Candidates:
    return list_candidates(find_units(model, fuse=[r"self_attn\.(q|k|v)_proj"]), FORMATS)


def make_input(model: PreTrainedModel) -> EstimatorInput:
    return EstimatorInput(model=model, candidates=make_candidates(model), tokens=TOKENS, seed=1)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_tables_keep_the_contract(name: str, model: PreTrainedModel) -> None:
    estimator = find_estimator(name)
    assert estimator.name == name
    given = make_input(model)
    before = {key: parameter.data.clone() for key, parameter in model.named_parameters()}
    table = estimator.estimate(given)
    allowed = given.candidates.allowed
    for values in (table.loss, table.std_error):
        assert values.shape == allowed.shape
        assert values.dtype == np.float64
        assert np.isfinite(values).all() and (name in SIGNED or (values >= 0.0).all())
        assert not values[~allowed].any()
    assert 0 < (~allowed).sum() < allowed.sum()
    assert table.unit_of_measure == estimator.unit_of_measure
    assert (estimator.inputs in ("gradients", "measured")) == table.std_error.any()
    assert estimator.unit_of_measure != NATS or table.std_error.any()
    # A wider code of the same groups loses less, where anything is lost at all.
    two, four, eight = np.abs(table.loss[:, :3]).T
    either = allowed[:, 0] & (two > 0.0)
    assert either.any()
    assert np.all(two[either] > four[either]) and np.all(four[either] > eight[either])
    # A second estimate of a fresh input gives the same numbers, and nothing has touched the weights.
    again = estimator.estimate(make_input(model))
    np.testing.assert_array_equal(again.loss, table.loss)
    assert all(torch.equal(parameter.data, before[key]) for key, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_text_is_asked_for_where_the_model_runs(name: str) -> None:
    model = build_tiny_llama().requires_grad_(False)
    given = dataclasses.replace(make_input(model), tokens=None)
    if ESTIMATORS[name].inputs == "weights":
        np.testing.assert_array_equal(
            ESTIMATORS[name].estimate(given).loss, ESTIMATORS[name].estimate(make_input(model)).loss
        )
    else:
        with pytest.raises(ValueError, match="tokens must be given for an estimator that runs the model: got None"):
            ESTIMATORS[name].estimate(given)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_format_that_holds_the_weights_loses_nothing(name: str) -> None:
    model = build_tiny_llama().bfloat16().float().requires_grad_(False)
    loss = ESTIMATORS[name].estimate(make_input(model)).loss
    assert not loss[:, FORMATS.index("bf16")].any()
    assert np.all(np.abs(loss[:, FORMATS.index("int4_g64")]) > 0)


@pytest.mark.parametrize("name", RANKINGS)
def test_score_times_error_is_the_table(name: str, model: PreTrainedModel) -> None:
    estimator, given = ESTIMATORS[name], make_input(model)
    assert estimator.score is not None
    score, loss = estimator.score(given), estimator.estimate(given).loss
    error = given.weight_error if "variance" in name else given.noise_to_signal
    known = np.isfinite(score)
    assert known.any() and np.all(score[known] >= 0.0)
    np.testing.assert_allclose(loss[known], score[known, None] * error[known], rtol=1e-12)
    np.testing.assert_allclose(loss[~known], score[known].max() * error[~known], rtol=1e-12)


def test_first_rows_are_the_functions_themselves() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    given = make_input(model)
    np.testing.assert_array_equal(
        find_estimator("weight_error").estimate(given).loss, measure_weight_error(model, given.candidates)
    )
    np.testing.assert_array_equal(
        find_estimator("output_error").estimate(given).loss, measure_output_error(model, given.candidates, TOKENS)
    )


def test_one_pass_serves_all_estimators() -> None:
    model = build_tiny_llama().requires_grad_(False)
    given = make_input(model)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for estimator in ESTIMATORS.values():
        if estimator.inputs in ("weights", "forward") and estimator.name not in OWN_PASSES:
            estimator.estimate(given)
    assert len(passes) == len(TOKENS)


def test_criteria_of_relative_error_do_not_see_the_scale_of_weights() -> None:
    model, larger = (build_tiny_llama().requires_grad_(False) for _ in range(2))
    for parameter in larger.parameters():
        parameter.data = parameter.data * 16.0
    for name in ("noise_to_signal", "crest_factor", "z_distribution", "kurtosis"):
        plain, scaled = (ESTIMATORS[name].estimate(make_input(m)).loss for m in (model, larger))
        # A power of two rounds nothing but the smallest scales, below the normal float16 numbers.
        np.testing.assert_allclose(scaled, plain, rtol=1e-3)


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator must be a known name: got 'magic'. Known estimators: weight_error"):
        find_estimator("magic")


def test_wrong_input_is_refused() -> None:
    given = make_input(build_tiny_llama().requires_grad_(False))
    with pytest.raises(ValueError, match="quantizer must be among rtn.*: got 'magic'"):
        dataclasses.replace(given, quantizer="magic")
    for tokens in (TOKENS[0], TOKENS[:, :0]):
        with pytest.raises(ValueError, match=r"tokens must be \[S, T\], not empty: got shape"):
            dataclasses.replace(given, tokens=tokens)
