"""Orthogonal matrices: exact where Hadamard's exist, orthogonal everywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.transforms.hadamard import make_hadamard, make_hadamard_rotation, make_random_orthogonal

# Sums of n products of entries of at most 1 in float64.
TOLERANCE = 1e-12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 200))
def test_what_is_built_is_a_hadamard_matrix(size: int) -> None:
    matrix = make_hadamard(size)
    if matrix is None:
        return
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 60, 64, 576, 896, 960, 1152, 1536, 2048, 2304])
def test_sizes_of_models_have_one(size: int) -> None:
    matrix = make_hadamard(size)
    assert matrix is not None and matrix.shape == (size, size)


@pytest.mark.parametrize("size", [3, 6, 15, 52, 92, 172])
def test_sizes_of_neither_construction_have_none(size: int) -> None:
    assert make_hadamard(size) is None


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 120), seed=st.integers(0, 10**6))
def test_rotations_are_orthogonal(size: int, seed: int) -> None:
    for R in (make_hadamard_rotation(size, generator(seed)), make_random_orthogonal(size, generator(seed))):
        assert (R.T @ R - torch.eye(size)).abs().max() <= TOLERANCE


def test_one_channel_spreads_evenly() -> None:
    assert torch.allclose(make_hadamard_rotation(576, generator()).abs(), torch.full((), 1 / 24, dtype=torch.float64))
    # 172 = 4 * 43: an odd part without a matrix stays together, four equal copies of it.
    blocks = make_hadamard_rotation(172, generator()).abs().view(4, 43, 4, 43)
    assert torch.allclose(blocks, blocks[:1, :, :1].expand_as(blocks))


def test_seed_decides() -> None:
    for make in (make_hadamard_rotation, make_random_orthogonal):
        assert torch.equal(make(24, generator(1)), make(24, generator(1)))
        assert not torch.equal(make(24, generator(1)), make(24, generator(2)))


def test_random_bases_have_no_preferred_sign() -> None:
    """The diagonal of a uniformly distributed basis has mean 0 and deviation 1 / sqrt(n)."""
    diagonal = torch.cat([make_random_orthogonal(16, generator(seed)).diagonal() for seed in range(50)])
    # Five standard errors of a mean of 800 numbers.
    assert abs(float(diagonal.mean())) <= 5 / math.sqrt(16 * 800)
