"""The compiled pass of a whole decoder, called through ctypes: one call a token. See ``cpu/decoder_step.h``."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.cpu import CpuKernels
from runtime.kernels.matrices import Matrix
from runtime.kernels.stored_planes import Packed

_NULL = 0
_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_NORMS = ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")


class _Linear(ctypes.Structure):
    _fields_ = (("weight", Matrix), ("bias", ctypes.c_uint64))


class _Layer(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_uint64) for name in _NORMS), *((name, _Linear) for name in _LINEARS))


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_uint64),
        ("last_norm", ctypes.c_uint64),
        ("head", _Linear),
        ("embedding", Matrix),
        *((name, ctypes.c_int64) for name in ("layer_count", "hidden", "heads", "key_value_heads", "head_dim")),
        ("feed_forward", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("embedding_scale", ctypes.c_float),
    )


class PackedHalf(ctypes.Structure):
    """The packed keys, or values, of a layer, as ``cpu/decoder_step.h`` describes them; valid while its tensors are."""

    _fields_ = (
        ("rows", Matrix),
        ("token_block", ctypes.c_int64),
        ("recent", ctypes.c_uint64),
        ("recent_tokens", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("ids", "hidden", "cosine", "sine", "states", "logits")),
        *((name, ctypes.c_int64) for name in ("tokens", "past", "capacity", "wanted")),
        *((name, ctypes.c_uint64) for name in ("packed", "room")),
        *((name, ctypes.c_int64) for name in ("packed_tokens", "room_capacity")),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedPast:
    """Positions before those of the states, packed.

    Args:
        halves: Keys and values of every layer in turn, an array.
        token_count: Positions that each of them holds.
        room: [2, heads, capacity, head_dim] float32, where a layer is read back; capacity for all positions.
    """

    halves: "ctypes.Array[PackedHalf]"
    token_count: int
    room: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearTensors:
    """A packed linear layer: the kernels' view of its weight, and its bias [rows] float32 or None."""

    weight: Matrix
    bias: Tensor | None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTensors:
    """One layer; norms are [hidden] float32, those of queries and keys [head_dim] or None."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: LinearTensors
    key: LinearTensors
    value: LinearTensors
    output: LinearTensors
    gate: LinearTensors
    up: LinearTensors
    down: LinearTensors


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderTensors:
    """A decoder of Llama's shape.

    Args:
        layers: Its layers.
        last_norm: [hidden] float32.
        head: The output projection.
        heads: Query heads, a multiple of ``key_value_heads``.
        key_value_heads: Heads of keys and values.
        head_dim: Numbers of a head, a multiple of 16, as are the sizes of hidden states and feed-forward.
        epsilon: Of the norms.
        attention_scale: Factor of query times key.
        embedding: The kernels' view of the table of tokens [vocabulary, hidden]; None where embeddings are given.
        embedding_scale: Its factor.
    """

    layers: Sequence[LayerTensors]
    last_norm: Tensor
    head: LinearTensors
    heads: int
    key_value_heads: int
    head_dim: int
    epsilon: float
    attention_scale: float
    embedding: Matrix | None = None
    embedding_scale: float = 1.0

    def make_states(self, capacity: int) -> Tensor:
        """Returns room for the keys and values of ``capacity`` positions: [layers, 2, heads, capacity, head_dim]."""
        shape = (len(self.layers), 2, self.key_value_heads, capacity, self.head_dim)
        return torch.empty(shape, dtype=torch.float32)


class CompiledDecoder:
    """A decoder as the library reads it; it keeps the tensors alive.

    Args:
        tensors: The decoder. Float tensors are contiguous on the CPU.
        read: Weights that can be read at several widths, and the widths at which the decoder reads them.
    """

    def __init__(self, tensors: DecoderTensors, read: Sequence[tuple[Packed, int]] = ()) -> None:
        self.tensors = tensors
        self._read = read
        self._layers = (_Layer * len(tensors.layers))(*map(_describe_layer, tensors.layers))
        self._view = _Decoder(
            ctypes.addressof(self._layers),
            tensors.last_norm.data_ptr(),
            _describe_linear(tensors.head),
            Matrix() if tensors.embedding is None else tensors.embedding,
            len(tensors.layers),
            tensors.last_norm.shape[0],
            tensors.heads,
            tensors.key_value_heads,
            tensors.head_dim,
            tensors.layers[0].gate.weight.rows,
            tensors.epsilon,
            tensors.attention_scale,
            tensors.embedding_scale,
        )

    @property
    def is_current(self) -> bool:
        """Whether it reads weights at the widths that they are read at now."""
        return all(weight.width == width for weight, width in self._read)

    def __deepcopy__(self, memo: dict[int, object]) -> "CompiledDecoder":
        # A cache is copied to go on from it several times: the decoder is the same, and read by its addresses.
        return self

    def run(
        self,
        kernels: CpuKernels,
        inputs: Tensor,
        rotation: tuple[Tensor, Tensor],
        states: Tensor,
        past: int,
        wanted: int,
        packed: PackedPast | None = None,
    ) -> Tensor:
        """Returns the logits [wanted, vocabulary] of the last tokens; their keys and values are put into ``states``.

        Args:
            kernels: The library at an instruction set.
            inputs: The embeddings [tokens, hidden] float32; or the tokens [tokens] int64, where ``embedding`` is there
                and has so many rows. Contiguous.
            rotation: Cosines and sines of the tokens' positions, [tokens, head_dim] float32, contiguous.
            states: As ``DecoderTensors.make_states`` returns it, with room behind ``past`` positions.
            past: Positions before the first token.
            wanted: How many of the last tokens, at least one.
            packed: Positions before these that are packed; None for none.

        Raises:
            MemoryError: If there is no memory for the states of the tokens.
        """
        tokens = inputs.shape[0]
        given = (inputs.data_ptr(), _NULL) if inputs.dtype == torch.int64 else (_NULL, inputs.data_ptr())
        logits = torch.empty((wanted, self.tensors.head.weight.rows), dtype=torch.float32)
        cosine, sine = rotation
        addresses = (t.data_ptr() for t in (cosine, sine, states, logits))
        step = _Step(*given, *addresses, tokens, past, states.shape[3], wanted)
        if packed is not None:
            step.packed, step.room = ctypes.addressof(packed.halves), packed.room.data_ptr()
            step.packed_tokens, step.room_capacity = packed.token_count, packed.room.shape[2]
        kernels.step(self._view, step)
        return logits


def _describe_linear(linear: LinearTensors) -> _Linear:
    return _Linear(linear.weight, _address(linear.bias))


def _describe_layer(layer: LayerTensors) -> _Layer:
    norms = (_address(getattr(layer, name)) for name in _NORMS)
    return _Layer(*norms, *(_describe_linear(getattr(layer, name)) for name in _LINEARS))


def _address(tensor: Tensor | None) -> int:
    return _NULL if tensor is None else tensor.data_ptr()
