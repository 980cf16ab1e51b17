"""Hessian-weighted output error: tr(D H D') with H = E[x x'] over the inputs of the unit, D the rendered error.

This is E ||D x||^2, the layer-local objective of GPTQ (Frantar et al. 2022, arXiv:2210.17323, eq. 1). An embedding
sees one-hot inputs, so H is the diagonal of token frequencies; a tied head adds the term of its own inputs. The
unit of measure is squared activation, not nats.

H is summed as the model runs, once for all weights that read one input (query, key and value; gate and up). Memory:
one float32 matrix in_features^2 for each distinct input.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule
from runtime.units import Weight, list_weights, read_weight
from sensitivity.criteria.weight_error import list_differences
from sensitivity.experts.expert_calls import eager_experts

_Address = tuple[int, int]


class InputSecondMoments(TorchFunctionMode):
    """Sums x x' of what ``linear`` and ``embedding`` multiply with each weight, while the model runs under it.

    Afterwards ``linear`` holds the sum [in_features, in_features] of each weight that a linear layer read, ``rows`` the
    number of its inputs, and ``embedding`` the number of times [rows] that each row of an embedding was read.

    Args:
        model: The model; its weights are recognised by their storage, experts inside one parameter included.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {_address(read_weight(model, w)): name for name, w in list_weights(model, routers=True).items()}
        self.linear: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.embedding: dict[str, Tensor] = {}
        # The input read last with its version, its product, and its readers: all weights that read one tensor in a
        # row share one sum.
        self._input: tuple[Tensor, int] | None = None
        self._product: Tensor | None = None
        self._readers: list[str] = []
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.functional.linear, nn.functional.embedding):
            named = {**dict(zip(("input", "weight"), args, strict=False)), **(kwargs or {})}
            name = self._names.get(_address(named["weight"]))
            if name and func is nn.functional.linear:
                self._add_linear(name, named["input"])
            elif name:
                counts = torch.bincount(named["input"].flatten(), minlength=named["weight"].shape[0])
                self.embedding[name] = self.embedding.get(name, 0) + counts
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]  # untyped in torch
        self._add_product()
        self.linear = {}
        for readers, total in self._sums.items():
            for name in readers:
                self.linear[name] = self.linear[name] + total if name in self.linear else total

    def _add_linear(self, name: str, x: Tensor) -> None:
        # The tensor is held until the next one comes, so that no other can take its identity; a tensor written to
        # in place meanwhile has another version.
        if self._input is None or self._input[0] is not x or self._input[1] != x._version:
            self._add_product()
            rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
            self._input, self._product = (x, x._version), rows.T @ rows
        self._readers.append(name)
        self.rows[name] = self.rows.get(name, 0) + x.shape[:-1].numel()

    def _add_product(self) -> None:
        if self._product is not None:
            readers = tuple(self._readers)
            known = self._sums.get(readers)
            self._sums[readers] = self._product if known is None else known.add_(self._product)
        self._input = self._product = None
        self._readers = []


def measure_output_error(
    model: Any, candidates: Candidates, tokens: Tensor, *, quantizer: RenderingRule = "rtn"
) -> NDArray[np.float64]:
    """Returns the Hessian-weighted output error [U, F], per token, of every allowed candidate (zero elsewhere).

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [S, T] int64.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
    """
    moments = InputSecondMoments(model)
    run_under(moments, model, tokens)
    return weigh_output_error(model, candidates, moments, token_count=tokens.numel(), quantizer=quantizer)


def run_under(mode: TorchFunctionMode, model: Any, tokens: Tensor) -> None:
    """Runs the model on tokens [S, T], sequence by sequence, with its products seen by a mode."""
    with eager_experts(model), torch.no_grad(), mode:
        for sequence in tokens:
            model(sequence.unsqueeze(0), use_cache=False)


def weigh_output_error(
    model: nn.Module,
    candidates: Candidates,
    moments: InputSecondMoments,
    *,
    token_count: int,
    quantizer: RenderingRule = "rtn",
) -> NDArray[np.float64]:
    """Returns the Hessian-weighted output error [U, F], per token, from second moments collected before.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        moments: Sums over the tokens.
        token_count: Number of these tokens.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
    """
    error = np.zeros(candidates.allowed.shape)
    for d in list_differences(model, candidates, quantizer=quantizer):
        error[d.unit_index, d.format_index] += _weighted(d.difference, d.weight, moments) / token_count
    return error


def _weighted(difference: Tensor, weight: Weight, moments: InputSecondMoments) -> float:
    total = 0.0
    if (moment := moments.linear.get(weight.name)) is not None:
        total += float(((difference @ moment) * difference).sum())
    if (counts := moments.embedding.get(weight.name)) is not None:
        total += float((difference.square().sum(dim=1) * counts).sum())
    return total


def _address(tensor: Tensor) -> _Address:
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
