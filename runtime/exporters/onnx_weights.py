"""Weights of an ONNX model: which operator reads them, and their bytes in the file of external data.

``com.microsoft::MatMulNBits`` and ``GatherBlockQuantized`` read codes as one little-endian bit stream a row, float16
scales (cast to float32 when the model is loaded) and zero points packed in the same way, as ours are; codes are written
unchanged. Values are scale * (code - zero_point), the middle code where there is no zero point. Weights that are not
quantized are float16 or bfloat16 and cast as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.formats import Format

MICROSOFT = "com.microsoft"


class GraphWriter:
    """Nodes and tensors of one graph; the tensors' bytes go to a file beside it, one after the other.

    Args:
        data_path: File of the tensors' bytes; it is made anew.
    """

    def __init__(self, data_path: Path) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._path = data_path
        self._offset = 0
        self._last = 0
        data_path.write_bytes(b"")

    def add(
        self, operator: str, inputs: Sequence[str], *, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> str:
        """Adds a node and returns the name of its output; those of further outputs end in their number."""
        from onnx import helper

        self._last += 1
        name = f"{operator}_{self._last}"
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, inputs, names, name=name, domain=domain, **attributes))
        return name

    def constant(self, name: str, values: Sequence[int]) -> str:
        """Adds a short list of integers to the graph itself and returns its name."""
        from onnx import TensorProto, helper

        self.tensors.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def store(self, name: str, tensor: Tensor) -> str:
        """Adds a tensor whose bytes are in the file of data and returns its name."""
        import torch
        from onnx import TensorProto

        types = {
            torch.uint8: TensorProto.UINT8,
            torch.float16: TensorProto.FLOAT16,
            torch.bfloat16: TensorProto.BFLOAT16,
            torch.float32: TensorProto.FLOAT,
        }
        octets = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        entry = TensorProto(name=name, data_type=types[tensor.dtype], dims=list(tensor.shape))
        entry.data_location = TensorProto.EXTERNAL
        place = {"location": self._path.name, "offset": self._offset, "length": len(octets)}
        for key, value in place.items():
            entry.external_data.add(key=key, value=str(value))
        with self._path.open("ab") as file:
            file.write(octets)
        self._offset += len(octets)
        self.tensors.append(entry)
        return name

    def store_wide(self, name: str, tensor: Tensor) -> str:
        """Adds a tensor of 16-bit floats, as it is stored, and returns the name of its values in float32."""
        from onnx import TensorProto

        return self.add("Cast", [self.store(name, tensor)], to=int(TensorProto.FLOAT))


class WeightReader:
    """The operators that read one weight [out_features, in_features].

    Args:
        graph: The graph.
        name: Name of the weight.
        stored: Tensors of ``format_.stored_tensors``.
        format_: Its format: integers of 2, 4 or 8 bits in groups, or 16-bit floats.
        shape: (out_features, in_features).
    """

    def __init__(
        self, graph: GraphWriter, name: str, stored: dict[str, Tensor], format_: Format, shape: tuple[int, int]
    ) -> None:
        self._graph, self._format, self._shape = graph, format_, shape
        if format_.unquantized:
            self._inputs = [graph.store_wide(name, stored["values"])]
            return
        # Block by block, [out_features, blocks, bytes of a block]; OpenVINO takes no other shape made of this one.
        blocks = stored["codes"].view(shape[0], format_.group_count(shape[1]), -1)
        self._codes = graph.store(f"{name}.codes", blocks)
        self._inputs = [graph.store_wide(f"{name}.scale", stored["scale"])]
        if not format_.symmetric:
            self._inputs.append(graph.store(f"{name}.zero_point", stored["zero_point"]))

    def multiply(self, x: str) -> str:
        """Adds the product of x [..., in_features] with the weight and returns its name."""
        if self._format.unquantized:
            turned = self._graph.add("Transpose", self._inputs, perm=[1, 0])
            return self._graph.add("MatMul", [x, turned])
        return self._graph.add(
            "MatMulNBits",
            [x, self._codes, *self._inputs],
            domain=MICROSOFT,
            K=self._shape[1],
            N=self._shape[0],
            bits=self._format.bits,
            block_size=self._format.group_size,
        )

    def gather(self, indices: str) -> str:
        """Adds the look-up of rows and returns its name."""
        if self._format.unquantized:
            return self._graph.add("Gather", [*self._inputs, indices])
        scale, *zero_point = self._inputs
        rows = self._graph.add("Reshape", [self._codes, self._graph.constant(f"{self._codes}.rows", [0, -1])])
        return self._graph.add(
            "GatherBlockQuantized",
            [rows, indices, scale, *zero_point],
            domain=MICROSOFT,
            gather_axis=0,
            quantize_axis=1,
            block_size=self._format.group_size,
            bits=self._format.bits,
        )
