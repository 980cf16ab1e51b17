"""Logits from a layer on are the model's own logits, bit for bit, and the model is whole again afterwards."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from runtime.units import find_units, read_weight
from sensitivity.streaming.suffix import SuffixRunner
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama

TOKENS = torch.randint(0, VOCABULARY_SIZE, (2, 10), generator=torch.Generator().manual_seed(0))


def build_deep_llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.1,
        )
    )


def build_gemma() -> PreTrainedModel:
    # Layers take turns between full and sliding attention, and the model asks each layer which it is.
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=4,
        )
    )


def build_gpt() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY_SIZE, n_embd=32, n_layer=3, n_head=2, n_positions=32))


def assert_every_unit_is_exact(model: PreTrainedModel) -> None:
    model.eval().requires_grad_(False)
    runner = SuffixRunner(model, TOKENS)
    layers = {name: id(module) for name, module in model.named_modules()}
    reference = model(TOKENS).logits
    assert torch.equal(runner.reference_logits, reference)
    for unit in find_units(model):
        weight = read_weight(model, unit.weights[0])
        saved = weight.clone()
        weight.mul_(-0.5)
        whole = model(TOKENS).logits
        assert torch.equal(runner.logits(unit.layer_index), whole), unit.name
        weight.copy_(saved)
        # An expert that no token visits changes nothing; everything else does.
        assert unit.kind == "expert" or not torch.equal(whole, reference), unit.name
    assert {name: id(module) for name, module in model.named_modules()} == layers
    assert torch.equal(model(TOKENS).logits, reference)


def test_every_unit_of_the_tiny_models(model: PreTrainedModel) -> None:
    assert_every_unit_is_exact(model)


def test_several_weights_of_one_layer_and_later_layers() -> None:
    model = build_deep_llama().eval().requires_grad_(False)
    runner = SuffixRunner(model, TOKENS)
    for layer in (3, 4):
        model.model.layers[layer].mlp.down_proj.weight.mul_(2)
    model.lm_head.weight.mul_(1.5)
    whole = model(TOKENS).logits
    for first in (None, 0, 1, 2, 3):
        assert torch.equal(runner.logits(first), whole)
    # From layer 4 on the change in layer 3 is not seen, which shows that the cache is used.
    assert not torch.equal(runner.logits(4), whole)


@pytest.mark.parametrize("build", [build_deep_llama, build_gemma], ids=["deep_llama", "gemma2"])
def test_every_unit_of_deeper_models(build: Callable[[], PreTrainedModel]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    assert_every_unit_is_exact(model)


def test_layers_under_another_name() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_gpt().eval().requires_grad_(False)
    runner = SuffixRunner(model, TOKENS)
    for k, layer in enumerate(model.transformer.h):
        layer.mlp.c_proj.weight.mul_(2)
        whole = model(TOKENS).logits
        assert torch.equal(runner.logits(k), whole)
        layer.mlp.c_proj.weight.div_(2)


class TupleLayer(nn.Module):
    """Returns a tuple, as decoder layers did before transformers 5 and those of remote code still do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return (hidden + self.linear(hidden), None)


class TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=6)
        self.embedding = nn.Embedding(VOCABULARY_SIZE, 4)
        self.layers = nn.ModuleList(TupleLayer() for _ in range(6))

    def forward(self, tokens: Tensor, *, use_cache: bool) -> SimpleNamespace:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)[0]
        return SimpleNamespace(logits=hidden @ self.embedding.weight.T)


def test_layers_that_return_tuples() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TupleModel().requires_grad_(False)
    runner = SuffixRunner(model, TOKENS)
    for k, layer in enumerate(model.layers):
        layer.linear.weight.mul_(2)
        assert torch.equal(runner.logits(k), model(TOKENS, use_cache=False).logits)
        layer.linear.weight.div_(2)


def test_layers_before_the_first_are_not_run() -> None:
    model = build_deep_llama().eval()
    runner = SuffixRunner(model, TOKENS)
    run: list[int] = []
    for k, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, k=k: run.append(k))
    runner.logits(4)
    assert run == [4, 5]


def test_model_is_restored_after_a_failure() -> None:
    model = build_tiny_llama().requires_grad_(False)
    runner = SuffixRunner(model, TOKENS)
    layers, weight = model.model.layers, model.model.layers[1].mlp.down_proj.weight
    saved = weight.data
    weight.data = torch.zeros(3, 5)
    with pytest.raises(RuntimeError):
        runner.logits(1)
    weight.data = saved
    assert model.model.layers is layers
    assert torch.equal(model(TOKENS).logits, runner.reference_logits)


def test_no_hook_is_left_even_after_a_failure() -> None:
    model = build_tiny_llama().requires_grad_(False)
    with pytest.raises(IndexError):
        SuffixRunner(model, torch.full((1, 4), VOCABULARY_SIZE))
    SuffixRunner(model, TOKENS)
    assert not any(layer._forward_hooks for layer in model.model.layers)


def test_model_without_a_list_of_layers_is_refused() -> None:
    model = build_tiny_llama()
    model.config.num_hidden_layers = 3
    with pytest.raises(
        ValueError, match=r"num_hidden_layers=3: got none in LlamaForCausalLM.*without 'single_unit_kl'"
    ):
        SuffixRunner(model, TOKENS)
