"""Curvatures against an explicit inverse, and both criteria against brute force in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.rendering import render
from runtime.units import Weight, find_units, read_weight
from sensitivity.criteria.column_loss import (
    DAMPING,
    ColumnCurvatures,
    column_curvature,
    measure_column_loss,
    score_inverse_hessian,
)
from sensitivity.criteria.statistics import measure_statistics
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_mixtral

FORMATS = ("int2_g64", "int4_g32_sym", "bf16")
TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))
# The moments are float32; the damping bounds the condition number by 100 in_features.
TOLERANCE = 2e-3


def explicit_curvature(rows: NDArray[np.float64], token_count: int) -> NDArray[np.float64]:
    """Returns 1 / U_jj^2 with U the upper Cholesky factor of the inverse, as GPTQ writes it."""
    H = 2.0 / token_count * rows.T @ rows
    H += DAMPING * np.diag(H).mean() * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    curvature: NDArray[np.float64] = np.diag(U) ** -2.0
    return curvature


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), features=st.integers(1, 9), count=st.integers(1, 20))
def test_curvature_is_that_of_the_inverse(seed: int, features: int, count: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(count, features))
    found = column_curvature(torch.from_numpy(rows.T @ rows), count).numpy()
    np.testing.assert_allclose(found, explicit_curvature(rows, count), rtol=1e-9)
    H = 2.0 / count * rows.T @ rows
    damped = np.diag(H) + DAMPING * np.diag(H).mean()
    # What is left of a column is no more than the column; of the last one, nothing is explained by later ones.
    assert np.all(found <= damped * (1 + 1e-12))
    assert found[-1] == pytest.approx(damped[-1], rel=1e-12)
    # Inputs twice as large: four times the curvature.
    doubled = column_curvature(torch.from_numpy(4.0 * rows.T @ rows), count).numpy()
    np.testing.assert_allclose(doubled, 4.0 * found, rtol=1e-12)


def test_inputs_that_are_all_zero_have_no_curvature() -> None:
    assert not column_curvature(torch.zeros(3, 3), 5).any()


def curvatures_of(weight: Weight, inputs: dict[str, torch.Tensor]) -> list[tuple[NDArray[np.float64], int]]:
    """Returns (curvature, axis) of everything that reads a weight."""
    found = []
    if len(inputs.get(weight.name, ())):
        found.append((explicit_curvature(inputs[weight.name].numpy(), TOKENS.numel()), 1))
    if weight.kind == "embedding":
        one_hot = np.eye(VOCABULARY_SIZE)[TOKENS.flatten().numpy()]
        found.append((explicit_curvature(one_hot, TOKENS.numel()), 0))
    return found


def test_criteria_are_those_of_brute_force(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), FORMATS)
    curvatures = ColumnCurvatures(measure_statistics(model, TOKENS))
    loss = measure_column_loss(model, candidates, curvatures)
    score = score_inverse_hessian(model, candidates.units, curvatures)
    inputs = capture_inputs(model, TOKENS)
    for u, unit in enumerate(candidates.units):
        [weight] = unit.weights
        values = read_weight(model, weight).double()
        readers = curvatures_of(weight, inputs)
        scaled = [(values * torch.from_numpy(c).unsqueeze(1 - axis).sqrt()).numpy() for c, axis in readers]
        if readers:
            assert score[u] == pytest.approx(sum(np.linalg.norm(a) * a.var() for a in scaled), rel=TOLERANCE)
        else:
            assert np.isnan(score[u])
        for f, format_ in enumerate(candidates.formats):
            if not candidates.allowed[u, f]:
                assert loss[u, f] == 0.0
                continue
            squares = (render(read_weight(model, weight), format_).double() - values).square().numpy()
            exact = sum(0.5 * float(squares.sum(axis=1 - axis) @ c) for c, axis in readers)
            assert loss[u, f] == pytest.approx(exact, rel=TOLERANCE)


def test_expert_that_no_token_visits_has_no_loss() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model), FORMATS)
    curvatures = ColumnCurvatures(measure_statistics(model, TOKENS[:1, :1]))
    loss = measure_column_loss(model, candidates, curvatures)
    idle = [u for u, unit in enumerate(candidates.units) if unit.kind == "expert" and not loss[u].any()]
    assert len(idle) == 2 * 2 * 2
    assert np.isnan(score_inverse_hessian(model, candidates.units, curvatures)[idle]).all()
