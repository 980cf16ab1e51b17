"""Pairs against copies of the model with both units changed; the matrix against the sum it stands for."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.interactions.pairwise import (
    Pair,
    PairwiseLosses,
    assemble_pairs,
    compare_with_gram,
    list_pairs,
    measure_pairs,
)
from sensitivity.sketches.logit_sketch import LogitSketch, gram_of
from solvers.pairwise import build_pairwise_matrix, project_pairwise
from tests.sensitivity.changed_models import joint_kl, kl_bound
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

FORMATS = ("int3_g64", "int4_g64", "bf16")
INT3, INT4, BF16 = range(3)
TOKENS = torch.randint(2, VOCABULARY_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))


def make_candidates(model: PreTrainedModel) -> Candidates:
    return list_candidates(find_units(model), FORMATS)


def test_pairs_are_the_kl_of_both_changes(model: PreTrainedModel) -> None:
    candidates = make_candidates(model)
    count = len(candidates.units)
    # First and last units (embedding and head), neighbours in one layer, and units of two layers, in both orders.
    units = [0, 1, 2, count // 2, count - 1]
    pairs = list_pairs(candidates, units, (INT3, INT4))[::2]
    pairs = [pair if i % 2 else (pair[1], pair[0]) for i, pair in enumerate(pairs)]
    weights = copy.deepcopy(model.state_dict())
    measured = measure_pairs(model, candidates, pairs, TOKENS)
    assert len(measured.pairs) == len(pairs) >= 10
    for row, pair in zip(range(len(pairs)), pairs, strict=True):
        alone = measured.singles[measured.pairs[row]]
        assert {tuple(c) for c in alone.tolist()} == set(pair)
        exact = joint_kl(model, candidates, dict(pair), TOKENS)
        assert np.all(np.abs(measured.joint[row] - exact) <= kl_bound(exact, 12.0, VOCABULARY_SIZE)), pair
    for (u, f), kl in zip(measured.singles.tolist(), measured.single, strict=True):
        exact = joint_kl(model, candidates, {u: f}, TOKENS)
        assert np.all(np.abs(kl - exact) <= kl_bound(exact, 12.0, VOCABULARY_SIZE))
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_experts_of_one_parameter() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = make_candidates(model)
    experts = [u for u, unit in enumerate(candidates.units) if unit.expert_index is not None and unit.layer_index == 0]
    assert len({candidates.units[u].weights[0].parameter for u in experts[:2]}) == 1
    [pair] = list_pairs(candidates, experts[:2], (INT3,))
    measured = measure_pairs(model, candidates, [pair], TOKENS)
    exact = joint_kl(model, candidates, dict(pair), TOKENS)
    assert exact.min() > 0
    assert np.all(np.abs(measured.joint[0] - exact) <= kl_bound(exact, 12.0, VOCABULARY_SIZE))


def make_measured() -> PairwiseLosses:
    return PairwiseLosses(
        singles=np.array([[0, 1], [1, 0], [2, 1]]),
        single=np.array([[1.0, 3.0], [4.0, 4.0], [0.0, 2.0]]),
        pairs=np.array([[0, 1], [0, 2]]),
        joint=np.array([[6.0, 8.0], [1.0, 7.0]]),
    )


def test_interaction_and_its_error() -> None:
    measured = make_measured()
    # Of the sequences: 6 - 1 - 4 = 1 and 8 - 3 - 4 = 1; 1 - 1 - 0 = 0 and 7 - 3 - 2 = 2.
    np.testing.assert_array_equal(measured.interaction, [1.0, 1.0])
    np.testing.assert_allclose(measured.std_error, [0.0, 1.0], rtol=1e-15)


def test_assembled_matrix_gives_the_measured_losses() -> None:
    single, pair = assemble_pairs(make_measured(), np.full((3, 2), 0.5))
    np.testing.assert_array_equal(single, [[0.5, 2.0], [4.0, 0.5], [0.5, 1.0]])
    matrix = build_pairwise_matrix(single, pair)
    np.testing.assert_array_equal(matrix, matrix.T)

    def loss(choice: list[int]) -> float:
        x = np.zeros(6)
        x[np.arange(3) * 2 + choice] = 1.0
        return float(x @ matrix @ x / 2)

    # Units 0 and 1 together 7 on average, 0 and 2 together 4; nothing was measured of 1 and 2.
    assert loss([1, 0, 0]) == pytest.approx(7.0 + 0.5)
    assert loss([1, 1, 1]) == pytest.approx(4.0 + 0.5)
    assert loss([0, 0, 1]) == pytest.approx(0.5 + 4.0 + 1.0)
    projected = project_pairwise(matrix, n_formats=2)
    assert projected.loss.shape == (3, 2) and projected.relative_distortion < 0.5


def test_real_pairs_pass_the_door_of_the_solvers() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    units = [u for u, unit in enumerate(candidates.units) if unit.role in ("o_proj", "down_proj")]
    measured = measure_pairs(model, candidates, list_pairs(candidates, units, (INT3, INT4)), TOKENS)
    single, pair = assemble_pairs(measured, np.zeros(candidates.allowed.shape))
    sketch = project_pairwise(build_pairwise_matrix(single, pair), n_formats=3, allowed=candidates.allowed)
    flat = sketch.sketch.reshape(len(sketch.sketch), -1)
    u, v = units[0], units[-1]
    joint = joint_kl(model, candidates, {u: INT3, v: INT4}, TOKENS).mean()
    predicted = sketch.loss[u, INT3] + sketch.loss[v, INT4] + flat[:, u * 3 + INT3] @ flat[:, v * 3 + INT4]
    # The projection moves the sum by no more than what it removed: the three entries of G, each by its norm.
    removed = sketch.relative_distortion * np.linalg.norm(build_pairwise_matrix(single, pair))
    assert predicted == pytest.approx(joint, abs=2 * removed + 1e-6)


def test_measured_pairs_agree_with_the_sketch_at_small_errors() -> None:
    model = build_tiny_llama().requires_grad_(False)
    # Two equal layers whose inputs are nearly equal, so that the same errors do nearly the same to the logits.
    model.model.embed_tokens.weight.mul_(10)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    candidates = list_candidates(find_units(model), ("int8_g64",))
    units = [u for u, unit in enumerate(candidates.units) if unit.role in ("o_proj", "down_proj")]
    measured = measure_pairs(model, candidates, list_pairs(candidates, units, (0,)), TOKENS)
    sketch = LogitSketch(model, candidates, TOKENS, top_tokens=VOCABULARY_SIZE)
    gram = gram_of(np.concatenate([sketch.measure(u).sketch for u in range(len(candidates.units))]))
    comparison = compare_with_gram(measured, gram, 1)
    np.testing.assert_array_equal(comparison.measured, measured.interaction)
    # Terms of the third order are a few percent at 8 bits.
    assert comparison.correlation > 0.99
    assert comparison.slope == pytest.approx(1.0, abs=0.05)
    assert comparison.relative_error < 0.1
    assert comparison.rank_correlation > 0.9


def test_comparison_of_known_numbers() -> None:
    gram = np.zeros((6, 6))
    gram[1, 2] = gram[2, 1] = 0.5
    gram[1, 5] = gram[5, 1] = 0.5
    comparison = compare_with_gram(make_measured(), gram, 2)
    assert np.isnan(comparison.correlation) and np.isnan(comparison.rank_correlation)
    assert comparison.slope == pytest.approx(2.0)
    assert comparison.relative_error == pytest.approx(0.5)
    # Standard errors 0 and 1 beside interactions of 1 and 1.
    assert comparison.noise == pytest.approx(0.5)


def test_pieces_are_taken_up(tmp_path: Path) -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    pairs = list_pairs(candidates, (1, 5, 9), (INT3,))
    calls: list[tuple[int, int]] = []
    once = measure_pairs(model, candidates, pairs, TOKENS, pieces=tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    again = measure_pairs(model, candidates, pairs, TOKENS, pieces=tmp_path)
    for name in ("singles", "single", "pairs", "joint"):
        np.testing.assert_array_equal(getattr(once, name), getattr(again, name))
    assert np.isfinite(again.joint).all()


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([], "at least one pair: got none"),
        ([((1, 0), (1, 1))], r"of two units: got unit 1 twice, in \(\(1, 0\), \(1, 1\)\)"),
        ([((0, 0), (1, 1))], "allowed candidates: got unit 0 with format 0"),
        ([((1, 0), (99, 1))], "allowed candidates: got unit 99 with format 1"),
        ([((1, 0), (2, 7))], "allowed candidates: got unit 2 with format 7"),
        ([((1, 0), (2, 1)), ((2, 1), (1, 0))], "named once: got 1 repeats"),
    ],
    ids=["none", "one_unit", "refused", "no_such_unit", "no_such_format", "twice"],
)
def test_bad_pairs_are_refused(pairs: list[Pair], text: str) -> None:
    model = build_tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match=text):
        measure_pairs(model, make_candidates(model), pairs, TOKENS)


def test_one_pair_cannot_be_compared() -> None:
    measured = make_measured()
    one = PairwiseLosses(
        singles=measured.singles, single=measured.single, pairs=measured.pairs[:1], joint=measured.joint[:1]
    )
    with pytest.raises(ValueError, match="at least 2 pairs to compare: got 1"):
        compare_with_gram(one, np.eye(6), 2)
