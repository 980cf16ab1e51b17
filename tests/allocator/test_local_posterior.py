"""The posterior of single changes against conditioning of the joint Gaussian distribution, written out."""

import numpy as np
import pytest

from allocator.local_model import LocalModel, Observations
from allocator.local_posterior import CAUTION, CURVATURE_ERROR, INTERACTION, Comparison, LocalPosterior, observe

UNITS, FORMATS = 6, 4


@pytest.fixture
def model() -> LocalModel:
    rng = np.random.default_rng(0)
    choice = rng.integers(0, FORMATS, UNITS)
    tables = [rng.normal(size=(UNITS, FORMATS)), *rng.uniform(0.1, 1.0, size=(2, UNITS, FORMATS))]
    for table in tables:
        table[np.arange(UNITS), choice] = 0.0
    slope, std_error, curvature = tables
    return LocalModel(choice=choice, slope=slope, std_error=std_error, curvature=curvature, factor=1.7)


def change_units(choice: np.ndarray, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    changed = choice.copy()
    units = rng.choice(UNITS, size=count, replace=False)
    changed[units] = (choice[units] + rng.integers(1, FORMATS, count)) % FORMATS
    return changed


def make_observations(model: LocalModel, noise: float = 0.2) -> Observations:
    rng = np.random.default_rng(5)
    choices = np.array([change_units(model.choice, count, seed) for seed, count in enumerate((1, 2, 3, 6, 4, 2))])
    # Most are compared with the plan, two with another one near by, one of them in a unit that both change.
    bases = np.array([model.choice] * 4 + [change_units(model.choice, 3, 9), change_units(model.choice, 6, 8)])
    return Observations(
        choices=choices,
        bases=bases,
        change=rng.normal(size=len(choices)),
        std_error=rng.uniform(0.5, 1.5, len(choices)) * noise,
    )


def condition(model: LocalModel, observed: Observations) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean [U F] and covariance [U F, U F] by conditioning the joint distribution of changes and sums."""
    mean = (model.slope + model.factor * model.curvature).ravel()
    sigma = np.diag((model.std_error**2 + (CURVATURE_ERROR * model.factor * model.curvature) ** 2).ravel())
    sums = np.zeros((len(observed.choices), UNITS, FORMATS))
    for c, choice in enumerate(observed.choices):
        for u in range(UNITS):
            # The plan's own format changes nothing: its mean and variance are zero.
            sums[c, u, choice[u]] += 1.0
            sums[c, u, observed.bases[c, u]] -= 1.0
    sums = sums.reshape(len(sums), -1)
    noise = np.diag(observed.std_error**2 + (INTERACTION * observed.change) ** 2)
    joint = sums @ sigma @ sums.T + noise
    gain = sigma @ sums.T @ np.linalg.inv(joint)
    return mean + gain @ (observed.change - sums @ mean), sigma - gain @ sums @ sigma


def test_mean_and_deviation_are_those_of_the_conditional_distribution(model: LocalModel) -> None:
    observed = make_observations(model)
    posterior = LocalPosterior(model, observed)
    mean, covariance = condition(model, observed)
    np.testing.assert_allclose(posterior.mean.ravel(), mean, atol=1e-10)
    # A root of what rounding leaves of zero is 1e-8.
    np.testing.assert_allclose(posterior.std.ravel(), np.sqrt(np.maximum(np.diag(covariance), 0.0)), atol=1e-7)
    np.testing.assert_allclose(posterior.cautious, posterior.mean + CAUTION * posterior.std)
    assert np.all(posterior.mean[np.arange(UNITS), model.choice] == 0.0)
    assert np.all(posterior.std <= LocalPosterior(model, no_observations()).std + 1e-12)


def test_draws_have_the_conditional_distribution(model: LocalModel) -> None:
    observed = make_observations(model)
    posterior = LocalPosterior(model, observed)
    rng = np.random.default_rng(1)
    count = 20_000
    draws = np.array([posterior.draw(rng).ravel() for _ in range(count)])
    mean, covariance = condition(model, observed)
    deviation = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    # Six standard errors of a mean, and of a covariance: E[x^2 y^2] <= 3 var_x var_y for Gaussian numbers.
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - mean), 6 * deviation / np.sqrt(count) + 1e-9)
    bound = 6 * np.sqrt(3 / count) * np.outer(deviation, deviation) + 1e-9
    np.testing.assert_array_less(np.abs(np.cov(draws.T) - covariance), bound)


def no_observations() -> Observations:
    nothing = np.zeros((0, UNITS), dtype=np.int64)
    return Observations(choices=nothing, bases=nothing, change=np.zeros(0), std_error=np.zeros(0))


def test_without_measured_plans_it_is_the_model(model: LocalModel) -> None:
    posterior = LocalPosterior(model, no_observations())
    np.testing.assert_allclose(posterior.mean, model.slope + model.factor * model.curvature)
    drawn = posterior.draw(np.random.default_rng(0))
    assert np.all(drawn[np.arange(UNITS), model.choice] == 0.0)


def test_an_exact_measurement_of_one_change_is_taken_over(model: LocalModel) -> None:
    choice = change_units(model.choice, 1, 3)
    unit = int(np.flatnonzero(choice != model.choice)[0])
    observed = Observations(
        choices=choice[None], bases=model.choice[None], change=np.array([1e-6]), std_error=np.zeros(1)
    )
    posterior = LocalPosterior(model, observed)
    assert posterior.mean[unit, choice[unit]] == pytest.approx(1e-6, abs=1e-9)
    others = posterior.mean - (model.slope + model.factor * model.curvature)
    others[unit, choice[unit]] = 0.0
    np.testing.assert_allclose(others, 0.0, atol=1e-12)


def test_only_plans_near_by_are_observed() -> None:
    rng = np.random.default_rng(2)
    plan = np.zeros(UNITS, dtype=np.int64)
    near, nearer, far = change_units(plan, 3, 1), change_units(plan, 2, 0), plan + 1
    pairs = [(near, plan), (far, plan), (near, far), (nearer, near), (plan, nearer)]
    comparisons = [Comparison(choice=c, base=b, difference=rng.normal(size=5)) for c, b in pairs]
    observed = observe(plan, comparisons, within=3)
    kept = [comparisons[i] for i in (0, 3, 4)]
    np.testing.assert_array_equal(observed.choices, [c.choice for c in kept])
    np.testing.assert_array_equal(observed.bases, [c.base for c in kept])
    for comparison, change, error in zip(kept, observed.change, observed.std_error, strict=True):
        assert change == pytest.approx(comparison.difference.mean())
        assert error == pytest.approx(comparison.difference.std(ddof=1) / np.sqrt(5))
    assert observe(plan, [], within=3).choices.shape == (0, UNITS)
