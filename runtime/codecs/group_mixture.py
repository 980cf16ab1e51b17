"""Two widths inside one matrix, by group, and a few 16-bit outliers: narrow groups where they do, wide where they must.

Rows go in blocks of 16 that have their wide groups in the same places, so that a tile of a kernel reads one width at a
time and all rows are equally long; one bit a group and block says which. Groups do not depend on each other, so the
error is least, weighted by the importance h of the columns, where the groups of the largest gains

    sum over the rows of the block, h (w - narrow(w))^2 - h (w - wide(w))^2

are wide. Outliers are taken from the narrow groups alone, the same number in every row: the weights farthest from the
mean of their group, times sqrt h. They are stored by two bytes of place and a float16, and count as the mean of the
group when this is quantized, whose range they would stretch. Ranges are clipped to the least error of each group
(``quantizers/clipping.py``). Time linear in the weights, and that of the two formats.

Paper: Li et al. 2023 (Fast and Efficient 2-bit LLM Inference on GPU, arXiv:2311.16442): 2, 4 and 16 bits in a matrix.
Its scales are quantized a second time; here they are those of the two formats.
"""

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, pick
from runtime.codecs.column_mixture import mixture_of, part_of
from runtime.codecs.integer import INTEGER, read_steps, round_to_steps
from runtime.packing import pack_codes, unpack_codes
from runtime.quantizers.grid import LARGEST_SCALE
from runtime.storage import MOST_OUTLIER_COLUMNS, ROWS_OF_A_MASK, Format


def encode_group_mixture(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the mask, the tensors of both parts, and the outliers.

    Raises:
        ValueError: If the group size does not divide the row, a row is too long for its outliers to be found, or a
            weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    mixture, groups = mixture_of(format_), format_.group_count(weight.shape[1])
    _check_places(format_, weight.shape[1])
    h = torch.ones(weight.shape[1]) if importance is None else importance
    wide, narrow = INTEGER.encode(weight, mixture.wide, h), INTEGER.encode(weight, mixture.narrow, h)
    mask = _choose_groups(weight, format_, h, wide=wide, narrow=narrow)
    tensors = {"mask": pack_codes(mask.to(torch.uint8), 1)}
    places = list_group_places(mask, torch.arange(len(weight)))
    count = mixture.outlier_count(weight.shape[1] // groups * places[1].shape[1])
    if count:
        index, inliers = _take_outliers(weight, places[1], count, groups, h)
        narrow = INTEGER.encode(inliers, mixture.narrow, h)
        tensors["outlier_index"] = torch.stack([index & 0xFF, index >> 8], dim=-1).to(torch.uint8)
        tensors["outlier"] = weight.gather(1, index).to(torch.float16)
    for part_name, part, encoded, chosen in zip(
        ("wide", "narrow"), (mixture.wide, mixture.narrow), (wide, narrow), places, strict=True
    ):
        if chosen.shape[1]:
            taken = _take_groups(encoded, part, chosen, groups)
            tensors.update({f"{name}_{part_name}": tensor for name, tensor in taken.items()})
    return tensors


def decode_group_mixture(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the groups of both parts in their places, and the outliers in theirs."""
    whole = _join_groups(tensors, format_, shape, rows, torch.float32)
    if "outlier" in tensors:
        whole.scatter_(1, read_outlier_columns(tensors, rows), pick(tensors["outlier"], rows).to(torch.float32))
    return whole


def group_mixture_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes as uint8, each of the width of its group; those of outliers are not looked at."""
    return _join_groups(tensors, format_, shape, rows, torch.uint8)


def group_mixture_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns of each column the grids of its rows' groups; outliers stay what they are."""
    groups = format_.group_count(shape[1])
    length, parts = shape[1] // groups, _list_parts(tensors, format_, shape)
    scales, zero_points, tops = (steps.T.contiguous() for steps in read_group_steps(tensors, format_, shape))
    outliers = torch.full(shape, torch.nan)
    if "outlier" in tensors:
        outliers.scatter_(1, read_outlier_columns(tensors, None), tensors["outlier"].to(torch.float32))

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        codes, values = round_to_steps(numbers, scales[j // length], zero_points[j // length], tops[j // length])
        return codes, torch.where(outliers[:, j].isnan(), values, outliers[:, j])

    def with_codes(codes: Tensor) -> dict[str, Tensor]:
        grouped = codes.reshape(shape[0], groups, length)
        packed = dict(tensors)
        for part_name, part, chosen in parts:
            taken = grouped.gather(1, chosen.unsqueeze(-1).expand(-1, -1, length)).flatten(1)
            packed[f"codes_{part_name}"] = pack_codes(taken, part.bits)
        return packed

    return ColumnGrid(round_column=round_column, with_codes=with_codes)


def read_group_steps(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scale, the zero point and the largest code of every group, [out_features, groups] float32 each."""
    steps = torch.empty(3, shape[0], format_.group_count(shape[1]))
    for part_name, part, chosen in _list_parts(tensors, format_, shape):
        scale, zero_point = read_steps(part_of(tensors, part_name), part, None)
        assert zero_point is not None
        top = torch.full(scale.shape, float((1 << part.bits) - 1))
        for whole, values in zip(steps, (scale, zero_point, top), strict=True):
            whole.scatter_(1, chosen, values.to(torch.float32))
    scale, zero_point, top = steps
    return scale, zero_point, top


def _list_parts(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> list[tuple[str, Format, Tensor]]:
    """Returns name, format and places [out_features, count] of the groups of the parts that are there."""
    mixture, groups = mixture_of(format_), format_.group_count(shape[1])
    places = list_group_places(unpack_codes(tensors["mask"], 1, groups).bool(), torch.arange(shape[0]))
    parts = zip(("wide", "narrow"), (mixture.wide, mixture.narrow), places, strict=True)
    return [part for part in parts if part[2].numel()]


def read_outlier_columns(tensors: StoredTensors, rows: Tensor | None) -> Tensor:
    """Returns the columns [n, count] int64 of the outliers."""
    octets = pick(tensors["outlier_index"], rows).to(torch.int64)
    return octets[..., 0] | octets[..., 1] << 8


def _check_places(format_: Format, in_features: int) -> None:
    if not format_.fits(in_features):
        msg = (
            f"outliers must be in a row of at most {MOST_OUTLIER_COLUMNS} weights: got in_features={in_features} in "
            f"format '{format_.name}'. Use a mixture without outliers."
        )
        raise ValueError(msg)


def _join_groups(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Returns the values, or the codes for uint8, of both parts in their places."""
    mixture, groups = mixture_of(format_), format_.group_count(shape[1])
    device = tensors["mask"].device
    mask = unpack_codes(tensors["mask"], 1, groups).bool()
    places = list_group_places(mask, torch.arange(shape[0], device=device) if rows is None else rows)
    length = shape[1] // groups
    whole = torch.empty((len(places[0]), groups, length), dtype=dtype, device=device)
    for part_name, part, chosen in zip(("wide", "narrow"), (mixture.wide, mixture.narrow), places, strict=True):
        if chosen.shape[1]:
            read = INTEGER.codes if dtype == torch.uint8 else INTEGER.decode
            values = read(part_of(tensors, part_name), part, (shape[0], chosen.shape[1] * length), rows)
            index = chosen.unsqueeze(-1).expand(-1, -1, length)
            whole.scatter_(1, index, values.reshape(index.shape))
    return whole.flatten(1)


def _choose_groups(weight: Tensor, format_: Format, h: Tensor, *, wide: StoredTensors, narrow: StoredTensors) -> Tensor:
    """Returns which groups of each block of rows are wide, [blocks, groups] bool."""
    mixture, groups = mixture_of(format_), format_.group_count(weight.shape[1])
    grouped, shape = weight.reshape(len(weight), groups, -1), (weight.shape[0], weight.shape[1])

    def errors(tensors: StoredTensors, part: Format) -> Tensor:
        difference = INTEGER.decode(tensors, part, shape, None).view(grouped.shape) - grouped
        return (h.view(groups, -1) * difference.square_()).sum(-1).double()

    gain = errors(narrow, mixture.narrow) - errors(wide, mixture.wide)
    blocks = -(-len(weight) // ROWS_OF_A_MASK)
    padded = torch.nn.functional.pad(gain, (0, 0, 0, blocks * ROWS_OF_A_MASK - len(weight)))
    best = padded.view(blocks, ROWS_OF_A_MASK, groups).sum(1).topk(mixture.wide_count(groups)).indices
    return torch.zeros((blocks, groups), dtype=torch.bool).scatter_(1, best, True)


def list_group_places(mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the wide and the narrow groups of rows [n], rising, [n, count] each; all blocks have as many."""
    of_blocks = (m.nonzero()[:, 1].view(len(mask), -1) for m in (mask, ~mask))
    wide, narrow = (places[rows // ROWS_OF_A_MASK] for places in of_blocks)
    return wide, narrow


def _take_groups(encoded: StoredTensors, part: Format, chosen: Tensor, groups: int) -> dict[str, Tensor]:
    """Returns the tensors of a part that has only the chosen groups [rows, count] of a whole weight."""
    # A group of a multiple of eight codes is a whole number of bytes.
    codes = encoded["codes"].view(len(chosen), groups, -1)
    taken = codes.gather(1, chosen.unsqueeze(-1).expand(-1, -1, codes.shape[-1])).flatten(1)
    zero_point = unpack_codes(encoded["zero_point"], part.bits, groups).gather(1, chosen)
    return {
        "codes": taken,
        "scale": encoded["scale"].gather(1, chosen),
        "zero_point": pack_codes(zero_point, part.bits),
    }


def _take_outliers(weight: Tensor, narrow: Tensor, count: int, groups: int, h: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rising places [rows, count] of the outliers, and the weight with the means of groups there."""
    grouped = weight.reshape(len(weight), groups, -1)
    mean = grouped.mean(-1, keepdim=True).expand_as(grouped)
    distance = (grouped - mean).abs() * h.view(groups, -1).sqrt()
    candidates = torch.full_like(grouped, -torch.inf)
    index = narrow.unsqueeze(-1).expand(-1, -1, grouped.shape[-1])
    candidates.scatter_(1, index, distance.gather(1, index))
    places = candidates.flatten(1).topk(count).indices.sort(dim=1).values
    return places, weight.scatter(1, places, mean.flatten(1).gather(1, places))


def wide_of_groups(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> Tensor:
    """Returns which weights are in wide groups."""
    groups = format_.group_count(shape[1])
    mask = unpack_codes(tensors["mask"], 1, groups).bool()
    of_rows = mask.repeat_interleave(ROWS_OF_A_MASK, dim=0)[: shape[0]]
    return of_rows.repeat_interleave(shape[1] // groups, dim=1)


GROUP_MIXTURE = Codec(
    encode=encode_group_mixture,
    decode=decode_group_mixture,
    codes=group_mixture_codes,
    grid=group_mixture_grid,
    wide=wide_of_groups,
)
