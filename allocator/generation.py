"""Continue a text with a model."""

from typing import TYPE_CHECKING, Any

import torch

from runtime.draft_generation import DraftCount, continue_with_drafts
from runtime.greedy_generation import continue_greedily
from runtime.packed_model import make_packed_cache
from runtime.read_widths import find_lowest_width

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
    inputs = _read_prompt(tokenizer, prompt)
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
    if temperature == 0 and prefix is None:
        cache = sampling["past_key_values"]
        tokens = continue_greedily(model, input_ids, max_new_tokens=max_new_tokens, past=cache)
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


def generate_by_drafts(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    draft_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    prefix: "Prefix | None" = None,
) -> tuple[str, DraftCount]:
    """Returns what ``generate_text`` does without sampling, and how many of the tokens were drafted.

    Args:
        model: A packed model with nested weights.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Most tokens of the continuation.
        draft_tokens: Tokens drafted at a time, at the lowest width of the nested weights.
        temperature: 0.
        seed: Not used, as nothing is drawn.
        prefix: Tokens before the prompt, with their keys and values.

    Raises:
        ValueError: If the prompt has no token, tokens are to be drawn, the model's cache is quantized, it has no nested
            weights, or its generation config asks for more than the most likely token.
    """
    if temperature > 0:
        msg = f"drafts must be judged by the most likely token: got temperature={temperature}. Use 0, or no drafts."
        raise ValueError(msg)
    if make_packed_cache(model) is not None:
        msg = "drafts must be taken back from a plain cache: got a model with cache formats. Generate without drafts."
        raise ValueError(msg)
    inputs = _read_prompt(tokenizer, prompt)
    tokens, count = continue_with_drafts(
        model,
        inputs.input_ids,
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
        width=find_lowest_width(model),
        past=None if prefix is None else prefix.make_cache(1),
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)), count


def _read_prompt(tokenizer: Any, prompt: str) -> Any:
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs.input_ids.shape[1] == 0:
        msg = f"a prompt must have at least one token: got {prompt!r}. Write a few words."
        raise ValueError(msg)
    return inputs
