"""Hessian-weighted output error: tr(D H D') with H = E[x x'] over the inputs of the unit, D the rendered error.

This is E ||D x||^2, the layer-local objective of GPTQ (Frantar et al. 2022, arXiv:2210.17323, eq. 1). An embedding
sees one-hot inputs, so H is the diagonal of token frequencies; a tied head adds the term of its own inputs. The
unit of measure is squared activation, not nats.

H is summed as the model runs, once for all weights that read one input. Memory: one matrix in_features^2 a distinct input.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.candidates import Candidates
from runtime.quantizers import render
from runtime.units import Weight, list_weights, read_weight

_Address = tuple[int, int]


class InputSecondMoments(TorchFunctionMode):
    """Sums x x' of what ``linear`` and ``embedding`` multiply with each weight, while the model runs under it.

    Args:
        model: The model; its weights are recognised by their storage, experts inside one parameter included.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {_address(read_weight(model, w)): name for name, w in list_weights(model).items()}
        self.linear: dict[str, Tensor] = {}
        self.embedding: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and (name := self._names.get(_address(args[1]))):
            self._add_linear(name, args[0])
        elif func is nn.functional.embedding and (name := self._names.get(_address(args[1]))):
            counts = torch.bincount(args[0].flatten(), minlength=args[1].shape[0])
            self.embedding[name] = self.embedding.get(name, 0) + counts
        return func(*args, **(kwargs or {}))

    def _add_linear(self, name: str, x: Tensor) -> None:
        # Projections that read the same tensor (query, key, value) share one sum of products.
        if self._last is None or self._last[0] is not x:
            rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
            self._last = (x, rows.T @ rows)
        moment = self._last[1]
        known = self.linear.get(name)
        self.linear[name] = moment if known is None else known + moment


def measure_output_error(
    model: Any, candidates: Candidates, tokens: Tensor, *, quantizer: str = "rtn"
) -> NDArray[np.float64]:
    """Returns the Hessian-weighted output error [U, F], per token, of every allowed candidate (zero elsewhere).

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [S, T] int64.
        quantizer: Name in ``QUANTIZERS``.
    """
    # The batched expert kernels would hide the products with single experts.
    saved = getattr(model.config, "_experts_implementation", None)
    model.config._experts_implementation = "eager"
    try:
        with torch.no_grad(), InputSecondMoments(model) as moments:
            for sequence in tokens:
                model(sequence.unsqueeze(0), use_cache=False)
    finally:
        model.config._experts_implementation = saved
    error = np.zeros(candidates.allowed.shape)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        for weight in candidates.units[u].weights:
            values = read_weight(model, weight)
            difference = render(values, candidates.formats[f], quantizer) - values
            error[u, f] += _weighted(difference, weight, moments) / tokens.numel()
    return error


def _weighted(difference: Tensor, weight: Weight, moments: InputSecondMoments) -> float:
    total = 0.0
    if (moment := moments.linear.get(weight.name)) is not None:
        total += float(((difference @ moment) * difference).sum())
    if (counts := moments.embedding.get(weight.name)) is not None:
        total += float((difference.square().sum(dim=1) * counts).sum())
    return total


def _address(tensor: Tensor) -> _Address:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()
