"""Inputs and output gradients of every product with a candidate's weight, handed on during the backward pass.

Only the gradients of activations are computed, never those of weights: the graph starts at the embedding's output.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.candidates import Candidates
from runtime.units import Weight, read_weight
from sensitivity.experts.expert_calls import eager_experts
from sensitivity.streaming.gradient_scope import only_gradients_of

ReceiveOutput = Callable[[int, Weight, Tensor, Tensor], None]
_Address = tuple[int, int]


@contextmanager
def received_output_gradients(model: nn.Module, candidates: Candidates, receive: ReceiveOutput) -> Iterator[None]:
    """While open, the model's backward passes hand on what each weight read and the gradient of what it gave.

    Args:
        model: The model; no parameter takes a gradient meanwhile.
        candidates: Units; their formats are of no account.
        receive: Called with (unit index, weight, x, g) for each product y = x W': x [N, in_features], or int64 [N]
            rows where an embedding was read, and g [N, out_features] (an embedding's: [N, in_features]) the
            gradient of the loss by y. A tied weight comes once as embedding and once as head.
    """
    with (
        only_gradients_of(model, ()),
        eager_experts(model),
        torch.enable_grad(),
        _OutputHooks(model, candidates, receive),
    ):
        yield


class _OutputHooks(TorchFunctionMode):
    """Recognises weights by their storage, experts inside one parameter included."""

    def __init__(self, model: nn.Module, candidates: Candidates, receive: ReceiveOutput) -> None:
        super().__init__()
        self._receive = receive
        self._weights: dict[_Address, tuple[int, Weight]] = {
            _address(read_weight(model, weight)): (u, weight)
            for u, unit in enumerate(candidates.units)
            for weight in unit.weights
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func not in (nn.functional.linear, nn.functional.embedding):
            return output
        if func is nn.functional.embedding and not output.requires_grad:
            # The start of the graph: nothing before it takes a gradient.
            output.requires_grad_()
        named = {**dict(zip(("input", "weight"), args, strict=False)), **(kwargs or {})}
        found = self._weights.get(_address(named["weight"]))
        if found and output.requires_grad:
            output.register_hook(partial(self._hand_on, *found, named["input"]))
        return output

    @torch.no_grad()
    def _hand_on(self, u: int, weight: Weight, x: Tensor, gradient: Tensor) -> None:
        rows = x.flatten() if not x.is_floating_point() else x.detach().reshape(-1, x.shape[-1])
        self._receive(u, weight, rows, gradient.reshape(-1, gradient.shape[-1]))


def _address(tensor: Tensor) -> _Address:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
