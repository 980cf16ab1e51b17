"""Prefix tokens: a few tokens before every text, their keys and values kept, that draw outliers onto themselves.

Some tokens, mostly the first ones, get activations a thousand times larger than the rest and attention that means
nothing. Where a fixed prefix takes this role, the text's own tokens need not. A prefix changes the function of a model:
it is no transform of the table, and what it does is measured.

Candidates: with m_t = max|x_t| at the input of down_proj (of the MLP, where experts have none), the tokens whose m_t
is largest against the median of its layer and sequence, and the token that begins a text. Search: greedy, one token at
a time behind those that stand already, by the caller's measure; it ends where no candidate makes that smaller.
Complexity: length * candidates measurements.

The keys and values are those of the unquantized model, in float32: they never pass through quantized weights.

Papers: Son et al. 2024 (CushionCache, arXiv:2406.12016), the greedy search, without its tuning of the cache; Chen et
al. 2024 (PrefixQuant, arXiv:2410.05265), the ratio; Yang et al. 2024 (QFeP, arXiv:2405.14428).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from runtime.files import atomic_path
from runtime.transforms.decoder_blocks import find_blocks
from runtime.transforms.observation import observe_inputs

PREFIX_FILE = "prefix.safetensors"
_TENSORS = ("tokens", "keys", "values")
_OWNER = "weights_fingerprint"


@dataclass(frozen=True, kw_only=True, eq=False)
class Prefix:
    """Tokens and what attention keeps of them.

    Args:
        tokens: [P] int64, P >= 0.
        keys: [layers, heads, P, head_dim] float32.
        values: The same for values.
        weights_fingerprint: Of the model that computed them.
    """

    tokens: Tensor
    keys: Tensor
    values: Tensor
    weights_fingerprint: str

    @property
    def stored_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.numel() * self.keys.element_size() + self.values.numel() * self.values.element_size()

    def make_cache(self, sequences: int) -> DynamicCache:
        """Returns a new cache of the prefix for so many sequences, which a model may write to."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(keys.repeat(sequences, 1, 1, 1), values.repeat(sequences, 1, 1, 1), layer)
        return cache


@torch.no_grad()
def make_prefix(model: Any, tokens: Sequence[int], *, weights_fingerprint: str) -> Prefix:
    """Returns a prefix with the keys and values that the model computes for it.

    Args:
        model: A causal language model whose layers all keep keys and values of every token.
        tokens: The tokens, at least one.
        weights_fingerprint: The model's.

    Raises:
        ValueError: If there is no token.
    """
    if not tokens:
        msg = "a prefix must have at least one token: got none. Leave the prefix out."
        raise ValueError(msg)
    ids = torch.tensor(list(tokens))
    cache = DynamicCache()
    model(ids[None], past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    keys = torch.stack([layer.keys[0] for layer in layers])
    values = torch.stack([layer.values[0] for layer in layers])
    return Prefix(tokens=ids, keys=keys, values=values, weights_fingerprint=weights_fingerprint)


@torch.no_grad()
def compute_prefixed_logits(model: Any, tokens: Tensor, prefix: Prefix | None) -> Tensor:
    """Returns the logits [S, T, V] of text [S, T] behind a prefix, or of the text alone."""
    if prefix is None:
        logits: Tensor = model(tokens, use_cache=False).logits
    else:
        logits = model(tokens, past_key_values=prefix.make_cache(len(tokens)), use_cache=True).logits
    return logits


def list_prefix_candidates(model: Any, tokens: Tensor, *, first: int | None, count: int) -> list[int]:
    """Returns the tokens to search among: the one that begins a text, then those of the largest outliers.

    Args:
        model: A decoder of the kind that ``decoder_blocks`` describes.
        tokens: [S, T] int64 of calibration text.
        first: The token that begins a text, or None.
        count: How many, at least 1.

    Raises:
        ValueError: If there is no text, or the model is no decoder of the known kind.
    """
    worst: dict[int, float] = {}
    position: dict[str, int] = {}
    flat = tokens.reshape(-1)

    def see(name: str, inputs: Tensor) -> None:
        start = position.get(name, 0)
        position[name] = start + len(inputs)
        peak = inputs.abs().amax(dim=1)
        ratios = peak / peak.median().clamp(min=1e-30)
        for token, ratio in zip(flat[start : position[name]].tolist(), ratios.tolist(), strict=True):
            worst[token] = max(worst.get(token, 0.0), ratio)

    blocks = find_blocks(model)
    observed = {
        block.name: next(iter(block.mlp.gated.values()))["down_proj"] if block.mlp.gated else block.mlp.first_reader
        for block in blocks
    }
    observe_inputs(model, tokens, observed, see)
    ranked = sorted(worst, key=lambda token: (-worst[token], token))
    return list(dict.fromkeys([*([] if first is None else [first]), *ranked]))[:count]


def search_prefix(
    candidates: Sequence[int], *, length: int, measure: Callable[[Sequence[Sequence[int]]], Sequence[float]]
) -> tuple[list[int], list[float]]:
    """Returns the tokens of the greedy search, none where no candidate helps, and the measure before and after each.

    Args:
        candidates: Tokens to try at every place.
        length: The most tokens.
        measure: What each of some prefixes leaves, to be made small; called with that of no token first.
    """
    chosen: list[int] = []
    left = list(measure([[]]))
    for _ in range(length):
        tried = measure([[*chosen, token] for token in candidates])
        best = min(range(len(candidates)), key=lambda i: tried[i])
        if not tried[best] < left[-1]:
            break
        chosen.append(candidates[best])
        left.append(tried[best])
    return chosen, left


def save_prefix(prefix: Prefix, path: Path) -> None:
    """Writes a prefix to a safetensors file, whole or not at all."""
    tensors = {name: getattr(prefix, name).contiguous() for name in _TENSORS}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_OWNER: prefix.weights_fingerprint})


def load_prefix(path: Path) -> Prefix:
    """Returns the prefix in a file.

    Raises:
        ValueError: If it is missing, damaged, or holds something else.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            return Prefix(**tensors, weights_fingerprint=(file.metadata() or {})[_OWNER])
    except (OSError, SafetensorError, KeyError) as error:
        msg = f"a prefix must be a file that 'bitplan prefix' wrote: got '{path}' ({error}). Make it again."
        raise ValueError(msg) from error
