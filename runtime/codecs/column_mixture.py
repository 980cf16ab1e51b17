"""Two formats inside one matrix, by column: the input channels that matter most are wide, all others narrow.

One bit a column says which: the mask is stored once for the whole matrix, 0.0002 bits a weight with 4,096 rows. The
wide columns stand together as a matrix of their own, the narrow ones as another, each in the order of the whole and
stored as its format says; where there are groups, the number of wide columns is a multiple of their length.

The columns of the largest error at the narrow width, weighted by the importance h, are chosen:

    h_j sum_i (w_ij - narrow(w)_ij)^2

Integer parts have their ranges clipped to the least error of each group (``quantizers/clipping.py``).

With one bit and 4 bits for a fifth of the columns this is PTQ1.61's binary with a channel mask. With 4 and 8 bits for
an eighth it is ResQ's split in coordinates: ResQ takes the leading eigenvectors of the inputs' covariance for the 8-bit
part. That basis minimises its bound, but a weight can only use it where the model is rotated (a transform), and stored
with each weight it would take in_features^2 numbers; after such a rotation its subspace is a set of columns again.

Papers: Zhao et al. 2025 (PTQ1.61, arXiv:2502.13179), where the mean magnitude of the inputs chooses; Saxena et al. 2024
(ResQ, arXiv:2412.14363).
"""

import torch
from torch import Tensor

from runtime.codecs.binary import BINARY
from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors
from runtime.codecs.integer import INTEGER
from runtime.packing import pack_codes, unpack_codes
from runtime.storage import Format, Mixture

# The codecs of what a matrix may be mixed of.
PART_CODECS: dict[str, Codec] = {"int": INTEGER, "binary": BINARY}


def encode_column_mixture(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the mask, and the tensors of both parts.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is out of the range of a part.
    """
    format_.group_count(weight.shape[1])
    h = torch.ones(weight.shape[1]) if importance is None else importance
    mask = _choose_columns(weight, format_, h)
    tensors = {"mask": pack_codes(mask.to(torch.uint8).unsqueeze(0), 1)[0]} if bool(mask.any()) else {}
    for part_name, part, columns in list_column_parts(format_, mask):
        encoded = PART_CODECS[part.kind].encode(weight[:, columns], part, h[columns])
        tensors.update({f"{name}_{part_name}": tensor for name, tensor in encoded.items()})
    return tensors


def decode_column_mixture(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the columns of both parts in their places."""
    count = shape[0] if rows is None else len(rows)
    whole = torch.empty((count, shape[1]), device=tensors["codes_narrow"].device)
    for part_name, part, columns in list_column_parts(format_, read_column_mask(tensors, shape)):
        part_shape = (shape[0], len(columns))
        whole[:, columns] = PART_CODECS[part.kind].decode(part_of(tensors, part_name), part, part_shape, rows)
    return whole


def column_mixture_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes as uint8, each of the width of its column."""
    count = shape[0] if rows is None else len(rows)
    whole = torch.empty((count, shape[1]), dtype=torch.uint8, device=tensors["codes_narrow"].device)
    for part_name, part, columns in list_column_parts(format_, read_column_mask(tensors, shape)):
        part_shape = (shape[0], len(columns))
        whole[:, columns] = PART_CODECS[part.kind].codes(part_of(tensors, part_name), part, part_shape, rows)
    return whole


def column_mixture_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns of each column the grid of its part."""
    parts = list_column_parts(format_, read_column_mask(tensors, shape))
    grids: list[ColumnGrid] = []
    place_of: dict[int, tuple[ColumnGrid, int]] = {}
    for part_name, part, columns in parts:
        make_grid = PART_CODECS[part.kind].grid
        assert make_grid is not None
        grids.append(make_grid(part_of(tensors, part_name), part, (shape[0], len(columns))))
        place_of.update({j: (grids[-1], place) for place, j in enumerate(columns.tolist())})

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        grid, place = place_of[j]
        return grid.round_column(place, numbers)

    def with_codes(codes: Tensor) -> dict[str, Tensor]:
        packed = dict(tensors)
        for grid, (part_name, _, columns) in zip(grids, parts, strict=True):
            renamed = grid.with_codes(codes[:, columns]).items()
            packed.update({f"{name}_{part_name}": tensor for name, tensor in renamed})
        return packed

    return ColumnGrid(round_column=round_column, with_codes=with_codes)


def read_column_mask(tensors: StoredTensors, shape: tuple[int, int]) -> Tensor:
    """Returns which columns are wide, [in_features] bool; none where the weight has too few to have a wide one."""
    if "mask" not in tensors:
        return torch.zeros(shape[1], dtype=torch.bool, device=tensors["codes_narrow"].device)
    return unpack_codes(tensors["mask"].unsqueeze(0), 1, shape[1])[0].bool()


def part_of(tensors: StoredTensors, part_name: str) -> dict[str, Tensor]:
    """Returns the tensors of the part called ``wide`` or ``narrow``, by the names of its own format."""
    end = f"_{part_name}"
    return {name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)}


def mixture_of(format_: Format) -> Mixture:
    """Returns the two formats of a mixture."""
    assert format_.mixture is not None
    return format_.mixture


def list_column_parts(format_: Format, mask: Tensor) -> list[tuple[str, Format, Tensor]]:
    """Returns name, format and columns of the parts that are there."""
    mixture = mixture_of(format_)
    parts = (("wide", mixture.wide, mask.nonzero()[:, 0]), ("narrow", mixture.narrow, (~mask).nonzero()[:, 0]))
    return [part for part in parts if len(part[2])]


def _choose_columns(weight: Tensor, format_: Format, h: Tensor) -> Tensor:
    """Returns the mask [in_features] of the wide columns."""
    length, in_features = format_.group_size or 1, weight.shape[1]
    mixture = mixture_of(format_)
    count = mixture.wide_count(in_features // length) * length
    narrow, shape = mixture.narrow, (len(weight), in_features)
    codec = PART_CODECS[narrow.kind]
    rendered = codec.decode(codec.encode(weight, narrow, h), narrow, shape, None)
    error = (rendered - weight).square_().sum(0).mul_(h)
    mask = torch.zeros(in_features, dtype=torch.bool)
    mask[error.topk(count).indices] = True
    return mask


def wide_of_columns(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> Tensor:
    """Returns which weights are in wide columns."""
    return read_column_mask(tensors, shape).expand(shape)


COLUMN_MIXTURE = Codec(
    encode=encode_column_mixture,
    decode=decode_column_mixture,
    codes=column_mixture_codes,
    grid=column_mixture_grid,
    wide=wide_of_columns,
)
