"""Experts that are skipped: the rule token by token, the same on every path, nothing read of what is skipped."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.apply import apply_formats_
from runtime.expert_modules import find_expert_modules
from runtime.expert_skipping import (
    ExpertSkipping,
    install_skipping_,
    keep_weights,
    load_skipping,
    save_skipping,
    skip_everywhere,
    skipped_experts,
)
from runtime.kernels.dispatch import kernel_path
from runtime.packed import PackedExperts
from runtime.units import list_weights
from tests.mixtures import build_tiny_deepseek_v2, build_tiny_olmoe, build_tiny_qwen3_moe
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

BUILDERS = {
    "mixtral": build_tiny_mixtral,
    "qwen3": build_tiny_qwen3_moe,
    "olmoe": build_tiny_olmoe,
    "deepseek_v2": build_tiny_deepseek_v2,
}
TOKENS = torch.randint(2, 320, (2, 11), generator=torch.Generator().manual_seed(0))


def skip_by_hand(
    hidden: Tensor, chosen: Tensor, weights: Tensor, ratio: float, magnitude: float | None, absent: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Returns experts and weights of each token, one at a time in Python's floats."""
    experts, grown = [], []
    for x, numbers, w in zip(hidden.tolist(), chosen.tolist(), weights.tolist(), strict=True):
        protected = magnitude is not None and math.fsum(map(abs, x)) >= magnitude
        kept = [protected or value >= ratio * max(w) for value in w]
        left = math.fsum(value for value, keep in zip(w, kept, strict=True) if keep)
        experts.append([number if keep else absent for number, keep in zip(numbers, kept, strict=True)])
        grown.append([value * math.fsum(w) / left if keep else 0.0 for value, keep in zip(w, kept, strict=True)])
    return experts, grown


@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(0, 7),
    k=st.integers(1, 4),
    ratio=st.floats(0, 1),
    magnitude=st.none() | st.floats(0, 8),
)
def test_rule_token_by_token(seed: int, tokens: int, k: int, ratio: float, magnitude: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(tokens, k, generator=generator, dtype=torch.float64) + 1e-3
    chosen = torch.randint(0, 6, (tokens, k), generator=generator)
    found = keep_weights(hidden, chosen, weights, ratio=ratio, magnitude=magnitude, absent=6)
    expected = skip_by_hand(hidden, chosen, weights, ratio, magnitude, 6)
    assert found[0].tolist() == expected[0]
    assert torch.allclose(found[1], torch.tensor(expected[1], dtype=torch.float64).view(tokens, k), rtol=1e-12)
    # Their sum is what the router gave, and the largest is never skipped.
    assert torch.allclose(found[1].sum(-1), weights.sum(-1), rtol=1e-12)
    assert ((found[0] != 6).sum(-1) >= 1).all()


def test_weights_of_zero_are_not_divided_by() -> None:
    chosen, weights = keep_weights(
        torch.ones(1, 2), torch.tensor([[3, 1]]), torch.zeros(1, 2), ratio=0.5, magnitude=None, absent=4
    )
    assert torch.equal(weights, torch.zeros(1, 2))
    assert chosen.tolist() == [[3, 1]]


@pytest.mark.parametrize("name", BUILDERS)
def test_model_computes_the_kept_experts_alone(name: str) -> None:
    """The output of every mixture layer against a sum over experts written out, with dense weights."""
    model = BUILDERS[name]().requires_grad_(False)
    skipping = skip_everywhere(model, 0.7)
    modules = find_expert_modules(model)
    seen: dict[str, tuple[Tensor, ...]] = {}
    outputs: dict[str, Tensor] = {}
    routed = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, n=n: seen.__setitem__(n, (*args, *kwargs.values())), with_kwargs=True
        )
        for n, module in modules.items()
    ]
    with skipped_experts(model, skipping) as count:
        hooks = [
            module.register_forward_hook(lambda _, __, out, n=n: outputs.__setitem__(n, out))
            for n, module in modules.items()
        ]
        model(TOKENS, use_cache=False)
    for hook in (*routed, *hooks):
        hook.remove()
    made = 0
    for n, module in modules.items():
        hidden, chosen, weights = seen[n]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        kept, grown = skip_by_hand(hidden, chosen, weights, 0.7, None, -1)
        expected = torch.zeros_like(hidden)
        for t, (experts, factors) in enumerate(zip(kept, grown, strict=True)):
            for expert, factor in zip(experts, factors, strict=True):
                if expert >= 0:
                    gate, up = (module.gate_up_proj[expert] @ hidden[t]).chunk(2)
                    expected[t] += factor * (module.down_proj[expert] @ (module.act_fn(gate) * up))
                    made += 1
        assert torch.allclose(outputs[n].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    assert count.made == made
    assert count.routed == sum(seen[n][1].numel() for n in modules)
    assert 0 < count.skipped_share < 1


@pytest.mark.parametrize("name", BUILDERS)
def test_packed_experts_skip_as_dense_ones_do(name: str) -> None:
    model = BUILDERS[name]().requires_grad_(False)
    experts = [weight for weight in list_weights(model) if ".experts." in weight]
    apply_formats_(model, dict.fromkeys(experts, "int8_g32"))
    count = install_skipping_(model, skip_everywhere(model, 0.7))
    found = model(TOKENS, use_cache=False).logits
    with kernel_path("reference"):
        expected = model(TOKENS, use_cache=False).logits
    assert (found - expected).norm() <= 2e-3 * expected.norm()
    assert 0 < count.skipped_share < 1


def test_nothing_is_read_of_experts_that_no_token_keeps() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    experts = [weight for weight in list_weights(model) if ".experts." in weight]
    apply_formats_(model, dict.fromkeys(experts, "int8_g32"))
    token = TOKENS[:1, :1]
    taken: list[int] = []
    module: Any = next(iter(find_expert_modules(model).values()))
    watch = module.register_forward_pre_hook(lambda _, args: taken.extend(args[1][0].tolist()))
    with skipped_experts(model, skip_everywhere(model, 1.0)):
        before = model(token, use_cache=False).logits
        second = taken[1]
        assert isinstance(module.gate_up_proj, PackedExperts)
        module.gate_up_proj.expert(second).scale.fill_(float("nan"))
        assert torch.equal(model(token, use_cache=False).logits, before)
    assert model(token, use_cache=False).logits.isnan().any()
    watch.remove()


def test_protected_tokens_and_ratio_zero_change_nothing() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    layers = tuple(range(2))
    with skipped_experts(model, skip_everywhere(model, 0.0)) as count:
        full = model(TOKENS, use_cache=False).logits
    assert count.skipped_share == 0.0
    protecting = ExpertSkipping(layers=layers, ratio=(1.0, 1.0), magnitude=(0.0, 0.0))
    with skipped_experts(model, protecting):
        assert torch.equal(model(TOKENS, use_cache=False).logits, full)
    # Afterwards the model runs as before, by the implementation that it had.
    implementation = model.config._experts_implementation
    with skipped_experts(model, skip_everywhere(model, 1.0)):
        assert not torch.allclose(model(TOKENS, use_cache=False).logits, full, atol=1e-3)
    assert model.config._experts_implementation == implementation
    assert torch.allclose(model(TOKENS, use_cache=False).logits, full, atol=1e-4)


def test_numbers_are_saved_and_read(tmp_path: Path) -> None:
    skipping = ExpertSkipping(layers=(1, 3), ratio=(0.25, 1 / 3), magnitude=(None, 17.5), weights_fingerprint="ab")
    save_skipping(skipping, tmp_path / "skipping.json")
    assert load_skipping(tmp_path / "skipping.json") == skipping
    assert json.loads((tmp_path / "skipping.json").read_text())["ratio"] == [0.25, 1 / 3]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema_version": 2}',
        '{"schema_version": 1, "layers": [0], "ratio": [2], "magnitude": [null]}',
    ],
)
def test_files_that_hold_something_else_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "skipping.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"must be in a file that 'bitplan skip-experts' wrote: got '.*skipping.json'"):
        load_skipping(path)
    with pytest.raises(ValueError, match=r"got '.*absent.json'"):
        load_skipping(tmp_path / "absent.json")


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must have a ratio and a magnitude: got 1 layers, 2 ratios, 1 magnitudes"):
        ExpertSkipping(layers=(0,), ratio=(0.5, 0.5), magnitude=(None,))
    with pytest.raises(ValueError, match=r"a ratio of expert weights must be from 0 to 1: got ratio=1.5"):
        ExpertSkipping(layers=(0,), ratio=(1.5,), magnitude=(None,))
    with pytest.raises(ValueError, match="a magnitude must be a number from 0: got magnitude=inf"):
        ExpertSkipping(layers=(0,), ratio=(0.5,), magnitude=(math.inf,))
    with pytest.raises(ValueError, match=r"got numbers for layers \[0\], the model has experts in \[0, 1\]"):
        install_skipping_(build_tiny_mixtral(), ExpertSkipping(layers=(0,), ratio=(0.5,), magnitude=(None,)))
    with pytest.raises(ValueError, match="a model must be a mixture of experts"):
        skip_everywhere(build_tiny_llama(), 0.5)
