"""Attention over a quantized cache, for all tokens of a text at once.

A decoder that keeps keys and values in a format reads past tokens as they come back from it, k^ and v^, and the
current token as it is (past-only quantization). Token by token that is

    score[t, s] = q_t . k^_s  for s < t,    score[t, t] = q_t . k_t,    p = softmax(scale * score + mask)
    output[t]   = sum over s < t of p[t, s] v^_s  +  p[t, t] v_t,

which is the usual attention with another diagonal: P V^ + diag(P) (V - V^). In formats of token blocks (``int4_t32``)
only tokens of blocks that were complete before t come back as k^_s and v^_s, floor(s / G) < floor(t / G); the others
come back from float16. One pass over a text gives therefore what as many steps of decoding give, and costs one or two
attentions with their scores written out, O(T^2) memory a layer.

Limits: attention that goes through the interface of transformers and is causal, without soft caps, sinks or biases of
its own. Here every token is decoded; a prompt that is read in one pass loses less, as its tokens see each other whole.

Paper: Yue et al. 2024, WKVQuant, arXiv:2402.12065, section 4.1 (past-only quantization).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from runtime.cache_formats import find_cache_formats
from runtime.formats import Format
from runtime.packed_attention import attend_packed, find_mark
from runtime.past_states import render_past

KEY_CACHE: Final = "key_cache"
VALUE_CACHE: Final = "value_cache"
INTERFACE = "bitplan_cache"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, kw_only=True)
class CacheFormats:
    """Formats of what one layer caches; None leaves that half as it is.

    Args:
        keys: Format of the keys.
        values: Format of the values.
    """

    keys: Format | None = None
    values: Format | None = None


def split_cache_formats(formats: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the formats of weights and those of caches, of a mapping from names of both to format names."""
    caches = {name: format_ for name, format_ in formats.items() if _half_of(name) in (KEY_CACHE, VALUE_CACHE)}
    return {name: format_ for name, format_ in formats.items() if name not in caches}, caches


def find_formats_by_module(model: nn.Module, formats_by_cache: Mapping[str, str]) -> dict[str, CacheFormats]:
    """Returns attention module -> formats.

    Args:
        model: A causal language model.
        formats_by_cache: Cache unit -> format name, such as ``model.layers.3.self_attn.key_cache`` -> ``int4_g32``.

    Raises:
        ValueError: If a name is no cache of the model, or a format is unknown.
    """
    names = {name for name, _ in model.named_modules()}
    unknown = [
        name
        for name in formats_by_cache
        if _half_of(name) not in (KEY_CACHE, VALUE_CACHE) or _module_of(name) not in names
    ]
    if unknown:
        msg = (
            f"cache formats must be given for caches of the model: got {len(unknown)} unknown names, first "
            f"'{unknown[0]}' in {type(model).__name__}. Use the plan that was made for this model."
        )
        raise ValueError(msg)
    found: dict[str, dict[str, Format]] = {}
    for name, format_name in formats_by_cache.items():
        half = "keys" if _half_of(name) == KEY_CACHE else "values"
        found.setdefault(_module_of(name), {})[half] = find_cache_formats([format_name])[0]
    return {module: CacheFormats(**halves) for module, halves in found.items()}


@contextmanager
def simulated_cache(model: nn.Module, formats_by_cache: Mapping[str, str]) -> Iterator[None]:
    """Lets every token see the others before it as a cache in these formats gives them back, in one pass of a text.

    Args:
        model: A causal language model; run it without a cache (``use_cache=False``).
        formats_by_cache: Cache unit -> format name; what is not named stays as it is.

    Raises:
        ValueError: If a name is no cache of the model, or a format is unknown.
    """
    found = find_formats_by_module(model, formats_by_cache)
    if not found:
        yield
        return
    modules: list[Any] = [model.get_submodule(name) for name in found]
    with _attention_through_interface(model):
        try:
            for module, formats in zip(modules, found.values(), strict=True):
                module.cache_formats = formats
            yield
        finally:
            for module in modules:
                vars(module).pop("cache_formats", None)


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What one attention module caches of a token.

    Args:
        module: Its name.
        keys: (heads, head_dim) of the keys.
        values: (heads, head_dim) of the values.
    """

    module: str
    keys: tuple[int, int]
    values: tuple[int, int]


@torch.no_grad()
def measure_attention_shapes(model: Any) -> tuple[AttentionShape, ...]:
    """Returns the attention modules of a model in the order in which a token passes them, by running one token.

    Raises:
        ValueError: If an attention has a soft cap, sinks or a bias of its own.
    """
    names = {id(module): name for name, module in model.named_modules()}
    seen: list[AttentionShape] = []

    def keep(module: nn.Module, key: Tensor, value: Tensor) -> None:
        seen.append(
            AttentionShape(
                module=names[id(module)], keys=(key.shape[1], key.shape[3]), values=(value.shape[1], value.shape[3])
            )
        )

    modules: list[Any] = list(model.modules())
    with _attention_through_interface(model):
        try:
            for module in modules:
                module.attention_observer = keep
            model(torch.zeros((1, 1), dtype=torch.int64, device=model.device), use_cache=False)
        finally:
            for module in modules:
                vars(module).pop("attention_observer", None)
    return tuple(seen)


def read_packed_caches_(model: nn.Module) -> None:
    """Lets a model's attention be ``attend``, which reads caches that stay packed, for good, where it was torch's."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = INTERFACE


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Returns the attention's output [batch, tokens, heads, head_dim], over the formats that the module has been given.

    Args:
        module: The attention module.
        query: [batch, heads, tokens, head_dim].
        key: [batch, key heads, tokens, head_dim].
        value: [batch, key heads, tokens, head_dim].
        attention_mask: [batch, 1, tokens, tokens] bool, True where a token sees another; None for the causal one.
        dropout: As transformers passes it.
        scaling: Factor of the scores.
        options: What else transformers passes.

    Raises:
        ValueError: If the attention has a soft cap, sinks or a bias of its own.
    """
    unsupported = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        msg = (
            f"a quantized cache needs plain attention: got {', '.join(unsupported)} in {type(module).__name__}. "
            "Leave the cache of this model unquantized (no cache formats)."
        )
        raise ValueError(msg)
    past = find_mark(key)
    if past is not None:
        # The cache has left the past packed, for one token.
        attended = attend_packed(query, past, attention_mask, scaling or query.shape[-1] ** -0.5)
        return attended.transpose(1, 2).contiguous(), None
    observer: Callable[[nn.Module, Tensor, Tensor], None] | None = getattr(module, "attention_observer", None)
    if observer is not None:
        observer(module, key, value)
    formats: CacheFormats | None = getattr(module, "cache_formats", None)
    if formats is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    output = attend_past(query, key, value, formats, attention_mask, scaling or query.shape[-1] ** -0.5)
    return output.transpose(1, 2).contiguous(), None


def attend_past(
    query: Tensor, key: Tensor, value: Tensor, formats: CacheFormats, mask: Tensor | None, scaling: float
) -> Tensor:
    """Returns [batch, heads, tokens, head_dim]: every token over the quantized past and itself.

    Args:
        query: [batch, heads, tokens, head_dim].
        key: [batch, key heads, tokens, head_dim].
        value: [batch, key heads, tokens, head_dim].
        formats: Formats of the past.
        mask: [batch, 1, tokens, tokens] bool, True where a token sees another; None for the causal one.
        scaling: Factor of the scores.
    """
    repeats = query.shape[1] // key.shape[1]
    keys, values = render_past(key, formats.keys), render_past(value, formats.values)
    keys, values = keys.repeated(repeats), values.repeated(repeats)
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = keys.scores(query)
    torch.diagonal(scores, dim1=-2, dim2=-1).copy_((query * key).sum(dim=-1))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    # Not minus infinity: padding sees no token at all, and its row must stay a number.
    scores = (scores * scaling).masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = torch.softmax(scores, dim=-1)
    own = torch.diagonal(shares, dim1=-2, dim2=-1).unsqueeze(-1)
    return values.mix(shares) + own * (value - values.recent)


def _half_of(name: str) -> str:
    return name.rpartition(".")[2]


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


@contextmanager
def _attention_through_interface(model: nn.Module) -> Iterator[None]:
    """Lets the model's attention call ``attend``."""
    found = [module.config for module in model.modules() if hasattr(module, "config")]
    configs: dict[int, Any] = {id(config): config for config in found}
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = INTERFACE
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = implementations[key]


# transformers looks attention up by name in tables of its own; what a module is to do is kept on the module.
AttentionInterface.register(INTERFACE, attend)
AttentionMaskInterface.register(INTERFACE, sdpa_mask)
