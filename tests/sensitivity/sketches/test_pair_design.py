"""The design keeps the number of passes, is balanced over roles, depth and formats, and copes with any mask."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.units import Unit
from sensitivity.sketches.pair_design import choose_pairs
from tests.sensitivity.listed_units import FORMATS, list_units, make_unit

ROLES = ("q_proj", "k_proj", "down_proj")
F = len(FORMATS)


def everything(units: tuple[Unit, ...]) -> NDArray[np.bool_]:
    return np.ones((len(units), F), dtype=bool)


def by_role(units: tuple[Unit, ...], values: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    roles = np.array([unit.role for unit in units])
    return {role: values[roles == role] for role in dict.fromkeys(roles.tolist())}


@pytest.mark.parametrize("passes", [540, 541, 10_000])
def test_all_pairs_where_there_are_enough_passes(passes: int) -> None:
    units = list_units(ROLES, 30)
    lossy = everything(units)
    np.testing.assert_array_equal(choose_pairs(units, lossy, passes, seed=0), lossy)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("passes", [90, 180, 200, 270, 500])
def test_formats_are_balanced_in_every_role_and_depth(passes: int, seed: int) -> None:
    units = list_units(ROLES, 30)
    chosen = choose_pairs(units, everything(units), passes, seed=seed)
    assert chosen.sum() == passes
    per_unit = chosen.sum(axis=1)
    assert set(per_unit) <= {passes // 90, passes // 90 + 1}
    assert np.ptp(chosen.sum(axis=0)) <= len(ROLES)
    for rows in by_role(units, chosen).values():
        assert np.ptp(rows.sum(axis=0)) <= 1
        # At each depth: any layers in a row have every format about equally often.
        for start in range(0, 30, 6):
            assert np.ptp(rows[start : start + 6].sum(axis=0)) <= 2
        # Passes left over are dealt out to all roles and all depths.
        extra = rows.sum(axis=1) - passes // 90
        assert abs(extra.sum() - (passes % 90) / len(ROLES)) < 1
        halves = extra[:15].sum(), extra[15:].sum()
        assert abs(halves[0] - halves[1]) <= 2


def test_two_formats_of_a_unit_are_not_always_the_same_two() -> None:
    units = list_units(ROLES, 30)
    chosen = choose_pairs(units, everything(units), 180, seed=0)
    assert len(np.unique(chosen, axis=0)) >= 3
    # The level of a unit is known at both ends: two formats are not neighbours for the most part.
    distances = [np.ptp(np.flatnonzero(row)) for row in chosen]
    assert np.mean(distances) > 2


def test_units_alone_in_their_role_get_all_formats() -> None:
    units = list_units(ROLES, 30, outside=("embed_tokens", "lm_head"))
    lossy = everything(units)
    lossy[0, :2] = False
    chosen = choose_pairs(units, lossy, 200, seed=0)
    np.testing.assert_array_equal(chosen[:2], lossy[:2])
    assert chosen.sum() == 200


def test_units_alone_in_their_role_take_half_of_the_passes_at_most() -> None:
    units = list_units(("q_proj",), 30, outside=("embed_tokens", "lm_head", "extra"))
    chosen = choose_pairs(units, everything(units), 30, seed=0)
    assert chosen.sum() == 30
    # 6 + 6 are no more than 15; the third has one in the round of all.
    assert sorted(chosen[:3].sum(axis=1)) == [1, 6, 6]
    # A model of one layer: every role has one unit.
    units = list_units([f"role_{i}" for i in range(10)], 1)
    chosen = choose_pairs(units, everything(units), 20, seed=0)
    assert sorted(chosen.sum(axis=1))[-2:] == [2, 6] and chosen.any(axis=1).all()


@pytest.mark.parametrize("passes", [3, 7, 20, 64])
def test_fewer_passes_than_units_measure_a_spread_subset(passes: int) -> None:
    experts = [make_unit(role, layer, e) for layer in range(8) for role in ("up", "down") for e in range(16)]
    units = (*list_units(("o_proj",), 8), *experts)
    chosen = choose_pairs(units, everything(units), passes, seed=0)
    assert chosen.sum() == passes
    assert chosen.sum(axis=1).max() == 1
    groups = by_role(units, chosen)
    # A unit of each role at least, then by their numbers: 8, 128 and 128.
    assert all(rows.any() for rows in groups.values())
    assert abs(int(groups["up"].sum()) - int(groups["down"].sum())) <= 1
    measured = [units[u] for u in np.flatnonzero(chosen.any(axis=1))]
    if passes >= 20:
        layers = np.bincount([unit.layer_index or 0 for unit in measured if unit.expert_index is not None], minlength=8)
        assert layers.min() >= 1
        assert layers.max() <= passes / 8 + 2
    if passes == 64:
        assert len({unit.expert_index for unit in measured}) > 8


def test_design_is_that_of_its_seed() -> None:
    units = list_units(ROLES, 30)
    designs = [choose_pairs(units, everything(units), 200, seed=seed) for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(designs[0], designs[1])
    assert all((a != b).any() for a, b in pairwise(designs[1:]))


def test_order_of_the_units_does_not_matter() -> None:
    units = list_units(ROLES, 7)
    turned = units[::-1]
    chosen = choose_pairs(units, everything(units), 50, seed=0)
    np.testing.assert_array_equal(choose_pairs(turned, everything(turned), 50, seed=0)[::-1], chosen)


@given(data=st.data())
def test_any_mask_gets_as_many_pairs_as_passes(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 4)))
    lossy = np.array(data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    lossy = lossy.reshape(shape)
    kinds = st.tuples(st.sampled_from(ROLES), st.one_of(st.none(), st.integers(0, 3)))
    units = tuple(make_unit(*data.draw(kinds)) for _ in range(shape[0]))
    passes = data.draw(st.integers(2, 50))
    chosen = choose_pairs(units, lossy, passes, seed=data.draw(st.integers(0, 5)))
    assert not (chosen & ~lossy).any()
    assert chosen.sum() == min(passes, lossy.sum())
