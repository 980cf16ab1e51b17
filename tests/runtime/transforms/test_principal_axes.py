"""The directions of most power come first, and what follows has nothing in common with them."""

import numpy as np
import pytest
import torch

from runtime.transforms.principal_axes import find_principal_rotation, measure_residual_moment
from runtime.transforms.residual_rotation import ROTATION, rotate_residual_
from tests.runtime.transforms.decoders import TOKENS, build_float64
from tests.tiny_models import build_tiny_llama


@pytest.mark.parametrize(("name", "share", "high"), [("llama, tied", 0.125, 8), ("qwen2, odd widths", 0.1, 6)])
def test_power_is_split_at_the_share(name: str, share: float, high: int) -> None:
    model = build_float64(name)
    before = measure_residual_moment(model, TOKENS)
    rotate_residual_(model, find_principal_rotation(model, TOKENS, share=share))
    after = measure_residual_moment(model, TOKENS)
    powers = np.linalg.eigvalsh(before.numpy())[::-1]
    scale = powers.sum()
    assert float(after[:high, :high].trace()) == pytest.approx(powers[:high].sum(), rel=1e-9)
    assert after[:high, high:].abs().max() <= 1e-9 * scale
    assert float(after.trace()) == pytest.approx(scale, rel=1e-9)


def test_moment_counts_every_norm_and_token_once() -> None:
    tokens = TOKENS + 2  # the row of the padding token, 1, is zero
    moment = measure_residual_moment(build_tiny_llama(), tokens)
    # Vectors of length sqrt(64), two norms in two blocks.
    assert float(moment.trace()) == pytest.approx(64 * 4 * tokens.numel(), rel=1e-9)


def test_basis_is_orthogonal() -> None:
    R = find_principal_rotation(build_tiny_llama(), TOKENS)[ROTATION]
    assert (R.T @ R - torch.eye(64)).abs().max() <= 1e-12


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must leave channels to both parts: got share=.* of 64 channels"):
        find_principal_rotation(build_tiny_llama(), TOKENS, share=share)
