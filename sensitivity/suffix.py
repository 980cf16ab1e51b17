"""Run a model from one of its layers on, with everything before that layer taken from a cache.

The layers before the changed one are replaced by stand-ins that return the cached outputs of these layers; masks,
rotary tables, the final norm and the head stay the model's own code. Memory: one output for each layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Cached(nn.Module):
    """Stands in for a layer: its attributes are the layer's, its output is the cached one."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        # Kept out of the module's own tables: the layer must not be registered a second time.
        self.__dict__["_layer"] = layer
        self.__dict__["_output"] = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_output"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class SuffixRunner:
    """The logits of a model for fixed tokens, from any layer on.

    Args:
        model: A decoder whose layers are one ``nn.ModuleList`` of ``config.num_hidden_layers``.
        tokens: [B, T] int64, run in one batch.

    Raises:
        ValueError: If the model has no such list of layers.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._owner, self._attribute, self._layers = _find_layers(model)
        self._outputs: list[Any] = []
        hooks = [layer.register_forward_hook(self._keep) for layer in self._layers]
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
        with self._prefix_replaced(layer_index):
            return self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        logits: Tensor = self._model(self._tokens, use_cache=False).logits
        return logits.float()

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs.append(output)

    @contextmanager
    def _prefix_replaced(self, layer_index: int) -> Iterator[None]:
        cached = map(_Cached, self._layers, self._outputs[:layer_index])
        setattr(self._owner, self._attribute, nn.ModuleList([*cached, *self._layers[layer_index:]]))
        try:
            yield
        finally:
            setattr(self._owner, self._attribute, self._layers)


def _find_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            owner_name, _, attribute = name.rpartition(".")
            return model.get_submodule(owner_name), attribute, module
    msg = (
        f"a model must keep its decoder layers in one ModuleList of config.num_hidden_layers={count}: got none in "
        f"{type(model).__name__}. Leave the single-unit KL out (metrics without 'single_unit_kl')."
    )
    raise ValueError(msg)
