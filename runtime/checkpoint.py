"""The packed checkpoint: one safetensors file whose size is known to the byte before it is written.

Tensors are written widest type first, so that every one is aligned, and the header is padded with spaces (the
format allows it) to a reserve that depends on the model alone and not on the choice of formats. Therefore

    file bytes = header reserve + sum of the stored bytes of all units + bytes of the unquantized rest,

where the stored bytes of formats of many tensors include what their entries need beyond the reserve.

The unquantized rest (norms, biases, routers) is stored in the narrowest of bfloat16, float16 and float32 that
holds every value exactly, so that reloading gives the same float32 numbers. safetensors itself reads the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from runtime.files import atomic_path
from runtime.formats import Format
from runtime.packed import PackedWeight
from runtime.residency import InMemory, Residency
from runtime.units import Weight, list_weights

CHECKPOINT_FILE = "model.safetensors"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
# Upper bounds of what one tensor's entry and one weight's format take in the header besides their names.
_ENTRY_BYTES = 110
_FORMAT_BYTES = 40
_PROVENANCE_BYTES = 8192
# What every weight is given in the header, whatever its format: as many tensors, with names that end so.
_RESERVED_TENSORS, _RESERVED_SUFFIX = 3, ".zero_point"


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the narrowest float type that holds every value of the tensor exactly; its own if none is narrower."""
    if not tensor.is_floating_point():
        return tensor.dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize < tensor.dtype.itemsize and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def rest_bytes(model: nn.Module, *, routers: bool = False, residency: Residency | None = None) -> int:
    """Returns the bytes of everything in the reference model that takes no format; routers may be asked to.

    Args:
        model: The reference model.
        routers: Whether routers take formats.
        residency: Brings the weights into memory: what type is exact depends on the values.
    """
    quantizable = {weight.parameter for weight in list_weights(model, routers=routers).values()}
    return sum(size for name, size in _exact_bytes(model, residency).items() if name not in quantizable)


def reference_bytes(model: nn.Module, *, residency: Residency | None = None) -> int:
    """Returns the bytes of the whole reference model, each tensor in its narrowest exact type."""
    return sum(_exact_bytes(model, residency).values())


def header_reserve_bytes(model: nn.Module, *, routers: bool = False) -> int:
    """Returns the bytes set aside for the header of the packed file of a reference model, length field included.

    Any format of the menu fits. A format of more tensors than all others, or with a longer name for one, makes every
    file longer by some bytes a weight, also those of plans that exist.
    """
    weights = list_weights(model, routers=routers)
    quantizable = {weight.parameter for weight in weights.values()}
    total = _PROVENANCE_BYTES
    for weight in weights.values():
        total += _reserved_entry_bytes(weight.name) + len(weight.name) + _FORMAT_BYTES
    names = {name: t.ndim for name, t in distinct_tensors(model).items() if name not in quantizable}
    return -(-(total + sum(most_entry_bytes(name, dims) for name, dims in names.items())) // 8) * 8


def most_entry_bytes(name: str, dimensions: int) -> int:
    """Returns an upper bound of what a tensor takes in the header."""
    return len(name) + _ENTRY_BYTES + 12 * dimensions


def further_header_bytes(weight: Weight, format_: Format) -> int:
    """Returns the bytes of header that a weight in a format needs beyond those that are set aside for every weight.

    They are a part of what the format costs: only formats that store many tensors need any.
    """
    needed = sum(
        len(weight.name) + len(f".{tensor.name}") + _ENTRY_BYTES for tensor in format_.stored_tensors(weight.shape)
    )
    return -(-max(0, needed - _reserved_entry_bytes(weight.name)) // 8) * 8


def _reserved_entry_bytes(weight_name: str) -> int:
    return _RESERVED_TENSORS * (len(weight_name) + len(_RESERVED_SUFFIX) + _ENTRY_BYTES)


def fixed_bytes(model: nn.Module, *, routers: bool = False, residency: Residency | None = None) -> int:
    """Returns the bytes of a packed file that no choice of formats changes: the rest and the header reserve."""
    return rest_bytes(model, routers=routers, residency=residency) + header_reserve_bytes(model, routers=routers)


def save_checkpoint(model: nn.Module, path: Path, metadata: Mapping[str, str], *, header_bytes: int) -> int:
    """Writes a packed model to one safetensors file and returns its size in bytes.

    Args:
        model: A model whose weights are packed (``apply_formats_``).
        path: The file to write.
        metadata: Strings kept in the header.
        header_bytes: Reserve of ``header_reserve_bytes``, taken from the reference model.

    Raises:
        ValueError: If the header does not fit its reserve.
    """
    packed = {id(t) for module in model.modules() if isinstance(module, PackedWeight) for t in module.buffers()}
    # What a format stores keeps its type, in which it was priced; only the rest is narrowed.
    tensors = {
        name: t.detach() if id(t) in packed else t.detach().to(exact_dtype(t))
        for name, t in distinct_tensors(model).items()
    }
    with atomic_path(path) as temporary:
        write_tensors(tensors, temporary, metadata, header_bytes=header_bytes)
    return path.stat().st_size


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], *, header_bytes: int) -> None:
    """Writes tensors to a safetensors file, widest type first, whose header is padded to a reserve.

    Args:
        tensors: Name -> tensor.
        path: The file to write.
        metadata: Strings kept in the header.
        header_bytes: Bytes of the header, length field included.

    Raises:
        ValueError: If the header does not fit its reserve.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header = _header(ordered, metadata).encode()
    if len(header) > header_bytes - 8:
        msg = (
            f"the header must fit its reserve: got {len(header)} bytes of header, {header_bytes - 8} reserved in "
            f"'{path}'. Shorten the metadata."
        )
        raise ValueError(msg)
    with path.open("wb") as file:
        file.write((header_bytes - 8).to_bytes(8, "little"))
        file.write(header.ljust(header_bytes - 8))
        for tensor in ordered.values():
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the strings kept in the header of a safetensors file.

    Raises:
        ValueError: If the file is missing, truncated or not safetensors.
    """
    with _open(path) as file:
        return dict(file.metadata() or {})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a safetensors file.

    Raises:
        ValueError: If the file is missing, truncated or not safetensors.
    """
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def _open(path: Path) -> safe_open:
    if not path.is_file():
        msg = f"a checkpoint must be a safetensors file: got '{path}', which is not there. Check the path."
        raise ValueError(msg)
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        msg = f"a checkpoint must be a complete safetensors file: got '{path}' ({error}). Write or fetch it again."
        raise ValueError(msg) from error


def _exact_bytes(model: nn.Module, residency: Residency | None) -> dict[str, int]:
    """Returns name -> bytes of every distinct tensor in its narrowest exact type."""
    residency = residency or InMemory()
    found: dict[str, int] = {}
    for block in residency.blocks:
        with residency.resident(block):
            for name, tensor in distinct_tensors(model).items():
                if name not in found and tensor.device.type != "meta":
                    found[name] = tensor.numel() * exact_dtype(tensor).itemsize
    return found


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors of a model by name, a tied one once, under its first name."""
    seen: set[int] = set()
    distinct: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            distinct[name] = tensor
    return distinct


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return json.dumps(entries, separators=(",", ":"))
