"""Generation by the compiled decoder: models of Llama's shape run in one call a token, not module by module.

``install_compiled_decoder_`` gives a packed model a forward that takes the compiled pass (``kernels/decoder_step.py``)
where a call continues one sequence with a cache, as ``generate`` does, and its own forward for all else: batches,
padding, gradients, hooks, other devices and types, hidden states or attentions asked for. Both compute the same
products with the same kernels; norms, rotation, softmax and gate differ by roundings of float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from runtime.decoder_cache import DecoderCache, torch_floats
from runtime.decoder_run import run_tokens
from runtime.kernels.decoder_step import CompiledDecoder, DecoderTensors, LayerTensors, LinearTensors
from runtime.kernels.dispatch import selected_kernels, uses_triton
from runtime.kernels.matrices import Matrix
from runtime.kernels.stored_planes import has_codes
from runtime.kernels.weight_views import find_matrix
from runtime.packed import PackedWeight, QuantizedEmbedding, QuantizedLinear
from runtime.packed_decoding import PackedSequence, find_cache_obstacle
from runtime.quantized_cache import QuantizedCache

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


class _DecodesCompiled:
    """Gives a causal language model of transformers the forward that is described at the top of this file."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Returns what the model's own forward does."""
        wanted = logits_to_keep if isinstance(logits_to_keep, int) else None
        plain = inputs_embeds is None and labels is None and not any(v for k, v in kwargs.items() if k != "return_dict")
        cache = None
        if plain and input_ids is not None and past_key_values is not None and wanted is not None:
            cache = _find_cache(self, input_ids, attention_mask, position_ids, past_key_values)
        if cache is None or input_ids is None or wanted is None:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        logits = run_tokens(self, cache, input_ids, wanted=min(wanted, input_ids.shape[1]) or input_ids.shape[1])
        output = CausalLMOutputWithPast(logits=logits[None], past_key_values=cache.as_cache)
        return output if kwargs.get("return_dict", True) else output.to_tuple()


def install_compiled_decoder_(model: Any) -> str | None:
    """Lets a packed model generate by the compiled decoder; returns None, or why it cannot.

    Args:
        model: As ``load_packed`` makes it.
    """
    try:
        compile_decoder(model)
    except NotCompiled as error:
        return str(error)
    if not isinstance(model, _DecodesCompiled):
        model.__class__ = type(type(model).__name__, (_DecodesCompiled, type(model)), {})
    return None


def find_obstacle(model: Any) -> str | None:
    """Returns why a packed model will not generate by the compiled decoder now; None where it will."""
    if not _has_kernels():
        return "The CPU kernels are not there, or another path was asked for."
    return install_compiled_decoder_(model)


def begin_sequence(model: Any, past: Any = None) -> DecoderCache | None:
    """Returns a cache for ``run_tokens`` with what another holds; None where the model's own forward must run."""
    return _begin_cache(model, DynamicCache() if past is None else past) if _decodes_compiled(model) else None


def begin_packed_sequence(model: Any, past: QuantizedCache) -> PackedSequence | None:
    """Returns a packed cache as ``run_tokens`` goes on with it; None where the model's own forward must run."""
    return _continue_packed(model, past) if _decodes_compiled(model) else None


def _decodes_compiled(model: Any) -> bool:
    return not model.training and isinstance(model, _DecodesCompiled) and _has_kernels()


def _has_kernels() -> bool:
    # Where Triton's interpreter is asked for, its kernels compute the products.
    return selected_kernels() is not None and not uses_triton(_CPU)


def _find_cache(
    model: Any, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: Any
) -> DecoderCache | PackedSequence | None:
    """Returns the cache that the compiled pass goes on with; None where the model's own forward must run."""
    tokens = input_ids.shape[-1]
    if model.training or input_ids.shape[0] != 1 or tokens == 0 or input_ids.device.type != "cpu":
        return None
    if torch.compiler.is_compiling() or not _has_kernels():
        return None
    length = past.get_seq_length()
    if mask is not None and not (mask.dim() == 2 and mask.shape[1] == length + tokens and bool(mask.all())):
        return None
    if position_ids is not None:
        ends = position_ids.reshape(-1)
        if len(ends) != tokens or int(ends[0]) != length or int(ends[-1]) != length + tokens - 1:
            return None
    if isinstance(past, QuantizedCache):
        return _continue_packed(model, past)
    if not isinstance(past, DecoderCache):
        return _begin_cache(model, past)
    return past if past.decoder.is_current or _read_anew(model, past) else None


def _continue_packed(model: Any, past: QuantizedCache) -> PackedSequence | None:
    """Returns a packed cache as the compiled pass goes on with it; None where the model's own forward must run."""
    kept = past.sequence
    if not isinstance(kept, PackedSequence) or not kept.decoder.is_current:
        if find_cache_obstacle(past) is not None:
            return None
        try:
            kept = past.sequence = PackedSequence(past, compile_decoder(model))
        except NotCompiled:
            return None
    return kept


def _read_anew(model: Any, cache: DecoderCache) -> bool:
    """Lets a cache go on at the widths that weights are read at now; False where the model's own forward must run."""
    try:
        cache.decoder = compile_decoder(model)
    except NotCompiled:
        return False
    return True


def _list_widths(model: nn.Module) -> list[tuple[PackedWeight, int]]:
    """Returns the weights that can be read at several widths, and those that they are read at now."""
    packed = (module for module in model.modules() if isinstance(module, PackedWeight))
    return [(weight, weight.width) for weight in packed if len(weight.format.widths) > 1]


def _begin_cache(model: Any, past: Any) -> DecoderCache | None:
    """Returns a new cache with what a cache of transformers' plain kind holds; None where it may not be replaced."""
    if type(past) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in past.layers):
        return None
    try:
        cache = DecoderCache(compile_decoder(model))
    except NotCompiled:
        return None
    if past.get_seq_length():
        first: Any = past.layers[0]
        held = first.keys
        if held is None or held.shape[0] != 1 or held.dtype != torch.float32:
            return None
        cache.take(past)
    return cache
