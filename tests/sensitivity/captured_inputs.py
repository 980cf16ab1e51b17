"""The inputs of every weight as hooks on modules see them: the truth for whatever is collected in other ways."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def capture_inputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the float64 inputs [rows, in_features] of every weight, seen by hooks on modules."""
    model = copy.deepcopy(model)
    inputs: dict[str, list[Tensor]] = {}

    def keep(name: str, rows: Tensor) -> None:
        inputs.setdefault(name, []).append(rows.reshape(-1, rows.shape[-1]).double())

    def hook_linear(name: str) -> Callable[..., None]:
        return lambda module, args: keep(name, args[0])

    def hook_experts(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, chosen, _ = args
            for expert in range(module.gate_up_proj.shape[0]):
                routed = hidden.reshape(-1, hidden.shape[-1])[(chosen == expert).any(dim=-1)]
                gate, up = (routed.double() @ module.gate_up_proj[expert].double().T).chunk(2, dim=-1)
                keep(f"{name}.gate_up_proj[{expert}]", routed)
                keep(f"{name}.down_proj[{expert}]", nn.functional.silu(gate) * up)

        return hook

    head = model.get_output_embeddings()
    tied = head.weight is model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key = "model.embed_tokens.weight" if tied and module is head else f"{name}.weight"
            module.register_forward_pre_hook(hook_linear(key))
        elif name.endswith("experts"):
            module.register_forward_pre_hook(hook_experts(name))
    model(tokens)
    return {name: torch.cat(parts) for name, parts in inputs.items()}
