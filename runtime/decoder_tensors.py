"""A packed model of Llama's shape as the compiled decoder reads it, and what of a model it does not know."""

from typing import Any

import torch
from torch import Tensor, nn

from runtime.decoder_cache import torch_floats
from runtime.kernels.decoder_step import CompiledDecoder, DecoderTensors, LayerTensors, LinearTensors
from runtime.kernels.matrices import Matrix
from runtime.kernels.stored_planes import has_codes
from runtime.kernels.weight_views import find_matrix
from runtime.packed import PackedWeight, QuantizedEmbedding, QuantizedLinear

# Their modules have the same names and the same order; Qwen 3 has norms of queries and keys besides.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Rotations whose angles do not depend on the length of the text.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_CPU = torch.device("cpu")


class NotCompiled(ValueError):
    """A model, or the way it is set up, that the compiled decoder does not know; the text says why."""


def compile_decoder(model: Any) -> CompiledDecoder:
    """Returns the compiled decoder of a packed model, which reads the model's own tensors.

    Raises:
        NotCompiled: If the model has another shape, or holds tensors that the kernels do not read.
    """
    check_shape(model)
    config = model.config
    layers = model.model.layers
    attention = layers[0].self_attn
    tensors = DecoderTensors(
        layers=[_describe_layer(layer) for layer in layers],
        last_norm=_norm_weight(model.model.norm, "the last norm"),
        head=_describe_linear(model.lm_head, "lm_head"),
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        epsilon=config.rms_norm_eps,
        attention_scale=attention.scaling,
        embedding=_find_table(model.model.embed_tokens),
        embedding_scale=getattr(model.model.embed_tokens, "scale", 1.0),
    )
    return CompiledDecoder(tensors, _list_widths(model))


def _find_table(embedding: nn.Module) -> Matrix | None:
    """Returns the view of a table that the decoder reads itself; None where its module must."""
    if not isinstance(embedding, QuantizedEmbedding) or not has_codes(embedding.weight.format):
        return None
    return find_matrix(embedding.weight, _CPU)


def check_shape(model: Any) -> None:
    """Checks what the compiled decoder asks of a model but its tensors.

    Raises:
        NotCompiled: If the model has another shape, or hooks.
    """
    _check_config(model.config)
    _check_modules(model)


def _check_config(config: Any) -> None:
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    sliding |= config.model_type == "mistral" and config.sliding_window is not None
    requirements = (
        (config.model_type in MODEL_TYPES, "model_type", config.model_type, f"one of {', '.join(MODEL_TYPES)}"),
        (getattr(config, "hidden_act", None) == "silu", "hidden_act", getattr(config, "hidden_act", None), "silu"),
        (rope_type in _ROPE_TYPES, "rope_type", rope_type, f"one of {', '.join(_ROPE_TYPES)}"),
        (not sliding, "attention", "sliding window", "of all tokens"),
        (head_dim % 16 == 0, "head_dim", head_dim, "a multiple of 16"),
        (config.hidden_size % 16 == 0, "hidden_size", config.hidden_size, "a multiple of 16"),
        (config.intermediate_size % 16 == 0, "intermediate_size", config.intermediate_size, "a multiple of 16"),
    )
    for holds, name, value, wanted in requirements:
        if not holds:
            msg = f"{name} must be {wanted} for the compiled decoder: got {value}. The model runs module by module."
            raise NotCompiled(msg)


def _describe_layer(layer: Any) -> LayerTensors:
    attention, feed_forward = layer.self_attn, layer.mlp
    index = attention.layer_idx
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    linears = {
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "output": attention.o_proj,
        "gate": feed_forward.gate_proj,
        "up": feed_forward.up_proj,
        "down": feed_forward.down_proj,
    }
    return LayerTensors(
        attention_norm=_norm_weight(layer.input_layernorm, f"layer {index}"),
        feed_forward_norm=_norm_weight(layer.post_attention_layernorm, f"layer {index}"),
        query_norm=None if query_norm is None else _norm_weight(query_norm, f"layer {index}"),
        key_norm=None if key_norm is None else _norm_weight(key_norm, f"layer {index}"),
        **{name: _describe_linear(linear, f"{name} of layer {index}") for name, linear in linears.items()},
    )


def _describe_linear(module: nn.Module, name: str) -> LinearTensors:
    if not isinstance(module, QuantizedLinear):
        msg = f"every weight must be packed: got '{type(module).__name__}' in {name}."
        raise NotCompiled(msg)
    matrix = find_matrix(module.weight, _CPU)
    if matrix is None:
        msg = (
            "every weight must be on the CPU, in a format that the kernels read: got "
            f"'{module.weight.format.name}' in {name}."
        )
        raise NotCompiled(msg)
    if not torch_floats(module.bias):
        msg = f"biases must lie on the CPU, in float32: got another in {name}."
        raise NotCompiled(msg)
    return LinearTensors(weight=matrix, bias=module.bias)


def _norm_weight(norm: nn.Module, place: str) -> Tensor:
    weight = getattr(norm, "weight", None)
    if not type(norm).__name__.endswith("RMSNorm") or weight is None or not torch_floats(weight):
        msg = f"norms must be RMS norms in float32 on the CPU: got {norm} with {_describe(weight)} in {place}."
        raise NotCompiled(msg)
    found: Tensor = weight
    return found


def _describe(tensor: Tensor | None) -> str:
    return "no weight" if tensor is None else f"{tensor.dtype} on {tensor.device}"


def _check_modules(model: nn.Module) -> None:
    # transformers leaves hooks of its own behind once hidden states were asked for; they do nothing when they are not.
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            owner = getattr(hook, "__module__", "")
            if not owner.startswith("transformers."):
                msg = f"modules must have no hooks, as activation formats are: got one of '{owner}' on '{name}'."
                raise NotCompiled(msg)


def _list_widths(model: nn.Module) -> list[tuple[PackedWeight, int]]:
    """Returns the weights that can be read at several widths, and those that they are read at now."""
    packed = (module for module in model.modules() if isinstance(module, PackedWeight))
    return [(weight, weight.width) for weight in packed if len(weight.format.widths) > 1]
