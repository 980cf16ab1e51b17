"""Rendered weights in files: what a slow quantizer has made once is read the next time.

A file belongs to one weight, its values and a format, so that it can never be of other values; the directory belongs to
one quantizer with its statistics. Codes are packed: a file is as long as the weight in its format, and reading it back
gives the same codes, bit for bit. GPTQ takes 0.12 seconds for a weight of 576 x 1536, the search of a block format up
to 0.4, reading its file 4 milliseconds.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.files import atomic_path
from runtime.formats import Format
from runtime.packing import pack_codes, unpack_codes
from runtime.quantization import QuantizedWeight

DEFAULT_MOST_BYTES = 16 * 2**30
_QUANTIZER = "quantizer"


class RenderedFiles:
    """A directory of rendered weights, up to a bound on its bytes; what does not fit is not kept.

    Args:
        directory: Where they are; made when the first is kept. Safe to delete at any time.
        most_bytes: Bound on the bytes of all files.
    """

    def __init__(self, directory: Path, *, most_bytes: int = DEFAULT_MOST_BYTES) -> None:
        self._directory = directory
        self._left_bytes = most_bytes - sum(path.stat().st_size for path in directory.glob("*.safetensors"))

    def read_or_make(
        self, name: str, values: Tensor, format_: Format, make: Callable[[], QuantizedWeight]
    ) -> QuantizedWeight:
        """Returns a quantized weight: that of its file, or made and kept where it is absent or damaged.

        Args:
            name: Name of the weight.
            values: Its values [out_features, in_features].
            format_: An integer format.
            make: Quantizes the values.
        """
        path = self._path(name, values, format_)
        kept = _read(path)
        if kept is not None:
            return _unpack(kept[0], format_, values.shape[1], kept[1])
        quantized = make()
        tensors = {"codes": pack_codes(quantized.codes, format_.bits), "scale": quantized.scale}
        if quantized.zero_point is not None:
            tensors["zero_point"] = quantized.zero_point
        self._keep(path, tensors, quantized.quantizer)
        return quantized

    def read_or_make_tensors(
        self, name: str, values: Tensor, format_: Format, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Returns the stored tensors of a weight: those of its file, or made and kept where it is absent or damaged.

        Args:
            name: Name of the weight.
            values: Its values [out_features, in_features].
            format_: A format that is rendered by its own encoder.
            make: Encodes the values.
        """
        path = self._path(name, values, format_)
        kept = _read(path)
        if kept is not None:
            return kept[0]
        tensors = make()
        self._keep(path, tensors, "")
        return tensors

    def _path(self, name: str, values: Tensor, format_: Format) -> Path:
        digest = hashlib.blake2b(values.contiguous().numpy().data, digest_size=12).hexdigest()
        return self._directory / f"{name}-{format_.name}-{digest}.safetensors"

    def _keep(self, path: Path, tensors: Mapping[str, Tensor], quantizer: str) -> None:
        file_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if file_bytes > self._left_bytes:
            return
        self._left_bytes -= file_bytes
        with atomic_path(path) as temporary:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={_QUANTIZER: quantizer})


def _read(path: Path) -> tuple[dict[str, Tensor], str] | None:
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()[_QUANTIZER]
    except (FileNotFoundError, SafetensorError):
        return None


def _unpack(tensors: Mapping[str, Tensor], format_: Format, in_features: int, quantizer: str) -> QuantizedWeight:
    return QuantizedWeight(
        format=format_,
        codes=unpack_codes(tensors["codes"], format_.bits, in_features),
        scale=tensors["scale"],
        zero_point=tensors.get("zero_point"),
        quantizer=quantizer,
    )
