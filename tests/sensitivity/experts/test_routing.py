"""Routing statistics against every family's own rule in float64, and what is derived from made-up counts."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.apply import simulated_formats
from runtime.expert_modules import find_expert_modules
from runtime.units import list_weights
from sensitivity.experts.routing import RoutingStatistics, load_routing, save_routing
from sensitivity.experts.routing_measurement import measure_router_shift, measure_routing
from tests.mixtures import MIXTURES, route_by_rule
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(2, VOCABULARY_SIZE, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MIXTURES)
def test_statistics_are_those_of_the_familys_rule(name: str) -> None:
    mixture = MIXTURES[name]
    model = mixture.build().requires_grad_(False)
    statistics = measure_routing(model, TOKENS)
    routes = route_by_rule(model, TOKENS, mixture)
    assert statistics.layers == tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate"))
    assert statistics.tokens.tolist() == [60]
    for row, (chosen, weight) in enumerate(routes):
        k, experts = chosen.shape[1], statistics.frequency.shape[1]
        for e in range(experts):
            taken = chosen == e
            assert statistics.expert_visits[row, e] == int(taken.sum())
            # Sums of at most 60 float32 scores.
            assert statistics.gate_weight_sum[row, e] == pytest.approx(float(weight[taken].sum()), rel=1e-5)
        pairs = np.zeros((experts, experts), dtype=int)
        for token in chosen.tolist():
            for a, b in itertools.product(token, token):
                pairs[a, b] += 1
        np.testing.assert_array_equal(statistics.together[row], pairs)
        assert statistics.frequency[row].sum() == pytest.approx(k, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, mixture in MIXTURES.items() if mixture.reports_logits])
def test_statistics_are_those_of_the_reported_router_logits(name: str) -> None:
    model = MIXTURES[name].build().requires_grad_(False)
    statistics = measure_routing(model, TOKENS)
    reported = [model(sequence[None], output_router_logits=True).router_logits for sequence in TOKENS]
    for row, layer in enumerate(zip(*reported, strict=True)):
        chosen = torch.cat(layer).topk(model.config.num_experts_per_tok, dim=-1).indices
        counts = torch.bincount(chosen.flatten(), minlength=statistics.visits.shape[-1])
        np.testing.assert_array_equal(statistics.expert_visits[row], counts.numpy())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_no_implementation_of_the_experts_hides_the_routing(implementation: str) -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    expected = measure_routing(model, TOKENS)
    model.config._experts_implementation = implementation
    np.testing.assert_array_equal(measure_routing(model, TOKENS).visits, expected.visits)


def test_hooks_are_gone_after_a_failed_run() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    with pytest.raises(IndexError):
        measure_routing(model, torch.full((1, 4), VOCABULARY_SIZE))
    assert not any(module._forward_pre_hooks for module in find_expert_modules(model).values())


def test_domains_are_counted_apart() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    mixed = measure_routing(model, TOKENS, domains=["code", "prose", "code"])
    code, prose = measure_routing(model, TOKENS[[0, 2]]), measure_routing(model, TOKENS[[1]])
    assert mixed.domains == ("code", "prose")
    for d, alone in enumerate((code, prose)):
        np.testing.assert_array_equal(mixed.visits[d], alone.visits[0])
        np.testing.assert_array_equal(mixed.domain_frequency[d], alone.frequency)
        np.testing.assert_allclose(mixed.gate_weight[d], alone.gate_weight[0], rtol=1e-12)
    np.testing.assert_array_equal(mixed.together, code.together + prose.together)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one domain a sequence: got 1 for 3"):
        measure_routing(build_tiny_mixtral(), TOKENS, domains=["code"])
    with pytest.raises(ValueError, match="must be a mixture of experts.* LlamaForCausalLM"):
        measure_routing(build_tiny_llama(), TOKENS)
    uneven = build_tiny_mixtral()
    uneven.model.layers[1].mlp.experts.num_experts = 5
    with pytest.raises(ValueError, match=r"same number of experts: got \[4, 5\]"):
        measure_routing(uneven, TOKENS)


def make_statistics() -> RoutingStatistics:
    """Returns counts of one layer of six experts in two groups that never meet, over two domains of 10 tokens."""
    together = np.zeros((1, 6, 6), dtype=np.int64)
    together[0, :3, :3], together[0, 3:, 3:] = 4, 2
    np.fill_diagonal(together[0], [8, 8, 8, 4, 4, 0])
    together[0, 5], together[0, :, 5] = 0, 0
    visits = np.array([[[8, 8, 0, 4, 0, 0]], [[0, 0, 8, 0, 4, 0]]])
    return RoutingStatistics(
        layers=(3,),
        domains=("a", "b"),
        tokens=np.array([10, 10]),
        visits=visits,
        gate_weight=visits * 0.25,
        together=together,
    )


def test_what_is_derived_from_counts() -> None:
    statistics = make_statistics()
    np.testing.assert_allclose(statistics.frequency, [[0.4, 0.4, 0.4, 0.2, 0.2, 0.0]])
    np.testing.assert_allclose(statistics.gate_weight_mean, [[0.25, 0.25, 0.25, 0.25, 0.25, 0.0]])
    # Around the mean 4/15: three at 2/15, two at -1/15, one at -4/15.
    assert statistics.usage_spread[0] == pytest.approx((30 / 15**2 / 5) ** 0.5, rel=1e-12)
    assert statistics.frequency_by_expert()[3, 4] == 0.2
    assert statistics.rare_experts(8) == {(3, 3): 4, (3, 4): 4, (3, 5): 0}
    assert statistics.row_of(3) == 0
    with pytest.raises(ValueError, match=r"got layer_index=0, layers with experts are \[3\]"):
        statistics.row_of(0)


def test_experts_taken_together_are_communities() -> None:
    statistics = make_statistics()
    graph = statistics.affinity_graph(3)
    assert {(a, b): graph[a][b]["weight"] for a, b in graph.edges} == {(0, 1): 4, (0, 2): 4, (1, 2): 4, (3, 4): 2}
    assert [graph.nodes[e]["tokens"] for e in range(6)] == [8, 8, 8, 4, 4, 0]
    assert statistics.communities(3, seed=0) == ((0, 1, 2), (3, 4), (5,))
    assert statistics.communities(3, seed=0) == statistics.communities(3, seed=0)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="Measure the routing again"):
        RoutingStatistics(
            layers=(0,),
            domains=("a",),
            tokens=np.zeros(2, dtype=np.int64),
            visits=np.zeros((1, 1, 4), dtype=np.int64),
            gate_weight=np.zeros((1, 1, 4)),
            together=np.zeros((1, 4, 4), dtype=np.int64),
        )


def test_statistics_come_back_from_disk(tmp_path: Path) -> None:
    statistics = make_statistics()
    save_routing(statistics, tmp_path / "routing")
    save_routing(statistics, tmp_path / "routing")
    again = load_routing(tmp_path / "routing")
    assert (again.layers, again.domains) == (statistics.layers, statistics.domains)
    for name in ("tokens", "visits", "gate_weight", "together"):
        np.testing.assert_array_equal(getattr(again, name), getattr(statistics, name))


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a directory that save_routing wrote: got .*nowhere"):
        load_routing(tmp_path / "nowhere")
    save_routing(make_statistics(), tmp_path / "routing")
    document = tmp_path / "routing" / "routing.json"
    text = document.read_text(encoding="utf-8")
    document.write_text(json.dumps({**json.loads(text), "schema_version": 9}), encoding="utf-8")
    with pytest.raises(ValueError, match="schema_version=1: got 9"):
        load_routing(tmp_path / "routing")
    document.write_text(json.dumps({**json.loads(text), "layers": [0, 1]}), encoding="utf-8")
    with pytest.raises(ValueError, match="a directory that save_routing wrote"):
        load_routing(tmp_path / "routing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("done", encoding="utf-8")
    with pytest.raises(ValueError, match="hold routing statistics already"):
        save_routing(make_statistics(), tmp_path / "full")


def test_lossless_formats_do_not_shift_the_router() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    shift = measure_router_shift(model, dict.fromkeys(list_weights(model), "bf16"), TOKENS)
    assert (shift.layers, shift.tokens) == ((0, 1), 60)
    assert shift.changed.tolist() == [0.0, 0.0]
    assert shift.overlap.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_router_shift_is_that_of_the_chosen_sets(name: str) -> None:
    mixture = MIXTURES[name]
    model = mixture.build().requires_grad_(False)
    formats = {weight: "int2_g32" for weight in list_weights(model)}
    shift = measure_router_shift(model, formats, TOKENS)
    before = route_by_rule(model, TOKENS, mixture)
    with simulated_formats(model, formats):
        after = route_by_rule(model, TOKENS, mixture)
    for row, ((ours, _), (theirs, _)) in enumerate(zip(before, after, strict=True)):
        sets = [(set(a), set(b)) for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        assert shift.changed[row] == pytest.approx(np.mean([a != b for a, b in sets]), rel=1e-12)
        assert shift.overlap[row] == pytest.approx(np.mean([len(a & b) / len(a) for a, b in sets]), rel=1e-12)
        assert 0.0 < shift.overlap[row] < 1.0
