"""Losses of quantized activations: static scales, a Fisher sketch of all activation units at once, joined profiles.

For labels drawn from the model itself the score's gradient g_t with respect to the input x_t of a linear layer gives,
as for a weight (``sensitivity.sketches.fisher_sketch``), to second order in the errors d_t = x^_t - x_t of a format

    sketch[s, u, f] = sum_t <g_t, d_t> / sqrt(T),        loss[u, f] = 1/2 mean_s sketch[s, u, f]^2

in nats per token: one backward pass a sequence for all units and formats. The gradient is that of this layer's reading
alone, where several layers read one tensor. The passes are those of the whole model in memory, the labels those that
the weights' sketch of the same seed has.

Limits: second order, around unquantized activations and weights. Where 4 bits clip what a layer lives on, the measured
KL of the finished plan is what counts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.activation_formats import (
    STATIC_FACTORS,
    ActivationFormat,
    render_activations,
    round_to_scale,
    spanning_scale,
)
from runtime.candidates import Candidates
from sensitivity.joined_candidates import JoinedCandidates
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import NATS, ActivationLosses, LossTable, SensitivityProfile, fingerprint_of
from sensitivity.sketches.fisher_sketch import fisher_loss
from sensitivity.streaming.gradient_probes import SampledScore

# Raised whenever a change makes the same inputs give other numbers.
ACTIVATION_VERSION = 1
# Of the Fisher sketch's text; the first of them set the static scales.
ACTIVATION_SEQUENCES = 16
CALIBRATION_SEQUENCES = 8
# Module -> name of a static format -> its scale, [1] or [in_features].
Scales = Mapping[str, Mapping[str, Tensor]]


def activation_fingerprint(weights_fingerprint: str, candidates: Candidates) -> str:
    """Returns the hash of what a profile of weights and activations depends on.

    Args:
        weights_fingerprint: That of the profile without activations, which stands for model, text and settings.
        candidates: Activation units and formats.
    """
    return fingerprint_of(
        {
            "version": ACTIVATION_VERSION,
            "weights": weights_fingerprint,
            "units": [unit.name for unit in candidates.units],
            "formats": [f.name for f in candidates.formats],
        }
    )


def measure_activation_losses(
    model: Any,
    candidates: Candidates,
    tokens: Tensor,
    *,
    seed: int,
    pieces: Path,
    progress: Callable[[int, int], None],
) -> ActivationLosses:
    """Returns the loss of every activation unit and format, and the static scales they were measured with.

    Args:
        model: The reference model in float32.
        candidates: Activation units and formats.
        tokens: [S, T] int64; the first ``CALIBRATION_SEQUENCES`` set the static scales.
        seed: Seed of the labels.
        pieces: Directory for the finished sequences; those already there are used.
        progress: Called with (sequences done, sequences in all).
    """
    scales = _read_scales(
        read_or_measure(
            pieces / "scales.safetensors",
            lambda: _write_scales(measure_static_scales(model, candidates, tokens[:CALIBRATION_SEQUENCES])),
        )
    )
    score = SampledScore(seed)

    def measure(s: int) -> Piece:
        return {"sketch": _sketch_sequence(model, candidates, scales, tokens[s : s + 1], partial(score, index=s))}

    progress(0, len(tokens))
    sketch = np.zeros((len(tokens), *candidates.allowed.shape), dtype=np.float32)
    for s in range(len(tokens)):
        sketch[s] = read_or_measure(pieces / f"{s:05d}.safetensors", partial(measure, s))["sketch"]
        progress(s + 1, len(tokens))
    loss, std_error = fisher_loss(sketch)
    table = LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS)
    return ActivationLosses(
        candidates=candidates,
        table=table,
        scales={module: {name: s.numpy() for name, s in own.items()} for module, own in scales.items()},
    )


@torch.no_grad()
def measure_static_scales(model: Any, candidates: Candidates, tokens: Tensor) -> Scales:
    """Returns the scale of every module and static format that leaves the least squared error.

    Args:
        model: The reference model.
        candidates: Activation units and formats.
        tokens: [S, T] int64.
    """
    formats = [f for f in candidates.formats if isinstance(f, ActivationFormat) and f.static]
    modules = [module for unit in candidates.units for module in unit.modules]
    largest: dict[str, Tensor] = {}
    errors: dict[tuple[str, str], Tensor] = {}

    def note_largest(module: str, x: Tensor) -> None:
        own = x.abs().flatten(0, -2).amax(dim=0)
        largest[module] = torch.maximum(largest.get(module, own), own)

    def note_errors(module: str, x: Tensor) -> None:
        for format_ in formats:
            squares = torch.stack(
                [
                    (round_to_scale(x, format_, factor * _spanning(largest[module], format_)) - x)
                    .square()
                    .flatten(0, -2)
                    .sum(0)
                    for factor in STATIC_FACTORS
                ]
            )
            own = squares if format_.scope == "channel" else squares.sum(dim=1, keepdim=True)
            key = (module, format_.name)
            errors[key] = errors[key] + own if key in errors else own

    if not formats:
        return {}
    for note in (note_largest, note_errors):
        with _observed_inputs(model, modules, note):
            for sequence in tokens:
                model(sequence[None], use_cache=False)
    factors = torch.tensor(STATIC_FACTORS)
    return {
        module: {f.name: factors[errors[module, f.name].argmin(dim=0)] * _spanning(largest[module], f) for f in formats}
        for module in modules
    }


def join_activations(profile: SensitivityProfile) -> SensitivityProfile:
    """Returns a profile whose candidates are those it has and, after them, the activations.

    As with caches (``sensitivity.cache_losses.join_cache``) metrics that are not in nats per token are NaN there, and
    there are no cross terms with weights.

    Raises:
        ValueError: If no activations were measured.
    """
    activations = profile.activations
    if activations is None:
        msg = (
            "a limit on bit operations needs the losses of activations: got a profile without them. Measure with "
            "activation formats (--activation-formats int8_token,int4_token,bf16)."
        )
        raise ValueError(msg)
    both = JoinedCandidates(profile.candidates, activations.candidates, words=("weights", "activations"))
    return replace(
        profile,
        candidates=both.candidates,
        losses={metric: both.join(table, activations.table) for metric, table in profile.losses.items()},
        fisher_sketch=None,
        logit_gram=None,
        activations_joined=True,
    )


def _sketch_sequence(
    model: Any, candidates: Candidates, scales: Scales, tokens: Tensor, score: Callable[[Tensor], Tensor]
) -> NDArray[np.float32]:
    """Returns [U, F] of one sequence [1, T]."""
    rows = {module: u for u, unit in enumerate(candidates.units) for module in unit.modules}
    sketch = np.zeros(candidates.allowed.shape)

    def contract(module: str, x: Tensor, gradient: Tensor) -> None:
        for f, format_ in enumerate(candidates.formats):
            error = render_activations(x, format_, scales.get(module, {}).get(format_.name)).sub_(x)
            sketch[rows[module], f] += float(torch.dot(error.flatten(), gradient.flatten()))

    with _observed_inputs(model, list(rows), contract, gradients=True), torch.enable_grad():
        logits = model(tokens, use_cache=False).logits[0].float()
        torch.autograd.backward(score(logits))
    scaled: NDArray[np.float32] = (sketch / np.sqrt(tokens.shape[1])).astype(np.float32)
    return scaled


@contextmanager
def _observed_inputs(
    model: Any, modules: list[str], observe: Callable[..., None], *, gradients: bool = False
) -> Iterator[None]:
    """Hands the input of each module to ``observe``; with gradients, in the backward pass, and its gradient as well."""

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            x = arguments[0]
            if not gradients:
                observe(name, x)
                return None
            # A name of its own, so that the gradient is that of this module alone.
            own, values = x.view_as(x), x.detach()
            register: Any = own.register_hook  # untyped in torch
            register(lambda gradient: observe(name, values, gradient.detach()))
            return (own, *arguments[1:])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(make_hook(name)) for name in modules]
    if gradients:
        # No parameter takes gradients: the path begins at the embedding.
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spanning(largest: Tensor, format_: ActivationFormat) -> Tensor:
    """Returns the scale [1] or [channels] that maps the largest magnitudes [channels] to the end of the range."""
    return largest / format_.reach if format_.scope == "channel" else spanning_scale(largest, format_, (0,))


def _write_scales(scales: Scales) -> Piece:
    return {f"{module}\n{name}": scale.numpy() for module, own in scales.items() for name, scale in own.items()}


def _read_scales(piece: Piece) -> dict[str, dict[str, Tensor]]:
    scales: dict[str, dict[str, Tensor]] = {}
    for key, scale in piece.items():
        module, _, name = key.partition("\n")
        scales.setdefault(module, {})[name] = torch.from_numpy(scale.copy())
    return scales
