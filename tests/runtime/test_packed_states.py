"""Packed states: back as the format renders them, however they came; and what is dropped has never been there."""

import copy

import pytest
import torch
from torch import Tensor

from runtime.cache_formats import CACHE_FORMATS, TokenBlockFormat, cache_bytes
from runtime.codecs import CODECS
from runtime.formats import FORMATS, Format
from runtime.packed_states import append_together, make_packed_states
from runtime.rendering import render

# Blocks of all widths, and of each kind the first and the last whose rows fit a head and share nothing.
_BY_ROW = [f for f in FORMATS.values() if f.fits(32) and f.storage_bytes((3, 32)) == 3 * f.storage_bytes((1, 32))]
_BY_KIND = {kind: [f.name for f in _BY_ROW if f.kind == kind] for kind in CODECS}
NAMES = [
    *(name for name, f in CACHE_FORMATS.items() if isinstance(f, TokenBlockFormat)),
    *(name for names in _BY_KIND.values() for name in dict.fromkeys([*names[:1], *names[-1:]])),
]
TOKENS = 75


def draw_states() -> Tensor:
    """Returns states [2, 3, 75, 32] that do not lie in one piece."""
    return torch.randn(2, TOKENS, 3, 32, generator=torch.Generator().manual_seed(0)).transpose(1, 2)


def expected(states: Tensor, format_: Format) -> Tensor:
    """Returns the states as they come back."""
    if not isinstance(format_, TokenBlockFormat):
        return render(states.reshape(-1, 32), format_).view(states.shape)
    back = states.half().float().clone()
    length = format_.token_block
    for b, h, block in torch.cartesian_prod(*map(torch.arange, (2, 3, states.shape[2] // length))).tolist():
        rows = slice(block * length, (block + 1) * length)
        back[b, h, rows] = render(back[b, h, rows].T, format_.row_format).T
    return back


@pytest.mark.parametrize("name", NAMES)
def test_states_come_back_as_the_format_renders_them_however_they_came(name: str) -> None:
    states, format_ = draw_states(), CACHE_FORMATS[name]
    packed = make_packed_states(format_)
    assert (packed.token_count, packed.stored_bytes) == (0, 0)
    for part in states.split([1, 29, 40, 5], dim=2):
        packed.append(part)
    assert torch.equal(packed.read(torch.float32), expected(states, format_))
    assert packed.token_count == TOKENS
    assert packed.stored_bytes == 2 * cache_bytes(format_, (3, 32), TOKENS)


@pytest.mark.parametrize("name", ["int4_g32", "bf16", "int3_t32", "int2_t64"])
@pytest.mark.parametrize("kept", [0, 1, 32, 64, 70])
def test_dropped_tokens_take_no_bytes(kept: int, name: str) -> None:
    packed = make_packed_states(CACHE_FORMATS[name])
    packed.append(draw_states())
    before = packed.read(torch.float32)
    packed.truncate(kept)
    assert packed.token_count == kept
    assert packed.stored_bytes == 2 * cache_bytes(CACHE_FORMATS[name], (3, 32), kept)
    if kept:
        # What a block that is opened again held goes on in float16.
        torch.testing.assert_close(packed.read(torch.float32), before[:, :, :kept], rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("name", ["int4_g32", "int3_t32"])
def test_sequences_change_places(name: str) -> None:
    packed = make_packed_states(CACHE_FORMATS[name])
    packed.append(draw_states())
    before = packed.read(torch.float64)
    packed.select(torch.tensor([1, 1, 0]))
    assert torch.equal(packed.read(torch.float64), before[[1, 1, 0]])


def test_states_beyond_float16_are_refused() -> None:
    states = torch.full((1, 1, 2, 4), 7e4)
    with pytest.raises(ValueError, match="cached states must be finite in float16: got a largest one of 70000"):
        make_packed_states(CACHE_FORMATS["int4_t32"]).append(states)


@pytest.mark.parametrize("name", ["int4_g32", "bf16", "int3_t32", "int2_t64"])
def test_states_are_read_from_a_token_on(name: str) -> None:
    packed = make_packed_states(CACHE_FORMATS[name])
    packed.append(draw_states())
    whole, rows = packed.read(torch.float32), packed.packed_rows()
    assert rows.head_dim == 32
    assert rows.token_count == (TOKENS // rows.token_block * rows.token_block if rows.token_block else TOKENS)
    for first in (0, 64, rows.token_count):
        assert torch.equal(packed.read(torch.float32, first), whole[:, :, first:])


@pytest.mark.parametrize("name", ["int4_g32", "int3_t32"])
def test_what_was_read_stays_as_it_is(name: str) -> None:
    """Tokens that come later are put behind those that are there, in the same room: none of these may change."""
    packed, states = make_packed_states(CACHE_FORMATS[name]), draw_states()
    for token in states.split(1, dim=2):
        packed.append(token)
    rows = packed.packed_rows()
    before = {key: buffer.clone() for key, buffer in rows.buffers.items()}
    packed.append(states.flip(2))
    packed.truncate(40)
    packed.append(states.flip(0))
    assert all(torch.equal(rows.buffers[key], buffer) for key, buffer in before.items())


def test_a_token_is_not_copied_at_every_later_one() -> None:
    packed, places = make_packed_states(CACHE_FORMATS["int4_g32"]), set()
    for token in torch.randn(1, 2, 400, 32).split(1, dim=2):
        packed.append(token)
        places.add(packed.packed_rows().buffers["codes"].data_ptr())
    # Room for a quarter more each time: from 5 on it grows at most 1 + log(400 / 5) / log(1.25) times.
    assert len(places) <= 25


def test_a_cache_that_began_in_inference_mode_goes_on_outside() -> None:
    packed, states = make_packed_states(CACHE_FORMATS["int4_g32"]), draw_states()
    with torch.inference_mode():
        for token in states[:, :, :6].split(1, dim=2):
            packed.append(token)
    packed.append(states[:, :, 6:])
    assert torch.equal(packed.read(torch.float32), expected(states, CACHE_FORMATS["int4_g32"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["int4_g32", "int3_channel_sym", "int8_g32", "bf16", "int3_t32"])
def test_stores_are_appended_to_together_as_each_alone(name: str) -> None:
    """Whatever happened to one of them in between: it was cropped, appended to alone, or copied."""
    states = torch.randn(4, 2, 3, TOKENS, 32, generator=torch.Generator().manual_seed(0)).transpose(0, 1)[:, :2]
    together, alone = ([make_packed_states(CACHE_FORMATS[name]) for _ in states] for _ in range(2))
    for i, part in enumerate(states.split([1, 2, 30, 1, 1, 35, 5], dim=3)):
        if i == 3:
            first, before = together, [store.read(torch.float32) for store in together]
            together = copy.deepcopy(first)
            for stores in (together, alone):
                stores[1].truncate(20)
                stores[1].append(states[1, :, :, 20:33])
                stores[0].append(states[1, :, :, 40:43])
                stores[0].truncate(33)
        append_together(together, part)
        for store, other, new in zip(together, alone, part, strict=True):
            other.append(new)
            assert store.token_count == other.token_count
            assert store.stored_bytes == other.stored_bytes
            assert torch.equal(store.read(torch.float32), other.read(torch.float32))
    assert all(torch.equal(store.read(torch.float32), earlier) for store, earlier in zip(first, before, strict=True))


def test_stores_of_other_formats_and_lengths_are_appended_to_at_once() -> None:
    names = ("int4_g32", "int4_t32", "int4_g32", "bf16", "int4_t32", "int4_g32")
    stores = [make_packed_states(CACHE_FORMATS[name]) for name in names]
    states = torch.randn(len(names), 1, 2, 40, 32, generator=torch.Generator().manual_seed(0))
    stores[2].append(states[2, :, :, :7])
    append_together(stores, states)
    for store, name, new in zip(stores, names, states, strict=True):
        alone = make_packed_states(CACHE_FORMATS[name])
        alone.append(new)
        assert torch.equal(store.read(torch.float32)[:, :, -40:], alone.read(torch.float32))


def test_no_store_keeps_states_of_which_one_is_refused() -> None:
    stores = [make_packed_states(CACHE_FORMATS["int4_g32"]) for _ in range(2)]
    states = torch.ones(2, 1, 1, 3, 32)
    append_together(stores, states)
    states[1, 0, 0, 2, 5] = torch.inf
    with pytest.raises(ValueError, match="scales must be finite in float16"):
        append_together(stores, states)
    assert [store.token_count for store in stores] == [3, 3]
