"""Types chosen by group: the nearest codes of the least error over all types, each rendered alone in float64."""

import numpy as np
import pytest
import torch

from runtime.codecs.chosen_type import chosen_type_codes, decode_chosen_type, encode_chosen_type, list_types
from runtime.elements import ELEMENTS
from runtime.formats import FORMATS, Format
from runtime.packing import pack_codes, unpack_codes
from runtime.storage import SELECTOR_BITS
from tests.runtime.codecs.cases import WEIGHTS, Array, encode, errors_by_group, nearest, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "chosen_type"]
SHAPE = (3, 128)


def selectors_of(tensors: dict[str, torch.Tensor], format_: Format) -> Array:
    """Returns the type of each group [rows, groups]."""
    groups = format_.group_count(SHAPE[1])
    selectors: Array = unpack_codes(tensors["selector"], SELECTOR_BITS[format_.element], groups).numpy()
    return selectors


def test_menus_are_those_of_the_papers() -> None:
    base = {0.0, 1.0, 2.0, 4.0, -1.0, -2.0, -4.0}
    assert [set(values) - base for values in list_types("bitmod", 3)] == [{3.0}, {-3.0}, {6.0}, {-6.0}]
    doubled = {2 * value for value in ELEMENTS["e2m1"].values}
    assert [set(values) - doubled for values in list_types("bitmod", 4)] == [{10.0}, {-10.0}, {16.0}, {-16.0}]
    for bits, element in ((4, "e2m1"), (6, "e2m3"), (8, "e4m3")):
        integers, floats = list_types("int_or_float", bits)
        assert sorted(integers) == list(range(-(1 << (bits - 1)), 1 << (bits - 1)))
        assert floats is ELEMENTS[element].values
    for format_ in FAMILY:
        assert all(len(values) == 1 << format_.bits for values in list_types(format_.element, format_.bits))
        assert len(list_types(format_.element, format_.bits)) == 1 << SELECTOR_BITS[format_.element]


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_the_nearest_of_the_group_s_type(name: str, format_: Format) -> None:
    weight = WEIGHTS[name](*SHAPE)
    tensors = encode(weight, format_.name)
    scale = tensors["scale"].double().numpy()[..., None]
    grouped = weight.double().numpy().reshape(*scale.shape[:2], -1)
    rendered = render(weight, format_.name).double().numpy().reshape(grouped.shape)
    selector, types = selectors_of(tensors, format_), list_types(format_.element, format_.bits)
    for row, group in np.ndindex(*selector.shape):
        numbers, values = grouped[row, group], np.array(types[selector[row, group]])
        exact = nearest(numbers / scale[row, group], values) * scale[row, group]
        # The quotient and the product are rounded to float32: a tie may go either way, by a relative 2^-23.
        slack = 2.0**-22 * np.abs(numbers)
        assert (np.abs(rendered[row, group] - numbers) <= np.abs(exact - numbers) + slack).all()


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("name", ["normal", "outliers", "zeros", "positive"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_type_leaves_less_at_its_usual_scale(name: str, format_: Format, weighted: bool) -> None:
    weight = WEIGHTS[name](*SHAPE)
    importance = draw_statistics(128).hessian().diagonal() if weighted else None
    h = torch.ones(128) if importance is None else importance
    found = errors_by_group(weight, render(weight, format_.name, importance), format_.name, importance)
    grouped = weight.double().numpy().reshape(3, format_.group_count(128), -1)
    h_grouped = h.double().numpy().reshape(grouped.shape[1:])
    for values in list_types(format_.element, format_.bits):
        finite = np.array([value for value in values if np.isfinite(value)])
        scale = (np.abs(grouped).max(-1, keepdims=True) / np.abs(finite).max()).clip(2.0**-24)
        scale = scale.astype(np.float16).astype(np.float64)
        usual = (h_grouped * (nearest(grouped / scale, finite) * scale - grouped) ** 2).sum(-1)
        # Scales, squares and their sums in float32, over up to 128 weights.
        assert (found <= usual * (1 + 2.0**-14) + 1e-12).all()


@pytest.mark.parametrize(("bits", "noise"), [(4, 0.15), (6, 0.1), (8, 0.04)])
def test_crest_factor_decides_between_integers_and_floats(bits: int, noise: float) -> None:
    """Far below the crossover integers win, far above it floats (2.4 at 4 bits to 5.2 at 8, of at most 5.7)."""
    even = torch.linspace(-1, 1, 32).repeat(4, 1)  # crest factor 1.7
    peaked = WEIGHTS["normal"](4, 32) * noise
    peaked[:, 7] = 1.0  # crest factors of about 4.3, 5.0 and 5.5
    weight = torch.cat([even, peaked], dim=1)
    tensors = encode(weight, f"intfp{bits}_g32")
    assert unpack_codes(tensors["selector"], 1, 2).tolist() == [[0, 1]] * 4


def test_special_values_go_to_the_longer_side() -> None:
    weight = torch.tensor(
        [[0.0, 1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 6.0] * 8, [0.0, 1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 3.0] * 8]
    )
    weight = torch.cat([weight, -weight])
    tensors = encode(weight, "bitmod3_g64")
    assert torch.equal(render(weight, "bitmod3_g64"), weight)
    assert unpack_codes(tensors["selector"], 2, 1)[:, 0].tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
def test_every_code_of_every_type(format_: Format) -> None:
    codes = torch.arange(128).remainder(1 << format_.bits).to(torch.uint8).repeat(3, 1)
    groups, bits = format_.group_count(128), SELECTOR_BITS[format_.element]
    selector = torch.arange(3 * groups).remainder(1 << bits).to(torch.uint8).view(3, groups)
    tensors = {
        "codes": pack_codes(codes, format_.bits),
        "scale": torch.full((3, groups), 0.375, dtype=torch.float16),
        "selector": pack_codes(selector, bits),
    }
    types = np.array(list_types(format_.element, format_.bits), dtype=np.float32)
    wide = selector.numpy().repeat(128 // groups, axis=1)
    expected = types[wide, codes.numpy()] * np.float32(0.375)
    assert np.array_equal(decode_chosen_type(tensors, format_, SHAPE).numpy(), expected, equal_nan=True)
    rows = torch.tensor([2, 0, 2])
    assert np.array_equal(decode_chosen_type(tensors, format_, SHAPE, rows).numpy(), expected[rows], equal_nan=True)
    assert torch.equal(chosen_type_codes(tensors, format_, SHAPE, rows), codes)


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 7e4], ids=str)
def test_weights_beyond_float16_are_refused(value: float) -> None:
    weight = torch.ones(1, 64)
    weight[0, 5] = value
    with pytest.raises(ValueError, match="range of format 'bitmod3_g64', at most 65504: got"):
        encode_chosen_type(weight, FORMATS["bitmod3_g64"])


def test_group_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="group_size=32, in_features=48 in format 'intfp4_g32'"):
        encode_chosen_type(torch.ones(1, 48), FORMATS["intfp4_g32"])
