"""Gradients and Hessian products of the candidates' parameters, each handed on when complete and then released.

Memory: one parameter's gradient at a time, whatever the depth; the Hessian probe holds those of all, and their signs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.units import Weight
from sensitivity.streaming.gradient_scope import only_gradients_of

Receive = Callable[[int, Weight, Tensor, Tensor], None]


@contextmanager
def received_gradients(model: nn.Module, candidates: Candidates, receive: Receive) -> Iterator[None]:
    """While open, every backward pass hands each weight's gradient to ``receive`` and keeps none.

    On exit the model is as it was, except that the candidates' parameters hold no gradient.

    Args:
        model: The model.
        candidates: Units; their formats are of no account.
        receive: Called with (unit index, weight, its values, their gradient), both [out_features, in_features].
    """
    rows_by_parameter: dict[str, list[tuple[int, Weight]]] = {}
    for u, unit in enumerate(candidates.units):
        for weight in unit.weights:
            rows_by_parameter.setdefault(weight.parameter, []).append((u, weight))
    parameters = {model.get_parameter(name): rows for name, rows in rows_by_parameter.items()}
    handles = []
    try:
        with only_gradients_of(model, parameters):
            for parameter, rows in parameters.items():
                parameter.grad = None
                hook: Any = parameter.register_post_accumulate_grad_hook  # untyped in torch
                handles.append(hook(_hand_on(rows, receive)))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None


def _hand_on(rows: list[tuple[int, Weight]], receive: Receive) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def hand_on(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        for u, weight in rows:
            index = () if weight.expert_index is None else weight.expert_index
            receive(u, weight, parameter.data[index], gradient[index])
        parameter.grad = None

    return hand_on


class SampledScore:
    """Minus the log-likelihood of labels drawn from the model, summed over the positions of a sequence.

    The sign of a score changes neither its square nor its cross terms. Labels that were drawn once are kept.

    Args:
        seed: Seed; the labels of a sequence depend on it and the sequence's index alone.
        first: Index of the sequence that is called 0 here, where others are measured before it.
    """

    def __init__(self, seed: int, *, first: int = 0) -> None:
        self._seed = seed
        self._first = first
        self._labels: dict[int, Tensor] = {}

    def __call__(self, logits: Tensor, index: int) -> Tensor:
        """Returns the score of a sequence from its logits [T, V] in float32."""
        if index not in self._labels:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._first + index) % 2**63)
            p = torch.softmax(logits.detach(), dim=-1)
            self._labels[index] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, self._labels[index], reduction="sum")


def text_loss(model: Any, tokens: Tensor) -> Tensor:
    """Returns minus the log-likelihood of the text's own next tokens, mean over positions, in nats per token.

    Args:
        model: The model.
        tokens: [1, T] int64, T >= 2.
    """
    logits = model(tokens, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])


class RademacherProbe:
    """Hutchinson's probe: z' H z over any block of parameters, with z of independent random signs.

    Its expectation is the trace of that block of the Hessian H, and so is that of the part z_b (H z)_b of a probe of
    all parameters at once: signs of different blocks are independent. z is drawn again wherever it is needed.

    Args:
        parameters: Parameters by name, which all take gradients.
        seed: Any integer.
        index: Index of the probe; its signs depend on seed, index and the parameter's name alone.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], *, seed: int, index: int) -> None:
        self._parameters = parameters
        self._seed = seed
        self._index = index
        self._order = {name: i for i, name in enumerate(sorted(parameters))}
        # Experts of one parameter ask for its signs one after another.
        self._last: tuple[str, Tensor] | None = None

    def signs(self, name: str) -> Tensor:
        """Returns z of a parameter: +1 and -1, in its shape and type."""
        if self._last is None or self._last[0] != name:
            seed = ((self._seed * 1_000_003 + self._index) * 1_000_003 + self._order[name]) % 2**63
            ones = torch.empty_like(self._parameters[name], requires_grad=False)
            ones.bernoulli_(0.5, generator=torch.Generator().manual_seed(seed)).mul_(2.0).sub_(1.0)
            self._last = name, ones
        return self._last[1]

    def backward(self, loss: Tensor) -> None:
        """Adds H z of each parameter to its gradient: a backward pass through the backward pass.

        Args:
            loss: A scalar whose graph can be differentiated twice.
        """
        names, parameters = zip(*self._parameters.items(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used = [(name, g) for name, g in zip(names, gradients, strict=True) if g is not None and g.requires_grad]
        # Linear in every parameter: H is zero, and there is nothing to add.
        if used:
            slope = torch.stack([(gradient * self.signs(name)).sum() for name, gradient in used]).sum()
            torch.autograd.backward(slope)
