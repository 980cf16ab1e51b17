"""The kernels' views of a weight that is stored in two parts, each the codes of a symmetric integer weight."""

from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from runtime.formats import Format
from runtime.kernels.matrices import Matrix, Plane, StoredMatrix, describe_matrix

PARTED = "double_rounding"


class Packed(Protocol):
    """What is read of a packed weight."""

    format: Format
    width: int
    shape: tuple[int, int]
    _buffers: dict[str, Tensor | None]

    def __call__(self, rows: Tensor | None = None) -> Tensor: ...


def find_parts(weight: Packed, device: torch.device) -> tuple[Plane, ...]:
    """Returns what is multiplied with to read a weight of kind ``PARTED`` at its width; nothing off the CPU."""
    format_ = weight.format
    parts = [("codes", format_.prefix_bits, 1.0), ("codes_rest", format_.rest_bits, 2.0**-format_.rest_bits)]
    read = parts if weight.width == format_.bits else parts[:1]
    matrices = [_find_part(weight, device, name, bits) for name, bits, _ in read]
    found = zip(matrices, read, strict=True)
    planes = tuple(Plane(matrix, factor) for matrix, (_, _, factor) in found if matrix is not None)
    return planes if len(planes) == len(read) else ()


def _find_part(weight: Packed, device: torch.device, name: str, bits: int) -> Matrix | None:
    """Returns the view of a part, which is kept with the weight, and made anew when its tensors have moved."""
    codes, scale = weight._buffers[name], weight._buffers["scale"]
    assert codes is not None and scale is not None
    if device.type != "cpu" or codes.device.type != "cpu":
        return None
    views: dict[str, Matrix] = weight.__dict__.setdefault("_parts", {})
    kept = views.get(name)
    if kept is None or kept.codes != codes.data_ptr() or kept.scale != scale.data_ptr():
        if isinstance(codes, FakeTensor) or not codes.is_contiguous():
            return None
        kept = views[name] = describe_matrix(StoredMatrix(codes, scale, None, bits, weight.shape[1]))
    return kept
