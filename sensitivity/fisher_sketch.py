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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.quantizers import render
from runtime.units import Weight


def measure_fisher_sketch(
    model: nn.Module, candidates: Candidates, tokens: Tensor, *, seed: int, quantizer: str = "rtn", first: int = 0
) -> Iterator[NDArray[np.float32]]:
    """Yields ``sketch[s]`` [U, F] for the sequences ``first`` and on, one after another.

    While the generator is open, the candidates' parameters take gradients and no other parameter does; closed or
    exhausted, it leaves the model as it was, except that these parameters hold no gradient.

    Args:
        model: The reference model in float32.
        candidates: Units and formats; entries of pairs not allowed are zero.
        tokens: [S, T] int64.
        seed: Seed of the labels; the labels of a sequence depend on the seed and its index alone.
        quantizer: Name in ``QUANTIZERS``.
        first: Index of the first sequence to measure (earlier ones are measured already).
    """
    contraction = _Contraction(model, candidates, quantizer)
    try:
        for s in range(first, tokens.shape[0]):
            contraction.sketch.fill(0.0)
            _backward_sampled_score(model, tokens[s : s + 1], seed=(seed * 1_000_003 + s) % 2**63)
            yield (contraction.sketch / np.sqrt(tokens.shape[1])).astype(np.float32)
    finally:
        contraction.close()


def fisher_loss(sketch: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the loss [U, F] and its standard error [U, F], in nats per token.

    Args:
        sketch: [S, U, F].
    """
    squares = 0.5 * sketch.astype(np.float64) ** 2
    return squares.mean(axis=0), squares.std(axis=0, ddof=1) / np.sqrt(len(sketch))


def _backward_sampled_score(model: nn.Module, tokens: Tensor, *, seed: int) -> None:
    with torch.enable_grad():
        logits = model(tokens, use_cache=False).logits[0].float()
        generator = torch.Generator().manual_seed(seed)
        labels = torch.multinomial(torch.softmax(logits.detach(), dim=-1), 1, generator=generator)[:, 0]
        # Minus the log-likelihood: the sign of a score changes neither its square nor its cross terms.
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels, reduction="sum"))


class _Contraction:
    """Hooks that contract each parameter's gradient with the errors of its candidates and release it."""

    def __init__(self, model: nn.Module, candidates: Candidates, quantizer: str) -> None:
        self.sketch = np.zeros(candidates.allowed.shape)
        self._candidates = candidates
        self._quantizer = quantizer
        rows_by_parameter: dict[str, list[tuple[int, Weight]]] = {}
        for u, unit in enumerate(candidates.units):
            for weight in unit.weights:
                rows_by_parameter.setdefault(weight.parameter, []).append((u, weight))
        self._parameters = {model.get_parameter(name): rows for name, rows in rows_by_parameter.items()}
        self._took_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
        for parameter in self._took_gradient:
            parameter.requires_grad_(parameter in self._parameters)
        # An embedding withholds the gradient of its padding token, but reads that row like any other.
        self._padding = {module: module.padding_idx for module in model.modules() if type(module) is nn.Embedding}
        for module in self._padding:
            module.padding_idx = None
        self._handles = []
        for parameter, rows in self._parameters.items():
            parameter.grad = None
            hook: Any = parameter.register_post_accumulate_grad_hook  # untyped in torch
            self._handles.append(hook(self._contract_rows(rows)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, took_gradient in self._took_gradient.items():
            parameter.requires_grad_(took_gradient)
        for parameter in self._parameters:
            parameter.grad = None
        for module, padding_idx in self._padding.items():
            module.padding_idx = padding_idx

    def _contract_rows(self, rows: list[tuple[int, Weight]]) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def contract(parameter: Tensor) -> None:
            gradient = parameter.grad
            assert gradient is not None
            for u, weight in rows:
                index = () if weight.expert_index is None else weight.expert_index
                self._contract(u, parameter.data[index], gradient[index])
            parameter.grad = None

        return contract

    def _contract(self, u: int, values: Tensor, gradient: Tensor) -> None:
        for f in np.flatnonzero(self._candidates.allowed[u]):
            error = render(values, self._candidates.formats[f], self._quantizer).sub_(values)
            self.sketch[u, f] += float(torch.dot(error.flatten(), gradient.flatten()))
