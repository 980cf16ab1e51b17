"""Losses of all candidates from one backward pass a sequence: the gradient criteria of other systems, in nats.

With D = render(W, f) - W the rendered error of a candidate, S sequences of T tokens, and g a gradient,

    output Fisher       1/2 mean_s 1/T sum_to (dL/dy_to)^2 ((D x_t)_o)^2        L: labels drawn from the model
    absolute slope      mean_s sum_ij |dL/dW_ij D_ij|                           L: mean loss of the text's next tokens
    Hessian trace       1/2 tr(H) / n * ||D||^2,  tr by z'Hz                    L: mean loss of the text's next tokens
    Fisher trace        1/2 tr(F) / n * ||D||^2,  tr by ||dL/dW||^2 / T         L: labels drawn from the model

with n the number of weights in a matrix. Output Fisher is the diagonal of the Fisher information of the outputs y:
it drops products of different outputs and tokens, which the Fisher sketch keeps. The absolute slope bounds the first
order of |loss| and, at the reference, where the expected gradient is zero, is mostly noise: a ranking, not a
prediction. Traces take all directions of a matrix to be alike. The Hessian of the text's loss has negative
directions, so a trace may be negative; its Gauss-Newton part, the Fisher information, has none. Losses are as
measured, negative ones included. A probe of signs crosses every weight with every other, a drawn label does not:
with 8 sequences of SmolLM2 the standard error of a Hessian trace is as large as the trace, of a Fisher trace a tenth.

Cost: a forward and a backward pass a sequence; besides, a rendering and a product with the inputs (output Fisher) or
a rendering (slope) of each candidate; for the traces one rendering of each candidate in all. The Hessian trace
differentiates twice: attention by its plain kernel, and one gradient of the whole model held with its graph.

Papers: output Fisher as in NVIDIA Model Optimizer's auto_quantize (gradient scoring); absolute slope as in
AutoScheme of auto-round (whose gradient is taken at the quantized model, one pass a format); HAWQ-V3, Yao et al.
2021 (arXiv:2011.10680) and Hutchinson 1990 for the trace, without our 1/2. None of them draws labels: with the
text's own labels in place of the model's the squared gradient is the empirical Fisher, no estimate of the KL.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule, render_weight
from runtime.units import Weight, read_weight
from sensitivity.criteria.output_gradients import received_output_gradients
from sensitivity.streaming.gradient_probes import RademacherProbe, SampledScore, received_gradients, text_loss

Estimate = tuple[NDArray[np.float64], NDArray[np.float64]]


def measure_output_fisher(
    model: nn.Module, candidates: Candidates, tokens: Tensor, *, seed: int, quantizer: RenderingRule = "rtn"
) -> Estimate:
    """Returns the loss [U, F] by the diagonal Fisher information of the outputs and its standard error [U, F].

    Args:
        model: The reference model in float32.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64, S >= 2.
        seed: Seed of the labels.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If there are fewer than two sequences.
    """
    samples = _samples(candidates, tokens)

    def receive(u: int, weight: Weight, x: Tensor, gradient: Tensor) -> None:
        squares = gradient.square()
        values = read_weight(model, weight)
        for f in np.flatnonzero(candidates.allowed[u]).tolist():
            error = _error(weight, values, candidates, f, quantizer)
            change = x @ error.T if x.is_floating_point() else error[x]
            samples[s, u, f] += 0.5 * float((squares * change.square()).sum()) / tokens.shape[1]

    score = SampledScore(seed)
    with received_output_gradients(model, candidates, receive):
        for s in range(len(tokens)):
            torch.autograd.backward(score(model(tokens[s : s + 1], use_cache=False).logits[0], s))
    return _estimate(samples)


def measure_absolute_slope(
    model: nn.Module, candidates: Candidates, tokens: Tensor, *, seed: int, quantizer: RenderingRule = "rtn"
) -> Estimate:
    """Returns the sum of |gradient x error| [U, F] over a unit's weights and its standard error [U, F].

    Args:
        model: The reference model in float32.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64, S >= 2 and T >= 2.
        seed: Not used, as nothing is drawn; the criteria share one signature.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If there are fewer than two sequences, or they have fewer than two tokens.
    """
    samples = _samples(candidates, tokens, least_tokens=2)

    def receive(u: int, weight: Weight, values: Tensor, gradient: Tensor) -> None:
        for f in np.flatnonzero(candidates.allowed[u]).tolist():
            samples[s, u, f] += float(_error(weight, values, candidates, f, quantizer).mul_(gradient).abs().sum())

    with received_gradients(model, candidates, receive), torch.enable_grad():
        for s in range(len(tokens)):
            torch.autograd.backward(text_loss(model, tokens[s : s + 1]))
    return _estimate(samples)


def measure_hessian_trace(
    model: nn.Module, candidates: Candidates, tokens: Tensor, *, seed: int, quantizer: RenderingRule = "rtn"
) -> Estimate:
    """Returns the loss [U, F] by the average trace of the Hessian of the text's loss and its standard error [U, F].

    One probe of random signs and two backward passes a sequence.

    Args:
        model: The reference model in float32, of operations that can be differentiated twice.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64, S >= 2 and T >= 2.
        seed: Seed of the signs.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If there are fewer than two sequences, they have fewer than two tokens, or an operation of the
            model cannot be differentiated twice.
    """
    _samples(candidates, tokens, least_tokens=2)
    names = {weight.parameter for unit in candidates.units for weight in unit.weights}
    parameters = {name: model.get_parameter(name) for name in names}
    traces = _empty_traces(candidates, len(tokens))

    def receive(_u: int, weight: Weight, _values: Tensor, product: Tensor) -> None:
        signs = probe.signs(weight.parameter)
        index = () if weight.expert_index is None else weight.expert_index
        traces[weight.name][s] = float(signs[index].mul(product).sum())

    # The fused kernels of attention have no second derivative.
    with (
        received_gradients(model, candidates, receive),
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):
        for s in range(len(tokens)):
            probe = RademacherProbe(parameters, seed=seed, index=s)
            _backward_twice(model, tokens[s : s + 1], probe)
    return _trace_estimate(model, candidates, traces, quantizer)


def measure_fisher_trace(
    model: nn.Module, candidates: Candidates, tokens: Tensor, *, seed: int, quantizer: RenderingRule = "rtn"
) -> Estimate:
    """Returns the loss [U, F] by the average trace of the Fisher information and its standard error [U, F].

    Args:
        model: The reference model in float32.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64, S >= 2.
        seed: Seed of the labels.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If there are fewer than two sequences.
    """
    _samples(candidates, tokens)

    traces = _empty_traces(candidates, len(tokens))

    def receive(_u: int, weight: Weight, _values: Tensor, gradient: Tensor) -> None:
        traces[weight.name][s] = float(gradient.square().sum()) / tokens.shape[1]

    score = SampledScore(seed)
    with received_gradients(model, candidates, receive), torch.enable_grad():
        for s in range(len(tokens)):
            torch.autograd.backward(score(model(tokens[s : s + 1], use_cache=False).logits[0], s))
    return _trace_estimate(model, candidates, traces, quantizer)


def _backward_twice(model: nn.Module, tokens: Tensor, probe: RademacherProbe) -> None:
    try:
        probe.backward(text_loss(model, tokens))
    except RuntimeError as error:
        if "derivative" not in str(error) and "differentiate" not in str(error):
            raise
        msg = (
            f"the model must be twice differentiable for a Hessian trace: got {type(model).__name__} ({error}). "
            "Use measure_fisher_trace, which needs one derivative."
        )
        raise ValueError(msg) from error


def _samples(candidates: Candidates, tokens: Tensor, *, least_tokens: int = 1) -> NDArray[np.float64]:
    """Returns zeros [S, U, F]."""
    if tokens.shape[0] < 2 or tokens.shape[1] < least_tokens:
        msg = (
            f"tokens must hold at least 2 sequences of {least_tokens} tokens (a standard error needs two samples, a "
            f"next token two tokens): got shape {tuple(tokens.shape)}. Cut the text into more sequences."
        )
        raise ValueError(msg)
    return np.zeros((len(tokens), *candidates.allowed.shape))


def _error(weight: Weight, values: Tensor, candidates: Candidates, f: int, quantizer: RenderingRule) -> Tensor:
    return render_weight(weight, values, candidates.formats[f], quantizer).to(values.dtype).sub_(values)


def _estimate(samples: NDArray[np.float64]) -> Estimate:
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def _empty_traces(candidates: Candidates, sequences: int) -> dict[str, NDArray[np.float64]]:
    # An expert that no token visits in a sequence has no gradient there: a sample of zero.
    return {weight.name: np.zeros(sequences) for unit in candidates.units for weight in unit.weights}


def _trace_estimate(
    model: nn.Module, candidates: Candidates, traces: dict[str, NDArray[np.float64]], quantizer: RenderingRule
) -> Estimate:
    samples = np.zeros((len(next(iter(traces.values()))), *candidates.allowed.shape))
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        for weight in candidates.units[u].weights:
            error = _error(weight, read_weight(model, weight), candidates, f, quantizer)
            samples[:, u, f] += 0.5 * traces[weight.name] / weight.weight_count * float(error.square().sum())
    return _estimate(samples)
