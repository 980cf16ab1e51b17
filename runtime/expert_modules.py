"""Where a mixture keeps the experts of its layers, and what it calls them with, in the layout of transformers 5."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_LAYER_INDEX = re.compile(r"\.(\d+)\.")
_ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def find_expert_modules(model: nn.Module) -> dict[str, Any]:
    """Returns the modules that hold the experts of a layer, by name, in model order.

    Raises:
        ValueError: If there is none that is called with its tokens' experts.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts" and hasattr(module, "is_transposed") and _LAYER_INDEX.search(name)
    }
    if not found:
        msg = (
            "a model must be a mixture of experts in the layout of transformers 5: got no module named 'experts' in "
            f"the layers of {type(model).__name__}. Leave the routing out."
        )
        raise ValueError(msg)
    return found


def layer_index_of(module_name: str) -> int:
    """Returns the index of the decoder layer that a module is part of."""
    match = _LAYER_INDEX.search(module_name)
    assert match is not None, "find_expert_modules lists modules of layers only"
    return int(match.group(1))


def bind_expert_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden states, chosen experts [N, k] and their weights [N, k] of a call of experts."""
    hidden, chosen, gate_weight = (args + tuple(kwargs[key] for key in _ARGUMENTS[len(args) :]))[:3]
    return hidden, chosen, gate_weight
