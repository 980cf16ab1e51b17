"""Metrics against whole passes of changed copies; combinations of known numbers; MixDQ's groups in a solve."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.interactions.metric_groups import (
    SHARE,
    MetricLosses,
    combine_by_group,
    combine_weighted,
    combine_worst,
    measure_metrics,
    normalise,
)
from tests.sensitivity.changed_models import EPS, build_changed, compute_kl, kl_bound
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama

FORMATS = ("int3_g64", "int4_g64", "bf16")
INT3, INT4, BF16 = range(3)
# Texts of different shapes, as different domains have.
TEXTS = {
    "prose": torch.randint(2, VOCABULARY_SIZE, (3, 8), generator=torch.Generator().manual_seed(0)),
    "code": torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(1)),
}


def compute_next_token(model: PreTrainedModel, changed: PreTrainedModel, tokens: torch.Tensor) -> NDArray[np.float64]:
    """Returns the increase of the cross-entropy of the text itself, [S]."""

    def loss(m: PreTrainedModel) -> torch.Tensor:
        logits = m(tokens).logits.double()
        return torch.stack(
            [torch.nn.functional.cross_entropy(z[:-1], t[1:]) for z, t in zip(logits, tokens, strict=True)]
        )

    return (loss(changed) - loss(model)).numpy()


def test_every_metric_on_every_text(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), FORMATS)
    calls: list[tuple[int, int]] = []
    losses = measure_metrics(
        model, candidates, TEXTS, metrics=("kl", "next_token"), progress=lambda *call: calls.append(call)
    )
    assert losses.names == ("prose/kl", "prose/next_token", "code/kl", "code/next_token")
    assert calls == [(u + 1, len(candidates.units)) for u in range(len(candidates.units))]
    for u in range(0, len(candidates.units), 3):
        for f in np.flatnonzero(candidates.allowed[u]).tolist():
            changed = build_changed(model, candidates, {u: f})
            for name, tokens in TEXTS.items():
                kl = compute_kl(model, changed, tokens)
                k = losses.index(f"{name}/kl")
                bound = kl_bound(kl, 12.0, VOCABULARY_SIZE).max()
                assert losses.loss[k, u, f] == pytest.approx(kl.mean(), abs=bound)
                assert losses.std_error[k, u, f] == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, abs=2 * bound)
                nll = compute_next_token(model, changed, tokens)
                k = losses.index(f"{name}/next_token")
                # Logarithms of the size of 12 and below, rounded four times in each of two runs.
                assert losses.loss[k, u, f] == pytest.approx(nll.mean(), abs=8 * EPS * 12)
                assert losses.std_error[k, u, f] == pytest.approx(nll.std(ddof=1) / len(nll) ** 0.5, abs=16 * EPS * 12)
    assert not losses.loss[:, ~candidates.allowed].any()
    # The texts are judged apart.
    assert not np.allclose(losses.loss[0], losses.loss[2])


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    """Two linear layers and the head, which may not have 3 bits."""
    units = [unit for unit in find_units(build_tiny_llama()) if unit.role in ("o_proj", "lm_head")]
    return list_candidates(units, FORMATS)


def make_losses() -> MetricLosses:
    return MetricLosses(
        names=("prose/kl", "code/kl"),
        loss=np.array(
            [[[8.0, 2.0, 0.0], [4.0, 2.0, 0.0], [0.0, 4.0, 0.0]], [[2.0, 0.1, 0.0], [6.0, 0.5, 0.0], [0.0, 0.4, 0.0]]]
        ),
        std_error=np.full((2, 3, 3), 0.8),
    )


def test_shares_of_the_whole_model_at_one_format(candidates: Candidates) -> None:
    shares = normalise(make_losses(), candidates, reference_format="int4_g64")
    np.testing.assert_allclose(shares.loss[:, :, INT4].sum(axis=1), [1.0, 1.0])
    np.testing.assert_allclose(shares.loss[0], make_losses().loss[0] / 8)
    np.testing.assert_allclose(shares.std_error[1], 0.8)
    # The head may not have 3 bits and is left out of that sum.
    np.testing.assert_allclose(
        normalise(make_losses(), candidates, reference_format="int3_g64").loss[1], make_losses().loss[1] / 8
    )


def test_weighted_sum_and_its_error() -> None:
    table = combine_weighted(make_losses(), {"prose/kl": 3.0, "code/kl": 1.0})
    assert table.unit_of_measure == SHARE
    np.testing.assert_allclose(table.loss[0], [6.5, 1.525, 0.0])
    np.testing.assert_allclose(table.std_error, 0.8 * np.sqrt(0.75**2 + 0.25**2))
    np.testing.assert_allclose(combine_weighted(make_losses(), {"code/kl": 0.2}).loss, make_losses().loss[1])


def test_worst_case_bounds_every_metric_of_every_choice(candidates: Candidates) -> None:
    shares = normalise(make_losses(), candidates, reference_format="int4_g64")
    table = combine_worst(shares)
    np.testing.assert_array_equal(table.loss, shares.loss.max(axis=0))
    np.testing.assert_allclose(table.std_error[0], [0.8, 0.1, 0.1])
    units = np.arange(3)
    for choice in np.ndindex(3, 3, 3):
        assert table.loss[units, choice].sum() >= shares.loss[:, units, choice].sum(axis=1).max() - 1e-15


@pytest.mark.parametrize(
    ("factors", "expected"),
    [(None, [[8, 2, 0], [6, 0.5, 0], [0, 4, 0]]), ({"code/kl": 2.0}, [[8, 2, 0], [12, 1, 0], [0, 4, 0]])],
    ids=["plain", "factor"],
)
def test_groups_have_their_own_metric(factors: Mapping[str, float] | None, expected: list[list[float]]) -> None:
    table = combine_by_group(make_losses(), ("prose/kl", "code/kl", "prose/kl"), factors=factors)
    np.testing.assert_array_equal(table.loss, expected)
    np.testing.assert_allclose(table.std_error[1], 1.6 if factors else 0.8)


def test_factor_moves_bits_between_the_groups() -> None:
    """A larger factor on a group's shares gives it more of one budget, as MixDQ's ratio of two budgets does."""
    losses = make_losses()
    bits = np.array([3, 4, 16])

    def bits_of_second(factor: float) -> int:
        table = combine_by_group(losses, ("prose/kl", "code/kl", "prose/kl"), factors={"code/kl": factor})
        choices = [c for c in product(range(3), range(3), (1,)) if bits[list(c)].sum() <= 23]
        best = min(choices, key=lambda c: table.loss[np.arange(3), list(c)].sum())
        return int(bits[best[1]])

    assert [bits_of_second(factor) for factor in (0.01, 1.0, 100.0)] == [3, 4, 16]


def test_bad_arguments_are_refused(candidates: Candidates) -> None:
    losses, model = make_losses(), build_tiny_llama()
    with pytest.raises(ValueError, match=r"must be among kl, next_token: got \['ssim'\]"):
        measure_metrics(model, candidates, TEXTS, metrics=("ssim",))
    with pytest.raises(ValueError, match=r"must be among kl, next_token: got \[\]"):
        measure_metrics(model, candidates, TEXTS, metrics=())
    with pytest.raises(ValueError, match="at least one text: got none"):
        measure_metrics(model, candidates, {})
    with pytest.raises(ValueError, match=r"2 sequences of 2 tokens: got shape \(1, 8\) for 'short'"):
        measure_metrics(model, candidates, {"short": TEXTS["prose"][:1]})
    with pytest.raises(ValueError, match="metric must be one of prose/kl, code/kl: got 'kl'"):
        losses.index("kl")
    with pytest.raises(ValueError, match="must lose at reference_format='bf16': got a total of 0 by 'prose/kl'"):
        normalise(losses, candidates, reference_format="bf16")
    with pytest.raises(ValueError, match="got 'int8_g64', candidates are"):
        normalise(losses, candidates, reference_format="int8_g64")
    for weights in ({"code/kl": -1.0}, {"code/kl": 0.0}, {}, {"code/kl": float("nan")}):
        with pytest.raises(ValueError, match=r"weights must be at least 0 and one of them positive: got \{"):
            combine_weighted(losses, weights)
    with pytest.raises(ValueError, match="for each of 3 units: got 2"):
        combine_by_group(losses, ("prose/kl", "code/kl"))
    for factor in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"factors must be positive: got {factor} for 'code/kl'"):
            combine_by_group(losses, ("prose/kl",) * 3, factors={"code/kl": factor})
