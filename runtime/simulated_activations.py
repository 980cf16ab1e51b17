"""Activations in their formats during the forward pass of a model: rounded in front of the layers that read them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from runtime.activation_formats import ActivationFormat, ActivationRounding, find_activation_formats
from runtime.activation_names import ACTIVATION
from runtime.packed import QuantizedLinear

# Module name -> format name and, of a static format, its scale [1] or [in_features].
ActivationScheme = Mapping[str, tuple[str, Sequence[float] | None]]


@contextmanager
def simulated_activations(model: nn.Module, scheme: ActivationScheme) -> Iterator[None]:
    """Lets linear layers read their inputs as formats give them back.

    Args:
        model: A model.
        scheme: Name of a linear layer -> format and static scale; what is not named reads its input as it is.

    Raises:
        ValueError: If a name is no module of the model, a format is unknown, or a static one has no scale that fits.
    """
    handles = install_activations_(model, scheme)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def install_activations_(model: nn.Module, scheme: ActivationScheme) -> list[Any]:
    """Lets linear layers read their inputs as formats give them back, for good; returns the handles of the hooks.

    Args:
        model: A model, packed or not.
        scheme: As of ``simulated_activations``.

    Raises:
        ValueError: As ``simulated_activations``; the model is unchanged then.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in scheme if name not in modules]
    if unknown:
        msg = (
            f"activation formats must be given for layers of the model: got {len(unknown)} unknown names, first "
            f"'{unknown[0]}' in {type(model).__name__}. Use the plan that was made for this model."
        )
        raise ValueError(msg)
    rounding = [(modules[name], _resolve(name, modules[name], *entry)) for name, entry in scheme.items()]
    return [module.register_forward_pre_hook(_make_hook(rounds)) for module, rounds in rounding]


def _resolve(name: str, module: Any, format_name: str, scale: Sequence[float] | None) -> ActivationRounding:
    [format_] = find_activation_formats([format_name])
    if not isinstance(format_, ActivationFormat) or not format_.static:
        return ActivationRounding(format=format_)
    wanted = 1 if format_.scope == "tensor" else int(module.in_features)
    if scale is None or len(scale) != wanted:
        msg = (
            f"a static activation format must have a scale of each {format_.scope}: got "
            f"{'none' if scale is None else len(scale)} of {wanted} for the {ACTIVATION} of '{name}' in "
            f"'{format_.name}'. Use the scales of the plan."
        )
        raise ValueError(msg)
    return ActivationRounding(format=format_, scale=Tensor(list(scale)))


def _make_hook(rounding: ActivationRounding) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(module, QuantizedLinear):
            # Its product may be one of integers.
            return (*arguments, rounding)
        return (rounding.render(arguments[0]), *arguments[1:])

    return hook
