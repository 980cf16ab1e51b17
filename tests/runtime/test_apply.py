"""Packed modules and simulated formats give the same logits, bit for bit; a simulation leaves no trace."""

import pytest
import torch
from torch import Tensor, nn

from runtime.apply import apply_formats_, check_formats_by_weight, install_empty_formats_, simulated_formats
from runtime.packed import PackedExperts, QuantizedEmbedding, QuantizedLinear
from runtime.units import list_weights
from tests.runtime.format_mixes import MODELS, TOKENS, compute_logits, draw_formats, round_parameters_
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_the_simulated_ones(name: str, seed: int) -> None:
    model = MODELS[name]()
    formats = draw_formats(model, seed)
    reference = compute_logits(model)
    with simulated_formats(model, formats):
        simulated = compute_logits(model)
    assert not torch.equal(simulated, reference)
    apply_formats_(model, formats)
    assert torch.equal(compute_logits(model), simulated)


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_packed_model_generates_what_the_simulated_one_does(name: str) -> None:
    model = MODELS[name]()
    formats = draw_formats(model, 0)
    with simulated_formats(model, formats):
        simulated = model.generate(TOKENS, do_sample=False, max_new_tokens=8)
    apply_formats_(model, formats)
    assert torch.equal(model.generate(TOKENS, do_sample=False, max_new_tokens=8), simulated)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_lossless_for_weights_that_fit_it(name: str) -> None:
    model = MODELS[name]()
    round_parameters_(model, torch.bfloat16)
    formats = dict.fromkeys(list_weights(model), "bf16")
    # Packed experts are read one by one; the batched forward sums them in another order.
    model.config._experts_implementation = "eager"
    reference = compute_logits(model)
    with simulated_formats(model, formats):
        assert torch.equal(compute_logits(model), reference)
    apply_formats_(model, formats)
    assert torch.equal(compute_logits(model), reference)


@pytest.mark.parametrize("name", MODELS)
def test_simulation_restores_the_model(name: str) -> None:
    model = MODELS[name]()
    before, pointers = copy_state(model), [p.data_ptr() for p in model.parameters()]
    implementation = model.config._experts_implementation
    with simulated_formats(model, draw_formats(model, 5)):
        assert any(not torch.equal(model.state_dict()[n], tensor) for n, tensor in before.items())
    assert_same_state(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model.config._experts_implementation == implementation


class Interruption(Exception):
    """Stands for anything that ends a simulation early."""


def test_simulation_restores_the_model_after_an_exception() -> None:
    model = build_tiny_mixtral()
    before, implementation = copy_state(model), model.config._experts_implementation
    with pytest.raises(Interruption), simulated_formats(model, draw_formats(model, 5)):
        raise Interruption
    assert_same_state(model, before)
    assert model.config._experts_implementation == implementation


def test_simulation_restores_the_model_when_a_weight_cannot_be_rendered() -> None:
    model = build_tiny_llama()
    model.lm_head.weight.data[3, 5] = 1e5
    before = copy_state(model)
    formats = {Q_PROJ: "int4_g64", "lm_head.weight": "fp16"}
    with pytest.raises(ValueError, match="range of format 'fp16'"), simulated_formats(model, formats):
        pass
    assert_same_state(model, before)


def test_simulation_of_some_experts_leaves_the_others() -> None:
    model = build_tiny_mixtral()
    name = "model.layers.1.mlp.experts.down_proj"
    before = model.get_parameter(name).detach().clone()
    with simulated_formats(model, {f"{name}[2]": "int2_g64"}):
        during = model.get_parameter(name).detach()
        assert [torch.equal(during[i], before[i]) for i in range(4)] == [True, True, False, True]


def test_simulated_tied_table_changes_embedding_and_head() -> None:
    model = build_tiny_llama(tied=True)
    with simulated_formats(model, {"model.embed_tokens.weight": "int4_g64"}):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert len(model.lm_head.weight[0].unique()) <= 16


def test_simulation_of_nothing_changes_nothing() -> None:
    model = build_tiny_mixtral()
    reference = compute_logits(model)
    with simulated_formats(model, {}):
        assert torch.equal(compute_logits(model), reference)


def test_modules_are_replaced_where_the_weights_were() -> None:
    model = build_tiny_llama(tied=True, attention_bias=True)
    bias = model.model.layers[0].self_attn.q_proj.bias
    apply_formats_(model, dict.fromkeys(list_weights(model), "int4_g32"))
    q_proj = model.model.layers[0].self_attn.q_proj
    assert isinstance(q_proj, QuantizedLinear)
    assert q_proj.bias is bias
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.ndim > 1} == set()


def test_experts_are_replaced_by_packed_ones() -> None:
    model = build_tiny_mixtral()
    apply_formats_(model, draw_formats(model, 1))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, PackedExperts)
    assert isinstance(experts.down_proj, PackedExperts)
    assert model.config._experts_implementation == "eager"


def test_packing_some_weights_leaves_the_others_dense() -> None:
    model = build_tiny_llama()
    formats = {Q_PROJ: "int3_g64", DOWN_PROJ: "int4_g128"}
    with simulated_formats(model, formats):
        simulated = compute_logits(model)
    apply_formats_(model, formats)
    assert torch.equal(compute_logits(model), simulated)
    assert isinstance(model.lm_head, nn.Linear)


def test_empty_modules_have_the_tensors_of_packed_ones() -> None:
    model, empty = MODELS["mixtral"](), MODELS["mixtral"]()
    formats = draw_formats(model, 2)
    apply_formats_(model, formats)
    install_empty_formats_(empty, formats)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == expected
    packed_head = [tensor for name, tensor in empty.state_dict().items() if name.startswith("lm_head.weight.")]
    assert packed_head and all(tensor.is_meta for tensor in packed_head)


MISTAKES = {
    "name": ({Q_PROJ: "bf16", "model.nothing.weight": "bf16"}, "1 unknown names, first 'model.nothing.weight'"),
    "alias": ({"lm_head.weight": "bf16"}, "1 unknown names, first 'lm_head.weight' in LlamaForCausalLM"),
    "format": ({Q_PROJ: "int9_g64"}, "known name: got 'int9_g64'"),
    "group": ({Q_PROJ: "int4_g128"}, f"for weight '{Q_PROJ}', but group_size=128 does not divide in_features=64"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_formats_that_cannot_be_are_refused(mistake: str) -> None:
    formats, message = MISTAKES[mistake]
    formats = {DOWN_PROJ: "int4_g64", **formats}
    model = build_tiny_llama(tied=True)
    before = copy_state(model)
    with pytest.raises(ValueError, match=message), simulated_formats(model, formats):
        pass
    for refuse in (apply_formats_, install_empty_formats_, check_formats_by_weight):
        with pytest.raises(ValueError, match=message):
            refuse(model, formats)
    assert_same_state(model, before)


def test_projection_with_some_experts_only_is_refused() -> None:
    model = build_tiny_mixtral()
    formats = draw_formats(model, 0)
    del formats["model.layers.1.mlp.experts.down_proj[0]"]
    before = copy_state(model)
    for refuse in (apply_formats_, install_empty_formats_):
        with pytest.raises(ValueError, match=r"got 3 of 4 experts of 'model.layers.1.mlp.experts.down_proj'"):
            refuse(model, formats)
    assert_same_state(model, before)


def test_unknown_quantizer_is_refused() -> None:
    model = build_tiny_llama()
    with pytest.raises(ValueError, match="Known quantizers: rtn"):
        apply_formats_(model, {Q_PROJ: "int4_g64"}, quantizer="magic")
