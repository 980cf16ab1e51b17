"""The table of engines is consistent with the formats and units it speaks of, and refuses what it says."""

import re
from dataclasses import replace

import pytest

from runtime.candidates import list_candidates, refuse_by_engine
from runtime.engine_rules import Engine, check_legal
from runtime.engines import ENGINES, describe_engines, engines_of, find_engine
from runtime.formats import FORMATS, find_format
from runtime.units import EXPERT_GRANULARITIES, Unit, find_units
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

MENU = ("int3_g64", "int4_g32", "int4_g64", "int8_g64_sym", "bf16")


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_an_entry_names_what_there_is(engine: Engine) -> None:
    assert ENGINES[engine.name] is engine
    assert engine.experts in EXPERT_GRANULARITIES
    assert "{out}" in engine.command
    for rule in engine.rules:
        assert any(re.fullmatch(rule.formats, name) for name in FORMATS), rule
    assert {*engine.menu, *engine.instead} <= set(FORMATS)
    # Its own menu must be of use: each format runs somewhere in a linear layer of even sizes.
    unit = next(u for u in find_units(build_tiny_llama()) if u.role == "down_proj")
    assert [name for name in engine.menu if engine.refusal(unit, find_format(name)) is None]
    assert describe_engines()[list(ENGINES).index(engine.name)]["name"] == engine.name


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_unquantized_weights_are_always_legal(engine: Engine) -> None:
    model = build_tiny_qwen_moe()
    units = find_units(model, fuse=engine.fusions(w.name for u in find_units(model) for w in u.weights))
    check_legal(engine, units, {weight.name: "bf16" for unit in units for weight in unit.weights})


def fused_units(engine: Engine, *, mixture: bool = False) -> tuple[Unit, ...]:
    model = build_tiny_mixtral() if mixture else build_tiny_llama()
    names = [weight.name for unit in find_units(model) for weight in unit.weights]
    return find_units(model, fuse=engine.fusions(names), experts=engine.experts)


def test_vllm_fuses_attention_gates_and_experts() -> None:
    vllm = find_engine("vllm")
    roles = [unit.role for unit in fused_units(vllm)]
    assert roles[:5] == ["embed_tokens", "q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    experts = [unit for unit in fused_units(vllm, mixture=True) if unit.kind == "expert"]
    assert [len(unit.weights) for unit in experts] == [8, 8]


def test_refusals_are_reasons_of_candidates() -> None:
    vllm = find_engine("vllm")
    candidates = list_candidates(fused_units(vllm), MENU, engine=vllm)
    later = refuse_by_engine(list_candidates(fused_units(vllm), MENU), vllm)
    assert later.reasons == candidates.reasons
    assert later.allowed.tolist() == candidates.allowed.tolist()
    qkv = next(u for u, unit in enumerate(candidates.units) if unit.role.startswith("q_proj"))
    assert candidates.allowed[qkv].tolist() == [False, True, True, True, True]
    assert candidates.reasons[qkv, 0] == "vllm cannot run int3_g64"
    assert candidates.allowed[0].tolist() == [False] * 4 + [True]
    assert candidates.reasons[0, 1] == "vllm never quantizes a weight of kind 'embedding' to int4_g32"


def test_rows_that_do_not_divide_are_refused() -> None:
    unit = next(u for u in find_units(build_tiny_llama()) if u.role == "q_proj")
    weight = unit.weights[0]
    odd = replace(unit, weights=(replace(weight, shape=(48, 64)),))
    reason = find_engine("vllm").refusal(odd, find_format("int4_g64"))
    assert reason == "vllm runs int4_g64 where 32 divides out_features: got out_features=48"


def test_silent_fallbacks_are_refused_before_the_solve() -> None:
    # 576 columns, as in SmolLM2: llama.cpp stores Q5_0 where Q4_K was asked for, and says so in its log alone.
    unit = next(u for u in find_units(build_tiny_llama()) if u.role == "q_proj")
    odd = replace(unit, weights=(replace(unit.weights[0], shape=(576, 576)),))
    candidates = list_candidates([odd], ("q4_k", "q6_k", "q5_0"), engine=find_engine("llama.cpp"))
    assert candidates.allowed.tolist() == [[False, False, True]]
    assert candidates.reasons[0, 0] == (
        "llama.cpp runs q4_k where 256 divides in_features: got in_features=576, where it would store q5_0 "
        "without a word"
    )
    assert candidates.reasons[0, 1].endswith("where it would store q8_0 without a word")


def test_experts_of_a_projection_are_one_unit_in_llama_cpp() -> None:
    experts = [unit for unit in fused_units(find_engine("llama.cpp"), mixture=True) if unit.kind == "expert"]
    assert [unit.role for unit in experts] == ["gate_up_proj", "down_proj"] * 2
    assert all(len(unit.weights) == 4 for unit in experts)
    with pytest.raises(ValueError, match="llama.cpp cannot load, first 'model.layers.0.*' must have one format"):
        formats = {weight.name: "q4_0" for unit in experts for weight in unit.weights}
        check_legal(find_engine("llama.cpp"), experts, {**formats, next(iter(formats)): "q8_0"})


def test_a_unit_without_format_is_refused() -> None:
    vllm = find_engine("vllm")
    with pytest.raises(ValueError, match=r"a format that vllm runs: unit '.*embed_tokens' has none .*kind 'embedding'"):
        list_candidates(fused_units(vllm), ("int4_g64", "int8_g64_sym"), engine=vllm)


def test_an_illegal_plan_is_refused() -> None:
    vllm = find_engine("vllm")
    units = fused_units(vllm)
    formats = {weight.name: "bf16" for unit in units for weight in unit.weights}
    formats["model.layers.0.self_attn.q_proj.weight"] = "int4_g64"
    with pytest.raises(ValueError, match=r"got 1 units that vllm cannot load, first '.*q_proj.*' must have one format"):
        check_legal(vllm, units, formats)
    formats["model.layers.0.self_attn.q_proj.weight"] = "bf16"
    formats["model.layers.1.mlp.down_proj.weight"] = "int3_g64"
    with pytest.raises(ValueError, match="vllm cannot run int3_g64. Plan with --engine vllm"):
        check_legal(vllm, units, formats)


def test_types_that_need_an_importance_matrix_are_none_of_llama_cpps() -> None:
    # llama-quantize stops at them without one; a plan can be quantized there with and without.
    needing = re.compile(r"iq1_[sm]|iq2_(xxs|xs|s)|iq3_xxs")
    llama_cpp = find_engine("llama.cpp")
    assert not [name for name in FORMATS if needing.fullmatch(name) and "llama.cpp" in engines_of(find_format(name))]
    assert not [name for name in (*llama_cpp.menu, *llama_cpp.instead.values()) if needing.fullmatch(name)]


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_that_change_the_whole_checkpoint_are_refused(bits: int) -> None:
    # GPTQModel writes every layer in another packing as soon as one has such a width, and no one else reads that.
    unit = next(u for u in find_units(build_tiny_llama()) if u.role == "q_proj")
    assert find_engine("gptqmodel").refusal(unit, find_format(f"int{bits}_g64_sym")) is not None
    assert find_engine("auto-round").refusal(unit, find_format(f"int{bits}_g64_sym")) is not None


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'onnx'\. Known engines: llama.cpp, transformers, vllm"):
        find_engine("onnx")


@pytest.mark.parametrize(
    ("name", "runs", "never"),
    [
        ("q4_k", {"bitplan", "llama.cpp"}, set(ENGINES) - {"llama.cpp"}),
        ("int4_g64", {"bitplan", "vllm", "mlx-lm", "torchao"}, {"llama.cpp", "transformers"}),
        ("int3_g64_sym", {"bitplan", "transformers", "mlx-lm"}, {"llama.cpp", "vllm"}),
        ("int4_g64_pow2", {"bitplan"}, set(ENGINES)),
        ("int1_g64_sym", {"bitplan"}, set(ENGINES)),
        ("bf16", {"bitplan", *ENGINES}, set()),
    ],
)
def test_who_runs_a_format(name: str, runs: set[str], never: set[str]) -> None:
    assert runs <= set(engines_of(find_format(name)))
    assert not never & set(engines_of(find_format(name)))
