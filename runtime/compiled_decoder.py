"""Generation by the compiled decoder: models of Llama's shape run in one call a token, not module by module.

``install_compiled_decoder_`` gives a packed model a forward that takes the compiled pass (``kernels/decoder_step.py``)
where a call continues one sequence with a cache, as ``generate`` does, and its own forward for all else: batches,
padding, gradients, hooks, other devices and types, hidden states or attentions asked for. Both compute the same
products with the same kernels; norms, rotation, softmax and gate differ by roundings of float32.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from runtime.decoder_cache import DecoderCache
from runtime.decoder_run import run_tokens
from runtime.decoder_tensors import NotCompiled, compile_decoder
from runtime.kernels.dispatch import selected_kernels, uses_triton
from runtime.packed_decoding import PackedSequence, find_cache_obstacle
from runtime.quantized_cache import QuantizedCache

_CPU = torch.device("cpu")


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
