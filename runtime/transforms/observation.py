"""What the modules of a model read on calibration text: each input handed to a function, nothing kept."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

See = Callable[[str, Tensor], None]


@torch.no_grad()
def observe_inputs(model: nn.Module, tokens: Tensor | None, modules: Mapping[str, nn.Module], see: See) -> None:
    """Runs the model on every sequence and shows what the modules read.

    Args:
        model: A causal language model.
        tokens: [S, T] int64, at least one sequence.
        modules: Name -> module.
        see: Called with a name and an input [N, in], for every call of that module.

    Raises:
        ValueError: If there is no text.
    """
    if tokens is None or not len(tokens):
        msg = "a transform that reads activations must have calibration text: got none. Give token sequences [S, T]."
        raise ValueError(msg)

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: see(name, args[0].reshape(-1, args[0].shape[-1]))

    hooks = [module.register_forward_pre_hook(make_hook(name)) for name, module in modules.items()]
    try:
        for sequence in tokens:
            model(sequence[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def observe_second_moments(
    model: nn.Module, tokens: Tensor | None, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns name -> the sum of x x' [in, in] in float64 over the inputs x of a module, and their number."""
    moments: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, inputs: Tensor) -> None:
        wide = inputs.double()
        moments[name] = moments.get(name, torch.zeros(())) + wide.T @ wide
        counts[name] = counts.get(name, 0) + len(inputs)

    observe_inputs(model, tokens, modules, see)
    return moments, counts


def observe_powers(model: nn.Module, tokens: Tensor | None, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns name -> the mean square [in] float64 of every channel of a module's inputs."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, inputs: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + inputs.double().square().sum(dim=0)
        counts[name] = counts.get(name, 0) + len(inputs)

    observe_inputs(model, tokens, modules, see)
    return {name: total / counts[name] for name, total in sums.items()}
