"""Two values a group: the least error of any two, by exhaustive search; and what is stored."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.codecs.binary import binary_codes, decode_binary, encode_binary
from runtime.formats import FORMATS

NAMES = [name for name in FORMATS if name.startswith("int1_")]


def render(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    return decode_binary(encode_binary(weight, FORMATS[name], importance), FORMATS[name], shape)


def least_error(group: np.ndarray, h: np.ndarray, *, symmetric: bool) -> float:
    """Returns the least weighted squared error over all 2^n codes, each with its best values."""
    errors = []
    for signs in itertools.product((-1.0, 1.0), repeat=len(group)):
        codes = np.array(signs)
        parts = [codes > 0, codes < 0]
        if symmetric:
            fitted = codes * max((h * codes * group).sum() / h.sum(), 0.0)
        else:
            fitted = np.zeros_like(group)
            for part in parts:
                if part.any():
                    fitted[part] = (h[part] * group[part]).sum() / h[part].sum()
        errors.append(float((h * (group - fitted) ** 2).sum()))
    return min(errors)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 9), symmetric=st.booleans(), weighted=st.booleans())
def test_error_is_the_least(seed: int, length: int, symmetric: bool, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((2, length))).float()
    h = rng.uniform(0.1, 10.0, length) if weighted else np.ones(length)
    importance = torch.from_numpy(h).float() if weighted else None
    rendered = render(weight, "int1_channel_sym" if symmetric else "int1_channel", importance).double().numpy()
    for values, row in zip(rendered, weight.double().numpy(), strict=True):
        # Rounding a value v to float16 moves it by up to |v| 2^-11, and with it each error by as much.
        largest = np.abs(row).max() * 2.0**-11
        bound = (np.sqrt(least_error(row, h, symmetric=symmetric)) + largest * np.sqrt(h.sum())) ** 2
        assert (h * (row - values) ** 2).sum() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_two_values_a_group(name: str) -> None:
    weight, format_ = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)), FORMATS[name]
    weight[1, :16], weight[2] = 0.0, 0.25
    rendered = render(weight, name)
    for row in rendered.view(7, format_.group_count(256), -1):
        for group in row:
            values = group.unique()
            assert len(values) <= 2
            if format_.scale_type == "pow2":
                assert torch.isin(values.abs(), 2.0 ** torch.arange(-24.0, 16.0)).all()
            elif format_.symmetric:
                assert len(values.abs().unique()) == 1
    codes = binary_codes(encode_binary(weight, format_), format_, (7, 256))
    assert set(codes.unique().tolist()) <= {0, 1}
    if format_.symmetric:
        assert torch.equal(codes.bool(), weight >= 0)


def test_power_of_two_is_the_better_neighbour() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    error = (render(weight, "int1_g64_sym_pow2") - weight).square().sum(1)
    others = [(weight - weight.sign() * 2.0**e).square().sum(1) for e in range(-4, 4)]
    assert torch.allclose(error, torch.stack(others).amin(0), rtol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4], ids=str)
@pytest.mark.parametrize("name", ["int1_channel", "int1_channel_sym"])
def test_weights_beyond_float16_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"range of format '{name}', at most 65504: got"):
        encode_binary(torch.tensor([[1.0, value]]), FORMATS[name])
