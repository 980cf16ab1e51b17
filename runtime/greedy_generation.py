"""The most likely continuation by the compiled decoder: around a step nothing but the search for its largest logit.

``model.generate`` gives the same tokens; its own work for each token takes about a sixth of a step of SmolLM2-135M.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from runtime.compiled_decoder import begin_packed_sequence, begin_sequence
from runtime.decoder_run import run_tokens
from runtime.quantized_cache import QuantizedCache

# What a generation config may say without changing the most likely token at a step.
_HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "max_length"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "use_cache"),
    *("output_attentions", "output_hidden_states"),
}


@torch.inference_mode()
def continue_greedily(
    model: Any, input_ids: Tensor, *, max_new_tokens: int, past: QuantizedCache | None = None
) -> Tensor | None:
    """Returns [1, tokens] of a text and its continuation, up to a token that ends texts; None where it cannot.

    It cannot where the model does not decode compiled, or its generation config asks for more (penalties and such).

    Args:
        model: A packed model.
        input_ids: [1, tokens], at least one.
        max_new_tokens: Most tokens of the continuation.
        past: An empty cache in the formats that the model was saved with, or None.
    """
    if _find_demands(model):
        return None
    cache = begin_sequence(model) if past is None else begin_packed_sequence(model, past)
    if cache is None:
        return None
    ends = list_ends(model.generation_config.eos_token_id)
    found: list[int] = []
    step = input_ids
    while len(found) < max_new_tokens and not (found and found[-1] in ends):
        # NumPy's search uses the vector instructions of the processor, torch's does not.
        found.append(int(run_tokens(model, cache, step, wanted=1).numpy().argmax()))
        step = torch.tensor([[found[-1]]])
    return torch.cat([input_ids, torch.tensor([found])], dim=1)


def check_plainly_greedy(model: Any) -> None:
    """Checks that a model's generation config asks for nothing but the most likely token.

    Raises:
        ValueError: If it does.
    """
    demands = _find_demands(model)
    if demands:
        msg = (
            f"drafts must be judged by the most likely token alone: got {', '.join(sorted(demands))} in the model's "
            "generation config. Generate without drafts."
        )
        raise ValueError(msg)


def _find_demands(model: Any) -> set[str]:
    return set(model.generation_config.to_diff_dict()) - _HARMLESS


def list_ends(token: int | list[int] | None) -> Collection[int]:
    """Returns the tokens that end texts, as a generation config has them."""
    return () if token is None else [token] if isinstance(token, int) else token
