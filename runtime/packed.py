"""Modules that hold a weight in its stored format and read it back when they run.

``PackedWeight`` is the stored matrix (its buffers are the tensors of the checkpoint, under the same names);
``QuantizedLinear``, ``QuantizedEmbedding`` and ``PackedExperts`` put it where the dense parameter was. Products go
through ``runtime.kernels.dispatch``: a kernel where there is one, else the matrix is dequantized to float32 whenever it
is used, which defines what correct means.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runtime.activation_formats import ActivationRounding
from runtime.codecs import CODECS, StoredTensors
from runtime.codecs.integer import pack_quantized
from runtime.kernels import dispatch
from runtime.kernels.weight_views import release_elsewhere_
from runtime.quantization import QuantizedWeight
from runtime.storage import Format


class PackedWeight(nn.Module):
    """One matrix [out_features, in_features] in its stored format.

    Its buffers are ``format_.stored_tensors(shape)``, empty and on the meta device until they are filled. It is read at
    ``width`` bits, one of ``format_.widths``: the full one, until ``runtime.read_widths`` says otherwise.

    Args:
        format_: The format.
        shape: (out_features, in_features).

    Raises:
        ValueError: If the weight does not fit the format.
    """

    def __init__(self, format_: Format, shape: tuple[int, int]) -> None:
        super().__init__()
        self.format = format_
        self.width = format_.bits
        self.shape = shape
        for tensor in format_.stored_tensors(shape):
            empty = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
            self.register_buffer(tensor.name, empty)

    @classmethod
    def from_tensors(cls, tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> "PackedWeight":
        """Returns a weight that holds the tensors an encoder has made, by name."""
        packed = cls(format_, shape)
        for name in packed._buffers:
            setattr(packed, name, tensors[name])
        return packed

    @classmethod
    def from_quantized(cls, quantized: QuantizedWeight) -> "PackedWeight":
        """Returns a quantized weight with its codes packed."""
        shape = (quantized.codes.shape[0], quantized.codes.shape[1])
        return cls.from_tensors(pack_quantized(quantized), quantized.format, shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return dict(self.named_buffers())

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """Returns the float32 matrix, or only the given rows.

        Args:
            rows: [n] int64 row indices, or None for all rows.
        """
        dense = dispatch.dequantize(self, rows)
        if dense is not None:
            return dense
        codec = CODECS[self.format.kind]
        if codec.at_width is not None:
            return codec.at_width(self.tensors, self.format, self.shape, self.width, rows)
        return codec.decode(self.tensors, self.format, self.shape, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        # A model may be cast to another type; what is stored keeps its own and only moves.
        stored = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        for name, before in stored.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        release_elsewhere_(self)
        return self

    def extra_repr(self) -> str:
        return f"{self.format.name}, shape={self.shape}"


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

    def forward(self, x: Tensor, rounding: ActivationRounding | None = None) -> Tensor:
        """Returns [..., out_features] for x [..., in_features].

        Args:
            x: What the layer reads.
            rounding: How it rounds it first (``simulated_activations`` passes it); None to leave it as it is.
        """
        return dispatch.linear(x, self.weight, self.bias, rounding)


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
