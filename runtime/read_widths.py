"""At how many bits nested weights are read: switched at run time, per layer or as a whole, with nothing copied.

A weight in a nested format (``nested4_8_g64``, ``nested8_g64``) is stored once and read at any of ``format.widths``. At
fewer bits fewer of its bytes are read, so a decode step is faster and its result coarser.

Papers: Chen et al. 2025 (Double-Rounding, arXiv:2502.01199); Park et al. 2024 (Any-Precision LLM, arXiv:2402.10517).
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from runtime.decoder_layers import find_layers
from runtime.packed import PackedWeight


def set_width_(model: nn.Module, width: int | None, *, layers: Collection[int] | None = None) -> None:
    """Lets a model read its nested weights at a width; all others are read as ever.

    A weight that is not stored at the width is read at the next lower one of its own.

    Args:
        model: A packed model.
        width: Bits of a code; None for the full width of each weight.
        layers: Which layers; None for all of them, embedding and head included.

    Raises:
        ValueError: If none of these weights is nested, one has no width so low, or a layer is not there.
    """
    chosen = list_nested(model, layers=layers)
    lowest = _lowest(chosen)
    if width is not None and width < lowest:
        msg = (
            f"the width must be at least the lowest of every nested weight: got width={width}, the lowest is {lowest}. "
            f"Read at {lowest} bits or more."
        )
        raise ValueError(msg)
    for weight in chosen.values():
        weight.width = max(w for w in weight.format.widths if width is None or w <= width)


@contextmanager
def read_at_width(model: nn.Module, width: int) -> Iterator[None]:
    """Reads all nested weights of a model at a width, and as before on exit.

    Args:
        model: A packed model.
        width: Bits of a code.

    Raises:
        ValueError: If it has no nested weight, or one has no width so low.
    """
    before = [(weight, weight.width) for weight in list_nested(model).values()]
    set_width_(model, width)
    try:
        yield
    finally:
        for weight, earlier in before:
            weight.width = earlier


def find_lowest_width(model: nn.Module) -> int:
    """Returns the least bits at which all nested weights of a model can be read.

    Raises:
        ValueError: If it has none.
    """
    return _lowest(list_nested(model))


def list_nested(model: nn.Module, *, layers: Collection[int] | None = None) -> dict[str, PackedWeight]:
    """Returns the packed weights that can be read at several widths, by module name.

    Args:
        model: A packed model.
        layers: Those of which layers; None for all.

    Raises:
        ValueError: If there is none, or a layer is not there.
    """
    nested = {name: module for name, module in model.named_modules() if _is_nested(module)}
    if layers is not None:
        known = find_layers(model, otherwise="Set the width of the whole model.")
        absent = [index for index in layers if not 0 <= index < len(known.layers)]
        if absent:
            msg = f"layers must be 0 to {len(known.layers) - 1} of the model: got layer {absent[0]}. Name others."
            raise ValueError(msg)
        nested = {name: module for name, module in nested.items() if known.index_of(name) in layers}
    if not nested:
        msg = (
            "reading at several widths must find nested weights: got none in this model or these layers. Plan with "
            "formats such as nested4_8_g64."
        )
        raise ValueError(msg)
    return {name: module for name, module in nested.items() if isinstance(module, PackedWeight)}


def _is_nested(module: nn.Module) -> bool:
    return isinstance(module, PackedWeight) and len(module.format.widths) > 1


def _lowest(weights: Mapping[str, PackedWeight]) -> int:
    return max(weight.format.widths[0] for weight in weights.values())
