"""A packed model with mixed widths gives the same text by every path: reference, CPU kernels, interpreted Triton."""

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.apply import apply_formats_
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.decoder_cache import DecoderCache
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path, uses_triton
from runtime.packed import PackedExperts
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

FORMATS = ("int4_g32", "int2_g64", "int8_g32_sym", "int3_g64", "int5_g32")


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
def test_greedy_text_is_the_same_by_every_path() -> None:
    model: Any = build_tiny_llama(tied=True)
    formats = {name: FORMATS[i % len(FORMATS)] for i, name in enumerate(list_weights(model))}
    apply_formats_(model, formats)
    assert install_compiled_decoder_(model.requires_grad_(False)) is None
    prompt = torch.tensor([[7, 120, 33, 260]])
    kernels = load_kernels()
    assert kernels is not None
    found: dict[str, Tensor] = {}
    for path in ("reference", kernels.level, "auto"):
        with kernel_path(path):
            assert uses_triton(torch.device("cpu")) == (path == "auto")
            output = model.generate(
                prompt, max_new_tokens=3, do_sample=False, pad_token_id=1, return_dict_in_generate=True
            )
        assert isinstance(output.past_key_values, DecoderCache) == (path == kernels.level)
        found[path] = output.sequences
    assert found["reference"].shape[1] > prompt.shape[1]
    assert torch.equal(found[kernels.level], found["reference"])
    assert torch.equal(found["auto"], found["reference"])


def test_experts_of_every_kind_generate_the_reference_text() -> None:
    """Formats that share a launch, and two that are multiplied alone, in a mixture that generates."""
    names = ("nvfp4", "int4_g32", "mxfp4", "ternary_g64", "bcq3_g64", "fp8_e4m3_channel", "int1_g64", "bf16", "mxint8")
    model: Any = build_tiny_mixtral().requires_grad_(False)
    apply_formats_(model, {name: names[i % len(names)] for i, name in enumerate(list_weights(model))})
    prompt = torch.tensor([[7, 120, 33, 260]])
    found: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for path in ("reference", "auto"):
        with kernel_path(path):
            found[path] = model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=1)
            logits[path] = model(prompt).logits
    assert torch.equal(found["auto"], found["reference"])
    assert not torch.equal(logits["auto"], logits["reference"])
    assert float((logits["auto"] - logits["reference"]).abs().max()) <= 1e-4 * float(logits["reference"].abs().max())
    projections = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert all(len(projection.__dict__["_fragment_experts"][1].kinds) >= 2 for projection in projections)
