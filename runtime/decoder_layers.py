"""The decoder layers of a model, and stand-ins that take their places while the model's own code runs around them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Takes the place of a layer: its attributes are the layer's, a call of it is a call of ``call``."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        # Kept out of the module's own tables: the layer must not be registered a second time.
        self.__dict__["_layer"] = layer
        self.__dict__["_call"] = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_call"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


@dataclass(frozen=True, kw_only=True)
class DecoderLayers:
    """Where a model keeps its decoder layers.

    Args:
        owner: The module that holds the list.
        attribute: Its attribute.
        name: Name of the list in the model, such as ``model.layers``.
        layers: The list.
    """

    owner: nn.Module
    attribute: str
    name: str
    layers: nn.ModuleList

    def index_of(self, parameter: str) -> int | None:
        """Returns the index of the layer that a parameter of the model lies in, or None if it is outside of them."""
        rest = parameter.removeprefix(f"{self.name}.")
        return None if rest == parameter else int(rest.partition(".")[0])

    @contextmanager
    def replaced(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Puts other modules in the places of the layers."""
        setattr(self.owner, self.attribute, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, self.layers)


class NotLayerwise(ValueError):
    """A model whose layers cannot be run one by one; it can be run as a whole."""


def find_layers(model: Any, *, otherwise: str) -> DecoderLayers:
    """Returns the first ``nn.ModuleList`` of ``config.num_hidden_layers`` modules.

    Args:
        model: The model.
        otherwise: What to do where there is none; ends the message.

    Raises:
        NotLayerwise: If there is none.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            owner_name, _, attribute = name.rpartition(".")
            return DecoderLayers(owner=model.get_submodule(owner_name), attribute=attribute, name=name, layers=module)
    msg = (
        f"a model must keep its decoder layers in one ModuleList of config.num_hidden_layers={count}: got none in "
        f"{type(model).__name__}. {otherwise}"
    )
    raise NotLayerwise(msg)
