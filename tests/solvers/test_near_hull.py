"""The hulls near one limit give the relaxation that all hulls give."""

import numpy as np
import pytest

from solvers import make_instance
from solvers.convex_hull import build_hull, relax
from solvers.near_hull import LEAST_UNITS, build_hull_near


@pytest.mark.parametrize("tightness", [0.0, 1e-4, 0.03, 0.5, 0.97, 0.9999, 1.0])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_relaxation_is_that_of_all_hulls(tightness: float, seed: int, masked: bool) -> None:
    problem = make_instance(n_units=2 * LEAST_UNITS, n_formats=5, seed=seed)
    loss, cost = problem.loss.copy(), problem.cost[0].copy()
    if masked:
        closed = np.random.default_rng(seed).random(loss.shape) < 0.3
        closed[:, seed] = False
        loss[closed], cost[closed] = np.inf, 0.0
    allowed_cost = np.where(np.isfinite(loss), cost, np.inf)
    least, most = allowed_cost.min(axis=1).sum(), cost.max(axis=1).sum()
    limit = float(least + tightness * (most - least))
    near, full = relax(build_hull_near(loss, cost, limit), limit), relax(build_hull(loss, cost), limit)
    np.testing.assert_array_equal(near.choice, full.choice)
    assert (near.price, near.slack, near.break_unit, near.break_format) == (
        full.price,
        full.slack,
        full.break_unit,
        full.break_format,
    )


def test_units_of_one_kind_share_one_price() -> None:
    """All slopes are equal: at every price either no unit or every unit takes its dear format."""
    loss, cost = np.tile([1.0, 0.0], (LEAST_UNITS, 1)), np.tile([1.0, 3.0], (LEAST_UNITS, 1))
    limit = 1.5 * LEAST_UNITS
    relaxed = relax(build_hull_near(loss, cost, limit), limit)
    assert relaxed.price == 0.5
    assert relaxed.choice.sum() == LEAST_UNITS // 4
