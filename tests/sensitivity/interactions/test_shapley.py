"""Marginals against all subsets by brute force, values against the exact ones, sampling, resuming, and refusals."""

import copy
from dataclasses import replace
from itertools import combinations, permutations
from math import factorial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.interactions.shapley import (
    ShapleyConfig,
    ShapleyMarginals,
    draw_permutation,
    fingerprint_parts,
    measure_shapley,
)
from tests.sensitivity.changed_models import joint_kl, kl_bound
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "bf16")
INT2, INT3, INT4, BF16 = range(4)
TOKENS = torch.randint(2, VOCABULARY_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
CONFIG = ShapleyConfig(start_format="int4_g64", target_format="int3_g64", permutations=6, antithetic=False)
Subsets = dict[frozenset[int], NDArray[np.float64]]


def make_candidates(model: PreTrainedModel, roles: tuple[str, ...] = ("o_proj", "down_proj")) -> Candidates:
    return list_candidates([unit for unit in find_units(model) if unit.role in roles], FORMATS)


def measure_subsets(model: PreTrainedModel, candidates: Candidates) -> Subsets:
    """Returns the KL [S] with each set of units lowered and the others at the start."""
    units = range(len(candidates.units))
    return {
        frozenset(lowered): joint_kl(model, candidates, {u: INT3 if u in lowered else INT4 for u in units}, TOKENS)
        for count in range(len(units) + 1)
        for lowered in combinations(units, count)
    }


def exact_values(subsets: Subsets, n: int) -> NDArray[np.float64]:
    """Returns the Shapley values by their definition: a weighted sum over the sets without the unit."""
    values = np.zeros(n)
    for u in range(n):
        for lowered, kl in subsets.items():
            if u not in lowered:
                weight = factorial(len(lowered)) * factorial(n - len(lowered) - 1) / factorial(n)
                values[u] += weight * (subsets[lowered | {u}] - kl).mean()
    return values


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_tiny_llama().requires_grad_(False)


@pytest.fixture(scope="module")
def subsets(llama: PreTrainedModel) -> Subsets:
    return measure_subsets(llama, make_candidates(llama))


def test_marginals_are_differences_of_subsets(llama: PreTrainedModel, subsets: Subsets) -> None:
    candidates = make_candidates(llama)
    weights = copy.deepcopy(llama.state_dict())
    found = measure_shapley(llama, candidates, TOKENS, CONFIG)
    assert found.marginal.shape == (6, 2, 4)
    bound = 2 * max(kl_bound(kl, 12.0, VOCABULARY_SIZE).max() for kl in subsets.values())
    assert np.abs(found.start_kl - subsets[frozenset()]).max() <= bound
    for order, marginal in zip(found.orders, found.marginal, strict=True):
        for step, u in enumerate(order.tolist()):
            before = frozenset(order[:step].tolist())
            assert np.abs(marginal[:, u] - (subsets[before | {u}] - subsets[before])).max() <= bound
        # Efficiency: what is shared out is the whole change, in every permutation.
        whole = subsets[frozenset(range(4))] - subsets[frozenset()]
        assert np.abs(marginal.sum(axis=1) - whole).max() <= bound
    # Lowering a unit changes the loss by far more than rounding.
    assert np.abs(found.value).min() > 20 * bound
    assert all(torch.equal(weight, weights[name]) for name, weight in llama.state_dict().items())


def test_average_over_all_permutations_is_the_exact_value(llama: PreTrainedModel, subsets: Subsets) -> None:
    config = replace(CONFIG, permutations=400)
    # As many draws as to meet all 24 orders; of each, the marginals are known.
    orders = {tuple(draw_permutation(config, m, 4).tolist()): m for m in range(400)}
    assert set(orders) == set(permutations(range(4)))
    found = measure_shapley(llama, make_candidates(llama), TOKENS, replace(CONFIG, permutations=60))
    exact = exact_values(subsets, 4)
    assert exact.sum() == pytest.approx((subsets[frozenset(range(4))] - subsets[frozenset()]).mean(), rel=1e-12)
    assert np.all(np.abs(found.value - exact) <= 5 * found.permutation_error + 1e-6)
    assert np.all(found.permutation_error < 0.2 * np.abs(exact).max())


def test_antithetic_pair_of_two_units_is_exact(llama: PreTrainedModel) -> None:
    candidates = make_candidates(llama, ("down_proj",))
    subsets = measure_subsets(llama, candidates)
    found = measure_shapley(llama, candidates, TOKENS, replace(CONFIG, permutations=4, antithetic=True))
    bound = 2 * max(kl_bound(kl, 12.0, VOCABULARY_SIZE).max() for kl in subsets.values())
    np.testing.assert_allclose(found.value, exact_values(subsets, 2), rtol=0, atol=bound)
    assert np.all(found.permutation_error <= bound)


def test_experts_routers_and_units_that_are_no_players() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model), FORMATS)
    found = measure_shapley(model, candidates, TOKENS, replace(CONFIG, permutations=2))
    refused = np.flatnonzero(~candidates.allowed[:, INT3])
    assert [candidates.units[u].kind for u in refused] == ["embedding", "head"]
    np.testing.assert_array_equal(found.players, np.flatnonzero(candidates.allowed[:, INT3]))
    # Embedding and head may not have 3 bits: they stay at the start.
    everything = {u: INT4 if u in refused else INT3 for u in range(len(candidates.units))}
    exact = joint_kl(model, candidates, everything, TOKENS)
    end = found.start_kl + found.marginal.sum(axis=2)
    assert np.all(np.abs(end - exact) <= kl_bound(exact, 12.0, VOCABULARY_SIZE) + 1e-9)
    assert np.all(np.abs(end[0] - end[1]) <= kl_bound(exact, 12.0, VOCABULARY_SIZE))


def test_unit_without_the_start_format_keeps_its_widest() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = list_candidates(find_units(model), FORMATS)
    found = measure_shapley(
        model, candidates, TOKENS, replace(CONFIG, start_format="int3_g64", target_format="int2_g64", permutations=2)
    )
    start = {u: INT3 if candidates.allowed[u, INT3] else BF16 for u in range(len(candidates.units))}
    exact = joint_kl(model, candidates, start, TOKENS)
    assert BF16 in start.values()
    assert np.all(np.abs(found.start_kl - exact) <= kl_bound(exact, 12.0, VOCABULARY_SIZE))


def make_marginals(marginal: NDArray[np.float64], *, antithetic: bool = False) -> ShapleyMarginals:
    count = marginal.shape[2]
    return ShapleyMarginals(
        config=replace(CONFIG, permutations=max(4, len(marginal)), antithetic=antithetic),
        players=np.arange(count),
        start_kl=np.zeros(marginal.shape[1]),
        orders=np.tile(np.arange(count), (len(marginal), 1)),
        marginal=marginal,
    )


def test_moments_of_known_numbers() -> None:
    # Two players, four permutations, two sequences that differ by 2 in player 0.
    means = np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 1.0], [7.0, 1.0]])
    marginal = np.stack([means, means + [2.0, 0.0]], axis=1)
    found = make_marginals(marginal)
    np.testing.assert_allclose(found.value, [5.0, 3.0])
    # Means 2, 4, 6, 8: variance 20 / 3; 5, 5, 1, 1: 16 / 3; covariance (-3 - 1 - 1 - 3) * 2 / 3.
    np.testing.assert_allclose(found.covariance, [[20 / 3, -16 / 3], [-16 / 3, 16 / 3]])
    np.testing.assert_allclose(found.permutation_error, np.sqrt([20 / 3 / 4, 16 / 3 / 4]))
    # Sequences: 4 and 6, variance 2, of two sequences 1; those of the other player agree.
    np.testing.assert_allclose(found.std_error, np.sqrt([20 / 3 / 4 + 1.0, 16 / 3 / 4]))
    # Pairs: 3 and 7, 5 and 1: variance 8 each.
    np.testing.assert_allclose(make_marginals(marginal, antithetic=True).permutation_error, [2.0, 2.0])
    np.testing.assert_allclose(found.shrunk_covariance(0.25), [[20 / 3, -4.0], [-4.0, 16 / 3]])
    np.testing.assert_allclose(found.shrunk_covariance(1.0), np.diag([20 / 3, 16 / 3]))


def test_std_error_covers_the_exact_value_as_often_as_it_says() -> None:
    # A game of pairwise interactions I: a marginal is a_u plus I of those before it.
    rng = np.random.default_rng(0)
    single, pair = rng.normal(1.0, 0.3, 5), rng.normal(0.0, 0.5, (5, 5))
    pair = pair + pair.T
    exact = single + 0.5 * (pair.sum(axis=1) - np.diag(pair))

    def play(config: ShapleyConfig) -> ShapleyMarginals:
        marginal = np.zeros((config.permutations, 2, 5))
        for m in range(config.permutations):
            order = draw_permutation(config, m, 5)
            for step, u in enumerate(order):
                marginal[m, :, u] = single[u] + pair[u, order[:step]].sum()
        return replace(make_marginals(marginal), config=config)

    inside = []
    for seed in range(200):
        found = play(replace(CONFIG, permutations=30, seed=seed))
        inside.append(np.abs(found.value - exact) <= 2 * found.permutation_error)
    # Two standard errors of 30 samples hold 94.5 % of the time; of 1000 draws within five deviations of that.
    assert np.mean(inside) == pytest.approx(0.945, abs=0.04)
    antithetic = play(replace(CONFIG, permutations=4, antithetic=True))
    np.testing.assert_allclose(antithetic.value, exact, rtol=1e-12)
    np.testing.assert_allclose(antithetic.permutation_error, 0.0, atol=1e-12)


def test_permutations_depend_on_seed_and_index_alone() -> None:
    plain = replace(CONFIG, permutations=100, seed=-3)
    drawn = [tuple(draw_permutation(plain, m, 30).tolist()) for m in range(100)]
    assert len(set(drawn)) == 100
    assert all(sorted(order) == list(range(30)) for order in drawn)
    assert drawn[7] == tuple(draw_permutation(replace(plain, permutations=2), 7, 30).tolist())
    assert drawn[7] != tuple(draw_permutation(replace(plain, seed=4), 7, 30).tolist())
    paired = replace(CONFIG, antithetic=True)
    for m in range(0, 6, 2):
        np.testing.assert_array_equal(draw_permutation(paired, m, 9)[::-1], draw_permutation(paired, m + 1, 9))


def test_pieces_are_taken_up_and_added_to(llama: PreTrainedModel, tmp_path: Path) -> None:
    candidates = make_candidates(llama)
    calls: list[tuple[int, int]] = []
    once = measure_shapley(
        llama, candidates, TOKENS, CONFIG, pieces=tmp_path, progress=lambda *call: calls.append(call)
    )
    assert calls == [(m + 1, 6) for m in range(6)]
    assert len(list(tmp_path.iterdir())) == 6
    (tmp_path / "00002.safetensors").write_bytes(b"half")
    more = measure_shapley(llama, candidates, TOKENS, replace(CONFIG, permutations=8), pieces=tmp_path)
    np.testing.assert_array_equal(more.marginal[:6], once.marginal)
    broken = copy.deepcopy(llama)
    for parameter in broken.parameters():
        parameter.fill_(float("nan"))
    again = measure_shapley(broken, candidates, TOKENS, CONFIG, pieces=tmp_path)
    np.testing.assert_array_equal(again.marginal, once.marginal)
    np.testing.assert_array_equal(again.start_kl, once.start_kl)
    assert fingerprint_parts(CONFIG) == fingerprint_parts(replace(CONFIG, permutations=8, max_passes=99))
    assert fingerprint_parts(CONFIG) != fingerprint_parts(replace(CONFIG, seed=1))


@pytest.mark.parametrize(
    ("antithetic", "max_passes", "expected"),
    [(False, None, 6), (False, 10, 2), (False, 14, 2), (False, 15, 3), (False, 1000, 6), (True, 39, 6), (True, 29, 4)],
)
def test_passes_are_capped_at_whole_permutations(antithetic: bool, max_passes: int | None, expected: int) -> None:
    # Four units: five passes a permutation.
    assert replace(CONFIG, antithetic=antithetic, max_passes=max_passes).count_permutations(4) == expected


def test_capped_measurement_is_the_first_permutations(llama: PreTrainedModel) -> None:
    candidates = make_candidates(llama)
    passes: list[None] = []
    hook = llama.lm_head.register_forward_hook(lambda *_: passes.append(None))
    capped = measure_shapley(llama, candidates, TOKENS, replace(CONFIG, max_passes=14))
    hook.remove()
    # One more for the reference, which no permutation needs again.
    assert len(passes) == 1 + 2 * 5
    whole = measure_shapley(llama, candidates, TOKENS, CONFIG)
    np.testing.assert_array_equal(capped.marginal, whole.marginal[:2])


def test_failure_leaves_the_model_as_it_was(llama: PreTrainedModel) -> None:
    model = copy.deepcopy(llama)
    passes: list[None] = []

    def fail(*_: object) -> None:
        passes.append(None)
        if len(passes) == 4:
            raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        measure_shapley(model, make_candidates(model), TOKENS, CONFIG)
    hook.remove()
    assert all(torch.equal(weight, llama.state_dict()[name]) for name, weight in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_bad_arguments_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="must differ from start_format: got 'int4_g64' twice"):
        replace(CONFIG, target_format="int4_g64")
    with pytest.raises(ValueError, match=r"at least 2, for a standard error: got 1\. Raise it"):
        replace(CONFIG, permutations=1)
    with pytest.raises(ValueError, match=r"even and at least 4 \(two antithetic pairs\).*got 5"):
        replace(CONFIG, permutations=5, antithetic=True)
    with pytest.raises(ValueError, match=r"allow 2 permutations of 4 units, 10 passes: got max_passes=9\. Raise it"):
        measure_shapley(llama, make_candidates(llama), TOKENS, replace(CONFIG, max_passes=9))
    with pytest.raises(ValueError, match="got 'int6_g64', candidates are"):
        measure_shapley(llama, make_candidates(llama), TOKENS, replace(CONFIG, target_format="int6_g64"))
    with pytest.raises(ValueError, match="allowed both formats: got none for 'int4_g64' and 'int3_g64'"):
        measure_shapley(llama, make_candidates(llama, ("embed_tokens", "lm_head")), TOKENS, CONFIG)
    with pytest.raises(ValueError, match=r"shrinkage must be between 0 and 1: got 1\.5"):
        make_marginals(np.ones((4, 2, 3))).shrunk_covariance(1.5)
