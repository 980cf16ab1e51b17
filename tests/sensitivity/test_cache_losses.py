"""Losses of caches against whole passes of the model, and profiles joined from weights and caches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from runtime.cache_formats import CacheLoad
from runtime.cache_units import find_cache_units, list_cache_candidates
from runtime.candidates import Candidates
from runtime.quantized_cache import QuantizedCache
from sensitivity.cache_losses import (
    cache_fingerprint,
    check_metrics_beside_weights,
    join_cache,
    measure_cache_losses,
    reference_cache_bytes,
)
from sensitivity.evaluation import score_assignments
from sensitivity.profile import CacheLosses, SensitivityProfile
from sensitivity.profile_files import load_profile, save_profile
from tests.tiny_models import build_tiny_llama

CACHE_FORMATS = ("int2_channel", "int4_channel", "int4_g32", "bf16")
TOKENS = torch.arange(4 * 9).mul(7).remainder(320).view(4, 9)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build_tiny_llama().requires_grad_(False)


@pytest.fixture(scope="module")
def caches(llama: LlamaForCausalLM) -> Candidates:
    return list_cache_candidates(find_cache_units(llama), CACHE_FORMATS)


@pytest.fixture(scope="module")
def losses(llama: LlamaForCausalLM, caches: Candidates, tmp_path_factory: pytest.TempPathFactory) -> CacheLosses:
    return measure_cache_losses(
        llama, caches, TOKENS, pieces=tmp_path_factory.mktemp("pieces"), progress=lambda done, total: None
    )


def decoded_kl(model: LlamaForCausalLM, formats: dict[str, str]) -> np.ndarray:
    """Returns the KL [S] of decoding with the packed cache, in float64 from the logits on."""
    everything = {unit.name: "bf16" for unit in find_cache_units(model)}
    cache = QuantizedCache(model, {**everything, **formats})
    steps = [model(t[:, None], past_key_values=cache, use_cache=True).logits for t in TOKENS.unbind(1)]
    log_p = torch.log_softmax(model(TOKENS, use_cache=False).logits.double(), dim=-1)
    log_q = torch.log_softmax(torch.cat(steps, dim=1).double(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).numpy()


def test_a_loss_is_the_kl_of_decoding_from_that_cache(
    llama: LlamaForCausalLM, caches: Candidates, losses: CacheLosses
) -> None:
    assert not caches.allowed[:, 2].any()  # a group of 32 in a head of 16
    assert not losses.table.loss[:, 2].any()
    for u, unit in enumerate(caches.units):
        for f in (0, 1):
            kl = decoded_kl(llama, {unit.name: CACHE_FORMATS[f]})
            # The others are held in bf16 there: relative errors of 2^-9 in the states.
            assert losses.table.loss[u, f] == pytest.approx(kl.mean(), rel=0.05)
            assert losses.table.std_error[u, f] == pytest.approx(kl.std(ddof=1) / 2, rel=0.15)
        assert losses.table.loss[u, 0] > losses.table.loss[u, 1] > losses.table.loss[u, 3] > 0
    assert (losses.table.loss[:, 3] < 1e-4).all()


def test_all_caches_together_are_scored_as_they_are_decoded(llama: LlamaForCausalLM, caches: Candidates) -> None:
    formats = {unit.name: ("int2_channel", "int4_channel")[u % 2] for u, unit in enumerate(caches.units)}
    scores = score_assignments(llama, {"caches": formats, "reference": {}}, TOKENS)
    # A sum of 320 float32 terms of logits that another order of summing rounds otherwise.
    np.testing.assert_allclose(scores["caches"].kl, decoded_kl(llama, formats), rtol=1e-3, atol=2e-6)
    assert not scores["reference"].kl.any()


def test_finished_units_are_taken_up(
    llama: LlamaForCausalLM, caches: Candidates, losses: CacheLosses, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        measure_cache_losses(llama, caches, TOKENS, pieces=tmp_path, progress=interrupt)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(kept) == ["00000.safetensors", "00001.safetensors"]
    again = measure_cache_losses(llama, caches, TOKENS, pieces=tmp_path, progress=lambda done, total: None)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept
    np.testing.assert_array_equal(again.table.loss, losses.table.loss)
    np.testing.assert_array_equal(again.table.std_error, losses.table.std_error)


@pytest.fixture(scope="module")
def measured(whole: SensitivityProfile, losses: CacheLosses) -> SensitivityProfile:
    """Weights of one tiny model and caches of another: tables know no model."""
    return replace(whole, cache=losses)


def test_joined_tables_hold_both(measured: SensitivityProfile, losses: CacheLosses) -> None:
    joined = join_cache(measured, context=64, batch=3)
    weights, units = measured.candidates, len(measured.candidates.units)
    assert joined.candidates.units == (*weights.units, *losses.candidates.units)
    names = [f.name for f in joined.candidates.formats]
    assert names == ["int2_g64", "int4_g64", "bf16", "int2_channel", "int4_channel", "int4_g32"]
    columns = [names.index(name) for name in CACHE_FORMATS]
    np.testing.assert_array_equal(joined.candidates.allowed[:units, :3], weights.allowed)
    assert not joined.candidates.allowed[:units, 3:].any()
    np.testing.assert_array_equal(joined.candidates.allowed[units:][:, columns], losses.candidates.allowed)
    assert not joined.candidates.allowed[units:, :2].any()
    assert set(joined.candidates.reasons) == set(zip(*np.nonzero(~joined.candidates.allowed), strict=True))
    for metric in ("fisher", "single_unit_kl", "combined"):
        table = joined.table(metric)
        np.testing.assert_array_equal(table.loss[:units, :3], measured.table(metric).loss)
        np.testing.assert_array_equal(table.loss[units:][:, columns], losses.table.loss)
        np.testing.assert_array_equal(table.std_error[units:][:, columns], losses.table.std_error)
    for metric in ("weight_error", "output_error"):
        np.testing.assert_array_equal(joined.table(metric).loss[:units, :3], measured.table(metric).loss)
        assert np.isnan(joined.table(metric).loss[units:][:, columns]).all()


def test_joined_sketches_know_the_weights_alone(measured: SensitivityProfile) -> None:
    joined = join_cache(measured, context=1, batch=1)
    units = len(measured.candidates.units)
    assert joined.fisher_sketch is not None and measured.fisher_sketch is not None
    np.testing.assert_array_equal(joined.fisher_sketch[:, :units, :3], measured.fisher_sketch)
    assert not joined.fisher_sketch[:, units:].any()
    assert joined.logit_gram is not None and measured.logit_gram is not None
    shape = joined.candidates.allowed.shape
    gram = joined.logit_gram.reshape(2, *shape, *shape)
    own = gram[:, :units, :3, :units, :3].reshape(measured.logit_gram.shape)
    np.testing.assert_array_equal(own, measured.logit_gram)
    assert np.count_nonzero(gram) == np.count_nonzero(own)


def test_the_reference_has_a_cache_of_16_bits(measured: SensitivityProfile) -> None:
    joined = join_cache(measured, context=64, batch=3)
    # 2 layers, keys and values, 2 heads of 16 numbers of 2 bytes.
    assert reference_cache_bytes(joined) == 64 * 3 * 2 * 2 * 2 * 16 * 2
    assert joined.reference_bytes == measured.reference_bytes + reference_cache_bytes(joined)
    assert reference_cache_bytes(measured) == 0
    assert joined.cache_load == CacheLoad(context=64, batch=3)


def test_completed_losses_stay_marked(measured: SensitivityProfile) -> None:
    mask = measured.candidates.allowed.copy()
    mask[0, 0] = False
    table = replace(measured.table("fisher"), measured=mask)
    joined = join_cache(replace(measured, losses={"fisher": table}), context=1, batch=1).table("fisher")
    assert joined.measured is not None
    units = len(mask)
    np.testing.assert_array_equal(joined.measured[:units, :3], mask)
    assert joined.measured[units:].all()


def test_caches_come_back_from_disk(measured: SensitivityProfile, losses: CacheLosses, tmp_path: Path) -> None:
    save_profile(measured, tmp_path / "profile")
    cache = load_profile(tmp_path / "profile").cache
    assert cache is not None
    assert (cache.candidates.units, cache.candidates.formats) == (losses.candidates.units, losses.candidates.formats)
    assert cache.candidates.reasons == losses.candidates.reasons
    np.testing.assert_array_equal(cache.candidates.allowed, losses.candidates.allowed)
    np.testing.assert_array_equal(cache.table.loss, losses.table.loss)
    np.testing.assert_array_equal(cache.table.std_error, losses.table.std_error)


def test_a_profile_of_weights_and_caches_has_a_fingerprint_of_its_own(caches: Candidates) -> None:
    own = cache_fingerprint("0" * 64, caches)
    fewer = replace(caches, units=caches.units[:3], allowed=caches.allowed[:3])
    assert len({own, cache_fingerprint("1" * 64, caches), cache_fingerprint("0" * 64, fewer), "0" * 64}) == 4
    assert own == cache_fingerprint("0" * 64, replace(caches, reasons={}))


def test_a_profile_without_caches_cannot_be_joined(whole: SensitivityProfile) -> None:
    with pytest.raises(ValueError, match="needs the losses of caches: got context=64 and a profile without them"):
        join_cache(whole, context=64, batch=1)


def test_some_metric_must_be_in_nats() -> None:
    for metrics in (("fisher",), ("weight_error", "single_unit_kl"), ("output_fisher",)):
        check_metrics_beside_weights(metrics, "caches")
    with pytest.raises(ValueError, match="got metrics weight_error, kurtosis. Add 'fisher' or 'single_unit_kl'"):
        check_metrics_beside_weights(("weight_error", "kurtosis"), "caches")
