"""A codebook: the values of all codes, the nearest code of a number, and the best of several scales for each group.

    minimise over the scales s of a list:    sum_j h_j (w_j - s round(w_j / s))^2

round to the nearest value of the codebook, ties to the even code, beyond its ends to the ends. The error is not
unimodal in s, so all are tried and the best kept, group by group; the first of equals. Linear time for each scale and
logarithmic in the number of codes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codebook:
    """The values of the codes of an element type.

    Args:
        values: [2^bits] float32, by code.
        codes: uint8, the codes of distinct finite values by rising value.
        boundaries: float32, the largest number that goes to each of these codes but the last.
    """

    values: Tensor
    codes: Tensor
    boundaries: Tensor

    @classmethod
    def of(cls, values: Sequence[float]) -> "Codebook":
        """Returns the codebook of a value for each code; the first code of equal values is rounded to."""
        by_code = torch.tensor(values, dtype=torch.float32)
        usable = dict.fromkeys(value for value in values if abs(value) < float("inf"))
        ordered = sorted(usable)
        codes = torch.tensor([values.index(value) for value in ordered], dtype=torch.uint8)
        steps = torch.tensor(ordered, dtype=torch.float32)
        middles = (steps[1:] + steps[:-1]) / 2
        # A tie belongs to the even code: the upper one's region begins just below it where that is the even one.
        below = torch.nextafter(middles, torch.full_like(middles, -torch.inf))
        return cls(by_code, codes, torch.where(codes[:-1] % 2 == 0, middles, below))

    def codes_of(self, numbers: Tensor) -> Tensor:
        """Returns the uint8 codes nearest to numbers of any shape."""
        boundaries = self.boundaries.to(numbers.device)
        return self.codes.to(numbers.device)[torch.bucketize(numbers.contiguous(), boundaries, out_int32=True)]

    def values_of(self, codes: Tensor) -> Tensor:
        """Returns the float32 values of uint8 codes of any shape."""
        return self.values.to(codes.device)[codes.to(torch.int32)]


@dataclass(frozen=True, eq=False)
class Scaled:
    """Groups with their scales and codes.

    Args:
        stored: [rows, groups], the scales as they are stored.
        codes: [rows, groups, length] uint8.
        error: [rows, groups] float32, the weighted squared error.
    """

    stored: Tensor
    codes: Tensor
    error: Tensor


def choose_scales(
    grouped: Tensor, importance: Tensor | None, codebook: Codebook, scales: Iterable[tuple[Tensor, Tensor]]
) -> Scaled:
    """Returns the best scale of each group, with its codes.

    Args:
        grouped: [rows, groups, length] float32.
        importance: [in_features] of the columns; None for ones.
        codebook: What w / scale is rounded to.
        scales: Pairs of the scales as stored and as float32 numbers, both [rows, groups]; at least one pair.
    """
    h = None if importance is None else importance.view(grouped.shape[1], -1)
    best: Scaled | None = None
    for stored, scale in scales:
        wide = scale.unsqueeze(-1)
        # A scale of zero stands for zeros, whatever the codes.
        codes = codebook.codes_of(torch.where(wide == 0, 0.0, grouped / wide))
        squares = (codebook.values_of(codes).mul_(wide)).sub_(grouped).square_()
        found = Scaled(stored, codes, (squares if h is None else squares.mul_(h)).sum(-1))
        best = found if best is None else choose_better(best, found)
    assert best is not None
    return best


def choose_better(first: Scaled, second: Scaled) -> Scaled:
    """Returns of each group the one with the smaller error."""
    better = second.error < first.error
    return Scaled(
        torch.where(better, second.stored, first.stored),
        torch.where(better.unsqueeze(-1), second.codes, first.codes),
        torch.where(better, second.error, first.error),
    )
