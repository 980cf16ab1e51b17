"""Measured KL against float64 over the whole vocabulary; the sketch against it and against real joint changes."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.rendering import render
from runtime.units import find_units, read_weight
from sensitivity.sketches.logit_sketch import LogitSketch, gram_of
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama

FORMATS = ("int3_g64", "int8_g64", "bf16")
INT3, INT8, BF16 = range(3)
TOKENS = torch.randint(0, VOCABULARY_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))
EPS = torch.finfo(torch.float32).eps
# A sketch is stored in float16: each entry is rounded by 2^-11 of its size, or by 2^-25 below the normal range.
HALF = 2.0**-11


def make_candidates(model: PreTrainedModel, formats: Sequence[str] = FORMATS) -> Candidates:
    return list_candidates(find_units(model), formats)


def compute_logits(model: PreTrainedModel, candidates: Candidates, changes: Sequence[tuple[int, int]]) -> Tensor:
    """Returns the logits [N, V] of a copy of the model whose units u have the formats f."""
    changed = copy.deepcopy(model)
    for u, f in changes:
        for weight in candidates.units[u].weights:
            values = read_weight(changed, weight)
            values.copy_(render(values, candidates.formats[f]))
    return changed(TOKENS).logits.flatten(0, 1)


def compute_kl(reference: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(reference.double(), -1), torch.log_softmax(logits.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compute_sketch(reference: Tensor, logits: Tensor) -> Tensor:
    """Returns the sketch [N, V] over the whole vocabulary in float64."""
    p = torch.softmax(reference.double(), -1)
    change = logits.double() - reference.double()
    return p.sqrt() * (change - (p * change).sum(-1, keepdim=True))


def kl_bound(reference: Tensor, kl: Tensor) -> Tensor:
    """Returns how far float32 may be off.

    Logarithms of p and q are rounded by an eps of their size four times over, and those of two runs of a model with
    its weights in other places of the memory differ by as much again: d = 8 eps log. The term e^c - 1 - c has the
    slope e^c - 1, about c, and sum p c^2 is about 2 KL, so the sum errs by d sqrt(2 KL) + d^2 / 2; to this comes the
    rounding of V positive terms, taken at its worst.
    """
    size = 8 * EPS * torch.log_softmax(reference, -1).abs().max()
    return size * (2 * kl).sqrt() + size**2 / 2 + reference.shape[1] * EPS * kl


def test_kl_is_that_of_the_whole_vocabulary(model: PreTrainedModel) -> None:
    candidates = make_candidates(model)
    sketch = LogitSketch(model, candidates, TOKENS, top_tokens=8)
    reference = model(TOKENS).logits.flatten(0, 1)
    weights = copy.deepcopy(model.state_dict())
    for u, unit in enumerate(candidates.units):
        effect = sketch.measure(u)
        assert effect.kl.dtype == np.float32 and effect.sketch.dtype == np.float16
        assert effect.sketch.shape == (len(FORMATS), TOKENS.numel(), 8)
        for f in range(len(FORMATS)):
            if not candidates.allowed[u, f]:
                assert not effect.kl[f].any() and not effect.sketch[f].any()
                continue
            kl = compute_kl(reference, compute_logits(model, candidates, [(u, f)]))
            error = (torch.from_numpy(effect.kl[f]) - kl).abs()
            assert bool((error <= kl_bound(reference, kl)).all()), unit.name
            assert effect.kl[f].min() >= 0.0
    assert not sketch.measure(0).kl[INT3].any() and sketch.measure(0).kl[INT8].any()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_change_beyond_the_range_of_the_exponential() -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.lm_head.weight.mul_(120)
    candidates = make_candidates(model, ("int2_g64", "bf16"))
    reference = model(TOKENS).logits.flatten(0, 1)
    logits = compute_logits(model, candidates, [(1, 0)])
    change = torch.log_softmax(logits, -1) - torch.log_softmax(reference, -1)
    assert change.max() > 89, "the case must overflow float32"
    effect = LogitSketch(model, candidates, TOKENS, top_tokens=8).measure(1)
    kl = compute_kl(reference, logits)
    # Terms are rounded by an eps of the logarithms' size, and V of them are summed.
    bound = (4 + VOCABULARY_SIZE) * EPS * torch.log_softmax(logits, -1).abs().max()
    assert bool(((torch.from_numpy(effect.kl[0]) - kl).abs() <= bound).all())


def test_equal_weights_lose_nothing() -> None:
    model = build_tiny_llama().bfloat16().float().requires_grad_(False)
    candidates = make_candidates(model)
    effect = LogitSketch(model, candidates, TOKENS, top_tokens=8).measure(3)
    assert not effect.kl[BF16].any() and not effect.sketch[BF16].any()
    assert effect.kl[INT8].all()


def test_sketch_has_half_its_square_near_the_kl(model: PreTrainedModel) -> None:
    candidates = make_candidates(model)
    reference = model(TOKENS).logits.flatten(0, 1)
    sketch = LogitSketch(model, candidates, TOKENS, top_tokens=10**6)
    for u in range(len(candidates.units)):
        effect = sketch.measure(u)
        for f in np.flatnonzero(candidates.allowed[u]):
            kl = compute_kl(reference, compute_logits(model, candidates, [(u, f)])).numpy()
            vector = compute_sketch(reference, compute_logits(model, candidates, [(u, f)]))
            centred = vector / torch.softmax(reference.double(), -1).sqrt()
            half_square = 0.5 * (effect.sketch[f].astype(np.float64) ** 2).sum(axis=1)
            # KL = log E e^c = 1/2 E c^2 + 1/6 E c^3 + ..., so the ratio is off by a third of the largest c at first
            # order, and by the rest of the exponential series. The ratio goes to one as the error does.
            largest = centred.abs().max(dim=1).values.numpy()
            bound = largest / 3 * np.exp(2 * largest) + 4 * HALF
            visible = kl > 1e-9
            assert np.all(np.abs(half_square[visible] / kl[visible] - 1) <= bound[visible])


def test_ratio_of_sketch_and_kl_goes_to_one() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model, ("int2_g64", "int4_g64", "int8_g64"))
    sketch = LogitSketch(model, candidates, TOKENS, top_tokens=VOCABULARY_SIZE)
    distance = []
    for u in range(1, len(candidates.units) - 1):
        effect = sketch.measure(u)
        squares = 0.5 * (effect.sketch.astype(np.float64) ** 2).sum(axis=2)
        distance.append(np.abs(squares.mean(axis=1) / effect.kl.astype(np.float64).mean(axis=1) - 1))
    by_format = np.mean(distance, axis=0)
    # Each bit halves the error and the distance with it: 1/4 from 2 to 4 bits, and far less at 8.
    assert by_format[1] < by_format[0] / 2
    assert by_format[2] < 0.005


def test_inner_products_are_the_cross_terms() -> None:
    model = build_tiny_llama().requires_grad_(False)
    # Two equal layers whose inputs are nearly equal, so that the same errors do nearly the same to the logits.
    model.model.embed_tokens.weight.mul_(10)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    candidates = make_candidates(model)
    units = [u for u, unit in enumerate(candidates.units) if unit.role in ("o_proj", "down_proj")]
    reference = model(TOKENS).logits.flatten(0, 1)
    measurer = LogitSketch(model, candidates, TOKENS, top_tokens=VOCABULARY_SIZE)
    vectors = np.stack([measurer.measure(u).sketch[INT8] for u in units])
    gram = gram_of(vectors)
    exact = [compute_sketch(reference, compute_logits(model, candidates, [(u, INT8)])) for u in units]
    kl = [compute_kl(reference, compute_logits(model, candidates, [(u, INT8)])).mean().item() for u in units]
    correlations = []
    for a in range(len(units)):
        for b in range(a):
            size = (gram[a, a] * gram[b, b]) ** 0.5
            product = (exact[a] * exact[b]).sum().item() / TOKENS.numel()
            # Two float16 roundings, and those of float32 logits, an eps of 3 in changes of 0.01.
            assert gram[a, b] == pytest.approx(product, abs=(3 * HALF + 4 * EPS * 3 / 0.01) * size)
            joint = compute_logits(model, candidates, [(units[a], INT8), (units[b], INT8)])
            joint_kl = compute_kl(reference, joint).mean().item()
            # What remains are terms of the third order: a few percent at 8 bits.
            assert joint_kl - kl[a] - kl[b] == pytest.approx(gram[a, b], abs=0.03 * size)
            correlations.append(abs(gram[a, b]) / size)
    assert len(units) == 4
    assert max(correlations) > 0.5


def test_sketch_keeps_the_most_likely_tokens() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    reference = model(TOKENS).logits.flatten(0, 1).double()
    effect = LogitSketch(model, candidates, TOKENS, top_tokens=5).measure(4)
    change = compute_logits(model, candidates, [(4, INT3)]).double() - reference
    for n in range(TOKENS.numel()):
        top = reference[n].argsort(descending=True)[:5]
        p = torch.softmax(reference[n], -1)[top]
        mean = (p * change[n, top]).sum() / p.sum()
        expected = (p.sqrt() * (change[n, top] - mean)).numpy()
        np.testing.assert_allclose(effect.sketch[INT3, n], expected, rtol=2 * HALF, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "positions", "top"),
    [(1, 1, 1), (6, 7, 5), (5, 40, 1000), (3, 3, 9001)],
    ids=["one", "one_block", "blocks_with_rest", "wider_than_a_block"],
)
def test_gram_is_the_mean_inner_product(count: int, positions: int, top: int) -> None:
    generator = np.random.default_rng(0)
    sketches: NDArray[np.float16] = generator.normal(size=(count, positions, top)).astype(np.float16)
    gram = gram_of(sketches)
    flat = sketches.reshape(count, -1).astype(np.float64)
    exact = flat @ flat.T / positions
    # float32 sums of up to 9001 terms, at their worst.
    magnitude = np.abs(flat) @ np.abs(flat).T / positions
    assert np.all(np.abs(gram - exact) <= 9001 * EPS * magnitude)
    assert gram.dtype == np.float64
    np.testing.assert_array_equal(gram, gram.T)
    assert np.linalg.eigvalsh(gram).min() >= -9001 * EPS * magnitude.max()


def test_gram_of_fewer_positions_than_vectors_is_positive_semidefinite() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    measurer = LogitSketch(model, candidates, TOKENS[:1, :2], top_tokens=4)
    gram = gram_of(np.concatenate([measurer.measure(u).sketch for u in range(len(candidates.units))]))
    values = np.linalg.eigvalsh(gram)
    # 48 vectors in 8 dimensions: rank 8 at most, the rest is float32 rounding.
    assert values.min() >= -len(gram) * EPS * values.max()
    assert values[-9] <= len(gram) * EPS * values.max() < values[-2]
