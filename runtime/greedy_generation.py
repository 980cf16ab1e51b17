"""The most likely continuation by the compiled decoder: around a step nothing but the search for its largest logit.

``model.generate`` gives the same tokens; its own work for each token takes about a sixth of a step of SmolLM2-135M.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from runtime.compiled_decoder import begin_sequence, run_tokens

# What a generation config may say without changing the most likely token at a step.
_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "max_length"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "use_cache"),
    *("output_attentions", "output_hidden_states"),
}


@torch.inference_mode()
def continue_greedily(model: Any, input_ids: Tensor, *, max_new_tokens: int) -> Tensor | None:
    """Returns [1, tokens] of a text and its continuation, up to a token that ends texts; None where it cannot.

    It cannot where the model does not decode compiled, or its generation config asks for more (penalties and such).

    Args:
        model: A packed model.
        input_ids: [1, tokens], at least one.
        max_new_tokens: Most tokens of the continuation.
    """
    config = model.generation_config
    if not set(config.to_diff_dict()) <= _HARMLESS:
        return None
    cache = begin_sequence(model)
    if cache is None:
        return None
    ends = _list_ends(config.eos_token_id)
    found: list[int] = []
    step = input_ids
    while len(found) < max_new_tokens and not (found and found[-1] in ends):
        # NumPy's search uses the vector instructions of the processor, torch's does not.
        found.append(int(run_tokens(model, cache, step, wanted=1).numpy().argmax()))
        step = torch.tensor([[found[-1]]])
    return torch.cat([input_ids, torch.tensor([found])], dim=1)


def _list_ends(token: int | list[int] | None) -> Collection[int]:
    return () if token is None else [token] if isinstance(token, int) else token
