import math

import pytest
import torch

from tests.data.expert_usage import (
    equal_routing,
    measure_loss,
    measure_usage,
    mutual_information_bits,
    random_routers,
    shuffled_routing,
)
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_mixtral, build_tiny_qwen_moe

TOKENS = torch.randint(2, VOCABULARY_SIZE, (3, 24), generator=torch.Generator().manual_seed(0))


def test_equal_use_tells_nothing_of_the_domain() -> None:
    usage = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(3, 2, 4)
    assert mutual_information_bits(usage).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_experts_of_their_own_tell_the_domain() -> None:
    one_each = torch.eye(3)[:, None, :]
    assert mutual_information_bits(one_each).item() == pytest.approx(math.log2(3))


def test_two_domains_on_three_experts() -> None:
    # p(e) = 1/4, 1/2, 1/4: each domain has half its tokens at ratio 2 and half at ratio 1.
    usage = torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]]])
    assert mutual_information_bits(usage).item() == pytest.approx(0.5)


@pytest.mark.parametrize("build", [build_tiny_mixtral, build_tiny_qwen_moe])
def test_usage_is_the_share_of_tokens_sent_to_each_expert(build: type) -> None:
    model = build()
    chosen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
        for layer in model.model.layers
    ]
    usage = measure_usage(model, {"a": TOKENS, "b": TOKENS[:1]}, batch=2)
    for hook in hooks:
        hook.remove()
    assert usage.shape == (2, 2, 4)
    # Calls: two batches of domain a, one of b, two layers each.
    for layer in range(2):
        expected = torch.cat([chosen[layer], chosen[2 + layer]]).flatten().bincount(minlength=4)
        assert usage[0, layer].tolist() == pytest.approx((expected / expected.sum()).tolist())
        expected = chosen[4 + layer].flatten().bincount(minlength=4)
        assert usage[1, layer].tolist() == pytest.approx((expected / expected.sum()).tolist())


@pytest.mark.parametrize("name", ["random_routers", "shuffled_routing", "equal_routing"])
def test_other_routing_lasts_for_the_block_only(name: str) -> None:
    model = build_tiny_mixtral()
    before = measure_loss(model, TOKENS)
    routing = {
        "random_routers": random_routers(model, seed=1),
        "shuffled_routing": shuffled_routing(model, seed=1),
        "equal_routing": equal_routing(model),
    }[name]
    with routing:
        assert not torch.equal(measure_loss(model, TOKENS), before)
    assert torch.equal(measure_loss(model, TOKENS), before)


def test_shuffled_routing_keeps_the_load_of_each_expert() -> None:
    model = build_tiny_mixtral()
    usage = measure_usage(model, {"a": TOKENS})
    with shuffled_routing(model, seed=1):
        shuffled = measure_usage(model, {"a": TOKENS})
    assert torch.equal(usage[:, 0], shuffled[:, 0])


def test_loss_is_that_of_transformers() -> None:
    model = build_tiny_mixtral()
    expected = model(TOKENS, labels=TOKENS).loss.item()
    assert measure_loss(model, TOKENS, batch=2).mean().item() == pytest.approx(expected, rel=1e-5)
