"""The output error against products with the inputs that hooks see, and the sharing of sums on small networks."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.rendering import render
from runtime.units import Weight, find_units, read_weight
from sensitivity.criteria.output_error import InputSecondMoments, measure_output_error
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g64", "int4_g32_sym", "bf16")
TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
EPS = torch.finfo(torch.float32).eps


def exact_error(difference: Tensor, weight: Weight, inputs: dict[str, Tensor]) -> Tensor:
    """Returns the sum of ||D x||^2 over all inputs in float64."""
    total = torch.zeros((), dtype=torch.float64)
    if weight.name in inputs:
        total += (inputs[weight.name] @ difference.T).square().sum()
    if weight.kind == "embedding":
        total += difference[TOKENS.flatten()].square().sum()
    return total


def test_error_is_that_of_the_outputs(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), FORMATS)
    error = measure_output_error(model, candidates, TOKENS)
    inputs = capture_inputs(model, TOKENS)
    for (u, f), measured in np.ndenumerate(error):
        [weight] = candidates.units[u].weights
        values = read_weight(model, weight)
        difference = (render(values, candidates.formats[f]) - values).double()
        exact = float(exact_error(difference, weight, inputs)) / TOKENS.numel() if candidates.allowed[u, f] else 0.0
        # tr(D H D'): every product of two entries of D with one of H is rounded in sums over in_features, rows and
        # tokens; the inputs themselves are float32 results of some hundred terms. Signs are mixed, so the error
        # is of the size sum |D||H||D'|, which exceeds the trace by sqrt(in_features) or so.
        assert measured == pytest.approx(exact, rel=100 * values.shape[1] ** 0.5 * EPS), (weight.name, f)
    visited = {unit.name for unit, row in zip(candidates.units, error, strict=True) if row.any()}
    assert visited == {unit.name for unit in candidates.units if unit.kind != "expert" or len(inputs[unit.name])}


def test_expert_that_no_token_visits_has_no_error() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    tokens = TOKENS[:1, :1]
    with InputSecondMoments(model) as moments:
        model.config._experts_implementation = "eager"
        model(tokens)
    visited = {name for name in moments.linear if "experts" in name}
    # One token and two of four experts: half of them, gate_up and down, in two layers.
    assert len(visited) == 2 * 2 * 2
    candidates = list_candidates(find_units(model), FORMATS)
    error = measure_output_error(model, candidates, tokens)
    for u, unit in enumerate(candidates.units):
        if unit.kind == "expert":
            assert error[u].any() == (unit.name in visited)


def test_routers_have_an_error_where_they_are_units() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model, routers=True), FORMATS)
    error = measure_output_error(model, candidates, TOKENS)
    routers = [u for u, unit in enumerate(candidates.units) if unit.kind == "router"]
    assert len(routers) == 2
    assert (error[routers] > 0).all()


def test_fused_units_sum_their_weights() -> None:
    model = build_tiny_llama().requires_grad_(False)
    single = list_candidates(find_units(model), FORMATS)
    fused = list_candidates(find_units(model, fuse=[r"self_attn\.(q|k|v)_proj"]), FORMATS)
    parts, whole = (measure_output_error(model, candidates, TOKENS) for candidates in (single, fused))
    row_of = {unit.weights[0].name: u for u, unit in enumerate(single.units)}
    for u, unit in enumerate(fused.units):
        expected = parts[[row_of[weight.name] for weight in unit.weights]].sum(axis=0)
        np.testing.assert_allclose(whole[u], expected, rtol=4 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", None], ids=str)
def test_experts_implementation_is_restored(implementation: str | None) -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    model.config._experts_implementation = implementation
    candidates = list_candidates(find_units(model), ("bf16",))
    measure_output_error(model, candidates, TOKENS)
    assert model.config._experts_implementation == implementation
    with pytest.raises(IndexError):
        measure_output_error(model, candidates, torch.full((1, 4), VOCABULARY_SIZE))
    assert model.config._experts_implementation == implementation


class Projections(nn.Module):
    """Three projections of one width, called as a test asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))


def random_rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def assert_moments(moments: InputSecondMoments, expected: dict[str, list[Tensor]]) -> None:
    assert set(moments.linear) == {f"{name}.weight" for name in expected}
    for name, inputs in expected.items():
        rows = torch.cat([x.reshape(-1, 6) for x in inputs])
        exact = (rows.double().T @ rows.double()).numpy()
        magnitude = (rows.abs().double().T @ rows.abs().double()).numpy()
        # The worst rounding of a sum over all rows.
        assert np.all(np.abs(moments.linear[f"{name}.weight"].numpy() - exact) <= len(rows) * EPS * magnitude)


@torch.no_grad()
def test_weights_that_read_one_tensor_share_one_sum() -> None:
    network = Projections()
    inputs = [random_rows(5, seed) for seed in range(3)]
    others = [random_rows(4, seed + 10) for seed in range(3)]
    with InputSecondMoments(network) as moments:
        for x, y in zip(inputs, others, strict=True):
            network.a(x)
            network.b(x)
            network.c(y)
    assert_moments(moments, {"a": inputs, "b": inputs, "c": others})
    assert moments.linear["a.weight"] is moments.linear["b.weight"]
    assert moments.linear["a.weight"] is not moments.linear["c.weight"]


@torch.no_grad()
def test_sharing_may_differ_from_call_to_call() -> None:
    network = Projections()
    x, y, z = (random_rows(5, seed) for seed in range(3))
    with InputSecondMoments(network) as moments:
        network.a(x), network.b(x), network.c(x)
        network.a(y), network.b(z), network.c(z)
        network.b(x), network.a(x)
        network.c(x), network.c(x)
    assert_moments(moments, {"a": [x, y, x], "b": [x, z, x], "c": [x, z, x, x]})


@torch.no_grad()
def test_tensor_written_to_in_place_is_another_input() -> None:
    network = Projections()
    x = random_rows(5, 0)
    before = x.clone()
    with InputSecondMoments(network) as moments:
        network.a(x)
        x.mul_(3)
        network.b(x)
        x.zero_()
    assert_moments(moments, {"a": [before], "b": [3 * before]})


@torch.no_grad()
def test_tensors_that_take_the_place_of_freed_ones_are_other_inputs() -> None:
    network = Projections()
    seen: list[Tensor] = []
    addresses = set()
    with InputSecondMoments(network) as moments:
        for seed in range(200):
            x = random_rows(5, seed)
            seen.append(x.clone())
            addresses.add(x.data_ptr())
            network.a(x)
            del x
    assert len(addresses) < 200, "memory must be used again for the test to say anything"
    assert_moments(moments, {"a": seen})


@torch.no_grad()
def test_inputs_of_any_layout_and_arguments_by_name() -> None:
    network = Projections()
    x = random_rows(8, 0)
    deep = x.reshape(2, 2, 2, 6).transpose(0, 1)
    with InputSecondMoments(network) as moments:
        network.a(deep)
        nn.functional.linear(input=x[0], weight=network.b.weight)
        nn.functional.linear(x, weight=network.c.weight)
        nn.functional.linear(x, torch.ones(2, 6))
    assert_moments(moments, {"a": [deep], "b": [x[0]], "c": [x]})


@torch.no_grad()
def test_embedding_counts_its_tokens() -> None:
    network = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6))
    with InputSecondMoments(network) as moments:
        network(torch.tensor([[1, 1, 6], [0, 1, 6]]))
        network(torch.tensor([3]))
    assert moments.embedding["0.weight"].tolist() == [1, 3, 0, 1, 0, 0, 2]
    assert set(moments.linear) == {"1.weight"}
