"""The compiled decoder over a cache that stays packed.

    packed past of a layer --read back, one layer at a time--> room [2, heads, positions, head_dim] float32
    keys and values of the step (float32) --behind them in the room; packed when the step ends--> the past

So beside the packed cache there are the float32 states of one layer, and those of the step at hand, whose tokens see
each other as they are (past-only quantization, as ``quantized_cache`` has it).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.cache_formats import TokenBlockFormat
from runtime.formats import Format
from runtime.kernels.cpu import CpuKernels
from runtime.kernels.decoder_step import CompiledDecoder, PackedHalf, PackedPast
from runtime.kernels.matrices import Matrix, StoredMatrix, describe_floats, describe_matrix
from runtime.kernels.stored_planes import has_codes
from runtime.packed import PackedWeight
from runtime.packed_states import PackedStates, append_together
from runtime.quantized_cache import QuantizedCache, QuantizedCacheLayer

# Room grows by at least so many positions.
_LEAST_ROOM = 256
_NULL = 0


def list_halves(cache: QuantizedCache) -> list[PackedStates] | None:
    """Returns keys and values of every layer in turn; None where the compiled decoder does not read their formats."""
    halves: list[PackedStates] = []
    for layer in cache.layers:
        if not isinstance(layer, QuantizedCacheLayer) or not all(map(_is_read, layer.formats)):
            return None
        halves += layer.past
    return halves


def find_cache_obstacle(cache: QuantizedCache) -> str | None:
    """Returns why the compiled decoder does not go on with a cache; None where it does."""
    formats = [format_ for layer in cache.layers if isinstance(layer, QuantizedCacheLayer) for format_ in layer.formats]
    other = next((format_.name for format_ in formats if not _is_read(format_)), None)
    if other is None:
        return None
    return (
        "Keys and values must be integers with scales in float16, or 16-bit floating point, for the compiled decoder: "
        f"got '{other}'."
    )


def _is_read(format_: Format) -> bool:
    row = format_.row_format if isinstance(format_, TokenBlockFormat) else format_
    return row.kind == "float" or (row.kind == "int" and has_codes(row))


class PackedSequence:
    """One sequence of a compiled decoder, whose past is packed.

    Args:
        cache: The cache, in formats of ``list_halves``.
        decoder: The decoder, as it was when the sequence began.
        read: Weights that can be read at several widths, and the widths at which the decoder reads them.
    """

    def __init__(
        self, cache: QuantizedCache, decoder: CompiledDecoder, read: Sequence[tuple[PackedWeight, int]] = ()
    ) -> None:
        self.as_cache = cache
        self.decoder = decoder
        self.read = read
        self.rotation: tuple[Tensor, Tensor] | None = None
        self._states = decoder.tensors.make_states(1)
        self._room = self._make_room(_LEAST_ROOM)
        self._packed: PackedPast | None = None
        # Tokens of the step that have been run.
        self._done = 0

    @property
    def length(self) -> int:
        """Tokens that are packed."""
        return int(self.as_cache.get_seq_length())

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self._room.shape[2]

    @property
    def is_current(self) -> bool:
        """Whether the decoder reads weights at the widths that they are read at now."""
        return all(weight.width == width for weight, width in self.read)

    def begin_step(self, token_count: int) -> None:
        """Makes room for the tokens of a step, and looks where the past lies now."""
        past = self.length
        if self._states.shape[3] != token_count:
            self._states = self.decoder.tensors.make_states(token_count)
        if past + token_count > self.capacity:
            self._room = self._make_room(max(past + token_count, self.capacity + _LEAST_ROOM))
        self._done, self._packed = 0, None
        if past:
            halves = [_describe_half(half) for half in self._halves()]
            self._packed = PackedPast(halves=halves, token_count=past, room=self._room)

    def run(self, kernels: CpuKernels, hidden: Tensor, rotation: tuple[Tensor, Tensor], wanted: int) -> Tensor:
        """Returns the logits of the last tokens of a part of a step, as ``CompiledDecoder.run``, and keeps the part."""
        logits = self.decoder.run(
            kernels, hidden, rotation, self._states, past=self._done, wanted=wanted, packed=self._packed
        )
        self._done += hidden.shape[0]
        return logits

    def end_step(self) -> None:
        """Packs the keys and values of the step.

        Raises:
            ValueError: If one is outside the range of its format.
        """
        append_together(self._halves(), self._states.flatten(0, 1).unsqueeze(1))

    def _halves(self) -> list[PackedStates]:
        halves = list_halves(self.as_cache)
        assert halves is not None
        return halves

    def _make_room(self, capacity: int) -> Tensor:
        t = self.decoder.tensors
        return torch.empty((2, t.key_value_heads, capacity, t.head_dim), dtype=torch.float32)


def _describe_half(states: PackedStates) -> PackedHalf:
    """Returns the library's view of packed states, which keeps their tensors."""
    packed = states.packed_rows()
    recent = None if packed.recent is None else packed.recent.contiguous()
    buffers = {name: buffer.flatten(0, 2) for name, buffer in packed.buffers.items()}
    half = PackedHalf(
        rows=_describe_rows(packed.format, buffers, packed.token_block or packed.head_dim),
        token_block=packed.token_block,
        recent=_NULL if recent is None else recent.data_ptr(),
        recent_tokens=0 if recent is None else recent.shape[2],
    )
    half.kept = (buffers, recent)
    return half


def _describe_rows(format_: Format, buffers: dict[str, Tensor], columns: int) -> Matrix:
    if not buffers:
        return Matrix(columns=columns, group_size=columns, inputs=columns)
    if format_.kind == "float":
        [numbers] = buffers.values()
        return describe_floats(numbers)
    stored: Any = StoredMatrix(buffers["codes"], buffers["scale"], buffers.get("zero_point"), format_.bits, columns)
    return describe_matrix(stored)
