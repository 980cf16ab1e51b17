"""What a family of formats has to offer: from a weight to its stored tensors and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.storage import Format

StoredTensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ColumnGrid:
    """The values that the weights of a stored matrix may take with its scales as they are.

    Args:
        round_column: (column j, numbers [out_features]) -> the nearest uint8 codes [out_features] and their float32
            values.
        with_codes: (codes [out_features, in_features] uint8) -> the stored tensors with these codes.
    """

    round_column: Callable[[int, Tensor], tuple[Tensor, Tensor]]
    with_codes: Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The encoder and the decoder of one kind of format.

    Args:
        encode: (weight [out_features, in_features] float32, format, importance [in_features] or None) -> the tensors of
            ``format.stored_tensors``, by name. The importance is the diagonal of the second moment of the weight's
            inputs: what the squared error of each column counts. None counts all alike. Raises ValueError for a weight
            that the format cannot hold.
        decode: (tensors, format, (out_features, in_features), row indices [n] or None for all rows) -> the float32
            weight [n, in_features]. Each row depends on its index alone, not on the others asked for.
        codes: The same arguments as ``decode`` -> the codes [n, in_features], integers of any type.
        reads_importance: Whether the encoder uses it.
        grid: (tensors, format, (out_features, in_features)) -> the values that each weight may take when all but the
            codes stay; None where weights cannot be rounded one by one.
        wide: (tensors, format, (out_features, in_features)) -> which weights [out_features, in_features] have the wide
            codes of a mixture; None for families of one width.
        at_width: ``decode`` with one of ``format.widths`` before the rows; None for families that are read at one.
    """

    encode: Callable[[Tensor, Format, Tensor | None], dict[str, Tensor]]
    decode: Callable[[StoredTensors, Format, tuple[int, int], Tensor | None], Tensor]
    codes: Callable[[StoredTensors, Format, tuple[int, int], Tensor | None], Tensor]
    reads_importance: bool = True
    grid: Callable[[StoredTensors, Format, tuple[int, int]], ColumnGrid] | None = None
    wide: Callable[[StoredTensors, Format, tuple[int, int]], Tensor] | None = None
    at_width: Callable[[StoredTensors, Format, tuple[int, int], int, Tensor | None], Tensor] | None = None


def pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Returns the rows [n] of a tensor; all of them for None."""
    return tensor if rows is None else tensor[rows]


def encode_by_rows(
    weight: Tensor, encode_block: Callable[[Tensor], dict[str, Tensor]], block_weights: int = 1 << 18
) -> dict[str, Tensor]:
    """Returns what an encoder of independent rows makes of a weight, block by block to bound the temporaries."""
    rows = max(1, block_weights // weight.shape[1])
    parts = [encode_block(weight[start : start + rows]) for start in range(0, len(weight), rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def group_importance(importance: Tensor | None, grouped: Tensor) -> Tensor:
    """Returns the importance of every weight of ``grouped`` [rows, groups, length], ones for None; a view."""
    if importance is None:
        return torch.ones(1, device=grouped.device).expand_as(grouped)
    return importance.view(grouped.shape[1], -1).expand_as(grouped)


def check_range(weight: Tensor, format_: Format, largest: float) -> None:
    """Raises ValueError unless all weights are finite and of magnitudes up to ``largest``."""
    limit = min(largest, torch.finfo(torch.float32).max)
    if not bool((weight.abs() <= limit).all()):
        msg = (
            f"weights must be finite and in the range of format '{format_.name}', at most {limit:g}: got "
            f"max|w|={weight.abs().max().item():g}. Check the weight for huge values; bf16 has the widest range."
        )
        raise ValueError(msg)
