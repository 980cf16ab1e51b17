"""Linearity theorem: KL = sum_u a_u t_uf^2 for small independent errors of relative size t.

t_uf^2 = ||D_uf||^2 / ||W_u||^2 is the noise-to-signal power ratio of a candidate and needs no data. The coefficient
a_u says what a relative error of one unit costs the whole model; it does not depend on the format. It is measured by
adding Gaussian noise of a known relative size t to the unit alone,

    W + t ||W||_F / sqrt(N) z,  z ~ N(0, 1)^N,        a_u = KL(t) / t^2   [nats/token],

averaged over draws. Without data all coefficients are one, and the table is the noise-to-signal ratio itself. Cost:
U x draws passes from the unit's layer on. Limits: the error of a quantizer is no Gaussian noise, least of all at 2
bits; t must be small enough for the square law and large enough for float32; and where noise before a router sends
tokens to other experts, the KL divergence jumps and no square law holds.

Paper: Malinovskii et al. 2024 (HIGGS, arXiv:2411.17525), theorem 1 and its calibration by noise, there with perplexity.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.units import Unit, read_weight
from sensitivity.streaming.suffix import SuffixRunner

RELATIVE_SIZE = 0.1  # about that of 4 bits


def measure_linearity_coefficients(
    model: Any,
    units: Sequence[Unit],
    tokens: Tensor,
    *,
    seed: int,
    relative_size: float = RELATIVE_SIZE,
    draws: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the coefficients [U] in nats per token and their standard errors [U] over the sequences.

    Args:
        model: The reference model in float32.
        units: U units.
        tokens: [S, T] int64, run in one batch; S at least 2.
        seed: Seed of the noise; that of a unit depends on the seed and its index alone.
        relative_size: t, greater than 0.
        draws: Noises averaged for each unit.

    Raises:
        ValueError: If the relative size or the number of draws is not positive, or there is one sequence only.
    """
    if not relative_size > 0.0 or draws < 1:
        msg = (
            "noise must have a positive relative_size and at least one draw: "
            f"got relative_size={relative_size}, draws={draws}. Use {RELATIVE_SIZE} and 1."
        )
        raise ValueError(msg)
    if len(tokens) < 2:
        msg = f"tokens must hold at least two sequences (their spread is the error): got {len(tokens)}. Add text."
        raise ValueError(msg)
    runner = SuffixRunner(model, tokens)
    log_p = torch.log_softmax(runner.reference_logits, dim=-1)
    coefficients = np.zeros((len(units), len(tokens)))
    for u, unit in enumerate(units):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + u) % 2**63)
        for _ in range(draws):
            with _noisy(model, unit, relative_size, generator):
                log_q = torch.log_softmax(runner.logits(unit.layer_index), dim=-1)
            kl = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
            coefficients[u] += kl.double().mean(dim=-1).numpy() / (relative_size**2 * draws)
    return coefficients.mean(axis=1), coefficients.std(axis=1, ddof=1) / np.sqrt(len(tokens))


@contextmanager
def _noisy(model: nn.Module, unit: Unit, relative_size: float, generator: torch.Generator) -> Iterator[None]:
    """Gives the unit's weights noise, all of them together of the relative size, and takes it away on exit."""
    power = sum(float(read_weight(model, weight).square().sum()) for weight in unit.weights)
    deviation = relative_size * (power / unit.weight_count) ** 0.5
    saved: dict[str, Tensor] = {}
    try:
        for weight in unit.weights:
            parameter = model.get_parameter(weight.parameter)
            if weight.parameter not in saved:
                saved[weight.parameter] = parameter.data
                parameter.data = parameter.data.clone()
            noise = torch.randn(weight.shape, generator=generator, dtype=parameter.dtype)
            read_weight(model, weight).add_(noise, alpha=deviation)
        yield
    finally:
        for name, data in saved.items():
            model.get_parameter(name).data = data
