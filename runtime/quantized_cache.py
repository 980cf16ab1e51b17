"""A cache of past keys and values that holds them packed, each layer and each half in a format of its own.

The tokens of the step at hand are read as they are; they are packed when the step adds them, and every later step
reads them back dequantized (past-only quantization, WKVQuant: Yue et al. 2024, arXiv:2402.12065, section 4.1).
All of the past is dequantized at every step, but where the attention reads it packed (``packed_attention``).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from runtime.cached_attention import INTERFACE, CacheFormats, find_formats_by_module
from runtime.formats import Format
from runtime.packed_attention import Reading, check_read, find_packed_past, mark_past
from runtime.packed_states import PackedStates, make_packed_states


class QuantizedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache, as transformers uses it.

    Args:
        keys: Format of the keys.
        values: Format of the values.
        config: The configuration of the attention that reads the layer, which says how it attends.
    """

    is_croppable = True

    def __init__(self, keys: Format, values: Format, config: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config
        # Of the last step, where its attention was to read the past packed.
        self._reading: Reading | None = None
        self.formats = (keys, values)
        self._past = (make_packed_states(keys), make_packed_states(values))

    @property
    def past(self) -> tuple[PackedStates, PackedStates]:
        """Keys and values of past tokens."""
        return self._past

    @property
    def stored_bytes(self) -> int:
        """Bytes that the layer holds."""
        return sum(half.stored_bytes for half in self._past)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Notes that the layer is in use; nothing is set aside."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Returns the keys and values [batch, heads, tokens, head_dim] that this step reads, and keeps its own packed.

        Args:
            key_states: Keys of the tokens of this step, [batch, heads, tokens, head_dim].
            value_states: Their values, likewise.

        Returns:
            Those of all tokens; of this step alone where the attention reads the others packed.

        Raises:
            RuntimeError: If it was to read them so at the step before, and has not.
        """
        self.lazy_initialization(key_states, value_states)
        if self._config._attn_implementation == INTERFACE:
            check_read(self._reading)
            past = find_packed_past(*self._past, key_states, value_states)
            self._reading = None if past is None else past.reading
            if past is not None:
                self._past[0].append(key_states)
                self._past[1].append(value_states)
                return mark_past(key_states, past), value_states
        seen = []
        for half, states in zip(self._past, (key_states, value_states), strict=True):
            seen.append(torch.cat([half.read(states.dtype), states], dim=-2) if half.token_count else states)
            half.append(states)
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many tokens a step of ``query_length`` tokens sees, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens held."""
        return self._past[0].token_count

    def get_max_length(self) -> int:
        """Returns -1: there is no most."""
        return -1

    # Its name in the first releases of transformers 5.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forgets all tokens."""
        keys, values = self.formats
        self._past = (make_packed_states(keys), make_packed_states(values))
        self._reading = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts the sequences in another order, some of them several times (beam search)."""
        for half in self._past:
            half.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove: Their number, negative.
        """
        for half in self._past:
            half.truncate(half.token_count - abs(tokens_to_remove))


class QuantizedCache(Cache):
    """The cache of a model, to be given to its ``generate`` or ``forward`` as ``past_key_values``.

    Args:
        model: The model.
        formats_by_cache: Cache unit -> format name, for the keys and the values of every layer.

    Raises:
        ValueError: If a name is no cache of the model, a format is unknown, or a layer is not named.
    """

    def __init__(self, model: Any, formats_by_cache: Mapping[str, str]) -> None:
        found = find_formats_by_module(model, formats_by_cache)
        modules: dict[int, Any] = {
            int(model.get_submodule(name).layer_idx): model.get_submodule(name) for name in found
        }
        by_layer: dict[int, CacheFormats] = dict(zip(modules, found.values(), strict=True))
        layers: list[Any] = []
        for layer in range(len(DynamicCache(config=model.config).layers)):
            formats = by_layer.get(layer, CacheFormats())
            if formats.keys is None or formats.values is None:
                msg = (
                    f"the keys and the values of every layer must have a format: got none for layer {layer} of "
                    f"{type(model).__name__}. Name them as well (bf16 leaves a cache unquantized)."
                )
                raise ValueError(msg)
            layers.append(QuantizedCacheLayer(formats.keys, formats.values, modules[layer].config))
        super().__init__(layers=layers)
        # What the compiled decoder keeps beside it (``runtime/packed_decoding.py``).
        self.sequence: Any = None

    @property
    def stored_bytes(self) -> int:
        """Bytes that the cache holds."""
        return sum(layer.stored_bytes for layer in self.layers if isinstance(layer, QuantizedCacheLayer))
