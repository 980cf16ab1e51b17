"""The compiled decoder over a cache that stays packed.

    packed past of a layer --read back, one layer at a time--> room [2, heads, positions, head_dim] float32
    keys and values of the step (float32) --behind them in the room; packed when the step ends--> the past

So beside the packed cache there are the float32 states of one layer, and those of the step at hand, whose tokens see
each other as they are (past-only quantization, as ``quantized_cache`` has it).
"""

import torch
from torch import Tensor

from runtime.cache_formats import TokenBlockFormat
from runtime.formats import Format
from runtime.kernels.cpu import CpuKernels
from runtime.kernels.decoder_step import CompiledDecoder, PackedHalf, PackedPast
from runtime.kernels.matrices import Matrix, StoredMatrix, describe_floats, describe_matrix
from runtime.kernels.stored_planes import has_codes
from runtime.packed_states import PackedStates, append_together
from runtime.quantized_cache import QuantizedCache, QuantizedCacheLayer

# Room grows by at least so many positions.
_LEAST_ROOM = 256
# Where the address of a tensor of ``PackedWeight`` stands in ``Matrix``.
_FIELDS = {"codes": "codes", "scale": "scale", "zero_point": "zero_point", "values": "codes"}


def find_cache_obstacle(cache: QuantizedCache) -> str | None:
    """Returns why the compiled decoder does not go on with a cache; None where it does."""
    formats = (format_ for layer in _list_layers(cache) for format_ in layer.formats)
    other = next((format_.name for format_ in formats if not _is_read(format_)), None)
    if other is None:
        return None
    return (
        "Keys and values must be integers with scales in float16, or 16-bit floating point, for the compiled decoder: "
        f"got '{other}'."
    )


def _list_layers(cache: QuantizedCache) -> list[QuantizedCacheLayer]:
    return [layer for layer in cache.layers if isinstance(layer, QuantizedCacheLayer)]


def _is_read(format_: Format) -> bool:
    row = format_.row_format if isinstance(format_, TokenBlockFormat) else format_
    return row.kind == "float" or (row.kind == "int" and has_codes(row))


class PackedSequence:
    """One sequence of a compiled decoder, whose past is packed.

    Args:
        cache: The cache, without a ``find_cache_obstacle``.
        decoder: The decoder, as it was when the sequence began.
    """

    def __init__(self, cache: QuantizedCache, decoder: CompiledDecoder) -> None:
        self.as_cache = cache
        self.decoder = decoder
        self.rotation: tuple[Tensor, Tensor] | None = None
        self._states = decoder.tensors.make_states(1)
        self._room = self._make_room(_LEAST_ROOM)
        # Keys and values of every layer in turn, as they are for the step at hand.
        self._halves: list[PackedStates] = []
        formats = [format_ for layer in _list_layers(cache) for format_ in layer.formats]
        # What the library sees of them: what their formats say, and where they lie at a step.
        self._views = (PackedHalf * len(formats))(*(self._describe(format_) for format_ in formats))
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

    def begin_step(self, token_count: int) -> None:
        """Makes room for the tokens of a step, and looks where the past lies now."""
        past = self.length
        if self._states.shape[3] != token_count:
            self._states = self.decoder.tensors.make_states(token_count)
        if past + token_count > self.capacity:
            self._room = self._make_room(max(past + token_count, self.capacity + _LEAST_ROOM))
        self._halves = [half for layer in _list_layers(self.as_cache) for half in layer.past]
        self._done, self._packed = 0, None
        if past:
            for view, half in zip(self._views, self._halves, strict=True):
                self._point(view, half)
            self._packed = PackedPast(halves=self._views, token_count=past, room=self._room)

    def run(self, kernels: CpuKernels, inputs: Tensor, rotation: tuple[Tensor, Tensor], wanted: int) -> Tensor:
        """Returns the logits of the last tokens of a part of a step, as ``CompiledDecoder.run``, and keeps the part."""
        logits = self.decoder.run(
            kernels, inputs, rotation, self._states, past=self._done, wanted=wanted, packed=self._packed
        )
        self._done += inputs.shape[0]
        return logits

    def end_step(self) -> None:
        """Packs the keys and values of the step.

        Raises:
            ValueError: If one is outside the range of its format.
        """
        append_together(self._halves, self._states.flatten(0, 1).unsqueeze(1))

    def _make_room(self, capacity: int) -> Tensor:
        t = self.decoder.tensors
        return torch.empty((2, t.key_value_heads, capacity, t.head_dim), dtype=torch.float32)

    def _describe(self, format_: Format) -> PackedHalf:
        """Returns the library's view of packed states in a format, which do not lie anywhere yet."""
        if isinstance(format_, TokenBlockFormat):
            rows = _describe_rows(format_.row_format, format_.token_block)
            return PackedHalf(rows=rows, token_block=format_.token_block)
        return PackedHalf(rows=_describe_rows(format_, self.decoder.tensors.head_dim), token_block=0)

    def _point(self, view: PackedHalf, half: PackedStates) -> None:
        """Lets a view show where packed states lie now, and how many they are."""
        packed, rows, heads = half.packed_rows(), view.rows, self.decoder.tensors.key_value_heads
        for name, room in packed.rooms.items():
            assert room.is_cpu and room.is_contiguous()
            setattr(rows, _FIELDS[name], room.data_ptr())
        rows.rows = heads * packed.token_count
        if packed.token_block:
            assert packed.recent is not None and packed.recent.is_contiguous()
            rows.rows = heads * packed.head_dim * (packed.token_count // packed.token_block)
            view.recent, view.recent_tokens = packed.recent.data_ptr(), packed.recent.shape[2]


def _describe_rows(format_: Format, columns: int) -> Matrix:
    row = {t.name: torch.empty(t.shape, dtype=getattr(torch, t.dtype)) for t in format_.stored_tensors((1, columns))}
    if format_.kind == "float":
        [numbers] = row.values()
        return describe_floats(numbers)
    return describe_matrix(StoredMatrix(row["codes"], row["scale"], row.get("zero_point"), format_.bits, columns))
