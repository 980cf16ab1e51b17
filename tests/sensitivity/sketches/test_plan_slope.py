"""The slope at a plan against the gradient of a float64 model that holds the plan's rendered weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.rendering import render
from runtime.units import find_units, read_weight
from sensitivity.sketches.plan_slope import measure_plan_slope
from tests.sensitivity.float64_models import make_float64
from tests.tiny_models import build_tiny_llama

FORMATS = ("int3_g32", "int4_g64", "int8_channel", "bf16")
DENSE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "tied_llama": partial(build_tiny_llama, tied=True),
}


def _draw_choice(candidates: Candidates, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(np.flatnonzero(row)) for row in candidates.allowed], dtype=np.int64)


def _exact_slope(
    model: PreTrainedModel, candidates: Candidates, choice: np.ndarray, tokens: torch.Tensor
) -> np.ndarray:
    exact, plan = make_float64(model), make_float64(model)
    for u, unit in enumerate(candidates.units):
        for weight in unit.weights:
            rendered = render(read_weight(model, weight), candidates.formats[choice[u]])
            plan.get_parameter(weight.parameter).data = rendered.double()
    plan.requires_grad_(True)
    slope = np.zeros((len(tokens), *candidates.allowed.shape))
    for s in range(len(tokens)):
        log_p = torch.log_softmax(exact(tokens[s : s + 1]).logits[0], dim=-1)
        log_q = torch.log_softmax(plan(tokens[s : s + 1]).logits[0], dim=-1)
        plan.zero_grad()
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
        for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
            for weight in candidates.units[u].weights:
                parameter = plan.get_parameter(weight.parameter)
                change = render(read_weight(model, weight), candidates.formats[f]).double() - parameter.data
                assert parameter.grad is not None
                slope[s, u, f] += float((change * parameter.grad).sum())
    return slope


@pytest.mark.parametrize("name", DENSE)
def test_the_slope_is_that_of_a_float64_model(name: str, tmp_path: Path) -> None:
    model = DENSE[name]().requires_grad_(False)
    candidates = list_candidates(find_units(model), FORMATS, embedding_formats=FORMATS)
    choice = _draw_choice(candidates, 4)
    tokens = torch.randint(0, 320, (3, 17), generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slope = measure_plan_slope(model, candidates, choice, tokens, directory=tmp_path, progress=lambda *_: None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    exact = _exact_slope(model, candidates, choice, tokens)
    # Float32 inner products of some thousand terms that partly cancel.
    np.testing.assert_allclose(slope, exact, rtol=2e-3, atol=2e-5 * np.abs(exact).max())
    assert np.all(slope[:, np.arange(len(choice)), choice] == 0.0)
    # A plan loses: towards the reference, all changes taken together lead down.
    assert slope[:, :, FORMATS.index("bf16")].mean(axis=0).sum() < 0.0


def test_nothing_slopes_at_the_reference(tmp_path: Path) -> None:
    model = build_tiny_llama().to(torch.bfloat16).float().requires_grad_(False)
    candidates = list_candidates(find_units(model), ("int4_g64", "bf16"))
    choice = np.ones(len(candidates.units), dtype=np.int64)
    tokens = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(2))
    at_reference = measure_plan_slope(
        model, candidates, choice, tokens, directory=tmp_path / "a", progress=lambda *_: None
    )
    at_plan = measure_plan_slope(
        model, candidates, 0 * choice, tokens, directory=tmp_path / "b", progress=lambda *_: None
    )
    # The divergence is least at the reference; what is left is float32 rounding.
    assert np.abs(at_reference).max() < 1e-4 * np.abs(at_plan).max()


def test_an_interrupted_slope_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = list_candidates(find_units(model), FORMATS)
    choice = _draw_choice(candidates, 0)
    tokens = torch.randint(0, 320, (2, 8), generator=torch.Generator().manual_seed(3))

    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_plan_slope(model, candidates, choice, tokens, directory=tmp_path / "cut", progress=stop)
    resumed = measure_plan_slope(
        model, candidates, choice, tokens, directory=tmp_path / "cut", progress=lambda *_: None
    )
    whole = measure_plan_slope(model, candidates, choice, tokens, directory=tmp_path / "w", progress=lambda *_: None)
    np.testing.assert_array_equal(resumed, whole)
