"""Streamed gradients against plain autograd, the streamed sketch against that of the whole model, and refusals."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from runtime.candidates import list_candidates
from runtime.rendering import render
from runtime.units import Weight, find_units, list_weights, read_weight
from sensitivity.sketches.fisher_sketch import measure_fisher_sketch
from sensitivity.streaming.decoder_layers import NotLayerwise
from sensitivity.streaming.gradient_stream import GradientStream
from tests.sensitivity.exact_gradients import compute_gradients, contract, make_score
from tests.sensitivity.streamed_models import FORMATS, SEED, TOKENS, make_candidates, measure_streamed
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

ROOT = TOKENS.shape[1] ** 0.5


def build_seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval().requires_grad_(False)


def build_gemma() -> PreTrainedModel:
    # Full and sliding attention in turns, a scaled embedding with a padding token, capped logits.
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        initializer_range=0.1,
        pad_token_id=int(TOKENS[0, 0]),
    )
    return Gemma2ForCausalLM(config)


def build_gpt() -> PreTrainedModel:
    # Layers under another name, arguments by position, an embedding of positions.
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def assert_is_the_whole_sketch(model: Any, directory: Path, **settings: Any) -> None:
    candidates = settings.pop("candidates", None) or make_candidates(model)
    whole = np.stack(list(measure_fisher_sketch(model, candidates, TOKENS, seed=SEED)))
    sketch = measure_streamed(model, directory, candidates=candidates, **settings)
    assert sketch.dtype == np.float32
    assert whole.any()
    for s in range(len(TOKENS)):
        _, bound = contract(model, candidates, compute_gradients(model, TOKENS, s, make_score(SEED)))
        # Each of the two errs by the bound.
        assert np.all(np.abs(sketch[s] - whole[s]) <= 2 * bound.numpy() / ROOT + 1e-6 * np.abs(whole[s]))


# Gradients of all sequences at once, of one at a time and of a last one alone; errors kept, none, and some.
@pytest.mark.parametrize("kept_bytes", [2**30, 3, 3_000_000, 300_000], ids=str)
def test_sketch_is_that_of_the_whole_model(model: PreTrainedModel, tmp_path: Path, kept_bytes: int) -> None:
    assert_is_the_whole_sketch(model, tmp_path, kept_bytes=kept_bytes)


@pytest.mark.parametrize("build", [build_gemma, build_gpt], ids=["gemma2", "gpt2"])
def test_sketch_of_other_architectures(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = build_seeded(build)
    assert_is_the_whole_sketch(model, tmp_path, candidates=list_candidates(find_units(model), ("int4_g32", "bf16")))


@pytest.mark.parametrize(
    "part", ["embed_tokens", "lm_head", r"layers.0.", r"layers.1.self_attn", "layers.0.mlp.down_proj"]
)
def test_sketch_of_some_units(tmp_path: Path, part: str) -> None:
    model = build_tiny_llama().requires_grad_(False)
    units = [unit for unit in find_units(model) if part in unit.name]
    assert_is_the_whole_sketch(model, tmp_path, candidates=list_candidates(units, FORMATS))


def test_units_of_several_layers(tmp_path: Path) -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    units = find_units(model, fuse=[r"layers\.\d+\.self_attn\.(q|k|v)_proj", r"experts\.(gate_up|down)_proj"])
    assert max(len(unit.weights) for unit in units) > 4
    assert_is_the_whole_sketch(model, tmp_path, candidates=list_candidates(units, FORMATS))


class Recorder:
    """Keeps every gradient, and checks the order of the calls."""

    def __init__(self) -> None:
        self.open: set[Weight] = set()
        self.closed: set[Weight] = set()
        self.gradients: dict[tuple[str, int], Tensor] = {}

    def begin(self, weights: Mapping[Weight, Tensor]) -> int:
        assert not self.open and not self.closed & set(weights)
        self.open = set(weights)
        return 0

    def add(self, weight: Weight, gradients: Tensor, first: int) -> None:
        assert weight in self.open
        for s, gradient in enumerate(gradients, start=first):
            assert (weight.name, s) not in self.gradients
            self.gradients[weight.name, s] = gradient.clone()

    def finish(self) -> dict[str, Tensor]:
        names = [weight.name for weight in self.open]
        self.closed |= self.open
        self.open = set()
        return {name: torch.tensor([self.gradients[name, s].sum() for s in range(len(TOKENS))]) for name in names}


def make_kl(model: PreTrainedModel) -> Callable[[Tensor, int], Tensor]:
    """Returns the KL divergence from other logits than the model's, as a loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        logits = [model(TOKENS[s : s + 1]).logits[0] for s in range(len(TOKENS))]
        reference = [x + 0.3 * torch.randn_like(x) for x in logits]

    def kl(logits: Tensor, index: int) -> Tensor:
        p, q = torch.log_softmax(reference[index], dim=-1), torch.log_softmax(logits, dim=-1)
        return (p.exp() * (p - q)).sum()

    return kl


def test_every_gradient_comes_once_and_complete(model: PreTrainedModel, tmp_path: Path) -> None:
    loss, recorder, again = make_kl(model), Recorder(), Recorder()
    weights = list(list_weights(model).values())
    stream = GradientStream(model, TOKENS, weights, loss=loss, directory=tmp_path)
    kept = stream.run({"first": recorder, "second": again}, lambda *_: None)
    assert recorder.gradients.keys() == {(weight.name, s) for weight in weights for s in range(len(TOKENS))}
    for s in range(len(TOKENS)):
        exact = compute_gradients(model, TOKENS, s, loss)
        for weight in weights:
            gradient = exact[weight.parameter]
            gradient = gradient if weight.expert_index is None else gradient[weight.expert_index]
            # Sums of some hundred float32 terms in another order, through some ten matrices.
            torch.testing.assert_close(
                recorder.gradients[weight.name, s], gradient, rtol=0, atol=1e-5 * max(gradient.abs().max().item(), 1e-3)
            )
    for name in ("first", "second"):
        assert kept[name].keys() == {weight.name for weight in weights}
        for weight in weights:
            for s, total in enumerate(kept[name][weight.name]):
                assert total == recorder.gradients[weight.name, s].sum()
    assert all(torch.equal(gradient, again.gradients[key]) for key, gradient in recorder.gradients.items())


def test_errors_lead_from_the_models_own_values_to_those_of_the_base(tmp_path: Path) -> None:
    base = build_tiny_llama(tied=True).requires_grad_(False)
    candidates, weights = make_candidates(base), list_weights(base)
    model = copy.deepcopy(base)
    for u, unit in enumerate(candidates.units):
        f = int(np.flatnonzero(candidates.allowed[u])[0])
        for weight in unit.weights:
            read_weight(model, weight).copy_(render(read_weight(base, weight), candidates.formats[f]))
    loss = make_kl(base)
    sketch = measure_streamed(
        model, tmp_path, candidates=candidates, loss=loss, base=lambda weight: read_weight(base, weights[weight.name])
    )
    for s in range(len(TOKENS)):
        gradients = compute_gradients(model, TOKENS, s, loss)
        product, bound = contract(model, candidates, gradients, lambda weight: read_weight(base, weight))
        assert np.all(np.abs(sketch[s] * ROOT - product.numpy()) <= bound.numpy() + 1e-6 * product.abs().numpy())
    # The candidate that the model holds already has no error, others have.
    assert all(not sketch[:, u, np.flatnonzero(row)[0]].any() for u, row in enumerate(candidates.allowed))
    assert np.count_nonzero(sketch) > sketch.size // 4


def test_parameter_that_nothing_reads(tmp_path: Path) -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.second_head = nn.Linear(64, 64).requires_grad_(False)
    units = [unit for unit in find_units(model) if "second_head" in unit.name]
    assert len(units) == 1
    sketch = measure_streamed(model, tmp_path, candidates=list_candidates(units, FORMATS))
    assert not sketch.any()


class Layer(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.output = output

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return self.output(hidden_states + torch.tanh(self.linear(hidden_states)))


class Decoder(nn.Module):
    """A decoder that calls its layers in a way of its own."""

    def __init__(
        self,
        call: Callable[..., Tensor] = lambda layer, hidden, *_: layer(hidden),
        output: Callable[[Tensor], Any] = lambda hidden: hidden,
    ) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=2)
        self.embedding = nn.Embedding(VOCABULARY_SIZE, 32)
        self.layers = nn.ModuleList(Layer(output) for _ in range(2))
        self.call = call

    def forward(self, tokens: Tensor, *, use_cache: bool) -> SimpleNamespace:
        first = hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = self.call(layer, hidden, tokens, first)
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


def build_decoder(*arguments: Callable[..., Any]) -> Decoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Decoder(*arguments).requires_grad_(False)


@pytest.mark.parametrize(
    "arguments",
    [
        (lambda layer, hidden, *_: layer(hidden, None, 0.5, (torch.ones(2), [True]), name="x"),),
        (lambda layer, hidden, *_: layer(hidden_states=hidden),),
        (lambda layer, hidden, *_: layer(hidden)[0], lambda hidden: (hidden, None)),
        (lambda layer, hidden, *_: layer(hidden), lambda hidden: hidden * 2),
    ],
    ids=["constants", "by_name", "tuples", "bare"],
)
def test_ways_to_call_a_layer(arguments: tuple[Callable[..., Any], ...], tmp_path: Path) -> None:
    model = build_decoder(*arguments)
    assert_is_the_whole_sketch(model, tmp_path, candidates=list_candidates(find_units(model), ("int4_g32",)))


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((lambda layer, hidden, *_: layer(hidden, {}),), r"argument '1', dict, in 'layers\.0' of Decoder"),
        ((lambda layer, hidden, tokens, first: layer(hidden, skip=first),), r"argument 'skip', Tensor"),
        ((lambda layer, hidden, tokens, _: layer(hidden, tokens),), r"arguments that differ between sequences"),
        ((lambda layer, hidden, tokens, _: layer(hidden, (tokens, 1)),), r"arguments that differ between sequences"),
        ((lambda layer, hidden, *_: layer(hidden, [hidden.mean().item()]),), r"arguments that differ"),
        ((lambda layer, hidden, *_: layer((hidden,)[0], *[hidden]),), r"argument '1', Tensor"),
        (
            (lambda layer, hidden, *_: layer(hidden)[0], lambda hidden: (hidden, hidden.detach())),
            r"more to return than its hidden states",
        ),
        ((lambda layer, hidden, *_: layer(hidden) + hidden,), r"a difference of .* where the largest is"),
    ],
    ids=["container", "gradient", "tokens", "nested", "number", "hidden_twice", "second_output", "around"],
)
def test_layers_that_cannot_be_run_by_themselves_are_refused(
    arguments: tuple[Callable[..., Any], ...], found: str, tmp_path: Path
) -> None:
    model = build_decoder(*arguments)
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(NotLayerwise, match=found + r".*Run it as a whole \(measure_fisher_sketch\)"):
        measure_streamed(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layer_without_hidden_states_is_refused(tmp_path: Path) -> None:
    model = build_decoder(lambda layer, hidden, *_: layer(x=hidden))
    with pytest.raises(NotLayerwise, match=r"no hidden states, neither first nor as 'hidden_states'"):
        measure_streamed(model, tmp_path)


def test_model_without_a_list_of_layers_is_refused(tmp_path: Path) -> None:
    model = build_tiny_llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(NotLayerwise, match=r"num_hidden_layers=3: got none in LlamaForCausalLM\. Run it as a whole"):
        measure_streamed(model, tmp_path)


def test_weight_of_several_layers_is_refused(tmp_path: Path) -> None:
    model: LlamaForCausalLM = build_tiny_llama().requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        NotLayerwise, match=r"got 'model\.layers\.0\.mlp\.up_proj\.weight', which is also 'model\.layers\.1"
    ):
        measure_streamed(model, tmp_path)


def test_no_weights_are_refused(tmp_path: Path) -> None:
    model = build_tiny_llama()
    with pytest.raises(ValueError, match=r"weights to stream must be at least one: got none"):
        GradientStream(model, TOKENS, [], loss=make_score(SEED), directory=tmp_path)
