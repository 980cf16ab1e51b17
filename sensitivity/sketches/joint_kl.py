"""KL divergence of a model with several units changed, running only the layers that a further change can reach.

Layers before the lowest changed one give what they gave before, so their outputs come from a cache. Here the cache
can follow the model: after ``follow`` it holds the outputs of the model as it is now, and the next change runs from
its own layer on, not from that of the first change. Pairs of units then cost the suffix of the later unit, and a walk
through all units, in whatever order, about half a pass a step. The results are those of whole passes bit for bit.

Memory: one output for each layer and state, and two float32 arrays of the logits' size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sensitivity.streaming.suffix import SuffixRunner

_LARGEST_CHANGE = 64.0  # in log p; e^88 overflows float32


class JointKL:
    """KL divergence between a model as it was and as it is.

    Args:
        model: The reference model, unchanged at this moment.
        tokens: [S, T] int64, run in one batch.

    Raises:
        ValueError: If the model has no list of layers, or there are fewer than two sequences.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        if tokens.shape[0] < 2:
            msg = (
                "tokens must hold at least 2 sequences (a standard error needs two samples): got "
                f"{tokens.shape[0]}. Cut the text into more, shorter sequences."
            )
            raise ValueError(msg)
        self._runner = _FollowingRunner(model, tokens)
        self._sequences = tokens.shape[0]
        self._log_p = torch.log_softmax(self._runner.reference_logits.flatten(0, 1), dim=-1)
        self._p = self._log_p.exp()

    def measure(self, layer_index: int | None) -> NDArray[np.float64]:
        """Returns the KL [S] of the model as it is now, nats per token of each sequence.

        Args:
            layer_index: Lowest layer that differs from the cached state; None or 0 for the whole model.
        """
        return self._by_sequence(self._runner.logits(layer_index))

    def follow(self, layer_index: int | None) -> NDArray[np.float64]:
        """Returns the KL [S] as ``measure`` does, and makes the model as it is now the cached state."""
        return self._by_sequence(self._runner.follow(layer_index))

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Puts the cached state back on exit, where the caller puts the model back."""
        with self._runner.branch():
            yield

    def _by_sequence(self, logits: Tensor) -> NDArray[np.float64]:
        kl = kl_by_position(self._log_p, self._p, logits.flatten(0, 1))
        return np.asarray(kl.double().reshape(self._sequences, -1).mean(dim=1).numpy())


def kl_by_position(log_p: Tensor, p: Tensor, logits: Tensor) -> Tensor:
    """Returns the KL divergence [N] of each position in nats, without cancellation where it is small.

    Args:
        log_p: [N, V] log-probabilities of the reference.
        p: [N, V] their exponentials.
        logits: [N, V] of the changed model.
    """
    change = torch.log_softmax(logits, dim=-1).sub_(log_p)
    if float(change.max()) > _LARGEST_CHANGE:
        return -(p * change).sum(dim=-1)
    # -sum p c and sum p (e^c - 1 - c) are equal, as both distributions sum to one; no term of the second is negative.
    return torch.expm1(change).sub_(change).mul_(p).sum(dim=-1)


class _FollowingRunner(SuffixRunner):
    def follow(self, layer_index: int | None) -> Tensor:
        first = layer_index or 0
        outputs = self._outputs[:first]
        layers = self._found.layers[first:]
        hooks = [
            layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)) for layer in layers
        ]
        try:
            logits = self.logits(layer_index)
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs = outputs
        return logits

    @contextmanager
    def branch(self) -> Iterator[None]:
        known = self._outputs
        try:
            yield
        finally:
            self._outputs = known
