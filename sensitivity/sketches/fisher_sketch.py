"""Fisher sketch: every unit's loss at every format from one backward pass a sequence.

For labels drawn from the model itself, y_t ~ p(.|x_<=t), the score g = d/dW sum_t log p(y_t) has mean zero and
covariance sum_t F_t, the Fisher information of the T positions, and to second order the KL divergence of a model
changed by D is KL = 1/2 D'FD. Hence, in nats per token, for the rendered error D_uf = render(W_u, f) - W_u,

    sketch[s, u, f] = <g_s, D_uf> / sqrt(T),        loss[u, f] = 1/2 mean_s sketch[s, u, f]^2.

A sequence is one rank-one sample, so the standard error of an entry is about loss * sqrt(2 / S). A gradient is
contracted with all candidates the moment it appears and then released: memory does not grow with the model's
depth, and one more format costs one rendering and one inner product of the weight, not a pass of the model.

Paper: the empirical and true Fisher and the KL divergence, Martens 2014 (arXiv:1412.1193); second-order
compression losses, LeCun et al. 1989 (Optimal Brain Damage). We contract with rendered errors instead of
estimating curvature.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule, render_weight
from runtime.residency import Residency
from runtime.units import Weight
from sensitivity.sketches.error_contraction import ErrorContraction
from sensitivity.streaming.gradient_probes import SampledScore, received_gradients
from sensitivity.streaming.gradient_stream import DEFAULT_KEPT_BYTES, GradientStream, Loss


def measure_fisher_sketch(
    model: nn.Module,
    candidates: Candidates,
    tokens: Tensor,
    *,
    seed: int,
    quantizer: RenderingRule = "rtn",
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[NDArray[np.float32]]:
    """Yields ``sketch[s]`` [U, F] for the sequences ``first`` and on, one after another.

    While the generator is open, the candidates' parameters take gradients and no other parameter does; closed or
    exhausted, it leaves the model as it was, except that these parameters hold no gradient.

    Args:
        model: The reference model in float32.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64.
        seed: Seed of the labels; the labels of a sequence depend on the seed and its index alone.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        first: Index of the first sequence to measure (earlier ones are measured already).
        dtype: Type that products are computed in; weights, sums and gradients are float32 in any case.
    """
    sketch = np.zeros(candidates.allowed.shape)

    def contract(u: int, weight: Weight, values: Tensor, gradient: Tensor) -> None:
        for f in np.flatnonzero(candidates.allowed[u]):
            error = render_weight(weight, values, candidates.formats[f], quantizer).sub_(values)
            sketch[u, f] += float(torch.dot(error.flatten(), gradient.flatten()))

    score = SampledScore(seed)
    with received_gradients(model, candidates, contract):
        for s in range(first, tokens.shape[0]):
            sketch.fill(0.0)
            with torch.enable_grad():
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    logits = model(tokens[s : s + 1], use_cache=False).logits[0].float()
                torch.autograd.backward(score(logits, s))
            yield (sketch / np.sqrt(tokens.shape[1])).astype(np.float32)


def measure_streamed_fisher_sketch(
    model: Any,
    candidates: Candidates,
    tokens: Tensor,
    *,
    seed: int,
    directory: Path,
    progress: Callable[[int, int], None],
    quantizer: RenderingRule = "rtn",
    loss: Loss | None = None,
    base: Callable[[Weight], Tensor] | None = None,
    residency: Residency | None = None,
    kept_bytes: int = DEFAULT_KEPT_BYTES,
    dtype: torch.dtype = torch.float32,
) -> NDArray[np.float32]:
    """Returns the sketch [S, U, F] of all sequences, measured one layer of the model at a time.

    The same numbers as ``measure_fisher_sketch`` gives, to the rounding of float32; a candidate is rendered once
    instead of once for each sequence.

    Args:
        model: The reference model in float32; on the meta device where ``residency`` brings the weights in.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64.
        seed: Seed of the labels; the labels of a sequence depend on the seed and its index alone.
        directory: Where the files of this measurement are, and of no other; one process at a time works in it. What
            an interrupted measurement has finished is used.
        progress: Called with (steps done, steps in all), before the first step and after every step.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        loss: Another loss than ``SampledScore``, whose gradients are contracted instead.
        base: Values of a weight that candidates are rendered from, where the model holds others.
        residency: Brings the weights into memory.
        kept_bytes: Bound on the bytes of rendered errors (four fifths at most) and gradients kept at once; the
            gradients of one layer and sequence always are.
        dtype: Type that products are computed in; weights, sums and gradients are float32 in any case.

    Raises:
        NotLayerwise: If the layers of the model cannot be run one by one.
    """
    weights = [weight for unit in candidates.units for weight in unit.weights]
    stream = GradientStream(
        model,
        tokens,
        weights,
        loss=loss or SampledScore(seed),
        directory=directory,
        residency=residency,
        kept_bytes=kept_bytes,
        dtype=dtype,
    )
    contraction = ErrorContraction(
        candidates, len(tokens), quantizer=quantizer, base=base, error_bytes=kept_bytes * 4 // 5
    )
    products = stream.run({"errors": contraction}, progress)["errors"]
    sketch: NDArray[np.float64] = np.zeros((len(tokens), *candidates.allowed.shape))
    for u, unit in enumerate(candidates.units):
        for weight in unit.weights:
            sketch[:, u] += products[weight.name].numpy()
    sketch /= np.sqrt(tokens.shape[1])
    return sketch.astype(np.float32)


def fisher_loss(sketch: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the loss [U, F] and its standard error [U, F], in nats per token.

    Args:
        sketch: [S, U, F].
    """
    squares = 0.5 * sketch.astype(np.float64) ** 2
    return squares.mean(axis=0), squares.std(axis=0, ddof=1) / np.sqrt(len(sketch))


def sequence_losses(sketch: NDArray[np.float32], choice: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the additive loss of a choice [U] by every sequence of a Fisher sketch, nats per token, [S]."""
    chosen = sketch[:, np.arange(len(choice)), choice].astype(np.float64)
    return np.asarray(0.5 * np.square(chosen).sum(axis=1))
