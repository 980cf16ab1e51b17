"""Shrinkage at its limits, by its moments on many experts, and by what it gains on experts with known rates."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.experts.shrinkage import ShrunkLosses, shrink_rare_losses
from tests.tiny_models import build_tiny_mixtral

N = 10_000


def make_routing(visits: NDArray[Any], tokens: int = N) -> RoutingStatistics:
    counts = np.asarray(visits, dtype=np.int64)
    return RoutingStatistics(
        layers=(0, 1),
        domains=("all",),
        tokens=np.array([tokens]),
        visits=counts[None],
        gate_weight=counts[None] * 0.5,
        together=np.stack([np.diag(row) for row in counts]),
    )


CANDIDATES = list_candidates(find_units(build_tiny_mixtral()), ("int4_g64",))
EXPERT = {
    (unit.layer_index, unit.role, unit.expert_index): u
    for u, unit in enumerate(CANDIDATES.units)
    if unit.kind == "expert"
}
DOWN = [EXPERT[0, "down_proj", e] for e in range(4)]


def shrink(loss: list[float], std_error: list[float], visits: list[int], **options: Any) -> ShrunkLosses:
    """Returns the tables with the given losses of layer 0's down projections and 1 elsewhere."""
    table, error = np.ones(CANDIDATES.allowed.shape), np.full(CANDIDATES.allowed.shape, 0.1)
    table[DOWN, 0], error[DOWN, 0] = loss, std_error
    return shrink_rare_losses(table, error, make_routing(np.array([visits, [2500] * 4])), CANDIDATES, **options)


def test_an_expert_never_taken_gets_its_layers_rate() -> None:
    result = shrink([0.4, 0.2, 0.4, 0.0], [0.05, 0.04, 0.05, 0.0], [4000, 2000, 4000, 0])
    # A loss of 1 in 10,000 visits of 10,000 tokens, and half a visit expected in 10,001; the frequencies of the
    # others are raised by half a visit in the same way, their losses are not.
    raised = (10_000 + 3 * 0.5) / 10_001
    assert result.loss[DOWN[3], 0] == pytest.approx(0.5 / 10_001 / raised, rel=1e-12)
    assert result.weight[DOWN[3], 0] == 0.0
    assert result.std_error[DOWN[3], 0] > 0.0


def test_many_tokens_keep_what_was_measured() -> None:
    loss = [0.4, 0.1, 0.3, 0.2]
    for tokens, tolerance in ((10**6, 1e-2), (10**10, 1e-6)):
        # The standard error of n samples falls as their root; that of each visit is ten times its mean.
        errors = [10.0 * x / (tokens / 4) ** 0.5 for x in loss]
        visits = np.full((2, 4), tokens // 4)
        table, error = np.ones(CANDIDATES.allowed.shape), np.zeros(CANDIDATES.allowed.shape)
        table[DOWN, 0], error[DOWN, 0] = loss, errors
        result = shrink_rare_losses(table, error, make_routing(visits, tokens), CANDIDATES)
        np.testing.assert_allclose(result.loss[DOWN, 0], loss, rtol=tolerance)
        np.testing.assert_allclose(result.std_error[DOWN, 0], errors, rtol=10 * tolerance)


def test_a_metric_without_error_keeps_what_was_seen() -> None:
    result = shrink([0.4, 0.2, 0.3, 0.0], [0.0] * 4, [4000, 2, 4000, 0])
    assert result.loss[DOWN[:3], 0].tolist() == [0.4, 0.2, 0.3]
    assert result.weight[DOWN, 0].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert result.loss[DOWN[3], 0] > 0.0


def test_experts_that_do_not_differ_get_one_rate() -> None:
    # Losses exactly in proportion to the visits: no variance among experts is seen, and k is infinite.
    result = shrink([0.4, 0.1, 0.3, 0.2], [0.04] * 4, [4000, 1000, 3000, 2000])
    assert result.weight[DOWN, 0].tolist() == [0.0] * 4
    np.testing.assert_allclose(result.loss[DOWN, 0], [0.4, 0.1, 0.3, 0.2], rtol=1e-3)


def test_other_units_and_unseen_layers_stay() -> None:
    result = shrink([0.0] * 4, [0.0] * 4, [0] * 4)
    assert result.loss[DOWN, 0].tolist() == [0.0] * 4
    dense = [u for u, unit in enumerate(CANDIDATES.units) if unit.kind != "expert"]
    assert (result.loss[dense] == 1.0).all() and (result.std_error[dense] == 0.1).all()
    assert (result.weight[dense] == 1.0).all()


def test_rare_experts_are_listed_by_unit() -> None:
    result = shrink([0.4, 0.2, 0.3, 0.1], [0.1] * 4, [6000, 63, 64, 0])
    names = [f"model.layers.0.mlp.experts.{role}[{e}]" for role in ("gate_up_proj", "down_proj") for e in (1, 3)]
    assert result.rare == dict(zip(names, [63.0, 0.0, 63.0, 0.0], strict=True))
    half = shrink([0.4, 0.2, 0.3, 0.1], [0.1] * 4, [6000, 63, 64, 0], measured_tokens=N // 2, least_tokens=32)
    assert half.rare == dict(zip(names, [31.5, 0.0, 31.5, 0.0], strict=True))


def make_many(experts: int) -> tuple[Candidates, Any]:
    """Returns candidates of one layer with many experts, drawn from the units of the tiny mixture."""
    units = tuple(
        type(CANDIDATES.units[0])(
            name=f"down[{e}]",
            weights=CANDIDATES.units[DOWN[0]].weights,
            role="down_proj",
            layer_index=0,
            expert_index=e,
            kind="expert",
        )
        for e in range(experts)
    )
    allowed = np.ones((experts, 1), dtype=bool)
    return Candidates(units=units, formats=CANDIDATES.formats, allowed=allowed, reasons={}), np.random.default_rng(0)


def test_known_rates_are_met_better_than_by_the_measurement() -> None:
    experts, rate_spread, visit_variance = 400, 0.3, 9.0
    candidates, rng = make_many(experts)
    visits = rng.integers(5, 400, experts)
    rates = np.exp(rng.normal(0.0, rate_spread, experts))
    # Means of n samples of mean 1 and variance 9.
    measured = rates * rng.gamma(visits / visit_variance, visit_variance / visits)
    frequency = visits / N
    routing = RoutingStatistics(
        layers=(0,),
        domains=("all",),
        tokens=np.array([N]),
        visits=visits[None, None],
        gate_weight=visits[None, None] * 1.0,
        together=np.diag(visits)[None],
    )
    std_error = frequency * measured * np.sqrt(visit_variance / visits)
    result = shrink_rare_losses((frequency * measured)[:, None], std_error[:, None], routing, candidates)
    # k = c / tau^2 = 100 visits; the logarithms of the least taken spread more than their relative errors say.
    weight = result.weight[:, 0]
    assert 0.3 * 100 < (visits / weight - visits).mean() < 2 * 100
    np.testing.assert_allclose(result.loss.sum(), (frequency * measured).sum(), rtol=1e-12)
    few = visits < 100
    before = np.log(measured / rates)[few]
    after = np.log(result.loss[:, 0] / (frequency * rates))[few]
    assert np.square(after).mean() < 0.4 * np.square(before).mean()
    # The standard errors are those of what is left, relative to it.
    standardised = np.log(result.loss[:, 0] / (frequency * rates)) / (result.std_error / result.loss)[:, 0]
    assert 0.7 < standardised.std() < 1.3


def test_tables_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tables must be \[U, F\] = .*got loss \(2, 2\)"):
        shrink_rare_losses(np.ones((2, 2)), np.ones((2, 2)), make_routing(np.ones((2, 4))), CANDIDATES)
