"""Run a model from one of its layers on, with everything before that layer taken from a cache.

The layers before the changed one are replaced by stand-ins that return the cached outputs of these layers; masks,
rotary tables, the final norm and the head stay the model's own code. Memory: one output for each layer.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.decoder_layers import StandIn, find_layers


class SuffixRunner:
    """The logits of a model for fixed tokens, from any layer on.

    Args:
        model: A decoder whose layers are one ``nn.ModuleList`` of ``config.num_hidden_layers``.
        tokens: [B, T] int64, run in one batch.

    Raises:
        NotLayerwise: If the model has no such list of layers.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._found = find_layers(model, otherwise="Leave the single-unit KL out (metrics without 'single_unit_kl').")
        self._outputs: list[Any] = []
        hooks = [layer.register_forward_hook(self._keep) for layer in self._found.layers]
        try:
            self.reference_logits = self._forward()
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, layer_index: int | None) -> Tensor:
        """Returns float32 logits [B, T, V] with the layers before ``layer_index`` from the cache.

        Args:
            layer_index: First layer that is run; None or 0 runs the whole model.
        """
        if not layer_index:
            return self._forward()
        layers = self._found.layers
        cached = [StandIn(layer, partial(_return, output)) for layer, output in zip(layers, self._outputs, strict=True)]
        with self._found.replaced([*cached[:layer_index], *layers[layer_index:]]):
            return self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        logits: Tensor = self._model(self._tokens, use_cache=False).logits
        return logits.float()

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs.append(output)


def _return(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return output
