"""The statistics that quantizers get: those of the inputs that hooks see, and the same whenever they are asked for."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from runtime.drawn_tokens import draw_tokens
from runtime.quantizers import STATISTICAL, TEXTLESS, InputStatistics
from runtime.rendering import Rendering
from runtime.units import list_weights
from sensitivity.weight_inputs import find_rendering
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


def find_statistics(
    model: PreTrainedModel, tokens: torch.Tensor | None = TOKENS, directory: Path | None = None
) -> dict[str, InputStatistics]:
    rule = find_rendering(model, "gptq", tokens, directory=directory)
    assert isinstance(rule, Rendering) and rule.quantizer == "gptq"
    return dict(rule.statistics)


def test_statistics_are_those_of_the_inputs(model: PreTrainedModel) -> None:
    statistics, inputs = find_statistics(model), capture_inputs(model, TOKENS)
    assert set(statistics) == set(list_weights(model, routers=True))
    for name, weight in list_weights(model).items():
        found = statistics[name]
        if name not in inputs or not len(inputs[name]):
            assert weight.kind in ("embedding", "expert")
            assert torch.equal(found.hessian(), torch.eye(weight.shape[1]))
            continue
        expected = inputs[name].T @ inputs[name]
        if weight.kind == "embedding":
            expected += torch.eye(weight.shape[1]) * TOKENS.numel() / VOCABULARY_SIZE
        assert found.count == len(inputs[name])
        # A token takes an expert or does not; every other weight reads them all.
        assert found.count == TOKENS.numel() or weight.kind == "expert"
        assert found.damping == InputStatistics.damping
        # Float32 sums over tokens of products of float32 results of some hundred terms.
        bound = 1e-5 * float(expected.diagonal().max())
        torch.testing.assert_close(found.second_moment.double(), expected, rtol=0, atol=bound)


def test_readers_of_one_input_share_it() -> None:
    statistics = find_statistics(build_tiny_llama())
    q, k, v, o = (statistics[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkvo")
    assert q is k is v
    assert o is not q
    assert len({id(s.second_moment) for s in statistics.values()}) == 1 + 4 * 2 + 1


def test_expert_that_no_token_visits_knows_nothing() -> None:
    statistics = find_statistics(build_tiny_mixtral(), TOKENS[:1, :1])
    experts = {name: s for name, s in statistics.items() if "experts" in name}
    visited = {name for name, s in experts.items() if not torch.equal(s.second_moment, torch.eye(s.in_features))}
    # One token and two of four experts: half of them, gate_up and down, in two layers.
    assert len(visited) == len(experts) / 2 == 2 * 2 * 2
    assert {experts[name].count for name in visited} == {1}


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_mixtral], ids=["llama", "mixtral"])
def test_statistics_collected_again_are_the_stored_ones(build: type[PreTrainedModel], tmp_path: Path) -> None:
    path = tmp_path / "renderings" / "of_a_profile" / "inputs.safetensors"
    first = find_statistics(build(), directory=path.parent)
    written = path.read_bytes()
    stored = find_statistics(build(), None, path.parent)
    path.unlink()
    again = find_statistics(build(), directory=path.parent)
    assert path.read_bytes() == written
    assert first.keys() == stored.keys() == again.keys()
    for name, statistics in first.items():
        for other in (stored[name], again[name]):
            assert torch.equal(other.second_moment, statistics.second_moment)
            assert (other.count, other.damping) == (statistics.count, statistics.damping)
    # What is damaged is collected again.
    path.write_bytes(written[:100])
    assert find_statistics(build(), directory=path.parent).keys() == first.keys()
    assert path.read_bytes() == written


def test_other_tokens_give_other_statistics() -> None:
    name = "lm_head.weight"
    first, other = (find_statistics(build_tiny_llama(), tokens)[name] for tokens in (TOKENS[:2], TOKENS[1:]))
    assert not torch.equal(first.second_moment, other.second_moment)


def test_quantizer_that_needs_none_gets_none(tmp_path: Path) -> None:
    for quantizer in ("rtn", "clipping", "hqq"):
        assert quantizer not in STATISTICAL
        rule = find_rendering(build_tiny_llama(), quantizer, None, directory=tmp_path / "none")
        assert isinstance(rule, Rendering) and (rule.quantizer, rule.statistics) == (quantizer, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_textless_quantizers_read_drawn_tokens(tokens: torch.Tensor | None) -> None:
    model = build_tiny_llama(tied=True)
    assert TEXTLESS <= STATISTICAL
    for quantizer in TEXTLESS:
        rule = find_rendering(model, quantizer, tokens, directory=None)
        assert isinstance(rule, Rendering)
        expected = find_statistics(model, draw_tokens(model))
        assert rule.statistics.keys() == expected.keys()
        for name, statistics in rule.statistics.items():
            assert torch.equal(statistics.second_moment, expected[name].second_moment)
            assert statistics.count == expected[name].count


def test_neither_text_nor_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"what was known of the inputs .* got neither the profile nor '.*gone'"):
        find_rendering(build_tiny_llama(), "auto", None, directory=tmp_path / "gone")
