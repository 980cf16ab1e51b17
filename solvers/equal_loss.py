"""Bits in closed form: equal loss per weight, reverse water-filling at the edges.

    minimise  sum_u c[u] 2^(-d R[u])   subject to  sum_u n[u] R[u] = N Rbar,  least <= R[u] <= most

with d = 2 for uniform quantizers (6 dB per bit), n weights per unit, N = sum n. Where no edge binds,

    R[u] = Rbar + 1/d log2((c[u] / n[u]) / GM),   c[u] 2^(-d R[u]) / n[u] = GM 2^(-d Rbar)   for every u,

GM the weighted geometric mean of c / n: all weights lose the same, and the summed loss is GM / AM of uniform bits
(the gain). With edges, R[u] = clip(1/d log2(c[u] / n[u] / level), least, most), the level found exactly.

Complexity: O(U log U). Limits: the law 2^(-d R) holds for many levels; at two bits and below, real losses fall faster.
Source: BAQ, arXiv 2506.05664 (n = 1, least = 0; its code uses d = 1.95 and rounds numbers of levels).
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from solvers.problem import AllocationProblem, BoolArray, FloatArray
from solvers.products import dot

UNIFORM_DECAY = 2.0
MEAN_BITS_TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class BitAllocation:
    """Bits of every unit under the exponential law.

    Args:
        bits: bits per weight of every unit, [U].
        loss: loss of every unit at these bits, [U].
        level: loss per weight of every unit that no edge holds.
        held: units at the least or most bits, [U].
        gain: summed loss over that of uniform bits, above 0, at most 1; its prediction where nothing is held.
    """

    bits: FloatArray
    loss: FloatArray
    level: float
    held: BoolArray
    gain: float


def allocate_bits(
    coefficient: FloatArray,
    *,
    mean_bits: float,
    n_weights: FloatArray | None = None,
    least_bits: float = 0.0,
    most_bits: float = math.inf,
    decay: float = UNIFORM_DECAY,
) -> BitAllocation:
    """Returns the optimal real-valued bits.

    Args:
        coefficient: loss of every unit at 0 bits by the law, above 0, [U].
        mean_bits: mean over all weights, from least_bits to most_bits.
        n_weights: weights of every unit, above 0, [U]; 1 each when None.
        least_bits: lower edge.
        most_bits: upper edge; inf for none.
        decay: d of the law, above 0.

    Raises:
        ValueError: coefficient, n_weights or decay not above 0, or a mean outside the edges.
    """
    weights = _check(coefficient, n_weights, decay)
    if not least_bits <= mean_bits <= most_bits or not math.isfinite(mean_bits):
        msg = f"mean_bits must be from {least_bits} to {most_bits}: got mean_bits={mean_bits}."
        raise ValueError(msg)
    wanted = np.log2(coefficient / weights) / decay
    offset = _find_offset(wanted, weights, mean_bits, least_bits, most_bits)
    bits = np.clip(wanted - offset, least_bits, most_bits)
    loss = coefficient * 2.0 ** (-decay * bits)
    uniform = float(coefficient.sum()) * 2.0 ** (-decay * mean_bits)
    return BitAllocation(
        bits=bits,
        loss=loss,
        level=2.0 ** (decay * offset),
        held=(wanted - offset <= least_bits) | (wanted - offset >= most_bits),
        gain=float(loss.sum()) / uniform,
    )


def predict_gain(coefficient: FloatArray, *, n_weights: FloatArray | None = None) -> float:
    """Returns GM / AM of the losses per weight: what equal loss leaves of the loss of uniform bits.

    Args:
        coefficient: losses of all units at any common number of bits, above 0, [U].
        n_weights: weights of every unit, above 0, [U]; 1 each when None.

    Raises:
        ValueError: coefficient or n_weights not above 0.
    """
    weights = _check(coefficient, n_weights, UNIFORM_DECAY)
    total = float(weights.sum())
    geometric = math.exp2(dot(weights, np.log2(coefficient / weights)) / total)
    return geometric / (float(coefficient.sum()) / total)


def round_to_levels(bits: FloatArray) -> FloatArray:
    """Returns the bits of the nearest whole number of levels, log2(round(2^bits)), at least one level (BAQ's
    rounding; the mean shifts a little)."""
    return np.asarray(np.log2(np.maximum(np.rint(2.0**bits), 1.0)))


def round_to_bits(
    coefficient: FloatArray,
    *,
    mean_bits: float,
    n_weights: FloatArray | None = None,
    least_bits: int = 0,
    most_bits: int = 16,
    decay: float = UNIFORM_DECAY,
) -> FloatArray:
    """Returns whole bits, [U], of mean at most mean_bits, each bit given where it saves the most loss per weight.

    Optimal for units of equal size (the law is convex); for unequal sizes a bit that no longer fits is passed over.

    Args:
        coefficient: as `allocate_bits`, [U].
        mean_bits: upper limit of the mean over all weights, at least least_bits.
        n_weights: as `allocate_bits`, [U].
        least_bits: lower edge.
        most_bits: upper edge.
        decay: as `allocate_bits`.

    Raises:
        ValueError: as `allocate_bits`.
    """
    weights = _check(coefficient, n_weights, decay)
    if not least_bits <= mean_bits:
        msg = f"mean_bits must be at least {least_bits}: got mean_bits={mean_bits}."
        raise ValueError(msg)
    bits = np.full(coefficient.size, float(least_bits))
    left = (mean_bits * (1.0 + MEAN_BITS_TOLERANCE) - least_bits) * float(weights.sum())
    saved = coefficient / weights * 2.0 ** (-decay * least_bits)
    # A sorted list is a heap.
    heap = sorted((-float(gain), u) for u, gain in enumerate(saved))
    while heap:
        gain, u = heapq.heappop(heap)
        if bits[u] >= most_bits or weights[u] > left:
            continue
        left -= float(weights[u])
        bits[u] += 1
        heapq.heappush(heap, (gain * 2.0**-decay, u))
    return bits


def build_bit_problem(
    coefficient: FloatArray,
    *,
    format_bits: FloatArray,
    mean_bits: float,
    n_weights: FloatArray | None = None,
    decay: float = UNIFORM_DECAY,
) -> AllocationProblem:
    """Returns the law tabulated at given bits, resource "bits": what any solver rounds to a menu of formats.

    Args:
        coefficient: as `allocate_bits`, [U].
        format_bits: bits per weight of every format, at least 0, [F].
        mean_bits: upper limit of the mean over all weights.
        n_weights: as `allocate_bits`, [U].
        decay: as `allocate_bits`.

    Raises:
        ValueError: coefficient, n_weights or decay not above 0.
    """
    weights = _check(coefficient, n_weights, decay)
    loss = coefficient[:, None] * 2.0 ** (-decay * format_bits)
    return AllocationProblem(
        loss=loss,
        cost=(weights[:, None] * format_bits)[None],
        limit=np.array([mean_bits * float(weights.sum())]),
        allowed=np.ones(loss.shape, dtype=bool),
        resources=("bits",),
    )


def _check(coefficient: FloatArray, n_weights: FloatArray | None, decay: float) -> FloatArray:
    """Returns the weights of the units, [U], after checking everything that must be above 0."""
    weights = np.ones(coefficient.size) if n_weights is None else np.asarray(n_weights, dtype=np.float64)
    for name, least in (("coefficient", coefficient.min()), ("n_weights", weights.min()), ("decay", decay)):
        if not least > 0:
            msg = f"{name} must be above 0: got {name}={least}. Leave such units out."
            raise ValueError(msg)
    return weights


def _find_offset(wanted: FloatArray, weights: FloatArray, mean: float, least: float, most: float) -> float:
    """Returns t with sum n clip(wanted - t, least, most) = N mean: bisection over the bends, then one division."""
    budget = mean * float(weights.sum())
    bends = np.concatenate([wanted - least, wanted - most])
    bends = np.sort(bends[np.isfinite(bends)])
    # The sum falls with t; find the last bend where it is still at least the budget.
    low, high = -1, bends.size
    while high - low > 1:
        middle = (low + high) // 2
        if dot(weights, np.clip(wanted - bends[middle], least, most)) >= budget:
            low = middle
        else:
            high = middle
    left = bends[low] if low >= 0 else bends[0] - 1.0
    right = bends[high] if high < bends.size else bends[-1] + 1.0
    inner = wanted - 0.5 * (left + right)
    free = (inner > least) & (inner < most)
    if not free.any():
        return float(left)
    at_edge = np.clip(inner[~free], least, most)
    return (dot(weights[free], wanted[free]) + dot(weights[~free], at_edge) - budget) / float(weights[free].sum())
