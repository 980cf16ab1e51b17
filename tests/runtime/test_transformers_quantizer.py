"""Packed models through transformers' own door give the logits of bitplan's own loader, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import runtime.transformers_quantizer  # noqa: F401 (registers the method)
from runtime.loading import load_reference
from runtime.packed import PackedWeight
from runtime.packed_model import load_packed, save_packed_
from runtime.transforms import apply_transforms_, parse_transform
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe, save_model

MENU = ("int4_g64", "q4_0", "int8_g32_sym", "mxfp4", "bf16", "int3_channel_sym")
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "own head": build_tiny_llama,
    "tied head": lambda: build_tiny_llama(tied=True),
    "mixtral": build_tiny_mixtral,
    "qwen2 mixture": build_tiny_qwen_moe,
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_from_pretrained_loads_a_packed_model(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    formats = {name: MENU[i % len(MENU)] for i, name in enumerate(list_weights(reference.model))}
    save_packed_(reference, formats, tmp_path / "packed", metadata={})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    assert any(isinstance(module, PackedWeight) for module in model.modules())
    own, _, _ = load_packed(tmp_path / "packed")
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, own(tokens).logits)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


def test_packed_routers_are_refused(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_mixtral(), tmp_path / "model")))
    formats = dict.fromkeys(list_weights(reference.model, routers=True), "int8_g32_sym")
    save_packed_(reference, formats, tmp_path / "packed", metadata={})
    with pytest.raises(ValueError, match=r"routers must be unquantized .*: got '.*gate\.weight' in int8_g32_sym"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_matrix_behind_the_last_norm_is_refused(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_llama(tied=True), tmp_path / "model")))
    apply_transforms_(reference.model, [parse_transform("hadamard")], torch.arange(2, 34)[None])
    formats = dict.fromkeys(list_weights(reference.model), "int8_g32_sym")
    save_packed_(reference, formats, tmp_path / "packed", metadata={})
    with pytest.raises(ValueError, match="transformers loads what the architecture says: got a packed model with a"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
