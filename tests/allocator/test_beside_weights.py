"""What is measured beside the weights, and refused before minutes are spent on them."""

from pathlib import Path

import pytest

from allocator.beside_weights import find_activation_candidates, find_cache_candidates
from runtime.loading import load_reference
from runtime.stored_weights import load_stored_reference
from runtime.units import find_units


def test_named_formats_alone_make_candidates(tiny_llama_dir: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    units = find_units(reference.model)
    assert find_activation_candidates(reference, units, (), ("fisher",)) is None
    assert find_cache_candidates(reference, (), ("fisher",)) is None
    found = find_activation_candidates(reference, units, ("int8_token", "bf16"), ("fisher",))
    assert found is not None and found.allowed.all() and found.allowed.shape == (14, 2)


def test_losses_beside_weights_need_nats(tiny_llama_dir: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    units = find_units(reference.model)
    with pytest.raises(ValueError, match=r"losses of activations are in nats/token .* leave the formats of act"):
        find_activation_candidates(reference, units, ("int8_token",), ("weight_error",))
    with pytest.raises(ValueError, match=r"losses of caches are in nats/token .* leave the formats of caches"):
        find_cache_candidates(reference, ("bf16",), ("weight_error",))


def test_models_read_block_by_block_have_no_activations(tiny_llama_dir: Path) -> None:
    reference = load_stored_reference(str(tiny_llama_dir))
    whole = load_reference(str(tiny_llama_dir))
    with pytest.raises(ValueError, match="activations of a model that is read block by block cannot be measured"):
        find_activation_candidates(reference, find_units(whole.model), ("int8_token",), ("fisher",))
