"""Which models the compiled decoder takes, and what it says of the others."""

from typing import Any

import pytest
import torch

from runtime.apply import apply_formats_
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.decoder_tensors import NotCompiled, compile_decoder
from runtime.kernels.cpu import load_kernels
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")


def pack(model: Any) -> Any:
    apply_formats_(model, dict.fromkeys(list_weights(model), "int4_g32"))
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, qwen2, qwen3.*got gemma"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu.*got gelu"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16.*got 24"),
        ({"intermediate_size": 100}, "intermediate_size must be a multiple of 16.*got 100"),
        ({"hidden_size": 72}, "hidden_size must be a multiple of 16.*got 72"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type must be one of default.*got dynamic"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "attention must be of all tokens.*sliding window"),
    ],
)
def test_models_of_other_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    model = build_tiny_llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(NotCompiled, match=message):
        compile_decoder(model)


def test_weights_that_the_kernels_do_not_read_are_refused() -> None:
    model = build_tiny_llama()
    with pytest.raises(NotCompiled, match="every weight must be packed: got 'Linear'"):
        compile_decoder(model)
    formats = dict.fromkeys(list_weights(model), "int4_g32") | {"model.layers.1.self_attn.k_proj.weight": "mxfp4"}
    apply_formats_(model, formats)
    assert "got 'mxfp4' in key of layer 1" in str(install_compiled_decoder_(model))
    with pytest.raises(NotCompiled, match="norms must be RMS norms in float32 on the CPU: got .* with torch.bfloat16"):
        compile_decoder(pack(build_tiny_llama()).bfloat16())
    mapped = pack(build_tiny_llama())
    mapped.model.norm = torch.nn.Sequential(mapped.model.norm)
    with pytest.raises(NotCompiled, match="(?s)got Sequential.* with no weight in the last norm"):
        compile_decoder(mapped)
    with pytest.raises(NotCompiled, match="biases must lie on the CPU, in float32"):
        biased = pack(build_tiny_llama(attention_bias=True))
        biased.model.layers[0].self_attn.q_proj.bias.data = biased.model.layers[0].self_attn.q_proj.bias.data.half()
        compile_decoder(biased)
    assert install_compiled_decoder_(build_tiny_mixtral()) is not None
