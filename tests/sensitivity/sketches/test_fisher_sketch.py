"""The contraction against plain autograd, its expectation against the exact Fisher, and the model left as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.rendering import render
from runtime.units import find_units, read_weight
from sensitivity.sketches.fisher_sketch import fisher_loss, measure_fisher_sketch
from tests.sensitivity.exact_gradients import compute_gradients, contract, draw_labels, make_score
from tests.sensitivity.float64_models import make_float64
from tests.tiny_models import VOCABULARY_SIZE, build_one_layer_llama, build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g64", "int4_g32_sym", "bf16")
SEED = 5
# Token 1 is the padding token of the tiny models; it has a test of its own.
TOKENS = torch.randint(2, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


def make_candidates(model: PreTrainedModel, formats: tuple[str, ...] = FORMATS) -> Candidates:
    return list_candidates(find_units(model), formats)


def test_sketch_is_the_gradient_times_the_error(model: PreTrainedModel) -> None:
    candidates = make_candidates(model)
    sketches = list(measure_fisher_sketch(model, candidates, TOKENS, seed=SEED))
    assert len(sketches) == len(TOKENS)
    for s, sketch in enumerate(sketches):
        product, bound = contract(model, candidates, compute_gradients(model, TOKENS, s, make_score(SEED)))
        root = TOKENS.shape[1] ** 0.5
        assert sketch.dtype == np.float32
        assert np.all(np.abs(sketch - product.numpy() / root) <= bound.numpy() / root + 1e-7 * np.abs(sketch))
        assert not sketch[~candidates.allowed].any()
    # The test says nothing where nothing is measured: all but the experts that no token visits have a sketch.
    measured = np.any(sketches, axis=0).any(axis=1)
    assert all(measured[u] or unit.kind == "expert" for u, unit in enumerate(candidates.units))
    assert measured.mean() > 0.8


def test_units_of_several_weights_sum_their_weights() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    fused = list_candidates(
        find_units(model, fuse=[r"self_attn\.(q|k|v)_proj", r"experts\.(gate_up|down)_proj"]), FORMATS
    )
    single = make_candidates(model)
    [whole] = measure_fisher_sketch(model, fused, TOKENS[:1], seed=SEED)
    [parts] = measure_fisher_sketch(model, single, TOKENS[:1], seed=SEED)
    row_of = {unit.weights[0].name: u for u, unit in enumerate(single.units)}
    assert len(fused.units) < len(single.units)
    for u, unit in enumerate(fused.units):
        rows = parts[[row_of[weight.name] for weight in unit.weights]]
        # A handful of float32 additions.
        np.testing.assert_allclose(whole[u], rows.sum(axis=0), atol=8 * 1.2e-7 * np.abs(rows).sum())


def test_padding_token_counts_like_any_other() -> None:
    # The truth is the slope of the loss along the error, by central differences in float64: no autograd at all.
    model = build_tiny_llama().requires_grad_(False)
    # Initialised to zero, as if it were for padding alone; it is often the end-of-text token, and trained.
    model.model.embed_tokens.weight[1] = model.model.embed_tokens.weight[2].flip(0)
    candidates = make_candidates(model, ("int4_g64",))
    embedding = next(u for u, unit in enumerate(candidates.units) if unit.kind == "embedding")
    tokens = torch.tensor([[1, 7, 1, 9]])
    assert model.config.pad_token_id == 1
    [sketch] = measure_fisher_sketch(model, candidates, tokens, seed=SEED)
    labels = draw_labels(model(tokens).logits[0], 0, SEED)
    values = model.model.embed_tokens.weight.data.clone()
    error = (render(values, candidates.formats[0]) - values).double()
    exact = make_float64(model)
    losses = []
    step = 1e-4
    for sign in (1, -1):
        exact.model.embed_tokens.weight.data = values.double() + sign * step * error
        losses.append(torch.nn.functional.cross_entropy(exact(tokens).logits[0], labels, reduction="sum").item())
    slope = (losses[0] - losses[1]) / (2 * step)
    # The differences err by step^2 of the third derivative. The float32 gradient errs by an eps of each of some
    # hundred terms of the model and of the inner product. Without the padding token's row, half of it is missing.
    assert sketch[embedding, 0] == pytest.approx(slope / 2, rel=200 * torch.finfo(torch.float32).eps)
    assert model.model.embed_tokens.padding_idx == 1


def build_scaled_model(padding: int | None) -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=padding,
    )
    return Gemma2ForCausalLM(config).eval().requires_grad_(False)


def test_padding_token_of_a_scaled_embedding_counts_like_any_other() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        without, padded = build_scaled_model(None), build_scaled_model(7)
    padded.load_state_dict(without.state_dict())
    assert padded.model.embed_tokens.padding_idx == 7
    tokens = torch.tensor([[7, 4, 7, 9]])
    [expected] = measure_fisher_sketch(without, make_candidates(without, ("int4_g32",)), tokens, seed=SEED)
    [sketch] = measure_fisher_sketch(padded, make_candidates(padded, ("int4_g32",)), tokens, seed=SEED)
    np.testing.assert_array_equal(sketch, expected)
    assert padded.model.embed_tokens.padding_idx == 7


def measure_logit_change(model: PreTrainedModel, candidates: Candidates, u: int, tokens: Tensor, step: float) -> Tensor:
    """Returns how the float64 logits [B, T, V] change when a unit gets ``step`` times the error of format 0."""
    exact = make_float64(model)
    before = exact(tokens).logits
    for weight in candidates.units[u].weights:
        values = read_weight(model, weight)
        error = (render(values, candidates.formats[0]) - values).double()
        read_weight(exact, weight).add_(step * error)
    return exact(tokens).logits - before


def exact_quadratic_form(model: PreTrainedModel, candidates: Candidates, u: int, tokens: Tensor) -> Tensor:
    """Returns D'FD of every position [B, T]: the variance of the logits' derivative under p."""
    step = 1e-4
    forward = measure_logit_change(model, candidates, u, tokens, step)
    derivative = (forward - measure_logit_change(model, candidates, u, tokens, -step)) / (2 * step)
    p = torch.softmax(make_float64(model)(tokens).logits, dim=-1)
    mean = (p * derivative).sum(dim=-1, keepdim=True)
    return (p * (derivative - mean) ** 2).sum(dim=-1)


def test_expectation_over_all_labels_is_the_exact_fisher_and_the_kl_of_small_errors() -> None:
    vocabulary, sequences = 16, 320
    model = build_one_layer_llama(vocabulary)
    candidates = make_candidates(model, ("int4_g32",))
    tokens = torch.full((sequences, 1), 3)
    logits = model(tokens[:1]).logits[0]
    p = torch.softmax(logits.double(), dim=-1)[0].numpy()
    # One token has one label, and all labels occur: the expectation is a sum over the vocabulary.
    by_label: dict[int, np.ndarray] = {}
    for s, sketch in enumerate(measure_fisher_sketch(model, candidates, tokens, seed=SEED)):
        by_label[int(draw_labels(logits, s, SEED))] = sketch
    assert sorted(by_label) == list(range(vocabulary))
    expectation = sum(0.5 * p[y] * sketch.astype(np.float64) ** 2 for y, sketch in by_label.items())
    for u, unit in enumerate(candidates.units):
        exact = 0.5 * exact_quadratic_form(model, candidates, u, tokens[:1]).item()
        # Query and key: attention to a single position has no choice, so they have no effect at all.
        if unit.role in ("q_proj", "k_proj"):
            assert exact < 1e-20
            assert expectation[u, 0] < 1e-12
            continue
        # float32 gradients of some hundred terms against float64.
        assert expectation[u, 0] == pytest.approx(exact, rel=1e-4)
        for step in (0.1, 0.01):
            change = measure_logit_change(model, candidates, u, tokens[:1], step)[0, 0].numpy()
            log_ratio = change - np.log((p * np.exp(change)).sum())
            kl = -(p * log_ratio).sum()
            # The next term of the expansion is one power of the step higher.
            assert kl / step**2 == pytest.approx(expectation[u, 0], rel=2 * step)


def test_loss_is_the_mean_over_positions_within_its_standard_error() -> None:
    model = build_one_layer_llama(24)
    candidates = make_candidates(model, ("int4_g32",))
    tokens = torch.randint(0, 24, (1, 4), generator=torch.Generator().manual_seed(1)).repeat(300, 1)
    sketch = np.stack(list(measure_fisher_sketch(model, candidates, tokens, seed=SEED)))
    loss, std_error = fisher_loss(sketch)
    for u in range(len(candidates.units)):
        exact = 0.5 * exact_quadratic_form(model, candidates, u, tokens[:1]).mean().item()
        assert abs(loss[u, 0] - exact) <= 4 * std_error[u, 0]
    # A square of a normal variable has a deviation of sqrt(2) times its mean; a sum of four scores is near to one.
    assert np.median(std_error / loss) == pytest.approx((2 / 300) ** 0.5, rel=0.5)


def test_labels_depend_on_seed_and_index_alone() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    same = TOKENS[:1].repeat(4, 1)
    whole = list(measure_fisher_sketch(model, candidates, same, seed=SEED))
    tail = list(measure_fisher_sketch(model, candidates, same, seed=SEED, first=2))
    head = list(measure_fisher_sketch(model, candidates, same[:2], seed=SEED))
    other = list(measure_fisher_sketch(model, candidates, same, seed=SEED + 1))
    np.testing.assert_array_equal(np.stack(whole), np.stack(head + tail))
    assert len({sketch.tobytes() for sketch in whole + other}) == 8
    assert list(measure_fisher_sketch(model, candidates, same, seed=SEED, first=4)) == []


@pytest.mark.parametrize("seed", [0, -1, 20_240_101_123_045, 2**63], ids=str)
def test_any_integer_is_a_seed(seed: int) -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model, ("bf16",))
    [once] = measure_fisher_sketch(model, candidates, TOKENS[:1], seed=seed)
    [again] = measure_fisher_sketch(model, candidates, TOKENS[:1], seed=seed)
    np.testing.assert_array_equal(once, again)


def describe(model: PreTrainedModel) -> list[tuple[object, ...]]:
    """Returns what a measurement may change of each parameter."""
    return [
        (name, parameter.requires_grad, parameter.grad is None, bool(parameter._post_accumulate_grad_hooks))
        for name, parameter in model.named_parameters()
    ]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trainable"])
def test_model_is_left_as_it_was(trained: bool) -> None:
    model = build_tiny_mixtral().requires_grad_(trained)
    before, weights = describe(model), copy.deepcopy(model.state_dict())
    candidates = make_candidates(model)
    unstarted = measure_fisher_sketch(model, candidates, TOKENS, seed=SEED)
    assert describe(model) == before
    unstarted.close()
    with torch.no_grad():
        assert len(list(measure_fisher_sketch(model, candidates, TOKENS, seed=SEED))) == len(TOKENS)
    assert describe(model) == before
    closed = measure_fisher_sketch(model, candidates, TOKENS, seed=SEED)
    next(closed)
    assert describe(model) != before
    closed.close()
    assert describe(model) == before
    outside = torch.full_like(TOKENS[:1], VOCABULARY_SIZE)
    with pytest.raises(IndexError):
        list(measure_fisher_sketch(model, candidates, torch.cat([TOKENS, outside]), seed=SEED))
    assert describe(model) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_no_gradient_is_kept() -> None:
    model = build_tiny_mixtral().requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    candidates = make_candidates(model)
    untouched = {name for name, _ in model.named_parameters()}
    untouched -= {weight.parameter for unit in candidates.units for weight in unit.weights}
    sketches = []
    for sketch in measure_fisher_sketch(model, candidates, TOKENS, seed=SEED):
        sketches.append(sketch)
        held = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        # Norms and routers keep what they had and get nothing new; the candidates' parameters hold nothing.
        assert held == untouched
    assert all(torch.equal(model.get_parameter(name).grad, torch.ones_like(model.get_parameter(name))) for name in held)
    clean = build_tiny_mixtral().requires_grad_(False)
    expected = np.stack(list(measure_fisher_sketch(clean, candidates, TOKENS, seed=SEED)))
    # The same sums over the same numbers in other places of the memory; a gradient of ones would add its own sums.
    np.testing.assert_allclose(np.stack(sketches), expected, atol=1e-5 * np.abs(expected).max())
