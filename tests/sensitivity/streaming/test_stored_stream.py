"""A model whose weights are read layer by layer gives the numbers of the model in memory, and holds one layer."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from runtime.loading import load_reference
from runtime.stored_weights import StoredWeights, build_empty_model
from runtime.units import Weight, list_weights
from sensitivity.streaming.gradient_stream import GradientStream
from tests.sensitivity.exact_gradients import make_score
from tests.sensitivity.streamed_models import TOKENS, make_candidates, measure_streamed
from tests.tiny_models import save_model


@pytest.mark.parametrize("shard", ["1GB", "60KB"], ids=["one_file", "shards"])
def test_sketch_is_that_of_the_model_in_memory(model: PreTrainedModel, tmp_path: Path, shard: str) -> None:
    directory = save_model(model, tmp_path / "model")
    if shard != "1GB":
        (directory / "model.safetensors").unlink()
        model.save_pretrained(directory, max_shard_size=shard)
        assert len(list(directory.glob("*.safetensors"))) > 3
    reference = load_reference(str(directory)).model
    empty = build_empty_model(directory)
    assert make_candidates(empty).units == make_candidates(reference).units
    sketch = measure_streamed(empty, tmp_path / "empty", residency=StoredWeights(empty, directory))
    np.testing.assert_array_equal(sketch, measure_streamed(reference, tmp_path / "whole"))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in empty.parameters())
    # Tied parameters are one still.
    assert list_weights(empty) == list_weights(reference)


def test_narrower_types_are_read_as_float32(tmp_path: Path, model: PreTrainedModel) -> None:
    directory = save_model(model.to(torch.bfloat16), tmp_path / "model")
    empty = build_empty_model(directory)
    sketch = measure_streamed(empty, tmp_path / "empty", residency=StoredWeights(empty, directory))
    np.testing.assert_array_equal(sketch, measure_streamed(load_reference(str(directory)).model, tmp_path / "whole"))


class ResidentLayers:
    """Keeps which blocks have weights in memory whenever a block begins."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seen: list[set[str]] = []

    def begin(self, weights: Mapping[Weight, Tensor]) -> int:
        names = [name for name, parameter in self.model.named_parameters() if parameter.device.type != "meta"]
        self.seen.append({name.split(".")[2] if ".layers." in name else "outside" for name in names})
        return 0

    def add(self, weight: Weight, gradients: Tensor, first: int) -> None:
        pass

    def finish(self) -> dict[str, Tensor]:
        return {}


def test_one_block_at_a_time_is_in_memory(tiny_qwen_moe_dir: Path, tmp_path: Path) -> None:
    empty = build_empty_model(tiny_qwen_moe_dir)
    layers = ResidentLayers(empty)
    stream = GradientStream(
        empty,
        TOKENS,
        list(list_weights(empty).values()),
        loss=make_score(0),
        directory=tmp_path,
        residency=StoredWeights(empty, tiny_qwen_moe_dir),
    )
    stream.run({"layers": layers}, lambda *_: None)
    assert layers.seen == [{"1"}, {"0"}, {"outside"}]


def test_missing_weight_is_refused_and_nothing_stays_in_memory(model: PreTrainedModel, tmp_path: Path) -> None:
    directory = save_model(model, tmp_path / "model")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    empty = build_empty_model(directory)
    with pytest.raises(ValueError, match=r"got none for 'model\.layers\.1\.self_attn\.o_proj\.weight'.*save the model"):
        measure_streamed(empty, tmp_path / "empty", residency=StoredWeights(empty, directory))
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
