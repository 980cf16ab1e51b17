"""Each criterion against its formula, written out by other means, in float64 or within rounding of float32."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.rendering import render
from runtime.units import find_units, read_weight
from sensitivity.criteria.gradient_errors import (
    measure_absolute_slope,
    measure_fisher_trace,
    measure_hessian_trace,
    measure_output_fisher,
)
from sensitivity.sketches.fisher_sketch import fisher_loss, measure_fisher_sketch
from tests.sensitivity.float64_models import make_float64
from tests.tiny_models import (
    VOCABULARY_SIZE,
    build_one_layer_llama,
    build_tiny_llama,
    build_tiny_mixtral,
    build_tiny_qwen_moe,
)

FORMATS = ("int2_g64", "int4_g32_sym", "bf16")
SEED = 5
TOKENS = torch.randint(2, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
CRITERIA = [measure_output_fisher, measure_absolute_slope, measure_hessian_trace, measure_fisher_trace]
Criterion = Callable[..., tuple[NDArray[np.float64], NDArray[np.float64]]]


def make_candidates(model: PreTrainedModel, formats: tuple[str, ...] = FORMATS) -> Candidates:
    return list_candidates(find_units(model), formats)


def draw_labels(logits: Tensor, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + index)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def sampled_nll(model: PreTrainedModel, index: int) -> Tensor:
    logits = model(TOKENS[index : index + 1], use_cache=False).logits[0]
    labels = draw_labels(logits.detach(), index)
    return -torch.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels].sum()


def error_of(model: PreTrainedModel, candidates: Candidates, u: int, f: int, w: int = 0) -> Tensor:
    values = read_weight(model, candidates.units[u].weights[w])
    return render(values, candidates.formats[f]).to(values.dtype) - values


def assert_mean_and_error(
    found: tuple[NDArray[np.float64], NDArray[np.float64]], samples: NDArray[np.float64], rtol: float
) -> None:
    loss, std_error = found
    np.testing.assert_allclose(loss, samples.mean(axis=0), rtol=rtol, atol=rtol * np.abs(samples).max() * 1e-3)
    expected = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    np.testing.assert_allclose(std_error, expected, rtol=20 * rtol, atol=rtol * np.abs(samples).max() * 1e-3)


def gradient_of(y: Tensor) -> Tensor:
    assert y.grad is not None
    return y.grad


def keep_outputs(model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Fills the dictionary that it returns with the input and output of every module with a weight, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        seen[name] = inputs[0], output

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(partial(keep, name))
    return seen


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_output_fisher_is_the_sum_over_tokens_and_outputs(tied: bool) -> None:
    model = make_float64(build_tiny_llama(tied=tied).requires_grad_(False))
    candidates = make_candidates(model)
    samples = np.zeros((len(TOKENS), *candidates.allowed.shape))
    for s in range(len(TOKENS)):
        plain = copy.deepcopy(model).requires_grad_(True)
        seen = keep_outputs(plain)
        torch.autograd.backward(sampled_nll(plain, s))
        for u, f in np.argwhere(candidates.allowed):
            [weight] = candidates.units[u].weights
            error = error_of(model, candidates, u, f)
            for parameter in (weight.parameter, *weight.aliases):
                x, y = seen[parameter.removesuffix(".weight")]
                for t in range(TOKENS.shape[1]):
                    change = error[x[0, t]] if x.dtype == torch.int64 else error @ x[0, t].detach()
                    samples[s, u, f] += 0.5 * float((gradient_of(y)[0, t] * change).square().sum()) / TOKENS.shape[1]
    assert samples[:, candidates.allowed].min() > 0
    found = measure_output_fisher(model, candidates, TOKENS, seed=SEED)
    # float64 throughout, with sums in another order.
    assert_mean_and_error(found, samples, 1e-9)


def keep_expert_products(model: PreTrainedModel) -> list[tuple[str, Tensor, Tensor]]:
    """Fills the list that it returns with (weight, x, y) of every product with an expert's matrix, token by token."""
    products: list[tuple[str, Tensor, Tensor]] = []

    def multiply(name: str, matrix: Tensor, x: Tensor) -> Tensor:
        y = matrix @ x
        y.retain_grad()
        products.append((name, x.detach(), y))
        return y

    def run(k: int, experts: Any, hidden: Tensor, index: Tensor, share: Tensor) -> Tensor:
        rows = []
        for t in range(len(hidden)):
            total = torch.zeros_like(hidden[t])
            for e, weight in zip(index[t].tolist(), share[t], strict=True):
                prefix = f"model.layers.{k}.mlp.experts"
                gate, up = multiply(f"{prefix}.gate_up_proj[{e}]", experts.gate_up_proj[e], hidden[t]).chunk(2)
                inner = nn.functional.silu(gate) * up
                total = total + weight * multiply(f"{prefix}.down_proj[{e}]", experts.down_proj[e], inner)
            rows.append(total)
        return torch.stack(rows)

    for k, layer in enumerate(model.model.layers):
        layer.mlp.experts.forward = partial(run, k, layer.mlp.experts)
    return products


def test_output_fisher_of_experts() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = make_candidates(model, ("int4_g64",))
    samples = np.zeros((len(TOKENS), len(candidates.units), 1))
    row_of = {unit.weights[0].name: u for u, unit in enumerate(candidates.units)}
    for s in range(len(TOKENS)):
        plain = copy.deepcopy(model).requires_grad_(True)
        products = keep_expert_products(plain)
        torch.autograd.backward(sampled_nll(plain, s))
        for name, x, y in products:
            change = error_of(model, candidates, row_of[name], 0) @ x
            samples[s, row_of[name], 0] += 0.5 * float((gradient_of(y) * change).square().sum()) / TOKENS.shape[1]
    loss, std_error = measure_output_fisher(model, candidates, TOKENS, seed=SEED)
    experts_rows = [u for u, unit in enumerate(candidates.units) if unit.kind == "expert"]
    assert len(experts_rows) == 16 and (samples.mean(axis=0)[experts_rows] > 0).mean() > 0.8
    # float32 gradients of some ten layers of operations, in sums of another order.
    np.testing.assert_allclose(loss[experts_rows], samples.mean(axis=0)[experts_rows], rtol=1e-3)
    expected = samples.std(axis=0, ddof=1) / np.sqrt(len(TOKENS))
    np.testing.assert_allclose(std_error[experts_rows], expected[experts_rows], rtol=2e-3)


def test_output_fisher_drops_only_cross_terms() -> None:
    # One output and one token: nothing to cross, and the criterion is the Fisher sketch's square.
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model, ("int4_g64",))
    tokens = TOKENS[:, :1]
    for u, unit in enumerate(candidates.units):
        for weight in unit.weights:
            # Rows of zeros have no error, so one output changes.
            values = read_weight(model, weight)
            values[:-1] = 0.0
        assert candidates.allowed[u, 0]
    model.model.embed_tokens.weight[:] = torch.randn(VOCABULARY_SIZE, 64, generator=torch.Generator().manual_seed(1))
    loss, _ = measure_output_fisher(model, candidates, tokens, seed=SEED)
    sketch = np.stack(list(measure_fisher_sketch(model, candidates, tokens, seed=SEED)))
    linear = [u for u, unit in enumerate(candidates.units) if unit.kind == "linear"]
    expected = fisher_loss(sketch)[0][linear]
    assert (expected > 0).any()
    np.testing.assert_allclose(loss[linear], expected, rtol=1e-3, atol=1e-6 * expected.max())


def text_nll(model: PreTrainedModel, index: int) -> Tensor:
    logits = model(TOKENS[index : index + 1], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1], TOKENS[index, 1:])


def gradients_of(model: PreTrainedModel, loss: Callable[[PreTrainedModel, int], Tensor], s: int) -> dict[str, Tensor]:
    plain = copy.deepcopy(model).requires_grad_(True)
    names, parameters = zip(*plain.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(plain, s), parameters), strict=True))


def of_weight(tensors: dict[str, Tensor], candidates: Candidates, u: int, w: int = 0) -> Tensor:
    weight = candidates.units[u].weights[w]
    tensor = tensors[weight.parameter]
    return tensor if weight.expert_index is None else tensor[weight.expert_index]


def test_absolute_slope_is_the_sum_of_magnitudes(model: PreTrainedModel) -> None:
    candidates = make_candidates(model)
    samples = np.zeros((len(TOKENS), *candidates.allowed.shape))
    for s in range(len(TOKENS)):
        gradients = gradients_of(model, text_nll, s)
        for u, f in np.argwhere(candidates.allowed):
            terms = error_of(model, candidates, u, f).double() * of_weight(gradients, candidates, u).double()
            samples[s, u, f] = float(terms.abs().sum())
    # A gradient errs by some eps of its own size, and the magnitudes do not cancel.
    assert_mean_and_error(measure_absolute_slope(model, candidates, TOKENS, seed=0), samples, 1e-4)


def test_absolute_slope_bounds_the_first_order() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    loss, _ = measure_absolute_slope(model, candidates, TOKENS, seed=0)
    gradients = [gradients_of(model, text_nll, s) for s in range(len(TOKENS))]
    for u, f in np.argwhere(candidates.allowed):
        error = error_of(model, candidates, u, f)
        slopes = [float((error * of_weight(g, candidates, u)).sum()) for g in gradients]
        assert abs(np.mean(slopes)) <= loss[u, f]


def test_fisher_trace_is_the_gradients_square(model: PreTrainedModel) -> None:
    candidates = make_candidates(model)
    samples = np.zeros((len(TOKENS), *candidates.allowed.shape))
    for s in range(len(TOKENS)):
        gradients = gradients_of(model, sampled_nll, s)
        for u, f in np.argwhere(candidates.allowed):
            trace = float(of_weight(gradients, candidates, u).double().square().sum()) / TOKENS.shape[1]
            error = error_of(model, candidates, u, f).double()
            samples[s, u, f] = 0.5 * trace * float(error.square().mean())
    assert_mean_and_error(measure_fisher_trace(model, candidates, TOKENS, seed=SEED), samples, 1e-4)


def test_units_of_several_weights_sum_their_weights() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    fused = list_candidates(find_units(model, fuse=[r"self_attn\.(q|k|v)_proj", r"experts\.down_proj"]), FORMATS)
    single = make_candidates(model)
    row_of = {unit.weights[0].name: u for u, unit in enumerate(single.units)}
    for measure in CRITERIA:
        whole, _ = measure(model, fused, TOKENS, seed=SEED)
        parts, _ = measure(model, single, TOKENS, seed=SEED)
        for u, unit in enumerate(fused.units):
            rows = parts[[row_of[weight.name] for weight in unit.weights]]
            np.testing.assert_allclose(whole[u], rows.sum(axis=0), rtol=1e-3, atol=1e-4 * np.abs(rows).sum())


def exact_hessian_trace(model: PreTrainedModel, parameter: str, tokens: Tensor) -> float:
    """Returns the trace of one parameter's Hessian: second differences along every single weight, in float64."""
    weight = model.get_parameter(parameter)
    step, total = 1e-4, 0.0

    def loss() -> float:
        logits = model(tokens, use_cache=False).logits
        return float(
            torch.stack(
                [nn.functional.cross_entropy(z[:-1], t[1:]) for z, t in zip(logits, tokens, strict=True)]
            ).mean()
        )

    middle = loss()
    for i in range(weight.numel()):
        flat = weight.data.view(-1)
        flat[i] += step
        above = loss()
        flat[i] -= 2 * step
        below = loss()
        flat[i] += step
        total += (above - 2 * middle + below) / step**2
    return total


def test_hessian_trace_against_second_differences() -> None:
    model = make_float64(build_one_layer_llama(11))
    candidates = list_candidates([unit for unit in find_units(model) if unit.role == "v_proj"], ("int4_g32",))
    # Probes are of sequences, so one text repeated gives many probes of one Hessian.
    text = torch.randint(0, 11, (1, 6), generator=torch.Generator().manual_seed(5))
    loss, std_error = measure_hessian_trace(model, candidates, text.repeat(300, 1), seed=SEED)
    for u, unit in enumerate(candidates.units):
        trace = exact_hessian_trace(model, unit.weights[0].parameter, text)
        error = error_of(model, candidates, u, 0)
        expected = 0.5 * trace * float(error.square().mean())
        assert abs(expected) > 5 * std_error[u, 0], "the test says nothing of a trace lost in its error"
        # Second differences are off by step^2 of fourth derivatives and 1e-16 / step^2: 1e-7 of a sum of that size.
        assert loss[u, 0] == pytest.approx(expected, abs=4 * std_error[u, 0])


def test_trace_of_the_fisher_information_in_expectation() -> None:
    model = make_float64(build_one_layer_llama(11))
    candidates = list_candidates([unit for unit in find_units(model) if unit.role == "o_proj"], ("int4_g32",))
    text = torch.randint(0, 11, (1, 4), generator=torch.Generator().manual_seed(4))
    loss, std_error = measure_fisher_trace(model, candidates, text.repeat(400, 1), seed=SEED)
    # The exact expectation: every label of every position, by its probability.
    plain = copy.deepcopy(model).requires_grad_(True)
    weight = plain.get_parameter(candidates.units[0].weights[0].parameter)
    log_p = torch.log_softmax(plain(text, use_cache=False).logits[0], -1)
    trace = 0.0
    for t in range(4):
        for y in range(11):
            [gradient] = torch.autograd.grad(log_p[t, y], weight, retain_graph=True)
            trace += float(log_p[t, y].exp().detach() * gradient.square().sum()) / 4
    expected = 0.5 * trace * float(error_of(model, candidates, 0, 0).square().mean())
    assert std_error[0, 0] < expected / 5
    assert loss[0, 0] == pytest.approx(expected, abs=4 * std_error[0, 0])


@pytest.mark.parametrize("measure", CRITERIA)
def test_criteria_are_reproducible_and_leave_the_model_as_it_was(measure: Criterion) -> None:
    for build in (build_tiny_mixtral, build_tiny_qwen_moe):
        model = build().requires_grad_(True)
        weights, experts = copy.deepcopy(model.state_dict()), model.config._experts_implementation
        candidates = make_candidates(model)
        with torch.no_grad():
            loss, std_error = measure(model, candidates, TOKENS, seed=SEED)
        again, _ = measure(model, candidates, TOKENS, seed=SEED)
        np.testing.assert_array_equal(loss, again)
        assert loss.shape == std_error.shape == candidates.allowed.shape
        assert not loss[~candidates.allowed].any() and not std_error[~candidates.allowed].any()
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert model.config._experts_implementation == experts
        assert model.model.embed_tokens.padding_idx == 1
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("measure", CRITERIA)
def test_seed_matters_where_something_is_drawn(measure: Criterion) -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = make_candidates(model)
    loss, _ = measure(model, candidates, TOKENS, seed=SEED)
    other, _ = measure(model, candidates, TOKENS, seed=SEED + 1)
    assert np.array_equal(loss, other) == (measure is measure_absolute_slope)


@pytest.mark.parametrize("measure", CRITERIA)
def test_too_little_text_is_refused(measure: Criterion) -> None:
    model = build_tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match=r"at least 2 sequences of \d tokens.*got shape \(1, 12\)"):
        measure(model, make_candidates(model), TOKENS[:1], seed=SEED)
    if measure in (measure_absolute_slope, measure_hessian_trace):
        with pytest.raises(ValueError, match=r"2 sequences of 2 tokens.*got shape \(3, 1\)"):
            measure(model, make_candidates(model), TOKENS[:, :1], seed=SEED)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_model_that_cannot_be_differentiated_twice_is_refused() -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.model.norm.register_forward_hook(lambda _module, _inputs, output: OnceOnly.apply(output))
    candidates = make_candidates(model)
    with pytest.raises(ValueError, match=r"twice differentiable.*got LlamaForCausalLM.*Use measure_fisher_trace"):
        measure_hessian_trace(model, candidates, TOKENS, seed=SEED)
    assert measure_fisher_trace(model, candidates, TOKENS, seed=SEED)[0].any()


def test_other_failures_keep_their_name() -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.model.norm.weight.data = torch.ones(7)
    with pytest.raises(RuntimeError, match="size"):
        measure_hessian_trace(model, make_candidates(model), TOKENS, seed=SEED)
