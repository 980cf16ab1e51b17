"""Every input of the named modules is shown once, and no hook stays."""

import pytest
import torch

from runtime.transforms.observation import observe_inputs, observe_powers, observe_second_moments
from tests.runtime.transforms.decoders import TOKENS
from tests.tiny_models import build_tiny_llama


def test_second_moments_are_sums_over_all_tokens() -> None:
    model = build_tiny_llama()
    linear = model.model.layers[1].mlp.down_proj
    moments, counts = observe_second_moments(model, TOKENS, {"down": linear})
    inputs = []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].double().view(-1, 128)))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    expected = torch.cat(inputs).T @ torch.cat(inputs)
    # Two sequences at once sum in another order, in float32.
    assert torch.allclose(moments["down"], expected, rtol=1e-4, atol=1e-4 * float(expected.diagonal().max()))
    assert counts == {"down": TOKENS.numel()}


def test_powers_are_the_diagonals_of_mean_second_moments() -> None:
    model = build_tiny_llama()
    modules = {"down": model.model.layers[1].mlp.down_proj, "q": model.model.layers[0].self_attn.q_proj}
    moments, counts = observe_second_moments(model, TOKENS, modules)
    powers = observe_powers(model, TOKENS, modules)
    assert powers.keys() == modules.keys()
    for name, power in powers.items():
        # Both are sums of the same squares in float64.
        assert torch.allclose(power, moments[name].diagonal() / counts[name], rtol=1e-12)


def test_no_hook_stays_behind_a_failure() -> None:
    model = build_tiny_llama()
    linear = model.model.layers[0].mlp.down_proj

    def fail(name: str, inputs: torch.Tensor) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="down"):
        observe_inputs(model, TOKENS, {"down": linear}, fail)
    assert not linear._forward_pre_hooks


@pytest.mark.parametrize("tokens", [None, TOKENS[:0]], ids=["none", "empty"])
def test_no_text_is_refused(tokens: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="a transform that reads activations must have calibration text: got none"):
        observe_inputs(build_tiny_llama(), tokens, {}, lambda name, inputs: None)
