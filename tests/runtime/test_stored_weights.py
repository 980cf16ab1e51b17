"""A model whose weights stay in its files runs as the one in memory, holds one block, and says what is wrong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.apply import apply_formats_, simulated_formats
from runtime.checkpoint import fixed_bytes, reference_bytes, rest_bytes
from runtime.loading import ReferenceModel, load_reference
from runtime.stored_weights import load_stored_reference
from runtime.units import list_weights, read_weight
from tests.runtime.format_mixes import MODELS, compute_logits, draw_formats
from tests.tiny_models import save_model


def devices(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(MODELS[request.param](), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def stored(directory: Path) -> ReferenceModel:
    return load_stored_reference(str(directory))


@pytest.fixture(scope="module")
def whole(directory: Path) -> ReferenceModel:
    return load_reference(str(directory))


def test_logits_are_those_of_the_model_in_memory(stored: ReferenceModel, whole: ReferenceModel) -> None:
    assert torch.equal(compute_logits(stored.model), compute_logits(whole.model))
    assert devices(stored.model) == {"meta"}
    assert (stored.name, stored.fingerprint) == (whole.name, whole.fingerprint)


def test_simulated_formats_are_those_of_the_model_in_memory(stored: ReferenceModel, whole: ReferenceModel) -> None:
    reference = compute_logits(whole.model)
    for seed in (1, 2):
        formats = draw_formats(whole.model, seed)
        with simulated_formats(whole.model, formats):
            expected = compute_logits(whole.model)
        with simulated_formats(stored.model, formats):
            assert torch.equal(compute_logits(stored.model), expected)
        assert torch.equal(compute_logits(stored.model), reference) and not torch.equal(expected, reference)
    # One inside the other.
    outer, inner = draw_formats(whole.model, 3), dict(list(draw_formats(whole.model, 4).items())[:5])
    with simulated_formats(whole.model, {**outer, **inner}):
        expected = compute_logits(whole.model)
    rest = {name: format_ for name, format_ in outer.items() if name not in inner}
    with simulated_formats(stored.model, rest), simulated_formats(stored.model, inner):
        assert torch.equal(compute_logits(stored.model), expected)


def test_bytes_are_those_of_the_model_in_memory(stored: ReferenceModel, whole: ReferenceModel) -> None:
    for count in (fixed_bytes, rest_bytes, reference_bytes):
        assert count(stored.model, residency=stored.residency) == count(whole.model)


def test_packed_model_is_that_of_the_model_in_memory(stored: ReferenceModel, directory: Path) -> None:
    whole = load_reference(str(directory))
    formats = draw_formats(whole.model, 7)
    apply_formats_(whole.model, formats)
    apply_formats_(stored.model, formats, residency=stored.residency)
    expected, found = whole.model.state_dict(), stored.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(compute_logits(stored.model), compute_logits(whole.model))


def test_a_block_is_in_memory_while_it_is_used(stored: ReferenceModel) -> None:
    layers, seen = stored.model.model.layers, []

    def observe(k: int) -> None:
        seen.append((k, devices(layers[k]), devices(layers[1 - k]), devices(stored.model.get_output_embeddings())))

    for k, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, k=k: observe(k))
    compute_logits(stored.model)
    assert seen == [(k, {"cpu"}, {"meta"}, {"cpu"}) for k in (0, 1)]
    weights = list(list_weights(stored.model).values())
    for block in stored.residency.blocks:
        with stored.residency.resident(block), stored.residency.resident(block):
            for weight in weights:
                own = stored.residency.block_of(weight.parameter) == block
                assert read_weight(stored.model, weight).device.type == ("cpu" if own else "meta")
    assert devices(stored.model) == {"meta"}


class Interruption(Exception):
    """Stands for anything that ends a run early."""


def test_nothing_stays_in_memory_after_an_exception(stored: ReferenceModel, whole: ReferenceModel) -> None:
    def interrupt(*_: object) -> None:
        raise Interruption

    handle = stored.model.model.layers[1].register_forward_pre_hook(interrupt)
    formats = draw_formats(stored.model, 5)
    with pytest.raises(Interruption), simulated_formats(stored.model, formats):
        compute_logits(stored.model)
    assert devices(stored.model) == {"meta"}
    handle.remove()
    assert torch.equal(compute_logits(stored.model), compute_logits(whole.model))


def change_weight(directory: Path, model: PreTrainedModel, name: str, values: Tensor | None) -> Path:
    """Writes a model without a weight, or with other values of it."""
    path = save_model(model, directory) / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors if values is None else {**tensors, name: values}, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"must hold all of its weights: got none for 'model\.layers\.1\.self_attn\.o_proj\.weight'"),
        (torch.full((64, 64), torch.nan), r"got 4096 non-finite values in 'model\.layers\.1\.self_attn\.o_proj"),
    ],
    ids=["missing", "not_finite"],
)
def test_bad_weight_is_refused(values: Tensor | None, message: str, tmp_path: Path) -> None:
    directory = change_weight(tmp_path, MODELS["llama"](), "model.layers.1.self_attn.o_proj.weight", values)
    model = load_stored_reference(str(directory)).model
    with pytest.raises(ValueError, match=message):
        compute_logits(model)
    assert devices(model) == {"meta"}


def test_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(
        ValueError, match=r"read block by block must be a directory with safetensors: got '.*model\.gguf'"
    ):
        load_stored_reference(str(path))
