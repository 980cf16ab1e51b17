"""Which pairs of unit and format are measured when passes of the model are fewer than pairs.

How often: units alone in their role (embedding, head) get all their formats first, from half of the passes at most:
there is none like them to learn from, and they are large. The rest is dealt out in rounds, one format to each unit a
round, in an order whose every beginning is spread over roles (at least one unit of each, then by their number) and,
within a role, over depth and experts: the positions of a van der Corput sequence, shifted by the seed. So a number of
passes below that of the units measures a spread subset, and what a division by it leaves goes to a spread subset too.

Which formats: units are taken by role and depth, and each gets those that its role has had least often; of equal
ones that farthest in the list from what the unit has, so that its own level is known at both ends, then that which
all roles together have had least often. In each role every format is measured equally often, give or take one, and
so at each depth: the balance of an incomplete block design, for masks of any shape. O(U F^2) steps.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.units import Unit


def choose_pairs(units: Sequence[Unit], lossy: NDArray[np.bool_], passes: int, *, seed: int) -> NDArray[np.bool_]:
    """Returns the pairs [U, F] to measure, as many of ``lossy`` as there are passes; the same for the same seed.

    Args:
        units: U units.
        lossy: [U, F] bool, the pairs that lose anything.
        passes: Most pairs.
        seed: Shifts which units and formats come first.
    """
    if int(lossy.sum()) <= passes:
        return lossy.copy()
    names = sorted({unit.role for unit in units})
    role = np.array([names.index(unit.role) for unit in units])
    counts = _deal(role, _spread_order(units, role, seed), lossy, passes)
    return _pick_formats(units, role, lossy, counts, seed)


def _spread_order(units: Sequence[Unit], role: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Returns the indices of all units in an order whose every beginning is spread over roles, depth and experts."""
    generator = np.random.default_rng(seed)
    share = np.zeros(len(units))
    for r in range(int(role.max()) + 1):
        members = sorted(np.flatnonzero(role == r).tolist(), key=lambda u: _place(units[u]))
        positions = (_van_der_corput(len(members)) + generator.integers(len(members))) % len(members)
        share[np.array(members)[positions]] = np.arange(len(members)) / len(members)
    return np.lexsort((role, share))


def _place(unit: Unit) -> tuple[int, int]:
    return (
        -1 if unit.layer_index is None else unit.layer_index,
        -1 if unit.expert_index is None else unit.expert_index,
    )


def _van_der_corput(count: int) -> NDArray[np.int64]:
    """Returns 0 .. count - 1 in the order of their reversed bits."""
    bits = max(1, (count - 1).bit_length())
    reversed_ = np.zeros(1 << bits, dtype=np.int64)
    for bit in range(bits):
        reversed_ += ((np.arange(1 << bits) >> bit) & 1) << (bits - 1 - bit)
    return reversed_[reversed_ < count]


def _deal(
    role: NDArray[np.int64], order: NDArray[np.int64], lossy: NDArray[np.bool_], passes: int
) -> NDArray[np.int64]:
    """Returns how many formats of each unit are measured, [U]."""
    room = lossy.sum(axis=1)
    counts = np.zeros(len(room), dtype=np.int64)
    alone = np.bincount(role)[role] == 1
    for u in order[alone[order]]:
        if counts.sum() + room[u] <= passes / 2:
            counts[u] = room[u]
    while (left := passes - int(counts.sum())) > 0:
        counts[order[counts[order] < room[order]][:left]] += 1
    return counts


def _pick_formats(
    units: Sequence[Unit], role: NDArray[np.int64], lossy: NDArray[np.bool_], counts: NDArray[np.int64], seed: int
) -> NDArray[np.bool_]:
    formats = lossy.shape[1]
    chosen = np.zeros_like(lossy)
    used = np.zeros((int(role.max()) + 1, formats), dtype=np.int64)
    for u in sorted(np.flatnonzero(counts).tolist(), key=lambda u: (role[u], *_place(units[u]))):
        for _ in range(counts[u]):
            free = np.flatnonzero(lossy[u] & ~chosen[u])
            own = np.flatnonzero(chosen[u])
            distance = np.abs(free[:, None] - own).min(axis=1) if len(own) else np.zeros_like(free)
            # The last key that differs decides last; a rotation makes roles begin at different formats.
            keys = ((free + role[u] + seed) % formats, used[:, free].sum(axis=0), -distance, used[role[u], free])
            f = free[np.lexsort(keys)[0]]
            chosen[u, f] = True
            used[role[u], f] += 1
    return chosen
