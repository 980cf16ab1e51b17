"""Cache units: what one decoder layer keeps of past tokens, its keys and its values apart.

How they may be stored, and in how many bytes: ``cache_formats``. Formats that share anything between rows cannot grow
by a token and are refused.

Limits: layers that keep a window, a state or another layer's cache are refused.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from runtime.cache_formats import TokenBlockFormat, find_cache_formats
from runtime.cached_attention import KEY_CACHE, VALUE_CACHE, AttentionShape, measure_attention_shapes
from runtime.candidates import Candidates
from runtime.formats import Format
from runtime.units import Unit, UnitKind


def find_cache_units(model: Any) -> tuple[Unit, ...]:
    """Returns the keys and the values of each layer as units, in the order of the layers; runs one token to see them.

    Args:
        model: A causal language model.

    Raises:
        ValueError: If a layer keeps something else than all of its past keys and values, or attends in its own way.
    """
    kinds = [type(layer).__name__ for layer in DynamicCache(config=model.config).layers]
    shapes = measure_attention_shapes(model)
    other = sorted(set(kinds) - {DynamicLayer.__name__})
    if other or len(shapes) != len(kinds):
        msg = (
            f"a quantized cache needs one full attention in each layer: got {len(shapes)} attentions of the usual kind "
            f"in {len(kinds)} layers ({', '.join(other) or 'full attention'}) of {type(model).__name__}. Leave the "
            "cache of this model unquantized (no cache formats)."
        )
        raise ValueError(msg)
    return tuple(
        _make_unit(shape.module, half, layer, rows)
        for layer, shape in enumerate(shapes)
        for half, rows in _halves(shape)
    )


def list_cache_candidates(units: Sequence[Unit], format_names: Sequence[str]) -> Candidates:
    """Returns the allowed formats of cache units.

    Args:
        units: U cache units.
        format_names: F names of formats.

    Raises:
        ValueError: If a format is unknown, or a unit is left without any.
    """
    formats = find_cache_formats(format_names)
    reasons = {
        (u, f): reason
        for u, unit in enumerate(units)
        for f, format_ in enumerate(formats)
        if (reason := _refusal(unit, format_))
    }
    allowed = np.ones((len(units), len(formats)), dtype=bool)
    for u, f in reasons:
        allowed[u, f] = False
    for u in np.flatnonzero(~allowed.any(axis=1)).tolist():
        msg = (
            f"every cache must have an allowed format: '{units[u].name}' has none "
            f"({'; '.join(dict.fromkeys(reasons[u, f] for f in range(len(formats))))}). Add a channel format or bf16."
        )
        raise ValueError(msg)
    return Candidates(units=tuple(units), formats=formats, allowed=allowed, reasons=reasons)


def _halves(shape: AttentionShape) -> tuple[tuple[UnitKind, tuple[int, int]], ...]:
    return (KEY_CACHE, shape.keys), (VALUE_CACHE, shape.values)


def _make_unit(module: str, half: UnitKind, layer: int, rows: tuple[int, int]) -> Unit:
    return Unit(
        name=f"{module}.{half}",
        weights=(),
        role=half,
        layer_index=layer,
        expert_index=None,
        kind=half,
        cache_shape=rows,
    )


def _refusal(unit: Unit, format_: Format) -> str | None:
    assert unit.cache_shape is not None
    heads, head_dim = unit.cache_shape
    if isinstance(format_, TokenBlockFormat):
        return None
    if not format_.fits(head_dim):
        return f"group_size={format_.group_size} does not divide head_dim={head_dim}"
    if format_.storage_bytes((heads, head_dim)) != heads * format_.storage_bytes((1, head_dim)):
        return "its rows share something, and a cache grows row by row"
    return None
