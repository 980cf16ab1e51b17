"""A decoder run one layer at a time, each layer as the model itself would call it.

One run of the whole model shows what each layer receives besides the hidden states. Masks, rotary tables and position
indices are the same for all sequences of one length, so what one sequence shows holds for all; every later sequence
is checked. What comes before the first layer and after the last one stays the model's own code, with stand-ins for the
layers. A layer that receives anything else (a cache, other layers' states, a tensor that depends on the sequence or
takes a gradient) cannot be run by itself, and the model is refused.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.decoder_layers import NotLayerwise, StandIn, find_layers
from runtime.residency import Residency

WHOLE = "Run it as a whole (measure_fisher_sketch)."
_HIDDEN = "hidden_states"
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call of a layer without its hidden states, and what it returns after them (None: it returns a bare tensor)."""

    positional: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rest: tuple[Any, ...] | None = None

    def run(self, layer: nn.Module, hidden: Tensor) -> Any:
        if self.positional:
            return layer(hidden, *self.args, **self.kwargs)
        return layer(*self.args, **self.kwargs, **{_HIDDEN: hidden})

    def output(self, hidden: Tensor) -> Any:
        return hidden if self.rest is None else (hidden, *self.rest)


class _LayersReached(Exception):  # noqa: N818 (ends a run of the model, no error)
    pass


class LayerwiseModel:
    """A decoder whose layers can be run one by one; ``reference_logits`` [T, V] are those of the whole model.

    Args:
        model: A decoder whose layers are one ``nn.ModuleList`` of ``config.num_hidden_layers``. Parameters outside of
            the layers that take gradients show which arguments of the layers depend on them.
        tokens: [1, T] int64, of the length of all sequences; run once.
        residency: Brings the weights into memory.

    Raises:
        NotLayerwise: If the model has no such list of layers, or its layers cannot be run by themselves.
    """

    def __init__(self, model: Any, tokens: Tensor, residency: Residency) -> None:
        found = find_layers(model, otherwise=WHOLE)
        self._model = model
        self._found = found
        self._residency = residency
        self._calls: list[_Call] = []
        self.layers, self.name = found.layers, found.name
        with residency.resident(None), torch.enable_grad():
            self.reference_logits = self._run(tokens, self._observe).detach()

    def run_layer(self, layer_index: int, hidden: Tensor) -> Tensor:
        """Returns the output [1, T, d] of a layer for its input [1, T, d]."""
        output = self._calls[layer_index].run(self.layers[layer_index], hidden)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the input [1, T, d] of the first layer."""
        first, _ = self._run_outside(tokens, None)
        return first

    def run_outside(self, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Runs everything but the layers.

        Args:
            tokens: [1, T] int64.
            last: Output [1, T, d] of the last layer.

        Returns:
            The input [1, T, d] of the first layer, and the logits [T, V] in float32.
        """
        first, logits = self._run_outside(tokens, last)
        assert logits is not None
        return first, logits

    @torch.no_grad()
    def run_layers(self, tokens: Tensor, begin: Callable[[int], None]) -> None:
        """Runs each layer on all sequences before the next layer, so that it is in memory once.

        Args:
            tokens: [S, T] int64; the hidden states of all of them are kept.
            begin: Called with the index of the sequence that a layer is run on next.
        """
        with self._residency.resident(None):
            states = [self.embed(sequence[None]) for sequence in tokens]
        for k in range(len(self.layers)):
            with self._residency.resident(k):
                for s, state in enumerate(states):
                    begin(s)
                    states[s] = self.run_layer(k, state)

    def check_logits(self, logits: Tensor) -> None:
        """Checks the logits [T, V] that the layers run one by one gave for the tokens of ``reference_logits``.

        Raises:
            NotLayerwise: If they are others.
        """
        difference, largest = ((x.abs().max().item()) for x in (logits - self.reference_logits, self.reference_logits))
        # Far above the rounding of another order of sums, far below the effect of a layer that is run wrongly.
        if not difference <= 1e-3 * largest:
            msg = (
                "layers run one by one must give the logits of the whole model: got a difference of "
                f"{difference:g} where the largest is {largest:g}, in {type(self._model).__name__}. {WHOLE}"
            )
            raise NotLayerwise(msg)

    def _run_outside(self, tokens: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor | None]:
        firsts: list[Tensor] = []

        def stand_in(k: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = self._read_call(k, args, kwargs)
            if not _equal((call.args, call.kwargs), (self._calls[k].args, self._calls[k].kwargs)):
                self._refuse(k, "arguments that differ between sequences")
            if k == 0:
                firsts.append(hidden)
            if k == len(self.layers) - 1:
                if last is None:
                    raise _LayersReached
                hidden = last
            return self._calls[k].output(hidden)

        logits = None
        with suppress(_LayersReached):
            logits = self._run(tokens, stand_in)
        return firsts[0], logits

    def _run(self, tokens: Tensor, call: Callable[..., Any]) -> Tensor:
        with self._found.replaced([StandIn(layer, partial(call, k)) for k, layer in enumerate(self.layers)]):
            logits: Tensor = self._model(tokens, use_cache=False).logits
        return logits[0].float()

    def _observe(self, k: int, *args: Any, **kwargs: Any) -> Any:
        hidden, call = self._read_call(k, args, kwargs)
        with self._residency.resident(k), torch.no_grad():
            output = call.run(self.layers[k], hidden)
        rest = output[1:] if isinstance(output, tuple) else None
        if any(isinstance(value, Tensor) or not _is_constant(value) for value in rest or ()):
            self._refuse(k, "more to return than its hidden states")
        self._calls.append(_Call(positional=call.positional, args=call.args, kwargs=call.kwargs, rest=rest))
        return output

    def _read_call(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
        positional = _HIDDEN not in kwargs
        if positional and not (args and isinstance(args[0], Tensor)):
            self._refuse(k, f"no hidden states, neither first nor as '{_HIDDEN}'")
        hidden: Tensor = args[0] if positional else kwargs[_HIDDEN]
        call = _Call(
            positional=positional,
            args=args[1:] if positional else args,
            kwargs={key: value for key, value in kwargs.items() if key != _HIDDEN},
        )
        for name, value in [*((str(i), v) for i, v in enumerate(call.args, start=1)), *call.kwargs.items()]:
            if not _is_constant(value):
                self._refuse(k, f"argument '{name}', {type(value).__name__}")
        return hidden, call

    def _refuse(self, k: int, found: str) -> None:
        msg = (
            "layers that are run one by one must take and return their hidden states and otherwise what is the same "
            f"for all sequences: got {found}, in '{self.name}.{k}' of {type(self._model).__name__}. "
            f"{WHOLE}"
        )
        raise NotLayerwise(msg)


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_constant, value))
    return isinstance(value, _CONSTANTS) or (isinstance(value, Tensor) and not value.requires_grad)


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and (value is other or torch.equal(value, other))
    if isinstance(value, tuple | list):
        return type(value) is type(other) and len(value) == len(other) and all(map(_equal, value, other))
    if isinstance(value, dict):
        return (
            isinstance(other, dict) and value.keys() == other.keys() and all(_equal(value[k], other[k]) for k in value)
        )
    return bool(value == other)
