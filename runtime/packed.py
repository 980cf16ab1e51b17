"""Modules that hold a weight in its stored format and read it back when they run.

``PackedWeight`` is the stored matrix (its buffers are the tensors of the checkpoint, under the same names);
``QuantizedLinear``, ``QuantizedEmbedding`` and ``PackedExperts`` put it where the dense parameter was. Products go
through ``runtime.kernels.dispatch``: a kernel where there is one, else the matrix is dequantized to float32 whenever it
is used, which defines what correct means.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runtime.formats import Format, packed_row_bytes
from runtime.kernels import dispatch
from runtime.packing import pack_codes, unpack_codes
from runtime.quantization import FLOAT_DTYPES, QuantizedWeight, dequantize_codes, round_to_float


class PackedWeight(nn.Module):
    """One matrix [out_features, in_features] in its stored format.

    Buffers, integer formats: ``codes`` [out_features, ceil(in_features * bits / 8)] uint8, ``scale``
    [out_features, groups] float16, ``zero_point`` [out_features, ceil(groups * bits / 8)] uint8 when asymmetric.
    Unquantized formats: ``values`` [out_features, in_features] bfloat16 or float16.

    Args:
        format_: The format.
        shape: (out_features, in_features).
    """

    values: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, format_: Format, shape: tuple[int, int]) -> None:
        super().__init__()
        self.format = format_
        self.shape = shape
        rows, in_features = shape
        if format_.kind == "float":
            self.register_buffer("values", torch.empty(shape, dtype=FLOAT_DTYPES[format_.name], device="meta"))
            return
        groups, bits = format_.group_count(in_features), format_.bits
        self._register_bytes("codes", rows, packed_row_bytes(in_features, bits))
        self.register_buffer("scale", torch.empty((rows, groups), dtype=torch.float16, device="meta"))
        if not format_.symmetric:
            self._register_bytes("zero_point", rows, packed_row_bytes(groups, bits))

    @classmethod
    def from_dense(cls, values: Tensor, format_: Format) -> "PackedWeight":
        """Returns a weight [out_features, in_features] stored in an unquantized format.

        Raises:
            ValueError: If a weight is not finite, or outside the range of the format.
        """
        packed = cls(format_, (values.shape[0], values.shape[1]))
        packed.values = round_to_float(values, format_).to(FLOAT_DTYPES[format_.name])
        return packed

    @classmethod
    def from_quantized(cls, quantized: QuantizedWeight) -> "PackedWeight":
        """Returns a quantized weight with its codes packed."""
        format_, codes = quantized.format, quantized.codes
        packed = cls(format_, (codes.shape[0], codes.shape[1]))
        packed.codes = pack_codes(codes, format_.bits)
        packed.scale = quantized.scale
        if quantized.zero_point is not None:
            packed.zero_point = pack_codes(quantized.zero_point, format_.bits)
        return packed

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Returns the float32 matrix, or only the given rows.

        Args:
            rows: [n] int64 row indices, or None for all rows.
        """
        if self.format.kind == "float":
            return self._pick(self.values, rows).to(torch.float32)
        dense = dispatch.dequantize(self, rows)
        if dense is not None:
            return dense
        bits = self.format.bits
        codes, scale = self._pick(self.codes, rows), self._pick(self.scale, rows)
        zero_point = None
        if not self.format.symmetric:
            zero_point = unpack_codes(self._pick(self.zero_point, rows), bits, scale.shape[1])
        return dequantize_codes(unpack_codes(codes, bits, self.shape[1]), scale, zero_point, bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        # A model may be cast to another type; what is stored keeps its own and only moves.
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.format.name}, shape={self.shape}"

    def _register_bytes(self, name: str, rows: int, row_bytes: int) -> None:
        self.register_buffer(name, torch.empty((rows, row_bytes), dtype=torch.uint8, device="meta"))

    @staticmethod
    def _pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
        return tensor if rows is None else tensor[rows]


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is packed: y = x W' + bias, computed in the type of x.

    Args:
        weight: The packed weight [out_features, in_features].
        bias: [out_features], or None.
    """

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out_features] for x [..., in_features]."""
        return dispatch.linear(x, self.weight, self.bias)


class QuantizedEmbedding(nn.Module):
    """An embedding whose table is packed; only the rows of the given tokens are read.

    Args:
        weight: The packed table [num_embeddings, embedding_dim].
        scale: What the rows are multiplied by when they are read (Gemma: the root of embedding_dim).
    """

    def __init__(self, weight: PackedWeight, scale: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = weight
        self.scale = scale

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns float32 [..., embedding_dim] for tokens [...]."""
        rows: Tensor = self.weight(tokens.reshape(-1)) * self.scale
        return rows.view(*tokens.shape, self.embedding_dim)


class PackedExperts(nn.Module):
    """The matrices of all experts of one projection, each in its own format.

    Stands where the parameter [experts, out_features, in_features] was: indexing returns one expert's matrix,
    which is how the eager forward of transformers reads it.

    Args:
        experts: One packed weight an expert.
    """

    def __init__(self, experts: list[PackedWeight]) -> None:
        super().__init__()
        for i, expert in enumerate(experts):
            self.add_module(str(i), expert)

    def expert(self, index: int) -> PackedWeight:
        """Returns the packed weight of one expert."""
        packed: nn.Module | Tensor | None = self._modules[str(index)]
        assert isinstance(packed, PackedWeight)
        return packed

    def __getitem__(self, index: int | Tensor) -> Tensor:
        dense: Tensor = self.expert(int(index))()
        return dense


class _ReadsPackedWeight:
    """Gives a module that reads ``self.weight`` in a forward of its own the packed matrix instead."""

    @property
    def weight(self) -> Tensor:
        """The float32 matrix [out_features, in_features]."""
        dense: Tensor = self._modules["weight"]()  # type: ignore[attr-defined]
        return dense


def pack_in_place_(module: nn.Module, weight: PackedWeight) -> None:
    """Puts a packed weight where a module with a forward of its own (a router) keeps its parameter ``weight``."""
    del module._parameters["weight"]
    # Not add_module: the name is the property's, under which the buffers are saved all the same.
    module._modules["weight"] = weight
    module.__class__ = type(type(module).__name__, (_ReadsPackedWeight, type(module)), {})
