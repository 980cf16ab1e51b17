"""Tokens of one sequence through a compiled decoder, a part of a long prompt at a time."""

from typing import Any

import torch
from torch import Tensor

from runtime.decoder_cache import DecoderCache
from runtime.kernels.dispatch import selected_kernels
from runtime.packed_decoding import PackedSequence

# Prompts are run in parts of so many tokens, which bounds the memory of their states.
_PROMPT_TOKENS = 256


@torch.no_grad()
def run_tokens(model: Any, cache: DecoderCache | PackedSequence, input_ids: Tensor, *, wanted: int) -> Tensor:
    """Returns the logits [wanted, vocabulary] of the last tokens, which are added to the cache.

    Args:
        model: The model.
        cache: What comes before.
        input_ids: [1, tokens].
        wanted: How many of the last tokens, 1 to ``tokens``.
    """
    kernels = selected_kernels()
    assert kernels is not None
    tokens, past = input_ids.shape[1], cache.length
    cache.begin_step(tokens)
    inputs = _read_tokens(model, cache, input_ids[0])
    cosine, sine = (table[past : past + tokens] for table in _rotation(model, cache))
    logits = []
    for start in range(0, tokens, _PROMPT_TOKENS):
        part = slice(start, min(start + _PROMPT_TOKENS, tokens))
        kept = max(1, min(part.stop - part.start, part.stop - (tokens - wanted)))
        found = cache.run(kernels, inputs[part], (cosine[part], sine[part]), kept)
        if part.stop > tokens - wanted:
            logits.append(found)
    cache.end_step()
    return logits[0] if len(logits) == 1 else torch.cat(logits)


def _read_tokens(model: Any, cache: DecoderCache | PackedSequence, ids: Tensor) -> Tensor:
    """Returns what the decoder takes: the tokens [tokens] where it embeds them itself, or [tokens, hidden] float32."""
    table = cache.decoder.tensors.embedding
    if table is not None and ids.dtype == torch.int64:
        least, most = (int(ids[0]),) * 2 if len(ids) == 1 else map(int, ids.aminmax())
        if least >= 0 and most < table.rows:
            return ids.contiguous()
    # Other tokens are the module's to read, or to refuse.
    embedded: Tensor = model.model.embed_tokens(ids)
    return embedded


def _rotation(model: Any, cache: DecoderCache | PackedSequence) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of all positions that the cache has room for, [capacity, head_dim] each."""
    if cache.rotation is None or len(cache.rotation[0]) < cache.capacity:
        cosine, sine = model.model.rotary_emb(torch.empty(0), torch.arange(cache.capacity)[None])
        cache.rotation = cosine[0].contiguous(), sine[0].contiguous()
    return cache.rotation
