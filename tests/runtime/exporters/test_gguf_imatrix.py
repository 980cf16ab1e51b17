"""Importance matrices: sums over the inputs that hooks see, under llama.cpp's names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

from runtime.exporters.gguf_imatrix import write_importance_matrix
from runtime.loading import ReferenceModel, load_reference
from runtime.units import list_weights
from sensitivity.weight_inputs import find_statistics
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral, save_model

TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


def write(reference: ReferenceModel, path: Path, tokens: torch.Tensor = TOKENS) -> dict[str, np.ndarray]:
    """Returns the tensors of the importance matrix of a model."""
    statistics = find_statistics(reference.model, tokens, directory=None)
    write_importance_matrix(reference, statistics, path, source="a text", tokens_shape=(3, 12))
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


def test_sums_are_those_of_the_inputs(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_llama(), tmp_path / "model")))
    found, inputs = write(reference, tmp_path / "imatrix.gguf"), capture_inputs(reference.model, TOKENS)
    parts = {"self_attn.k_proj": "attn_k", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
    names = {f"model.layers.1.{part}.weight": f"blk.1.{named}.weight" for part, named in parts.items()}
    for name, tensor in {**names, "lm_head.weight": "output.weight"}.items():
        expected = inputs[name].double().square().sum(0).numpy()
        # Float32 sums of some tens of products.
        np.testing.assert_allclose(found[f"{tensor}.in_sum2"].ravel(), expected, rtol=1e-5, atol=1e-5 * expected.max())
        assert found[f"{tensor}.counts"].ravel() == [TOKENS.numel()]
    # An embedding that is no head reads ones and zeros, which say nothing of columns.
    assert len(found) == 2 * (len(list_weights(reference.model)) - 1)
    fields = GGUFReader(tmp_path / "imatrix.gguf").fields
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.datasets"].contents() == ["a text"]
    assert (fields["imatrix.chunk_count"].contents(), fields["imatrix.chunk_size"].contents()) == (3, 12)


def test_experts_have_a_row_each(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_mixtral(), tmp_path / "model")))
    # One token takes two of the four experts.
    found = write(reference, tmp_path / "imatrix.gguf", TOKENS[:1, :1])
    for part in ("gate", "up", "down"):
        sums, counts = (found[f"blk.0.ffn_{part}_exps.weight.{kind}"] for kind in ("in_sum2", "counts"))
        assert sums.shape[0] == len(counts) == 4
        assert sorted(counts.ravel()) == [0, 0, 1, 1]
        assert np.array_equal(sums.any(axis=1), counts.ravel() > 0)


def test_of_a_known_kind_only(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_llama(), tmp_path / "model")))
    reference.model.config.model_type = "gpt_neox"
    with pytest.raises(ValueError, match=r"one of llama, .*: got 'gpt_neox'"):
        write(reference, tmp_path / "imatrix.gguf")
