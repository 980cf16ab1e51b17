"""Packed keys or values of past tokens, token by token or in blocks of tokens. They grow by tokens.

Buffers are those of ``PackedWeight``, a token's or a block's rows together, so that bytes held are bytes priced
(``cache_formats.cache_bytes``) and what comes back is what the format renders. Room for a quarter more tokens is set
aside when it runs out, so that a token costs the same however many there are; stores that are appended to together
have it in one piece, so that a token of all of them costs hardly more than one of one.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Self

import torch
from torch import Tensor

from runtime.cache_formats import TokenBlockFormat
from runtime.formats import Format
from runtime.packed import PackedWeight
from runtime.packed_rows import PackedRows
from runtime.rendering import encode


def make_packed_states(format_: Format) -> "PackedStates":
    """Returns an empty store of states in a cache format."""
    if isinstance(format_, TokenBlockFormat):
        return PackedTokenBlocks(format_.row_format, format_.token_block)
    return PackedTokens(format_)


class PackedStates(ABC):
    """States of past tokens of all sequences."""

    @property
    @abstractmethod
    def token_count(self) -> int:
        """Tokens held for each sequence."""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes of the tokens held, without the room set aside for more."""

    @property
    @abstractmethod
    def likeness(self) -> Hashable:
        """What stores of a class have in common if states can be appended to them together."""

    @classmethod
    @abstractmethod
    def append_all(cls, stores: Sequence[Self], states: Tensor) -> None:
        """Keeps the states [stores, batch, heads, tokens, head_dim] of further tokens of stores that are alike.

        Raises:
            ValueError: If a state is outside the range of the format; no store keeps any then.
        """

    def append(self, states: Tensor) -> None:
        """Keeps the states [batch, heads, tokens, head_dim] of further tokens.

        Raises:
            ValueError: If a state is outside the range of the format.
        """
        type(self).append_all([self], states[None])

    @abstractmethod
    def read(self, dtype: torch.dtype, first: int = 0) -> Tensor:
        """Returns the states [batch, heads, tokens, head_dim] as they come back, from a token on.

        Args:
            dtype: Their type.
            first: Not past the packed tokens, and where a block begins.
        """

    @abstractmethod
    def packed_rows(self) -> PackedRows:
        """Returns what is packed; at least one token has been kept."""

    @abstractmethod
    def select(self, sequences: Tensor) -> None:
        """Keeps these sequences of the batch, in this order; one may come several times."""

    @abstractmethod
    def truncate(self, token_count: int) -> None:
        """Keeps the first tokens."""


class PackedTokens(PackedStates):
    """Every last axis of the states is a row of its own; the third axis grows.

    Args:
        format_: The format of every row.
    """

    def __init__(self, format_: Format) -> None:
        self._format = format_
        # Buffer of ``PackedWeight`` -> [stores, at least token_count, batch, heads, ...], its rows in that order: room
        # of this store, which is that of index ``_index``, and of others.
        self._shared: dict[str, Tensor] = {}
        self._index = 0
        # The part of this store.
        self._rooms: dict[str, Tensor] = {}
        self._count = 0
        self._row_length = 0

    @property
    def token_count(self) -> int:
        return self._count

    @property
    def _buffers(self) -> dict[str, Tensor]:
        return {name: room[: self._count] for name, room in self._rooms.items()}

    @property
    def stored_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    @property
    def likeness(self) -> Hashable:
        return self._format, self._count

    @classmethod
    def append_all(cls, stores: Sequence[Self], states: Tensor) -> None:
        first, (_, batch, heads, tokens, row_length) = stores[0], states.shape
        # Store by store and token by token.
        rows = states.to(torch.float32).permute(0, 3, 1, 2, 4).reshape(-1, row_length)
        packed = {
            name: buffer.view(len(stores), tokens, batch, heads, *buffer.shape[1:])
            for name, buffer in encode(rows, first._format).items()
        }
        held, needed = first._count, first._count + tokens
        if not held:
            cls._share(stores, packed)
        else:
            if not cls._have_room(stores, needed):
                cls._share(stores, cls._make_room(stores, needed))
            for name, new in packed.items():
                first._shared[name][first._index : first._index + len(stores), held:needed] = new
        for store in stores:
            store._count, store._row_length = needed, row_length

    @classmethod
    def _share(cls, stores: Sequence[Self], shared: dict[str, Tensor]) -> None:
        """Lets stores lie in tensors [stores, ...], in this order."""
        for i, store in enumerate(stores):
            store._shared, store._index = shared, i
            store._rooms = {name: room[i] for name, room in shared.items()}

    @classmethod
    def _have_room(cls, stores: Sequence[Self], needed: int) -> bool:
        """Returns True if stores lie one behind the other in one room for so many tokens, which can be written to."""
        shared, index = stores[0]._shared, stores[0]._index
        room = next(iter(shared.values()))
        # What was made in inference mode cannot be written to outside of it.
        writable = not room.is_inference() or torch.is_inference_mode_enabled()
        together = all(store._shared is shared and store._index == i for i, store in enumerate(stores, index))
        return writable and together and room.shape[1] >= needed

    @classmethod
    def _make_room(cls, stores: Sequence[Self], needed: int) -> dict[str, Tensor]:
        """Returns room for more than so many tokens of each store, with those that it holds."""
        grown = {}
        for name, held in stores[0]._rooms.items():
            grown[name] = held.new_empty((len(stores), needed + needed // 4, *held.shape[1:]))
            for room, store in zip(grown[name], stores, strict=True):
                room[: store._count] = store._buffers[name]
        return grown

    def packed_rows(self) -> PackedRows:
        return PackedRows(
            format=self._format,
            rooms=self._rooms,
            head_dim=self._row_length,
            token_block=0,
            token_count=self.token_count,
        )

    def read(self, dtype: torch.dtype, first: int = 0) -> Tensor:
        buffers = {name: buffer[first:] for name, buffer in self._buffers.items()}
        tokens, batch, heads = next(iter(buffers.values())).shape[:3]
        if not tokens:
            return torch.empty(
                (batch, heads, 0, self._row_length), dtype=dtype, device=next(iter(buffers.values())).device
            )
        packed = PackedWeight(self._format, (tokens * batch * heads, self._row_length))
        packed.load_state_dict({name: b.flatten(0, 2) for name, b in buffers.items()}, assign=True)
        rows: Tensor = packed()
        return rows.view(tokens, batch, heads, self._row_length).permute(1, 2, 0, 3).to(dtype)

    def select(self, sequences: Tensor) -> None:
        chosen = {name: b.index_select(1, sequences.to(b.device))[None] for name, b in self._buffers.items()}
        self._share([self], chosen)

    def truncate(self, token_count: int) -> None:
        # Copied: a view would keep the memory of the rest, and what was read of it before may still be in use.
        self._share([self], {name: b[None, :token_count].clone() for name, b in self._buffers.items() if token_count})
        self._count = min(self._count, token_count)


def append_together(stores: Sequence[PackedStates], states: Tensor) -> None:
    """Appends states [stores, batch, heads, tokens, head_dim] to each of several stores.

    Those that are alike are packed in one go, which takes hardly longer than packing one of them. Formats must be such
    that rows share nothing, as integers and 16-bit floating point.

    Raises:
        ValueError: If a state is outside the range of its format.
    """
    places: dict[Hashable, list[int]] = {}
    for i, store in enumerate(stores):
        places.setdefault((type(store), store.likeness), []).append(i)
    for alike in places.values():
        some = [stores[i] for i in alike]
        type(some[0]).append_all(some, states if len(some) == len(stores) else states[alike])


class PackedTokenBlocks(PackedStates):
    """Every channel of a block of tokens is a row; tokens wait in float16 until their block is complete.

    Args:
        row_format: The format of a row.
        token_block: Tokens of a block.
    """

    def __init__(self, row_format: Format, token_block: int) -> None:
        self._length = token_block
        # A block takes the place of a token, its [head_dim, token_block] numbers that of more heads.
        self._blocks = PackedTokens(row_format)
        self._recent: Tensor | None = None  # [batch, heads, less than a block, head_dim] float16

    @property
    def token_count(self) -> int:
        recent = 0 if self._recent is None else self._recent.shape[2]
        return self._blocks.token_count * self._length + recent

    @property
    def stored_bytes(self) -> int:
        recent = 0 if self._recent is None else self._recent.numel() * self._recent.element_size()
        return self._blocks.stored_bytes + recent

    @property
    def likeness(self) -> Hashable:
        return self._blocks.likeness, self._length, self.token_count

    @classmethod
    def append_all(cls, stores: Sequence[Self], states: Tensor) -> None:
        new, first = states.to(torch.float16), stores[0]
        if not bool(torch.isfinite(new).all()):
            msg = (
                f"cached states must be finite in float16: got a largest one of {states.abs().max().item():g}. Use a "
                "format without token blocks, or bf16."
            )
            raise ValueError(msg)
        recent = [store._recent for store in stores if store._recent is not None]
        waiting = torch.cat([torch.stack(recent), new], dim=3) if first.token_count else new
        whole = waiting.shape[3] // first._length * first._length
        if whole:
            *leading, _, head_dim = waiting.shape
            blocks = waiting[..., :whole, :].reshape(*leading, -1, first._length, head_dim).transpose(-1, -2)
            # [stores, batch, heads, blocks, head_dim, block] -> [stores, batch, heads * head_dim, blocks, block]
            PackedTokens.append_all([store._blocks for store in stores], blocks.transpose(3, 4).flatten(2, 3))
        for store, kept in zip(
            stores, waiting[..., whole:, :].clone(memory_format=torch.contiguous_format), strict=True
        ):
            store._recent = kept

    def packed_rows(self) -> PackedRows:
        assert self._recent is not None
        blocks = self._blocks.packed_rows()
        return PackedRows(
            format=blocks.format,
            rooms=blocks.rooms,
            head_dim=self._recent.shape[3],
            token_block=self._length,
            token_count=blocks.token_count * self._length,
            recent=self._recent,
        )

    def read(self, dtype: torch.dtype, first: int = 0) -> Tensor:
        assert self._recent is not None
        recent = self._recent.to(dtype)
        if self._blocks.token_count == first // self._length:
            return recent
        batch, heads, _, head_dim = recent.shape
        blocks = self._blocks.read(dtype, first // self._length).reshape(batch, heads, head_dim, -1, self._length)
        # [batch, heads, head_dim, blocks, block] -> [batch, heads, tokens, head_dim]
        return torch.cat([blocks.flatten(3, 4).transpose(2, 3), recent], dim=2)

    def select(self, sequences: Tensor) -> None:
        self._blocks.select(sequences)
        if self._recent is not None:
            self._recent = self._recent.index_select(0, sequences.to(self._recent.device))

    def truncate(self, token_count: int) -> None:
        if self._recent is None:
            return
        blocks = min(token_count // self._length, self._blocks.token_count)
        # Tokens of a block that is opened again keep what they have lost.
        kept = self.read(torch.float32)[:, :, blocks * self._length : token_count]
        self._blocks.truncate(blocks)
        self._recent = kept.to(torch.float16).contiguous()
