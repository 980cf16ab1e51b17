"""The pass of a decoder some of whose weights are read in several parts, each a product of its own.

The same operations as ``cpu/decoder_step.h`` names, in PyTorch, with one call of the compiled products for projections
of the same states. Around the products it takes tens of microseconds a layer, where the compiled pass takes none.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from runtime.kernels.cpu import CpuKernels, Product
from runtime.kernels.decoder_step import DecoderTensors, LayerTensors, LinearTensors
from runtime.kernels.matrices import add_planes

# Steps of so many tokens keep their buffers; those of more are made for each step.
_MOST_KEPT_TOKENS = 4


class PlaneDecoder:
    """A decoder of Llama's shape that runs layer by layer; used as ``CompiledDecoder`` is.

    Args:
        tensors: The decoder.
    """

    def __init__(self, tensors: DecoderTensors) -> None:
        self.tensors = tensors
        self._kept: dict[tuple[str, int], list[_LayerStages]] = {}

    def run(
        self,
        kernels: CpuKernels,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        states: Tensor,
        past: int,
        wanted: int,
    ) -> Tensor:
        """Returns the logits [wanted, vocabulary] of the last tokens; their keys and values are put into ``states``.

        Args:
            kernels: The library at an instruction set.
            hidden: [tokens, hidden] float32: the embeddings.
            rotation: Cosines and sines of the tokens' positions, [tokens, head_dim] float32.
            states: As ``DecoderTensors.make_states`` returns it, with room behind ``past`` positions.
            past: Positions before the first token.
            wanted: How many of the last tokens, at least one.

        Raises:
            MemoryError: If there is no memory for the rounded activations.
        """
        t, tokens = self.tensors, hidden.shape[0]
        # One token sees all that is kept.
        seen = None if tokens == 1 else torch.ones(tokens, past + tokens, dtype=torch.bool).tril(past)
        for i, layer in enumerate(t.layers):
            stages = self._find_stages(kernels, i, tokens)
            query, key, value = stages.attention_in(self._normalize(hidden, layer.attention_norm))
            query, key = (
                self._turn(query, layer.query_norm, rotation),
                self._turn(key, layer.key_norm, rotation),
            )
            states[i, 0, :, past : past + tokens] = key
            states[i, 1, :, past : past + tokens] = self._split_heads(value)
            keys, values = states[i, :, None, :, : past + tokens]
            attended = nn.functional.scaled_dot_product_attention(
                query[None], keys, values, attn_mask=seen, scale=t.attention_scale, enable_gqa=True
            )
            (delta,) = stages.attention_out(attended[0].transpose(0, 1).reshape(tokens, -1))
            hidden = hidden + delta
            gate, up = stages.feed_forward_in(self._normalize(hidden, layer.feed_forward_norm))
            (delta,) = stages.feed_forward_out(nn.functional.silu(gate, inplace=True).mul_(up))
            hidden = hidden + delta
        last = self._normalize(hidden[-wanted:], t.last_norm)
        return _Stage(kernels, [t.head], wanted)(last)[0]

    def _find_stages(self, kernels: CpuKernels, layer: int, tokens: int) -> "_LayerStages":
        if tokens > _MOST_KEPT_TOKENS:
            return _LayerStages(kernels, self.tensors.layers[layer], tokens)
        key = (kernels.level, tokens)
        if key not in self._kept:
            self._kept[key] = [_LayerStages(kernels, each, tokens) for each in self.tensors.layers]
        return self._kept[key][layer]

    def _normalize(self, states: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.rms_norm(states, weight.shape, weight, self.tensors.epsilon)

    def _split_heads(self, states: Tensor) -> Tensor:
        """Returns [heads, tokens, head_dim] of [tokens, heads * head_dim]."""
        return states.view(states.shape[0], -1, self.tensors.head_dim).transpose(0, 1)

    def _turn(self, states: Tensor, norm: Tensor | None, rotation: tuple[Tensor, Tensor]) -> Tensor:
        heads = self._split_heads(states)
        if norm is not None:
            heads = self._normalize(heads, norm)
        low, high = heads.chunk(2, dim=-1)
        return heads * rotation[0] + torch.cat((-high, low), dim=-1) * rotation[1]


class _Stage:
    """Products of the same states, [tokens, columns], in one call; what it returns is overwritten by the next."""

    def __init__(self, kernels: CpuKernels, linears: Sequence[LinearTensors], tokens: int) -> None:
        self._linears = linears
        self._x = torch.empty((tokens, linears[0].planes[0].matrix.columns))
        products = [
            Product(self._x, plane.matrix, None if i else linear.bias)
            for linear in linears
            for i, plane in enumerate(linear.planes)
        ]
        self._outs, self._run = kernels.prepare(products)

    def __call__(self, x: Tensor) -> list[Tensor]:
        self._x.copy_(x)
        self._run()
        outs = iter(self._outs)
        return [add_planes([next(outs) for _ in linear.planes], linear.planes) for linear in self._linears]


class _LayerStages:
    """The calls of one layer, for steps of so many tokens."""

    def __init__(self, kernels: CpuKernels, layer: LayerTensors, tokens: int) -> None:
        def make(*linears: LinearTensors) -> Callable[[Tensor], list[Tensor]]:
            return _Stage(kernels, linears, tokens)

        self.attention_in = make(layer.query, layer.key, layer.value)
        self.attention_out = make(layer.output)
        self.feed_forward_in = make(layer.gate, layer.up)
        self.feed_forward_out = make(layer.down)
