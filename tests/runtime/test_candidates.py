"""Which pairs are allowed, and the reason for each that is not."""

import numpy as np
import pytest

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

NAMES = ("int2_g64", "int4_g64", "int4_g128", "int8_channel", "bf16")
UNITS = find_units(build_tiny_llama())


def allowed_formats(candidates: Candidates, unit_name: str) -> list[str]:
    u = next(u for u, unit in enumerate(candidates.units) if unit.name == unit_name)
    return [f.name for f, allowed in zip(candidates.formats, candidates.allowed[u], strict=True) if allowed]


def test_shapes_and_the_menu_of_embeddings() -> None:
    candidates = list_candidates(UNITS, NAMES)
    assert (candidates.units, [f.name for f in candidates.formats]) == (UNITS, list(NAMES))
    assert allowed_formats(candidates, "model.layers.0.mlp.down_proj") == list(NAMES)
    assert allowed_formats(candidates, "model.layers.0.mlp.up_proj") == ["int2_g64", "int4_g64", "int8_channel", "bf16"]
    for name in ("model.embed_tokens", "lm_head"):
        assert allowed_formats(candidates, name) == ["int4_g64", "int8_channel", "bf16"]


def test_every_refusal_has_its_reason() -> None:
    candidates = list_candidates(UNITS, NAMES)
    refused = {(int(u), int(f)) for u, f in zip(*np.nonzero(~candidates.allowed), strict=True)}
    assert set(candidates.reasons) == refused
    assert candidates.reasons[0, 0] == "embeddings and heads take 4 bits or more by default"
    # A reason that holds for good comes before one that a setting could lift.
    assert candidates.reasons[0, 2] == "group_size=128 does not divide in_features=64"
    assert candidates.reasons[1, 2] == "group_size=128 does not divide in_features=64"


def test_embedding_formats_replace_the_default() -> None:
    candidates = list_candidates(UNITS, NAMES, embedding_formats=["int2_g64", "bf16"])
    assert allowed_formats(candidates, "lm_head") == ["int2_g64", "bf16"]
    assert candidates.reasons[0, 1] == "not among embedding_formats"
    assert "int4_g64" in allowed_formats(candidates, "model.layers.0.mlp.up_proj")


def test_pins() -> None:
    candidates = list_candidates(
        UNITS, NAMES, pins={r"self_attn": "int4_g64", r"layers\.1\..*o_proj": "bf16", "lm_head": "int2_g64"}
    )
    assert allowed_formats(candidates, "model.layers.0.self_attn.o_proj") == ["int4_g64"]
    # The later pin wins, and a pin overrides the embeddings' default.
    assert allowed_formats(candidates, "model.layers.1.self_attn.o_proj") == ["bf16"]
    assert allowed_formats(candidates, "lm_head") == ["int2_g64"]
    assert candidates.reasons[1, 0] == "pinned to int4_g64"


def test_fused_unit_takes_what_fits_all_of_its_weights() -> None:
    units = find_units(build_tiny_mixtral(), fuse=[r"experts\.(gate_up|down)_proj"])
    candidates = list_candidates(units, NAMES)
    # The group of 128 divides the rows of down_proj, but not those of gate_up_proj.
    name = "model.layers.0.mlp.experts.gate_up_proj[0]+down_proj[0]"
    assert allowed_formats(candidates, name) == ["int2_g64", "int4_g64", "int8_channel", "bf16"]


def test_format_index() -> None:
    candidates = list_candidates(UNITS, NAMES)
    assert candidates.format_index("int4_g128") == 2
    with pytest.raises(ValueError, match="among the candidates: got 'fp16', candidates are int2_g64, int4_g64"):
        candidates.format_index("fp16")


def test_unit_without_a_format_is_refused_with_reasons() -> None:
    with pytest.raises(ValueError, match=r"'model.embed_tokens' has none \(group_size=128 .*in_features=64; embed"):
        list_candidates(UNITS, ["int4_g128", "int2_g32"])
    with pytest.raises(ValueError, match=r"'model.embed_tokens' has none \(not among embedding_formats\)"):
        list_candidates(UNITS, ["int4_g64"], embedding_formats=["bf16"])
    with pytest.raises(
        ValueError, match=r"'model.layers.1.mlp.up_proj' has none \(pinned to int4_g128; group_size=128"
    ):
        list_candidates(UNITS, ["int4_g64", "int4_g128"], pins={r"1\.mlp\.up_proj": "int4_g128"})


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"q_proj": "int3_g64"}, r"one of the formats: got 'q_proj=int3_g64', formats are \['bf16', "),
        ({"query": "bf16"}, "match at least one unit: got 'query', e.g. 'model.embed_tokens'"),
        ({"(q_proj": "bf16"}, r"a pin must be a regular expression: got '\(q_proj'"),
    ],
    ids=["format", "name", "pattern"],
)
def test_pins_that_cannot_be_are_refused(pins: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_candidates(UNITS, NAMES, pins=pins)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="known name: got 'int7'"):
        list_candidates(UNITS, ["int7"])
    with pytest.raises(ValueError, match="known name: got 'int7'"):
        list_candidates(UNITS, NAMES, embedding_formats=["int7"])
    with pytest.raises(ValueError, match="each once"):
        list_candidates(UNITS, ["bf16", "bf16"])
