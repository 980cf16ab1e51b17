"""Units of every kind of model: names, kinds, ties, fusions, and what is left out."""

import copy
import re
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from transformers import DbrxConfig, GptOssConfig, GptOssForCausalLM, Llama4TextConfig
from transformers.models.dbrx.modeling_dbrx import DbrxRouter
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from runtime.units import (
    EXPERT_GRANULARITIES,
    Unit,
    count_weights,
    find_units,
    list_weights,
    merge_units,
    read_weight,
)
from tests.mixtures import MIXTURES
from tests.runtime.format_mixes import MODELS
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

ATTENTION = [f"self_attn.{letter}_proj" for letter in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def list_names(parts: list[str]) -> list[str]:
    """Returns the names of the same units in both layers, between embedding and head."""
    layers = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
    return ["model.embed_tokens", *layers, "lm_head"]


def test_dense_model_in_order() -> None:
    units = find_units(build_tiny_llama())
    assert [unit.name for unit in units] == list_names(ATTENTION + MLP)
    assert Counter(unit.kind for unit in units) == {"linear": 14, "embedding": 1, "head": 1}
    down = units[7]
    assert (down.role, down.layer_index, down.expert_index, down.kind) == ("down_proj", 0, None, "linear")
    assert down.weights[0].shape == (64, 128)
    assert [(unit.layer_index, unit.role) for unit in (units[0], units[8], units[-1])] == [
        (None, "embed_tokens"),
        (1, "q_proj"),
        (None, "lm_head"),
    ]


def test_tied_weights_are_one_unit() -> None:
    units = find_units(build_tiny_llama(tied=True))
    assert [unit.name for unit in units] == list_names(ATTENTION + MLP)[:-1]
    (table,) = units[0].weights
    assert (table.name, table.aliases, table.kind) == ("model.embed_tokens.weight", ("lm_head.weight",), "embedding")


def test_experts_are_units_of_their_own_and_routers_are_none() -> None:
    units = find_units(build_tiny_mixtral())
    experts = [f"mlp.experts.{projection}[{e}]" for projection in ("gate_up_proj", "down_proj") for e in range(4)]
    assert sorted(unit.name for unit in units) == sorted(list_names(ATTENTION + experts))
    expert = next(unit for unit in units if unit.name == "model.layers.1.mlp.experts.gate_up_proj[2]")
    assert (expert.kind, expert.role, expert.layer_index, expert.expert_index) == ("expert", "gate_up_proj", 1, 2)
    assert expert.weights[0].shape == (256, 64)


def test_shared_expert_takes_part_without_its_gate() -> None:
    names = [unit.name for unit in find_units(build_tiny_qwen_moe())]
    experts = [f"mlp.experts.{projection}[{e}]" for projection in ("gate_up_proj", "down_proj") for e in range(4)]
    shared = [f"mlp.shared_expert.{projection}_proj" for projection in ("gate", "up", "down")]
    assert sorted(names) == sorted(list_names(ATTENTION + experts + shared))


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_all_matrices_but_routers(name: str) -> None:
    model = MODELS[name]()
    left_out = re.compile(r"norm|\.bias$|mlp\.gate\.|shared_expert_gate")
    expected = {n: p.numel() for n, p in model.named_parameters() if not left_out.search(n)}
    counted: Counter[str] = Counter()
    for weight in list_weights(model).values():
        counted[weight.parameter] += weight.weight_count
    assert counted == expected
    units = find_units(model)
    assert count_weights(units) == sum(expected.values())
    assert sum(unit.weight_count for unit in units) == count_weights(units)
    assert len({unit.name for unit in units}) == len(units)


def test_weights_are_read_in_place() -> None:
    model = build_tiny_mixtral()
    weights = list_weights(model)
    expert = weights["model.layers.0.mlp.experts.down_proj[3]"]
    parameter = model.model.layers[0].mlp.experts.down_proj
    assert torch.equal(read_weight(model, expert), parameter[3])
    read_weight(model, expert).zero_()
    assert not parameter[3].any()
    assert parameter[:3].all()
    head = read_weight(model, weights["lm_head.weight"])
    assert head.data_ptr() == model.lm_head.weight.data_ptr()


def find_unit(units: tuple[Unit, ...], name: str) -> Unit:
    return next(unit for unit in units if unit.name == name)


def test_fused_projections_get_one_format() -> None:
    model = build_tiny_llama()
    units = find_units(model, fuse=[r"self_attn\.(q|k|v)_proj", r"mlp\.(gate|up)_proj"])
    parts = ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]
    assert [unit.name for unit in units] == list_names(parts)
    fused = find_unit(units, "model.layers.1.self_attn.q_proj+k_proj+v_proj")
    assert [weight.shape for weight in fused.weights] == [(64, 64), (32, 64), (32, 64)]
    assert (fused.role, fused.layer_index, fused.weight_count) == ("q_proj+k_proj+v_proj", 1, 128 * 64)
    assert count_weights(units) == count_weights(find_units(model))


def test_fused_experts() -> None:
    model = build_tiny_mixtral()
    by_expert = find_units(model, fuse=[r"experts\.(gate_up|down)_proj"])
    fused = find_unit(by_expert, "model.layers.0.mlp.experts.gate_up_proj[1]+down_proj[1]")
    assert (fused.expert_index, fused.kind, len(by_expert)) == (1, "expert", 2 + 2 * (4 + 4))
    by_projection = find_units(model, fuse=[r"\[\d+\]"])
    fused = find_unit(
        by_projection,
        "model.layers.0.mlp.experts.down_proj[0-3]",
    )
    assert (fused.expert_index, fused.role, len(by_projection)) == (None, "down_proj", 2 + 2 * (4 + 2))


def test_overlapping_fusions_join() -> None:
    units = find_units(build_tiny_llama(), fuse=[r"(q|k)_proj", r"(k|v)_proj"])
    assert len(find_unit(units, "model.layers.0.self_attn.q_proj+k_proj+v_proj").weights) == 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(q_proj", r"regular expression: got '\(q_proj'"), ("query", "match at least one weight: got 'query'.* 16 ")],
)
def test_fusions_that_cannot_be_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_units(build_tiny_llama(), fuse=[pattern])


def test_model_without_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="got none in LayerNorm"):
        find_units(nn.LayerNorm(4))


class SquaringLinear(nn.Linear):
    """A linear layer that does more than its name says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class NormalizedEmbedding(nn.Embedding):
    """An embedding that does more than its name says."""

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(tokens))


def test_modules_with_a_forward_of_their_own_are_left_out() -> None:
    model = nn.Sequential(NormalizedEmbedding(8, 4), nn.Linear(4, 4), SquaringLinear(4, 4))
    assert list(list_weights(model)) == ["1.weight"]


def test_weight_shared_with_such_a_module_is_left_out() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), SquaringLinear(4, 8))
    model[2].weight = model[0].weight
    assert list(list_weights(model)) == ["1.weight"]


def test_module_with_two_names_is_one_weight() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "again": nn.Linear(4, 4)})
    model["again"] = model["first"]
    (weight,) = list_weights(model).values()
    assert (weight.name, weight.aliases) == ("first.weight", ("again.weight",))


def test_transposed_experts_are_left_out() -> None:
    config = GptOssConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        layer_types=["full_attention"],
    )
    model = GptOssForCausalLM(config)
    assert {unit.role for unit in find_units(model)} == {
        "embed_tokens",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "lm_head",
    }


def test_experts_that_are_read_in_batches_only_are_left_out() -> None:
    config = Llama4TextConfig(hidden_size=16, intermediate_size=8, num_local_experts=2)
    assert list(list_weights(nn.ModuleDict({"experts": Llama4TextExperts(config)}))) == []


def test_units_do_not_depend_on_values() -> None:
    model = build_tiny_mixtral()
    assert find_units(copy.deepcopy(model).to("meta")) == find_units(model)


EXPERT_NAMES = {
    "projection": [f"experts.{projection}_proj[{e}]" for e in range(4) for projection in ("gate_up", "down")],
    "expert": [f"experts.gate_up_proj[{e}]+down_proj[{e}]" for e in range(4)],
    "stack_projection": ["experts.gate_up_proj[0-3]", "experts.down_proj[0-3]"],
    "stack": ["experts.gate_up_proj[0-3]+down_proj[0-3]"],
}


@pytest.mark.parametrize("experts", EXPERT_GRANULARITIES)
def test_granularities_of_experts(experts: str) -> None:
    model = build_tiny_qwen_moe()
    shared = [f"mlp.shared_expert.{projection}_proj" for projection in ("gate", "up", "down")]
    units = find_units(model, experts=experts)
    expected = list_names([*ATTENTION, *(f"mlp.{name}" for name in EXPERT_NAMES[experts]), *shared])
    assert sorted(unit.name for unit in units) == sorted(expected)
    weights = [weight.name for unit in units for weight in unit.weights]
    assert sorted(weights) == sorted(list_weights(model))
    for unit in units:
        if unit.kind == "expert":
            indices = {weight.expert_index for weight in unit.weights}
            assert unit.expert_index == (indices.pop() if len(indices) == 1 else None)
            assert unit.layer_index in (0, 1)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_familys_experts_are_units(name: str) -> None:
    model = MIXTURES[name].build()
    experts = [unit for unit in find_units(model, experts="expert") if unit.kind == "expert"]
    mixtures = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    count = model.model.layers[-1].mlp.experts.num_experts
    assert [(unit.layer_index, unit.expert_index) for unit in experts] == [
        (layer, e) for layer in mixtures for e in range(count)
    ]
    assert {tuple(weight.parameter.rpartition(".")[2] for weight in unit.weights) for unit in experts} == {
        ("gate_up_proj", "down_proj")
    }
    stacks = find_units(model, experts="stack")
    assert [len(unit.weights) for unit in stacks if unit.kind == "expert"] == [2 * count] * len(mixtures)
    # Shared experts are ordinary projections, three for each mixture.
    shared = [unit for unit in stacks if "shared_expert" in unit.name]
    assert len(shared) == (3 * len(mixtures) if name.startswith(("qwen2", "deepseek")) else 0)


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_take_formats_when_asked(name: str) -> None:
    model = MIXTURES[name].build()
    units, without = find_units(model, routers=True), find_units(model)
    routers = [unit for unit in units if unit.kind == "router"]
    assert tuple(unit for unit in units if unit.kind != "router") == without
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]
    gates = ["gate", "shared_expert_gate"] if name == "qwen2" else ["gate"]
    assert sorted(unit.name for unit in routers) == sorted(
        f"model.layers.{layer}.mlp.{gate}" for layer in layers for gate in gates
    )
    for unit in routers:
        assert read_weight(model, unit.weights[0]).shape == unit.weights[0].shape
        assert unit.weights[0].name in list_weights(model, routers=True)
        assert unit.weights[0].name not in list_weights(model)


def test_routers_with_a_matrix_inside_them_are_routers() -> None:
    config = DbrxConfig(ffn_config={"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2})
    block = nn.ModuleDict({"router": DbrxRouter(config.ffn_config), "proj": nn.Linear(4, 4)})
    assert list(list_weights(block)) == ["proj.weight"]
    assert list(list_weights(block, routers=True)) == ["router.layer.weight", "proj.weight"]


@pytest.mark.parametrize("experts", EXPERT_GRANULARITIES)
def test_units_merge_without_their_model(experts: str) -> None:
    model = build_tiny_qwen_moe()
    fuse = [r"self_attn\.(q|k|v)_proj"]
    fine = find_units(model, fuse=fuse)
    assert merge_units(fine, experts=experts) == find_units(model, fuse=fuse, experts=experts)
    stacks = find_units(model, experts="stack")
    assert merge_units(stacks, experts=experts) == stacks


def test_fusions_join_with_granularities() -> None:
    units = find_units(build_tiny_mixtral(), experts="stack_projection", fuse=[r"(gate_up|down)_proj\[0\]"])
    assert [len(unit.weights) for unit in units if unit.kind == "expert"] == [8, 8]


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="one of projection, expert, stack_projection, stack: got 'layer'"):
        find_units(build_tiny_mixtral(), experts="layer")
    with pytest.raises(ValueError, match="got 'layer'"):
        merge_units(find_units(build_tiny_mixtral()), experts="layer")
