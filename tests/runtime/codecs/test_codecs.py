"""What every codec promises, for every format of the menu and shapes of any kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.codecs import CODECS
from runtime.formats import FORMATS, Format
from runtime.storage import LAYOUTS
from tests.runtime.codecs.cases import WEIGHTS
from tests.runtime.quantizers.cases import draw_statistics


def test_every_kind_has_a_layout_and_a_codec() -> None:
    assert set(CODECS) == set(LAYOUTS) == {format_.kind for format_ in FORMATS.values()}


def assert_kept(weight: Tensor, format_: Format, importance: Tensor | None) -> None:
    """Asserts that what is stored is what was promised, the same each time, and read back by rows."""
    codec, shape, before = CODECS[format_.kind], (weight.shape[0], weight.shape[1]), weight.clone()
    tensors, again = (codec.encode(weight, format_, importance) for _ in range(2))
    assert torch.equal(weight, before)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    stored = {t.name: (t.shape, f"torch.{t.dtype}") for t in format_.stored_tensors(shape)}
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()} == stored
    assert sum(t.nbytes for t in tensors.values()) == format_.storage_bytes(shape)
    values, codes = (read(tensors, format_, shape, None) for read in (codec.decode, codec.codes))
    assert (values.dtype, tuple(values.shape), tuple(codes.shape)) == (torch.float32, shape, shape)
    assert torch.isfinite(values).all()
    assert format_.unquantized or 0 <= int(codes.min()) <= int(codes.max()) < 1 << format_.bits
    rows = torch.tensor([shape[0] - 1, 0, shape[0] - 1])
    assert torch.equal(codec.decode(tensors, format_, shape, rows), values[rows])
    assert torch.equal(codec.codes(tensors, format_, shape, rows), codes[rows])


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(list(FORMATS)),
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    channel=st.integers(1, 131),
    kind=st.sampled_from(list(WEIGHTS)),
    weighted=st.booleans(),
)
def test_any_format_keeps_any_shape(name: str, rows: int, groups: int, channel: int, kind: str, weighted: bool) -> None:
    format_ = FORMATS[name]
    in_features = channel if format_.group_size is None else groups * format_.group_size
    importance = draw_statistics(in_features).hessian().diagonal() if weighted else None
    assert_kept(WEIGHTS[kind](rows, in_features), format_, importance)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=list(FORMATS))
def test_one_group_of_one_row(format_: Format) -> None:
    assert_kept(WEIGHTS["normal"](1, format_.group_size or 1), format_, None)


@pytest.mark.parametrize("format_", [f for f in FORMATS.values() if CODECS[f.kind].grid], ids=lambda f: f.name)
def test_codes_packed_again_are_the_same_tensors(format_: Format) -> None:
    """And a stored weight rounded on its own grid keeps its codes' values."""
    weight, codec = WEIGHTS["outliers"](5, 256), CODECS[format_.kind]
    tensors = codec.encode(weight, format_, None)
    values, codes = (read(tensors, format_, (5, 256), None) for read in (codec.decode, codec.codes))
    assert codec.grid is not None
    grid = codec.grid(tensors, format_, (5, 256))
    packed = grid.with_codes(codes)
    assert packed.keys() == tensors.keys()
    assert all(torch.equal(packed[name], tensor) for name, tensor in tensors.items())
    rounded = [grid.round_column(j, values[:, j])[1] for j in range(256)]
    assert torch.equal(torch.stack(rounded, dim=1), values)


@pytest.mark.parametrize("format_", [f for f in FORMATS.values() if f.group_size], ids=lambda f: f.name)
def test_group_that_does_not_divide_the_row_is_refused(format_: Format) -> None:
    in_features = (format_.group_size or 0) + 8
    both = f"group_size={format_.group_size}, in_features={in_features} in format '{format_.name}'"
    with pytest.raises(ValueError, match=both):
        CODECS[format_.kind].encode(torch.ones(2, in_features), format_, None)
