"""What a measurement adds for a mixture of experts: the routing as measured, taken up again, and the shrunk table."""

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.candidates import list_candidates
from runtime.units import find_units
from sensitivity.experts.expert_tables import find_routing, shrink_table
from sensitivity.experts.routing_measurement import measure_routing
from sensitivity.experts.shrinkage import shrink_rare_losses
from sensitivity.profile import NATS, LossTable
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(0, 320, (3, 12), generator=torch.Generator().manual_seed(0))


def test_the_routing_is_that_of_the_text_and_is_measured_once(tmp_path: Path) -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model), ("int4_g64", "bf16"))
    calls: list[tuple[str, int, int]] = []
    path = tmp_path / "routing.safetensors"
    found = find_routing(model, candidates, TOKENS, path=path, progress=lambda *call: calls.append(call))
    assert calls == [("routing", 0, 1), ("routing", 1, 1)]
    assert found is not None
    expected = measure_routing(model, TOKENS)
    assert found.layers == expected.layers and found.domains == expected.domains
    for name in ("tokens", "visits", "gate_weight", "together"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    again = find_routing(None, candidates, TOKENS, path=path, progress=lambda *_: None)
    assert again is not None
    np.testing.assert_array_equal(again.visits, expected.visits)


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    model = build_tiny_llama()
    candidates = list_candidates(find_units(model), ("int4_g64", "bf16"))
    path = tmp_path / "routing.safetensors"
    never = pytest.fail
    assert find_routing(model, candidates, TOKENS, path=path, progress=lambda *_: never("nothing to measure")) is None
    assert not path.exists()


def test_the_shrunk_table_is_the_shrinkage_of_the_table() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model), ("int3_g64", "int4_g64"))
    rng = np.random.default_rng(1)
    loss = np.where(candidates.allowed, rng.lognormal(size=candidates.allowed.shape), 0.0)
    table = LossTable(loss=loss, std_error=0.3 * loss, unit_of_measure=NATS)
    routing = measure_routing(model, TOKENS)
    shrunk, expected = (
        shrink_table(table, routing, candidates),
        shrink_rare_losses(loss, 0.3 * loss, routing, candidates),
    )
    np.testing.assert_array_equal(shrunk.loss, expected.loss)
    np.testing.assert_array_equal(shrunk.std_error, expected.std_error)
    assert shrunk.unit_of_measure == NATS
    assert not np.array_equal(shrunk.loss, loss)
