"""Continue a text with a model."""

from typing import TYPE_CHECKING, Any

import torch

from runtime.greedy_generation import continue_greedily
from runtime.packed_model import make_packed_cache

if TYPE_CHECKING:
    from runtime.transforms.prefix_tokens import Prefix


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    prefix: "Prefix | None" = None,
) -> str:
    """Returns the prompt and its continuation; a packed model caches in the formats that it was saved with, if any.

    Args:
        model: A causal language model, packed or not.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Most tokens of the continuation.
        temperature: 0 for the most likely token at each step, otherwise sampling.
        seed: Seed of the sampling.
        prefix: Tokens before the prompt, with their keys and values; not part of what is returned.

    Raises:
        ValueError: If the prompt has no token.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        msg = f"a prompt must have at least one token: got {prompt!r}. Write a few words."
        raise ValueError(msg)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "past_key_values": make_packed_cache(model)}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature}
    input_ids, mask, hidden = inputs.input_ids, inputs.attention_mask, 0
    if prefix is not None:
        # The cache holds the first of these; only the others are run.
        hidden = len(prefix.tokens)
        input_ids = torch.cat([prefix.tokens[None], input_ids], dim=1)
        mask = torch.cat([torch.ones(1, hidden, dtype=mask.dtype), mask], dim=1)
        sampling["past_key_values"] = prefix.make_cache(1)
    tokens = None
    if temperature == 0 and sampling["past_key_values"] is None:
        tokens = continue_greedily(model, input_ids, max_new_tokens=max_new_tokens)
    if tokens is None:
        tokens = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    text: str = tokenizer.decode(tokens[0, hidden:], skip_special_tokens=True)
    return text
