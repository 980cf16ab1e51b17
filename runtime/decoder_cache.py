"""Keys and values of one sequence in memory that is set aside ahead, as the compiled decoder writes them.

transformers sees an ordinary cache: a model that runs module by module may go on with it, and the other way round.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from runtime.kernels.cpu import CpuKernels
from runtime.kernels.decoder_step import CompiledDecoder

_LEAST_CAPACITY = 256


class DecoderCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of the cache, as transformers uses it.

    Args:
        owner: The cache.
        index: The layer.
    """

    is_croppable = True

    def __init__(self, owner: "DecoderCache", index: int) -> None:
        self._owner = owner
        self._index = index
        self.is_initialized = True

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._owner.lengths[self._index]

    @length.setter
    def length(self, tokens: int) -> None:
        self._owner.lengths[self._index] = tokens

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """The keys [1, heads, tokens, head_dim]: a view."""
        return self._owner.states[self._index, 0, None, :, : self.length]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The values, likewise."""
        return self._owner.states[self._index, 1, None, :, : self.length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_options: Any) -> tuple[Tensor, Tensor]:
        """Returns all keys and values after those of the tokens of this step [1, heads, tokens, head_dim] are added.

        Raises:
            ValueError: If there is more than one sequence.
        """
        if key_states.shape[0] != 1:
            msg = (
                f"this cache must be given one sequence: got {key_states.shape[0]}. Pass past_key_values=None, or a "
                "DynamicCache, for several."
            )
            raise ValueError(msg)
        start, self.length = self.length, self.length + key_states.shape[2]
        self._owner.reserve(self.length)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns how many tokens a step of ``query_length`` tokens sees, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Returns -1: there is no most."""
        return -1

    # Its name in the first releases of transformers 5.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forgets all tokens."""
        self.length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Does nothing: there is one sequence."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens.

        Args:
            tokens_to_remove: Their number, negative.
        """
        self.length = max(0, self.length - abs(tokens_to_remove))


class DecoderCache(Cache):
    """The cache of one sequence of a compiled decoder.

    Args:
        decoder: The decoder, as it was when the sequence began.
    """

    def __init__(self, decoder: CompiledDecoder) -> None:
        self.decoder = decoder
        self.states = decoder.tensors.make_states(_LEAST_CAPACITY)
        # Cosines and sines of the positions that there is room for; made when they are first wanted.
        self.rotation: tuple[Tensor, Tensor] | None = None
        # Tokens of each layer; all but while a model runs module by module the same.
        self.lengths = [0] * len(decoder.tensors.layers)
        super().__init__(layers=[DecoderCacheLayer(self, i) for i in range(len(self.lengths))])

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.lengths[0]

    @property
    def as_cache(self) -> "DecoderCache":
        """What transformers goes on with."""
        return self

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return self.states.shape[3]

    def begin_step(self, token_count: int) -> None:
        """Makes room for the tokens of a step."""
        self.reserve(self.length + token_count)

    def run(self, kernels: CpuKernels, inputs: Tensor, rotation: tuple[Tensor, Tensor], wanted: int) -> Tensor:
        """Returns the logits of the last tokens of a part of a step, as ``CompiledDecoder.run``, and adds the part."""
        logits = self.decoder.run(kernels, inputs, rotation, self.states, past=self.length, wanted=wanted)
        self.lengths = [self.length + inputs.shape[0]] * len(self.lengths)
        return logits

    def end_step(self) -> None:
        """Does nothing: all is where it stays."""

    def reserve(self, token_count: int) -> None:
        """Makes room for so many tokens in all."""
        capacity = self.states.shape[3]
        if token_count <= capacity:
            return
        grown = self.decoder.tensors.make_states(max(token_count, 2 * capacity))
        grown[:, :, :, :capacity] = self.states
        self.states = grown

    def take(self, past: Cache) -> None:
        """Copies what another cache of one sequence holds."""
        layers: list[Any] = list(past.layers)
        own: list[Any] = list(self.layers)
        for own_layer, layer in zip(own, layers, strict=True):
            own_layer.update(layer.keys, layer.values)


def torch_floats(*tensors: Tensor | None) -> bool:
    """Returns True if all tensors are contiguous float32 on the CPU; None counts as one."""
    return all(
        t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()) for t in tensors
    )
