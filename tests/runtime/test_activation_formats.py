"""Formats of activations: derived bounds on every format, shapes of scales, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.activation_formats import (
    ACTIVATION_FORMATS,
    ActivationFormat,
    find_activation_formats,
    render_activations,
    round_to_scale,
    spanning_scale,
)
from runtime.elements import ELEMENTS

QUANTIZED = [f for f in ACTIVATION_FORMATS.values() if isinstance(f, ActivationFormat)]
DYNAMIC = [f for f in QUANTIZED if not f.static]


def scale_of(x: torch.Tensor, format_: ActivationFormat) -> torch.Tensor:
    """The scale that spans, by the definition: over a token, all of a sequence, or a channel."""
    dims = {"token": (-1,), "tensor": (-2, -1), "channel": tuple(range(x.ndim - 1))}[format_.scope]
    return x.abs().amax(dim=dims, keepdim=True) / format_.reach


@settings(deadline=None, max_examples=60)
@given(
    format_=st.sampled_from(QUANTIZED),
    shape=st.sampled_from([(1, 1), (1, 7), (5, 1), (2, 3, 11), (3, 1, 64), (1, 13, 96)]),
    magnitude=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_an_error_is_within_half_a_step(
    format_: ActivationFormat, shape: tuple[int, ...], magnitude: float, seed: int
) -> None:
    x = magnitude * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale = scale_of(x, format_)
    own = scale.flatten() if format_.static else None
    if format_.static and format_.scope == "tensor":
        own = scale.amax().view(1)
    rendered = render_activations(x, format_, own)
    s = (scale if own is None else own).double()
    # float32 rounds x / s and the product once each: 2^-23 of values up to the largest.
    slack = 2.0**-22 * s * format_.reach
    bound = torch.maximum(x.double().abs() / 16, s / 1024) if format_.element else s / 2
    assert bool(((rendered.double() - x.double()).abs() <= bound + slack).all())


@pytest.mark.parametrize("format_", QUANTIZED, ids=lambda f: f.name)
def test_every_value_is_an_element_times_the_scale(format_: ActivationFormat) -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
    s = 0.7 * scale_of(x, format_).amax().view(1)
    values = (round_to_scale(x, format_, s) / s).flatten()
    if format_.element:
        elements = torch.tensor(ELEMENTS["e4m3"].values)
        distance = (values[:, None] - elements[~elements.isnan()]).abs().amin(dim=1)
        # The quotient rounds a product back: one unit in the last place.
        assert bool((distance <= 2.0**-23 * values.abs()).all())
    else:
        assert bool(((values - values.round()).abs() <= 2.0**-22 * format_.reach).all())
        half = 2 ** (format_.bits - 1)
        assert float(values.min()) >= -half - 0.001 and float(values.max()) <= half - 0.999


@pytest.mark.parametrize("format_", DYNAMIC, ids=lambda f: f.name)
def test_dynamic_scales_are_of_one_token_or_one_sequence(format_: ActivationFormat) -> None:
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[0, 2] *= 100.0
    before, after = render_activations(x, format_), render_activations(changed, format_)
    assert torch.equal(before[1], after[1]), "another sequence"
    alone = torch.equal(before[0, [0, 1, 3, 4, 5]], after[0, [0, 1, 3, 4, 5]])
    assert alone == (format_.scope == "token")


@pytest.mark.parametrize("format_", DYNAMIC, ids=lambda f: f.name)
def test_zeros_stay_and_non_contiguous_input_is_read(format_: ActivationFormat) -> None:
    assert not render_activations(torch.zeros(1, 3, 8), format_).any()
    x = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    assert torch.equal(render_activations(x, format_), render_activations(x.contiguous(), format_))


def test_unquantized_is_bfloat16() -> None:
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(4))
    [format_] = find_activation_formats(["bf16"])
    assert torch.equal(render_activations(x, format_), x.bfloat16().float())


def test_fp8_agrees_with_the_table_of_elements() -> None:
    format_ = ACTIVATION_FORMATS["fp8_token"]
    assert isinstance(format_, ActivationFormat)
    values = np.array([v for v in ELEMENTS["e4m3"].values if np.isfinite(v)])
    x = torch.tensor(values, dtype=torch.float32).view(1, 1, -1)
    # Its largest is 448, so that the scale is one and every element is itself.
    assert torch.equal(render_activations(x, format_), x)
    assert float(spanning_scale(x, format_, (-1,)).max()) == 1.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"must be a known name: got 'int8_tokens'. Spelled alike: int8_token"):
        find_activation_formats(["int8_tokens"])
    for names in ([], ["bf16", "bf16"]):
        with pytest.raises(ValueError, match="must name at least one format, each once"):
            find_activation_formats(names)
    with pytest.raises(ValueError, match="needs a scale: got none for 'int8_tensor_static'"):
        render_activations(torch.ones(1, 1, 4), ACTIVATION_FORMATS["int8_tensor_static"])
