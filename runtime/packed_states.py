"""Packed keys or values of past tokens, token by token or in blocks of tokens. They grow by tokens.

Buffers are those of ``PackedWeight``, a token's or a block's rows together, so that bytes held are bytes priced
(``cache_formats.cache_bytes``) and what comes back is what the format renders. Room for a quarter more tokens is set
aside when it runs out, so that a token costs the same however many there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.apply import pack_weight
from runtime.cache_formats import TokenBlockFormat
from runtime.formats import Format
from runtime.packed import PackedWeight
from runtime.packed_rows import PackedRows


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

    @abstractmethod
    def append(self, states: Tensor) -> None:
        """Keeps the states [batch, heads, tokens, head_dim] of further tokens.

        Raises:
            ValueError: If a state is outside the range of the format.
        """

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
        # Buffer of ``PackedWeight`` -> [at least token_count, batch, heads, ...], its rows in that order.
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

    def append(self, states: Tensor) -> None:
        self._append_rows(states.shape, dict(pack_weight(_list_rows(states), self._format).named_buffers()))

    def _append_rows(self, shape: torch.Size, packed: dict[str, Tensor]) -> None:
        batch, heads, tokens, self._row_length = shape
        for name, buffer in packed.items():
            new = buffer.view(tokens, batch, heads, *buffer.shape[1:])
            self._rooms[name] = _put(self._rooms[name], new, self._count) if name in self._rooms else new
        self._count += tokens

    def packed_rows(self) -> PackedRows:
        return PackedRows(
            format=self._format,
            buffers=self._buffers,
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
        self._rooms = {name: b.index_select(1, sequences.to(b.device)) for name, b in self._buffers.items()}

    def truncate(self, token_count: int) -> None:
        # Copied: a view would keep the memory of the rest, and what was read of it before may still be in use.
        self._rooms = {name: b[:token_count].clone() for name, b in self._buffers.items() if token_count}
        self._count = min(self._count, token_count)


def append_together(stores: Sequence[PackedStates], states: Sequence[Tensor]) -> None:
    """Appends states [batch, heads, tokens, head_dim] to each of several stores.

    Those of one format are packed in one go, which takes hardly longer than packing one of them. Formats must be such
    that rows share nothing, as integers and 16-bit floating point.

    Raises:
        ValueError: If a state is outside the range of its format.
    """
    by_format: dict[Format, list[tuple[PackedTokens, Tensor]]] = {}
    for store, new in zip(stores, states, strict=True):
        if isinstance(store, PackedTokens):
            by_format.setdefault(store._format, []).append((store, new))
        else:
            store.append(new)
    for format_, pairs in by_format.items():
        rows = [_list_rows(new) for _, new in pairs]
        packed = pack_weight(torch.cat(rows), format_)
        parts = {name: torch.split(buffer, [len(r) for r in rows]) for name, buffer in packed.named_buffers()}
        for i, (store, new) in enumerate(pairs):
            store._append_rows(new.shape, {name: part[i] for name, part in parts.items()})


def _list_rows(states: Tensor) -> Tensor:
    """Returns states [batch, heads, tokens, head_dim] as float32 rows, token by token."""
    return states.to(torch.float32).permute(2, 0, 1, 3).reshape(-1, states.shape[3])


def _put(room: Tensor, new: Tensor, count: int) -> Tensor:
    """Returns room whose first ``count`` tokens are kept and followed by new ones; a larger one if they do not fit."""
    needed = count + new.shape[0]
    # What was made in inference mode cannot be written to outside of it.
    if room.shape[0] < needed or (room.is_inference() and not torch.is_inference_mode_enabled()):
        kept, room = room[:count], room.new_empty((needed + needed // 4, *room.shape[1:]))
        room[:count] = kept
    room[count:needed] = new
    return room


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

    def append(self, states: Tensor) -> None:
        new = states.to(torch.float16)
        if not bool(torch.isfinite(new).all()):
            msg = (
                f"cached states must be finite in float16: got a largest one of {states.abs().max().item():g}. Use a "
                "format without token blocks, or bf16."
            )
            raise ValueError(msg)
        waiting = new if self._recent is None else torch.cat([self._recent, new], dim=2)
        whole = waiting.shape[2] // self._length * self._length
        if whole:
            batch, heads, _, head_dim = waiting.shape
            blocks = waiting[:, :, :whole].reshape(batch, heads, -1, self._length, head_dim).transpose(-1, -2)
            # [batch, heads, blocks, head_dim, block] -> [batch, heads * head_dim, blocks, block]
            self._blocks.append(blocks.transpose(2, 3).flatten(1, 2))
        self._recent = waiting[:, :, whole:].clone()

    def packed_rows(self) -> PackedRows:
        assert self._recent is not None
        blocks = self._blocks.packed_rows()
        return PackedRows(
            format=blocks.format,
            buffers=blocks.buffers,
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
        self._recent = kept.to(torch.float16)
