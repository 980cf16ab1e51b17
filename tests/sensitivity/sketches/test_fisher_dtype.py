"""A Fisher sketch whose products are bfloat16 ranks candidates as one in float32 does, streamed or not."""

from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from sensitivity.sketches.fisher_sketch import fisher_loss, measure_fisher_sketch
from tests.sensitivity.streamed_models import SEED, TOKENS, make_candidates, measure_streamed


def test_losses_rank_as_in_float32(model: PreTrainedModel, tmp_path: Path) -> None:
    candidates = make_candidates(model)
    exact = measure_streamed(model, tmp_path / "exact")
    narrow = measure_streamed(model, tmp_path / "narrow", dtype=torch.bfloat16)
    assert narrow.dtype == np.float32 and not np.array_equal(narrow, exact)
    losses = [fisher_loss(sketch)[0] for sketch in (exact, narrow)]
    for f in range(len(candidates.formats)):
        lossy = losses[0][:, f] > 0
        if lossy.sum() > 2:
            assert spearmanr(losses[0][lossy, f], losses[1][lossy, f]).statistic > 0.97
    # Labels and experts near a tie are drawn otherwise. All labels drawn anew would move a loss by sqrt(2) errors.
    lossy = losses[0] > 0
    moved = (losses[1] - losses[0])[lossy] / fisher_loss(exact)[1][lossy]
    assert np.sqrt(np.square(moved).mean()) < 1.0
    # Weights, and what they are rendered from, stay what they are.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_streamed_sketch_is_that_of_the_whole_model(model: PreTrainedModel, tmp_path: Path) -> None:
    candidates = make_candidates(model)
    whole = np.stack(list(measure_fisher_sketch(model, candidates, TOKENS, seed=SEED, dtype=torch.bfloat16)))
    streamed = measure_streamed(model, tmp_path, dtype=torch.bfloat16)
    np.testing.assert_allclose(streamed, whole, atol=2**-6 * np.abs(whole).max())
