"""FP8 and block formats: every code and scale byte, nearest codes, and no more error than the specifications' rules."""

import gguf
import numpy as np
import pytest
import torch

from runtime.codecs.scaled_elements import decode_scaled, encode_scaled, scaled_codes
from runtime.elements import ELEMENTS
from runtime.formats import FORMATS, Format
from runtime.packing import pack_codes
from tests.runtime.codecs.cases import WEIGHTS, Array, encode, errors_by_group, nearest, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "element"]
SHAPE = (3, 256)


def scales_of(tensors: dict[str, torch.Tensor], format_: Format) -> Array:
    """Returns the scale of each group, from the stored bytes, in float64."""
    stored = tensors["scale"].numpy()
    if format_.scale_type == "e8m0":
        return 2.0 ** (stored.astype(np.float64) - 127)
    if format_.scale_type == "e4m3":
        read = tensors["scale"].view(torch.float8_e4m3fn).double().numpy()
        product: Array = (read.astype(np.float32) * tensors["scale_unit"].numpy()).astype(np.float64)
        return product
    return stored.astype(np.float64)


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_are_the_nearest_of_all(name: str, format_: Format, weighted: bool) -> None:
    weight = WEIGHTS[name](*SHAPE)
    importance = draw_statistics(256).hessian().diagonal() if weighted else None
    tensors = encode(weight, format_.name, importance)
    scale = scales_of(tensors, format_)[..., None]
    values = np.array(ELEMENTS[format_.element].values)
    grouped = weight.numpy().astype(np.float64).reshape(*scale.shape[:2], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = nearest(np.where(scale == 0, 0.0, grouped / scale), values) * scale
    rendered = render(weight, format_.name, importance).double().numpy().reshape(grouped.shape)
    # The quotient and the product are rounded to float32: a tie may go either way, by a relative 2^-23.
    slack = 2.0**-22 * np.abs(grouped) + 2.0**-149
    assert (np.abs(rendered - grouped) <= np.abs(exact - grouped) + slack).all()


def usual_scales(weight: torch.Tensor, format_: Format) -> Array:
    """Returns the scale that the usual rule gives each group: OCP's exponent, the nearest E4M3 or float16 number."""
    grouped = weight.numpy().astype(np.float64).reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    magnitude, largest = np.abs(grouped).max(-1), ELEMENTS[format_.element].largest
    if format_.scale_type == "e8m0":
        with np.errstate(divide="ignore"):
            exponent = np.floor(np.log2(magnitude)) - np.floor(np.log2(largest))
        return np.where(magnitude == 0, 1.0, 2.0 ** np.clip(exponent, -127, 127))
    if format_.scale_type == "e4m3":
        unit = np.float32(np.abs(grouped).max()) / np.float32(448 * largest)
        scale = torch.from_numpy((magnitude / (largest * unit)).astype(np.float32)).to(torch.float8_e4m3fn)
        return scale.double().numpy() * unit
    return (magnitude / largest).clip(2.0**-24).astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["normal", "outliers", "zeros", "positive"])
def test_no_more_error_than_the_usual_rule(name: str, format_: Format) -> None:
    weight = WEIGHTS[name](*SHAPE)
    scale = usual_scales(weight, format_)[..., None]
    grouped = weight.numpy().astype(np.float64).reshape(*scale.shape[:2], -1)
    with np.errstate(invalid="ignore"):
        ratio = np.where(scale == 0, 0.0, grouped / np.where(scale == 0, 1.0, scale))
    usual = ((nearest(ratio, np.array(ELEMENTS[format_.element].values)) * scale - grouped) ** 2).sum(-1)
    found = errors_by_group(weight, render(weight, format_.name), format_.name)
    # Squares and their sums in float32, over up to 256 weights.
    assert (found <= usual * (1 + 2.0**-14) + 1e-12).all()


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
def test_every_code_under_every_scale_byte(format_: Format) -> None:
    codes = torch.arange(256).remainder(1 << format_.bits).to(torch.uint8).view(1, 256)
    values = np.array(ELEMENTS[format_.element].values)[codes.numpy()]
    groups = format_.group_count(256)
    stored = torch.arange(255).to(torch.uint8)
    if format_.scale_type == "fp16":
        stored = torch.arange(1, 0x7C00, 97).to(torch.int16).view(torch.float16)
    for scale in stored.split(1):
        tensors = {
            "codes": pack_codes(codes, format_.bits),
            "scale": scale.expand(1, groups),
            "scale_unit": torch.tensor([0.37]),
        }
        wide = scales_of(tensors, format_).repeat(256 // groups, axis=1)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (values.astype(np.float32) * wide.astype(np.float32)).astype(np.float32)
        rendered = decode_scaled(tensors, format_, (1, 256)).numpy()
        assert np.array_equal(rendered, expected, equal_nan=True)
    assert torch.equal(scaled_codes(tensors, format_, (1, 256)), codes)


def test_mxfp4_is_read_as_ggml_reads_it() -> None:
    """The same bytes in ggml's order: the scale, then weights 0 to 15 in the low and 16 to 31 in the high halves."""
    weight = WEIGHTS["outliers"](5, 96)
    tensors, format_ = encode(weight, "mxfp4"), FORMATS["mxfp4"]
    codes = scaled_codes(tensors, format_, (5, 96)).view(5, 3, 2, 16).numpy()
    blocks = np.concatenate([tensors["scale"].numpy()[..., None], codes[:, :, 0] | codes[:, :, 1] << 4], axis=-1)
    expected = gguf.quants.dequantize(blocks.reshape(5, -1), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(render(weight, "mxfp4").numpy(), expected)


def test_scales_reach_the_ends_of_float32() -> None:
    for name in ("mxfp4", "mxfp8_e5m2", "mxint8", "nvfp4"):
        for size in (1e-38, 3e38):
            weight = torch.tensor([[size, -size / 2, 0.0, size / 4] * 16])
            rendered = render(weight, name)
            assert torch.isfinite(rendered).all()
            # Powers of two of one number lie on every grid up to the rounding of that number.
            assert ((rendered - weight).abs() <= 0.26 * size).all()


@pytest.mark.parametrize("name", ["fp8_e4m3_g64", "fp4_e2m1_channel", "mxfp4", "nvfp4", "nvint4"])
def test_rows_are_read_alone(name: str) -> None:
    weight, format_ = WEIGHTS["normal"](5, 128), FORMATS[name]
    tensors, rows = encode(weight, name), torch.tensor([3, 3, 0])
    assert torch.equal(decode_scaled(tensors, format_, (5, 128), rows), render(weight, name)[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["fp8_e4m3_channel", "mxfp4", "nvfp4"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    weight = torch.ones(1, 32)
    weight[0, 3] = value
    with pytest.raises(ValueError, match=f"finite and in the range of format '{name}', at most .*: got max"):
        encode_scaled(weight, FORMATS[name])


def test_group_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="group_size=32, in_features=48 in format 'mxfp4'"):
        encode_scaled(torch.ones(1, 48), FORMATS["mxfp4"])
