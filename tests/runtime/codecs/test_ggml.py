"""llama.cpp's blocks: read as the package gguf reads them, packed without loss, and no worse than the plain rules."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.codecs.ggml import decode_ggml, encode_ggml, ggml_codes
from runtime.codecs.ggml_layouts import GGML_LAYOUTS
from runtime.codecs.ggml_search import fit_affine
from runtime.formats import FORMATS
from tests.runtime.codecs.cases import WEIGHTS, Array, encode, errors_by_group, render
from tests.runtime.quantizers.cases import draw_statistics

NAMES = list(GGML_LAYOUTS)
PLAIN = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]  # those that gguf itself quantizes
# One row of one block, prime numbers of rows, several blocks.
SHAPES = [(1, 256), (7, 256), (3, 768)]


def read_by_gguf(blocks: Tensor, name: str) -> Array:
    """Returns what the package gguf makes of the bytes [rows, bytes of a row]."""
    return gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_are_read_as_gguf_reads_them_and_packed_again(name: str, seed: int) -> None:
    layout, format_ = GGML_LAYOUTS[name], FORMATS[name]
    block_bytes = sum(size for _, size in layout.sections)
    blocks = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (5, 3, block_bytes), dtype=np.uint8))
    for section in layout.split(blocks).items():
        if section[0] in ("d", "dmin", "m"):
            section[1][..., 1] &= 0xBB  # no infinities, no NaN
    shape = (5, 3 * (format_.group_size or 0))
    values = decode_ggml({"blocks": blocks.flatten(1)}, format_, shape)
    assert np.array_equal(values.numpy().view(np.uint32), read_by_gguf(blocks.flatten(1), name).view(np.uint32))
    assert torch.equal(layout.pack(layout.unpack(blocks)), blocks)
    rows = torch.tensor([4, 4, 0])
    assert torch.equal(decode_ggml({"blocks": blocks.flatten(1)}, format_, shape, rows), values[rows])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoded_bytes_are_read_by_gguf(name: str, weights: str, shape: tuple[int, int]) -> None:
    weight = WEIGHTS[weights](*shape)
    tensors = encode(weight, name)
    rendered = decode_ggml(tensors, FORMATS[name], shape)
    assert np.array_equal(rendered.numpy().view(np.uint32), read_by_gguf(tensors["blocks"], name).view(np.uint32))
    assert tensors["blocks"].nbytes == FORMATS[name].storage_bytes(shape)
    assert int(ggml_codes(tensors, FORMATS[name], shape).max()) < 1 << FORMATS[name].bits


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("weights", ["normal", "outliers", "zeros", "positive", "large"])
def test_no_more_error_than_gguf(name: str, weights: str) -> None:
    weight = WEIGHTS[weights](5, 256)
    quantized = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()])
    plain = errors_by_group(weight, torch.from_numpy(read_by_gguf(torch.from_numpy(quantized), name)), name)
    found = errors_by_group(weight, render(weight, name), name)
    assert (found <= plain * (1 + 2.0**-16)).all()
    if weights == "normal":
        assert found.sum() < 0.97 * plain.sum()


def plain_rule(weight: Array, name: str) -> Array:
    """Returns a weight [rows, in_features] rendered by the plain rule of formats with parts or a table, in float64.

    Each part's range sets its scale and minimum; the largest of a block set d and dmin; all are rounded to nearest.
    """
    layout = GGML_LAYOUTS[name]
    parts = weight.reshape(-1, layout.parts, (FORMATS[name].group_size or 0) // layout.parts)
    low, top = layout.scale_range
    if layout.most_min:
        least = -np.minimum(parts.min(-1), 0)
        scale = (np.maximum(parts.max(-1), 0) + least) / layout.top
        d = (scale.max(-1) / top).astype(np.float16).astype(np.float64)[:, None]
        dmin = (least.max(-1) / layout.most_min).astype(np.float16).astype(np.float64)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            step, minimum = d * np.rint(scale / d), dmin * np.nan_to_num(np.rint(least / dmin))
            codes = np.nan_to_num(np.rint((parts + minimum[..., None]) / step[..., None])).clip(0, layout.top)
        return (codes * step[..., None] - minimum[..., None]).reshape(weight.shape)
    extreme = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
    levels = np.array(layout.table or range(-layout.zero, layout.top - layout.zero + 1), dtype=np.float64)
    scale = extreme / levels[0]
    widest = np.take_along_axis(scale, np.abs(scale).argmax(-1)[:, None], -1)
    d = (widest / low).astype(np.float16).astype(np.float64)
    step = d * np.rint(scale / d).clip(low, top)
    every = levels * step[..., None]
    nearest = np.abs(parts[..., None] - every[:, :, None]).argmin(-1)
    return np.take_along_axis(every, nearest, -1).reshape(weight.shape)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PLAIN)))
@pytest.mark.parametrize("weights", ["normal", "outliers", "positive", "large"])
def test_no_more_error_than_the_plain_rule(name: str, weights: str) -> None:
    weight = WEIGHTS[weights](5, 512)
    plain = errors_by_group(weight, torch.from_numpy(plain_rule(weight.double().numpy(), name)), name)
    found = errors_by_group(weight, render(weight, name), name)
    # Scales and sums in float32: a scale next to a half may be rounded the other way, by a step of a 63rd at most.
    assert (found <= plain * (1 + 1e-3)).all()
    if weights == "normal":
        assert found.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_of_all(name: str) -> None:
    weight, layout = WEIGHTS["outliers"](3, 256), GGML_LAYOUTS[name]
    fields = layout.unpack(encode(weight, name)["blocks"].view(3, 256 // (FORMATS[name].group_size or 1), -1))
    step = fields.d.double().unsqueeze(-1) * fields.scales
    every = layout.levels(torch.arange(layout.top + 1)).double() * step.unsqueeze(-1)
    if fields.mins is not None and fields.dmin is not None:
        every = every - (fields.dmin.double().unsqueeze(-1) * fields.mins).unsqueeze(-1)
    parts = weight.double().view(*step.shape, -1)
    least = (parts.unsqueeze(-1) - every.unsqueeze(-2)).abs().amin(-1)
    error = (render(weight, name).double().view(parts.shape) - parts).abs()
    assert (error <= least + 2.0**-20 * parts.abs() + 2.0**-20 * every.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    weight, importance = WEIGHTS["normal"](8, 256), draw_statistics(256).hessian().diagonal()
    alike, weighted = (render(weight, name, h) for h in (None, importance))
    before, after = (errors_by_group(weight, r, name, importance).sum() for r in (alike, weighted))
    assert after < before


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), nonnegative=st.booleans())
def test_fit_is_that_of_least_squares(seed: int, nonnegative: bool) -> None:
    rng = np.random.default_rng(seed)
    x, h, codes = rng.standard_normal(16), rng.uniform(0.1, 3.0, 16), rng.integers(0, 4, 16).astype(np.float64)
    tensors = (torch.from_numpy(a).view(1, 16) for a in (x, h, codes))
    scale, minimum = (float(t) for t in fit_affine(*tensors, nonnegative=nonnegative))

    def error(a: float, b: float) -> float:
        return float((h * (a * codes - b - x) ** 2).sum())

    if nonnegative:
        assert scale >= 0 and minimum >= 0
    # Convex in both: no point of a fine neighbourhood that is allowed is better.
    for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, 1e-3), (-1e-3, -1e-3)):
        other = (scale + step[0], minimum + step[1])
        if not nonnegative or min(other) >= 0:
            assert nonnegative or error(scale, minimum) <= error(*other) + 1e-9


@pytest.mark.parametrize(("name", "in_features", "block"), [("q4_0", 48, 32), ("q4_k", 576, 256)])
def test_block_must_divide_the_row(name: str, in_features: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"group_size={block}, in_features={in_features} in format '{name}'"):
        encode_ggml(torch.ones(1, in_features), FORMATS[name])
    assert not FORMATS[name].fits(in_features)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4], ids=str)
def test_weights_beyond_float16_are_refused(value: float) -> None:
    weight = torch.ones(1, 256)
    weight[0, 3] = value
    with pytest.raises(ValueError, match="range of format 'q4_k', at most 65504: got"):
        encode_ggml(weight, FORMATS["q4_k"])
