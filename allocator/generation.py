"""Continue a text with a model."""

from typing import Any

import torch

from runtime.packed_model import make_packed_cache


def generate_text(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> str:
    """Returns the prompt and its continuation; a packed model caches in the formats that it was saved with, if any.

    Args:
        model: A causal language model, packed or not.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Most tokens of the continuation.
        temperature: 0 for the most likely token at each step, otherwise sampling.
        seed: Seed of the sampling.

    Raises:
        ValueError: If the prompt has no token.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        msg = f"a prompt must have at least one token: got {prompt!r}. Write a few words."
        raise ValueError(msg)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    tokens = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        past_key_values=make_packed_cache(model),
        **sampling,
    )
    text: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return text
