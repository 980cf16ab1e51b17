"""Instances by seed, shaped like a model's: for trying a solver out, for tests and for benchmarks."""

import numpy as np

from solvers.problem import AllocationProblem


def make_instance(
    *,
    n_units: int,
    n_formats: int,
    n_resources: int = 1,
    seed: int = 0,
    tightness: float = 0.5,
    n_sketch: int = 0,
) -> AllocationProblem:
    """Returns an instance with log-normal losses that are not convex in the cost, and unequal sizes in bytes.

    Args:
        n_units: U.
        n_formats: F, of 2 to 8 bits.
        n_resources: R; their costs differ by a factor per unit and some noise per candidate.
        seed: seed of every draw.
        tightness: place of every limit between the least (0) and the greatest (1) use.
        n_sketch: length S of the sketch vectors; 0 for a separable objective.
    """
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, n_formats)
    weights = rng.integers(2**18, 2**24, n_units)[:, None]
    factor = rng.uniform(0.5, 1.5, (n_resources, n_units, 1)) * rng.uniform(
        0.95, 1.1, (n_resources, n_units, n_formats)
    )
    cost = np.floor(weights * bits / 8 * factor)
    loss = 0.1 * rng.lognormal(0, 1.5, (n_units, 1)) * 4.0**-bits * rng.lognormal(0, 0.5, (n_units, n_formats))
    least, most = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    sketch = None
    if n_sketch:
        # A direction common to all units makes the errors add up, as they do in models.
        direction = 0.3 * rng.normal(size=(n_sketch, 1, 1)) + rng.normal(size=(n_sketch, n_units, 1))
        direction = direction + 0.5 * rng.normal(size=(n_sketch, n_units, n_formats))
        sketch = direction / np.linalg.norm(direction, axis=0) * np.sqrt(2 * loss)
    return AllocationProblem(
        loss=loss,
        cost=cost,
        limit=np.floor(least + tightness * (most - least)),
        allowed=np.ones(loss.shape, dtype=bool),
        resources=tuple(f"resource{r}" for r in range(n_resources)),
        sketch=sketch,
    )
