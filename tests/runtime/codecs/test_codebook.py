"""The nearest code, by looking at all of them; and the best of several scales."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.codecs.codebook import Codebook, choose_scales
from runtime.elements import ELEMENTS
from tests.runtime.codecs.cases import nearest


@pytest.mark.parametrize("name", ELEMENTS)
def test_nearest_of_all_codes(name: str) -> None:
    codebook, values = Codebook.of(ELEMENTS[name].values), np.array(ELEMENTS[name].values)
    largest = ELEMENTS[name].largest
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat(
        [
            torch.rand(2000, generator=generator).mul(2.4).sub(1.2) * largest,
            torch.randn(2000, generator=generator).mul(8).exp2() * largest / 4096,
            torch.tensor([0.0, -0.0, largest, -largest, 1e38, -1e38, torch.inf, -torch.inf]),
        ]
    )
    found = codebook.values_of(codebook.codes_of(numbers)).numpy().astype(np.float64)
    clipped = np.clip(numbers.numpy().astype(np.float64), np.nanmin(values[np.isfinite(values)]), largest)
    assert np.array_equal(np.abs(found - clipped), np.abs(nearest(clipped, values) - clipped))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_ties_are_those_of_torch(name: str) -> None:
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    codebook = Codebook.of(ELEMENTS[name].values)
    ordered = codebook.values_of(codebook.codes)
    middles = (ordered[1:] + ordered[:-1]) / 2
    expected = middles.to(dtype).to(torch.float32)
    assert torch.equal(codebook.values_of(codebook.codes_of(middles)), expected)


def test_every_distinct_value_keeps_its_code() -> None:
    for element in ELEMENTS.values():
        codebook = Codebook.of(element.values)
        assert torch.equal(codebook.codes_of(codebook.values_of(codebook.codes)), codebook.codes)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(["e2m1", "e3m2", "int4"]), weighted=st.booleans())
def test_best_scale_of_each_group(seed: int, name: str, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    grouped = rng.standard_normal((3, 2, 8)).astype(np.float32)
    h = rng.uniform(0.1, 5.0, 16).astype(np.float32) if weighted else np.ones(16, np.float32)
    values = np.array(ELEMENTS[name].values)
    scales = [rng.uniform(0.02, 1.0, (3, 2)).astype(np.float32) for _ in range(4)]
    errors = []
    for scale in scales:
        wide = scale[..., None].astype(np.float64)
        rounded = nearest(grouped.astype(np.float64) / wide, values) * wide
        errors.append((h.reshape(2, 8) * (grouped - rounded) ** 2).sum(-1))
    pairs = [(torch.from_numpy(scale), torch.from_numpy(scale)) for scale in scales]
    importance = torch.from_numpy(h) if weighted else None
    best = choose_scales(torch.from_numpy(grouped), importance, Codebook.of(tuple(values)), pairs)
    least = np.min(errors, axis=0)
    # A rounded weight is below 8 and so off by up to 2^-21, as in float32; that moves sum h d^2 by 2^-20 sum h |d|.
    bound = 2.0**-20 * np.sqrt(least * h.reshape(2, 8).sum(-1)) + 2.0**-20 * least
    assert (np.abs(best.error.numpy() - least) <= bound).all()
    assert np.isin(best.stored.numpy(), np.stack(scales)).all()


def test_scale_of_zero_stands_for_zeros() -> None:
    zero = torch.zeros(1, 1)
    found = choose_scales(torch.ones(1, 1, 4), None, Codebook.of(ELEMENTS["e2m1"].values), [(zero, zero)])
    assert (found.codes == 0).all() and float(found.error) == 4.0
