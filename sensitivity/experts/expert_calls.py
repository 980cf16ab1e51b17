"""What reaches the experts of a mixture: the tokens, the experts each of them takes, and the weights of these.

transformers calls the experts of a layer as ``experts(hidden, chosen, gate_weight)`` in every family (Mixtral, Qwen,
OLMoE, DeepSeek and some sixty more), whatever its router does before: softmax or sigmoid scores, a bias for the
choice, groups of experts, normalised or scaled weights. What is passed there is what the model does, so it is read
there, by hooks, and no router's rule is written down a second time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime.expert_modules import bind_expert_call, find_expert_modules, layer_index_of


@dataclass(frozen=True, kw_only=True)
class ExpertCall:
    """One call of the experts of a layer, N tokens with k experts each.

    Args:
        layer_index: Index of the decoder layer.
        module_name: Name of the experts' module.
        module: The module.
        hidden: [N, hidden_size], the experts' input.
        chosen: [N, k] int64, the experts of each token.
        gate_weight: [N, k], what the output of each of them is multiplied by.
    """

    layer_index: int
    module_name: str
    module: Any
    hidden: Tensor
    chosen: Tensor
    gate_weight: Tensor

    @property
    def expert_count(self) -> int:
        """Number of experts in the layer."""
        return int(self.module.num_experts)

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens [n] that take an expert, ascending, and its gate weight [n] for each."""
        taken = self.chosen == expert
        tokens = taken.any(dim=-1).nonzero().flatten()
        return tokens, (self.gate_weight * taken)[tokens].sum(dim=-1)


Visit = Callable[[ExpertCall], None]


@contextmanager
def watched_experts(model: nn.Module, visit: Visit) -> Iterator[None]:
    """Calls ``visit`` with every call of the experts of a layer, before it is made, while the model runs inside.

    Args:
        model: A mixture of experts.
        visit: Called layer by layer in the order of the run.

    Raises:
        ValueError: If the model has no experts to watch.
    """
    hooks = [
        module.register_forward_pre_hook(_hook(name, visit), with_kwargs=True)
        for name, module in find_expert_modules(model).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Lets the experts be read one by one, by ``linear`` with one expert's matrix, while the model runs inside."""
    # A model and its parts have configs of their own, and setting one sets those nested in it: the outer ones come
    # first here.
    found: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs = {id(config): config for config in found if hasattr(config, "_experts_implementation")}
    saved = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in saved:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in saved:
            config._experts_implementation = implementation


def run_experts(call: ExpertCall, experts: tuple[int, ...], tokens: Tensor) -> Tensor:
    """Returns what some experts add to the layer's output for some tokens, [n, hidden_size].

    Args:
        call: The call they are part of.
        experts: The experts; what the others add is left out.
        tokens: [n] tokens of the call, each of which takes at least one of the experts.
    """
    inside = torch.isin(call.chosen[tokens], torch.tensor(experts))
    # The others are replaced by one of these at weight zero, so that no other expert runs.
    chosen = call.chosen[tokens].where(inside, torch.tensor(experts[0]))
    gate_weight = call.gate_weight[tokens] * inside
    if len(experts) == 1:
        chosen, gate_weight = chosen[:, :1], gate_weight.sum(dim=-1, keepdim=True)
    # Not through __call__, where the hooks are.
    output: Tensor = call.module.forward(call.hidden[tokens], chosen, gate_weight)
    return output


def _hook(name: str, visit: Visit) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, gate_weight = bind_expert_call(args, kwargs)
        visit(
            ExpertCall(
                layer_index=layer_index_of(name),
                module_name=name,
                module=module,
                hidden=hidden.reshape(-1, hidden.shape[-1]),
                chosen=chosen,
                gate_weight=gate_weight,
            )
        )

    return hook
