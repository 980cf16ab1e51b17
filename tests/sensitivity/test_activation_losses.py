"""Losses of activations: gradients by finite differences, measured KL, scales by search, profiles joined and kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from runtime.activation_formats import STATIC_FACTORS, ActivationFormat, find_activation_formats, render_activations
from runtime.activation_names import activation_name
from runtime.activation_units import list_activation_candidates
from runtime.candidates import Candidates
from runtime.units import find_units
from sensitivity.activation_losses import (
    activation_fingerprint,
    join_activations,
    measure_activation_losses,
    measure_static_scales,
)
from sensitivity.evaluation import score_assignments
from sensitivity.profile import ActivationLosses, SensitivityProfile
from sensitivity.profile_files import load_profile, save_profile
from sensitivity.streaming.gradient_probes import SampledScore
from tests.tiny_models import build_tiny_llama

FORMATS = ("int4_token", "int8_token", "fp8_tensor", "int4_tensor_static", "int8_channel_static", "bf16")
TOKENS = torch.arange(6 * 9).mul(7).remainder(320).view(6, 9)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build_tiny_llama().requires_grad_(False)


@pytest.fixture(scope="module")
def candidates(llama: LlamaForCausalLM) -> Candidates:
    return list_activation_candidates(find_units(llama, fuse=(r"mlp\.(gate|up)_proj",)), FORMATS)


@pytest.fixture(scope="module")
def losses(
    llama: LlamaForCausalLM, candidates: Candidates, tmp_path_factory: pytest.TempPathFactory
) -> ActivationLosses:
    place = tmp_path_factory.mktemp("pieces")
    return measure_activation_losses(llama, candidates, TOKENS, seed=3, pieces=place, progress=lambda *_: None)


def test_a_loss_is_half_the_mean_square_of_score_differences(
    llama: LlamaForCausalLM, candidates: Candidates, losses: ActivationLosses
) -> None:
    """The sketch is the derivative of the score along the errors: here by central differences in float64."""
    u, f = 5, FORMATS.index("int4_token")
    [format_] = find_activation_formats(["int4_token"])
    model, score = build_tiny_llama().double().requires_grad_(False), SampledScore(3)
    step, sketch = 1e-4, []
    for s, sequence in enumerate(TOKENS):
        # Labels as the float32 model draws them.
        score(llama(sequence[None], use_cache=False).logits[0].float(), s)
        values = []
        for sign in (1.0, -1.0):
            handles = [
                model.get_submodule(module).register_forward_pre_hook(
                    lambda _, x, sign=sign: (
                        x[0] + sign * step * (render_activations(x[0].float(), format_).double() - x[0]),
                    )
                )
                for module in candidates.units[u].modules
            ]
            values.append(float(score(model(sequence[None], use_cache=False).logits[0], s)))
            for handle in handles:
                handle.remove()
        sketch.append((values[0] - values[1]) / (2 * step) / np.sqrt(TOKENS.shape[1]))
    expected = 0.5 * np.square(sketch)
    # A number near the middle of two codes may be rounded otherwise in the float64 model's input: one error of many.
    assert losses.table.loss[u, f] == pytest.approx(expected.mean(), rel=1e-2)
    assert losses.table.std_error[u, f] == pytest.approx(expected.std(ddof=1) / np.sqrt(len(TOKENS)), rel=2e-2)


def test_fewer_bits_lose_more_and_predictions_follow_the_measured_kl(
    llama: LlamaForCausalLM, candidates: Candidates, losses: ActivationLosses
) -> None:
    total = losses.table.loss.sum(axis=0)
    assert total[0] > 10 * total[1] > 0 and total[3] > total[4]
    assert total[-1] < total[1]
    scores = score_assignments(
        llama,
        {name: {activation_name(m): name for u in candidates.units for m in u.modules} for name in FORMATS},
        TOKENS,
        activation_scales=losses.scales,
    )
    measured = np.array([scores[name].kl.mean() for name in FORMATS])
    # Six formats over a factor of thousands: in the same order but for formats that are nearly equal.
    assert np.corrcoef(np.log(measured), np.log(total))[0, 1] > 0.95
    # What is not named is the reference itself.
    assert not score_assignments(llama, {"none": {}}, TOKENS)["none"].kl.any()


def test_static_scales_leave_the_least_error_of_the_list(llama: LlamaForCausalLM, candidates: Candidates) -> None:
    scales = measure_static_scales(llama, candidates, TOKENS)
    module = candidates.units[3].modules[0]
    seen: list[torch.Tensor] = []
    handle = llama.get_submodule(module).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for sequence in TOKENS:
            llama(sequence[None], use_cache=False)
    handle.remove()
    x = torch.cat(seen)
    for name in ("int4_tensor_static", "int8_channel_static"):
        [format_] = find_activation_formats([name])
        assert isinstance(format_, ActivationFormat)
        top = x.abs().amax(dim=0) if format_.scope == "channel" else x.abs().amax().view(1)

        def error(s: torch.Tensor, format_: ActivationFormat = format_) -> torch.Tensor:
            squares = (render_activations(x, format_, s) - x).double().square().sum(dim=0)
            return squares if format_.scope == "channel" else squares.sum().view(1)

        tried = torch.stack([error(factor * top / format_.reach) for factor in STATIC_FACTORS]).amin(dim=0)
        # Sums of squares in float32 over 54 tokens, in another order.
        torch.testing.assert_close(error(scales[module][name]), tried, rtol=1e-4, atol=1e-12)


def test_finished_sequences_are_taken_up(llama: LlamaForCausalLM, candidates: Candidates, tmp_path: Path) -> None:
    counts: list[tuple[int, int]] = []
    first = measure_activation_losses(
        llama, candidates, TOKENS, seed=0, pieces=tmp_path, progress=lambda *count: counts.append(count)
    )
    assert counts == [(done, 6) for done in range(7)]
    (tmp_path / "00003.safetensors").unlink()
    again = measure_activation_losses(llama, candidates, TOKENS, seed=0, pieces=tmp_path, progress=lambda *_: None)
    np.testing.assert_array_equal(first.table.loss, again.table.loss)
    assert activation_fingerprint("a", candidates) != activation_fingerprint("b", candidates)


def test_profiles_are_joined_and_kept(
    losses: ActivationLosses, candidates: Candidates, tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="needs the losses of activations: got a profile without them"):
        join_activations(tiny_profile)
    whole = replace(tiny_profile, activations=losses)
    save_profile(whole, tmp_path / "profile")
    read = load_profile(tmp_path / "profile")
    assert read.activations is not None
    assert read.activations.candidates.units == candidates.units
    np.testing.assert_array_equal(read.activations.table.loss, losses.table.loss)
    for module, own in losses.scales.items():
        for name, scale in own.items():
            np.testing.assert_array_equal(read.activations.scales[module][name], scale)
    joined = join_activations(read)
    units = len(tiny_profile.candidates.units)
    assert joined.candidates.units[units:] == candidates.units
    f = joined.candidates.format_index("int8_token")
    for metric, table in joined.losses.items():
        own = table.loss[units:, f]
        expected = losses.table.loss[:, 1] if table.unit_of_measure == "nats/token" else np.full(len(own), np.nan)
        np.testing.assert_array_equal(own, expected, err_msg=metric)
    assert not joined.candidates.allowed[:units, f].any()
    assert joined.candidates.reasons[0, f] == "a format of activations"
