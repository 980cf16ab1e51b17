"""The gradient of every weight for every sequence, one layer of the model at a time.

A pass keeps the hidden states between layers on disk. Forward, all sequences go through one layer before the next;
backward, each layer is run again from its stored input and gives, from the gradient of its output, the gradients of its
weights and of its input. The gradients of a few sequences are handed to accumulators, which keep what they make of
them, and released. What an accumulator prepares for a weight (its candidates rendered) is prepared once for all
sequences, and a layer's weights are needed in two stretches of time only, so they need not be in memory otherwise.

Costs: four forward passes of each layer where a backward pass of the whole model costs three, five of head and
embedding; 4 (L + 1) S T d bytes on disk; in memory two tensors [S, T, d], one layer with its gradients for a few
sequences, and what the accumulators keep. The gradients of weights outside of the layers come last: embedding and
head may be one parameter, whose gradient is complete only when the pass has reached the embedding.

Every step writes its files whole; a pass that was interrupted goes on at the step it was in, with the same numbers.

Paper: recomputing activations from stored layer inputs is gradient checkpointing (Chen et al. 2016, arXiv:1604.06174).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runtime.decoder_layers import DecoderLayers, NotLayerwise, find_layers
from runtime.residency import InMemory, Residency
from runtime.units import Weight, read_weight
from sensitivity.streaming.gradient_scope import only_gradients_of
from sensitivity.streaming.layerwise_model import WHOLE, LayerwiseModel
from sensitivity.streaming.stream_files import GRADIENT, HIDDEN, RESULT, Step, StreamFiles, StreamSteps

# (logits [T, V] in float32, sequence index) -> the scalar whose gradient is taken; always the same for the same input.
Loss = Callable[[Tensor, int], Tensor]
# More make a product with kept errors no faster, and errors that are rendered again hardly.
_MOST_SEQUENCES = 8
DEFAULT_KEPT_BYTES = 3 * 2**27


class GradientAccumulator(Protocol):
    """What is made of the gradients. A block is a layer, or all that is outside of the layers."""

    def begin(self, weights: Mapping[Weight, Tensor]) -> int:
        """Starts a block, with the values [out_features, in_features] of its weights; returns the bytes it keeps."""

    def add(self, weight: Weight, gradients: Tensor, first: int) -> None:
        """Takes the gradients [B, out_features, in_features] of the sequences ``first`` and on, each one once."""

    def finish(self) -> dict[str, Tensor]:
        """Ends the block and returns what is kept of it, by names that no other block uses."""


class GradientStream:
    """One pass over all weights and sequences.

    Args:
        model: The model in float32; on the meta device where ``residency`` brings the weights in.
        tokens: [S, T] int64.
        weights: The weights whose gradients are wanted.
        loss: The loss of a sequence.
        directory: Where the files of this pass are; one directory for one model, text, loss and set of accumulators.
        residency: Brings the weights into memory.
        kept_bytes: Bound on what accumulators keep for a block and its gradients for a few sequences together; the
            gradients for one sequence are kept in any case.
        dtype: Type that products are computed in; weights, sums and gradients are float32 in any case.

    Raises:
        ValueError: If there is no weight.
        NotLayerwise: If the model has no list of layers, or a weight is shared between layers or with the rest.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        weights: Sequence[Weight],
        *,
        loss: Loss,
        directory: Path,
        residency: Residency | None = None,
        kept_bytes: int = DEFAULT_KEPT_BYTES,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._loss = loss
        self._files = StreamFiles(directory)
        self._residency = residency or InMemory()
        self._kept_bytes = kept_bytes
        self._products = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
        layers = find_layers(model, otherwise=WHOLE)
        self._blocks = _group_by_block(layers, weights)
        self._steps = StreamSteps(layer_count=len(layers.layers), blocks=frozenset(self._blocks))

    def run(
        self, accumulators: Mapping[str, GradientAccumulator], progress: Callable[[int, int], None]
    ) -> dict[str, dict[str, Tensor]]:
        """Returns what each accumulator kept, of all blocks together.

        Args:
            accumulators: Each with a name, without a slash.
            progress: Called with (steps done, steps in all), before the first step and after every step.

        Raises:
            NotLayerwise: If the layers cannot be run one by one.
        """
        pending = self._steps.list_pending(self._files)
        self._delete_unneeded(pending)
        total = len(self._steps.list_steps())
        progress(total - len(pending), total)
        if pending:
            try:
                with only_gradients_of(self._model, self._list_parameters(), sparse=True):
                    self._run_steps(pending, total, accumulators, progress)
            except NotLayerwise:
                # Nothing will take up what was begun.
                self._delete_unneeded(())
                raise
        kept: dict[str, dict[str, Tensor]] = {name: {} for name in accumulators}
        for block in sorted(self._blocks):
            for key, tensor in self._files.read(RESULT, block).items():
                name, _, rest = key.partition("/")
                kept[name][rest] = tensor
        return kept

    def _list_parameters(self) -> set[nn.Parameter]:
        names = {weight.parameter for weights in self._blocks.values() for weight in weights}
        return {self._model.get_parameter(name) for name in names}

    def _run_steps(
        self,
        pending: list[Step],
        total: int,
        accumulators: Mapping[str, GradientAccumulator],
        progress: Callable[[int, int], None],
    ) -> None:
        with self._products():
            model = LayerwiseModel(self._model, self._tokens[:1], self._residency)
        while pending:
            step = pending.pop(0)
            with self._residency.resident(step.resident_layer()):
                if step.kind == "forward":
                    self._run_forward(model, step.index)
                elif step.kind == "head":
                    self._run_head(model)
                elif step.kind == "backward":
                    self._run_backward(model, step.index, accumulators)
                else:
                    self._run_outside(model, accumulators)
            self._delete_unneeded(pending)
            progress(total - len(pending), total)

    def _delete_unneeded(self, pending: Sequence[Step]) -> None:
        self._files.keep_only({file for step in pending for file in step.inputs(self._steps.layer_count)})

    @torch.no_grad()
    def _run_forward(self, model: LayerwiseModel, k: int) -> None:
        below = self._files.read_states(HIDDEN, k - 1) if k else self._tokens
        run = partial(model.run_layer, k - 1) if k else model.embed
        with self._products():
            states = [run(_sequence(below, s)) for s in range(len(below))]
        self._files.write_states(HIDDEN, k, torch.cat(states))

    @torch.enable_grad()
    def _run_head(self, model: LayerwiseModel) -> None:
        states = self._files.read_states(HIDDEN, len(model.layers))
        gradients: list[Tensor] = []
        for s in range(len(states)):
            last = _sequence(states, s).requires_grad_()
            with self._products():
                _, logits = model.run_outside(self._tokens[s : s + 1], last)
            if s == 0:
                model.check_logits(logits.detach())
            gradients += torch.autograd.grad(self._loss(logits, s), last)
        self._files.write_states(GRADIENT, len(model.layers), torch.cat(gradients))

    def _run_backward(self, model: LayerwiseModel, k: int, accumulators: Mapping[str, GradientAccumulator]) -> None:
        hidden, above = self._files.read_states(HIDDEN, k), self._files.read_states(GRADIENT, k + 1)
        below = torch.empty_like(hidden)

        def differentiate(s: int, parameters: list[nn.Parameter]) -> list[Tensor | None]:
            first = _sequence(hidden, s).requires_grad_()
            with self._products():
                output = model.run_layer(k, first)
            gradient, *gradients = _gradients([output], [_sequence(above, s)], [first, *parameters])
            assert gradient is not None
            below[s] = gradient[0]
            return gradients

        results = self._stream(k, accumulators, differentiate)
        if k > self._steps.lowest or self._steps.layer_count in self._blocks:
            self._files.write_states(GRADIENT, k, below)
        # Last: with its result, a layer is done.
        if k in self._blocks:
            self._files.write(RESULT, k, results)

    def _run_outside(self, model: LayerwiseModel, accumulators: Mapping[str, GradientAccumulator]) -> None:
        L = len(model.layers)
        last, above = self._files.read_states(HIDDEN, L), self._files.read_states(GRADIENT, 0)

        def differentiate(s: int, parameters: list[nn.Parameter]) -> list[Tensor | None]:
            with self._products():
                first, logits = model.run_outside(self._tokens[s : s + 1], _sequence(last, s))
            # The gradient of a loss with respect to itself is 1.
            ends = [(self._loss(logits, s), None), (first, _sequence(above, s))]
            reached = [(output, gradient) for output, gradient in ends if output.requires_grad]
            return _gradients([output for output, _ in reached], [gradient for _, gradient in reached], parameters)

        self._files.write(RESULT, L, self._stream(L, accumulators, differentiate))

    @torch.enable_grad()
    def _stream(
        self,
        block: int,
        accumulators: Mapping[str, GradientAccumulator],
        differentiate: Callable[[int, list[nn.Parameter]], list[Tensor | None]],
    ) -> dict[str, Tensor]:
        """Hands the gradients of a block to the accumulators, a few sequences at a time."""
        weights_of: dict[str, list[Weight]] = {}
        for weight in self._blocks.get(block, []):
            weights_of.setdefault(weight.parameter, []).append(weight)
        parameters = [self._model.get_parameter(name) for name in weights_of]
        values = {weight: read_weight(self._model, weight) for weights in weights_of.values() for weight in weights}
        left_bytes = self._kept_bytes - sum(accumulator.begin(values) for accumulator in accumulators.values())
        one_sequence_bytes = 4 * sum(parameter.numel() for parameter in parameters)
        batch = min(max(left_bytes // max(one_sequence_bytes, 1), 1), _MOST_SEQUENCES, len(self._tokens))
        buffers = [torch.empty(batch, *parameter.shape) for parameter in parameters]
        for first in range(0, len(self._tokens), batch):
            count = min(batch, len(self._tokens) - first)
            for b in range(count):
                for buffer, gradient in zip(buffers, differentiate(first + b, parameters), strict=True):
                    # None: the loss of this sequence does not depend on the parameter.
                    dense = gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
                    buffer[b] = 0.0 if dense is None else dense
            for buffer, weights in zip(buffers, weights_of.values(), strict=True):
                for weight in weights:
                    index = () if weight.expert_index is None else (weight.expert_index,)
                    for accumulator in accumulators.values():
                        accumulator.add(weight, buffer[(slice(count), *index)], first)
        return {f"{name}/{key}": tensor for name, a in accumulators.items() for key, tensor in a.finish().items()}


def _group_by_block(layers: DecoderLayers, weights: Sequence[Weight]) -> dict[int, list[Weight]]:
    """Returns the weights of each layer, and under the number of layers those outside of them."""
    blocks: dict[int, list[Weight]] = {}
    for weight in weights:
        first, *others = (layers.index_of(name) for name in (weight.parameter, *weight.aliases))
        if any(other != first for other in others):
            msg = (
                "a weight that is streamed must belong to one layer, or lie outside of all: got "
                f"'{weight.parameter}', which is also {', '.join(map(repr, weight.aliases))}. {WHOLE}"
            )
            raise NotLayerwise(msg)
        blocks.setdefault(len(layers.layers) if first is None else first, []).append(weight)
    if not blocks:
        msg = "weights to stream must be at least one: got none. Name the weights of a unit."
        raise ValueError(msg)
    return blocks


def _gradients(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    if not outputs:
        return [None] * len(inputs)
    return list(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))


def _sequence(states: Tensor, s: int) -> Tensor:
    # A part of a mapped file lies anywhere in memory; sums over numbers at other alignments may round differently.
    return states[s : s + 1].clone()
