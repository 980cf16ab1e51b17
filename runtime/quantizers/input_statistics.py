"""Input statistics of one weight: the sum M of x x' over the inputs x that it multiplied, and what follows from it.

Quantizers that read statistics lower the output error of one layer per input,

    tr(D H D'),   H = M / count + damping * mean(diag M / count) * I,   D = rendered - weight,

the layer-local objective of GPTQ (Frantar et al. 2022, arXiv:2210.17323, equation 1). The damping keeps H positive
definite and stands for inputs that the calibration text did not show. Any weighted sum of x x' is a second moment
like another: gate-weighted inputs of an expert come with the sum of their weights as ``count``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """What is known about the inputs of one weight [out_features, in_features].

    Args:
        second_moment: [in_features, in_features] float32, the sum of x x' (symmetric, positive semidefinite).
        count: Number of inputs in the sum, or the sum of their weights; positive.
        damping: Part of the mean of the diagonal that H gets on its diagonal; not negative.

    Raises:
        ValueError: If the second moment is not a square matrix of finite numbers with a diagonal of none below zero,
            or a number is out of range.
    """

    second_moment: Tensor
    count: float
    damping: float = 0.1

    def __post_init__(self) -> None:
        moment = self.second_moment
        if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
            msg = f"second_moment must be [in_features, in_features]: got shape {list(moment.shape)}. Sum x x'."
            raise ValueError(msg)
        if not bool(torch.isfinite(moment).all()) or bool((moment.diagonal() < 0).any()):
            msg = (
                "second_moment must be finite with no diagonal entry below zero: got a diagonal from "
                f"{moment.diagonal().min().item():g} to {moment.diagonal().max().item():g}. Check the inputs."
            )
            raise ValueError(msg)
        if not (math.isfinite(self.count) and self.count > 0):
            msg = f"count must be a positive number: got count={self.count}. Give the number of inputs in the sum."
            raise ValueError(msg)
        if not (math.isfinite(self.damping) and self.damping >= 0):
            msg = f"damping must be a finite number >= 0: got damping={self.damping}. Use a value such as 0.01."
            raise ValueError(msg)

    @classmethod
    def isotropic(cls, in_features: int) -> "InputStatistics":
        """Returns statistics that say nothing, H = I: an embedding sees one-hot inputs, an expert may see none."""
        return cls(second_moment=torch.eye(in_features), count=1.0, damping=0.0)

    @property
    def say_nothing(self) -> bool:
        """True for those of ``isotropic``."""
        same = self.count == 1.0 and self.damping == 0.0
        return same and torch.equal(self.second_moment, torch.eye(self.in_features))

    @property
    def in_features(self) -> int:
        """Length of an input."""
        return len(self.second_moment)

    def hessian(self) -> Tensor:
        """Returns H [in_features, in_features] float32, a new tensor with a positive diagonal.

        Channels that were always zero get the mean of the diagonal; they touch no other channel. Where all were zero,
        H is the identity.
        """
        H = self.second_moment.to(torch.float32) / self.count
        diagonal = H.diagonal()
        mean = diagonal.mean()
        if not bool(mean > 0):
            return torch.eye(len(H), dtype=H.dtype, device=H.device)
        diagonal += self.damping * mean
        diagonal[diagonal <= 0] = mean
        return H

    def root_mean_square(self) -> Tensor:
        """Returns the root mean square [in_features] of every input channel; no mean magnitude is below it."""
        return (self.second_moment.diagonal().to(torch.float32) / self.count).sqrt()

    def output_error(self, difference: Tensor) -> float:
        """Returns tr(D M D') / count, squared output error per input without damping, of D [out_features, in_features].

        Raises:
            ValueError: If the statistics are of another input.
        """
        self.check_fits(difference)
        return float(((difference @ self.second_moment.to(difference.dtype)) * difference).sum()) / self.count

    def divided(self, scale: Tensor) -> "InputStatistics":
        """Returns the statistics of the inputs divided, channel by channel, by ``scale`` [in_features]."""
        inverse = scale.to(torch.float32).reciprocal()
        moment = self.second_moment * inverse * inverse.unsqueeze(1)
        return InputStatistics(second_moment=moment, count=self.count, damping=self.damping)

    def check_fits(self, weight: Tensor) -> None:
        """Raises ValueError unless the statistics are of inputs of a weight [out_features, in_features]."""
        if weight.shape[-1] != self.in_features:
            msg = (
                f"statistics must be of the weight's inputs: got in_features={self.in_features} for a weight of shape "
                f"{list(weight.shape)}. Pass the statistics collected for this weight."
            )
            raise ValueError(msg)


def require_statistics(statistics: InputStatistics | None, weight: Tensor, quantizer: str) -> InputStatistics:
    """Returns the statistics that a quantizer cannot do without.

    Raises:
        ValueError: If there are none, or they are of another input.
    """
    if statistics is None:
        msg = (
            f"quantizer '{quantizer}' needs input statistics: got none for a weight of shape {list(weight.shape)}. "
            "Pass statistics=InputStatistics(...), or use a quantizer that reads the weight alone."
        )
        raise ValueError(msg)
    statistics.check_fits(weight)
    return statistics
