"""Inner products of gradients with the rendered errors of all candidates.

    product[s, f] = <g_s, render(W, f) - W>      for each weight W, sequence s, allowed format f.

The errors of a weight [F, numel] are rendered once and kept while the gradients of its block come in, as far as a bound
on the bytes allows; those of other weights are rendered again for every few sequences. A format that changes nothing,
such as bf16 for weights that came from bf16, costs no more.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule, render_weight
from runtime.units import Weight

_DEFAULT_ERROR_BYTES = 2**29


class ErrorContraction:
    """Accumulates the inner products, by the names of the weights: [S, F] float32, zero where not allowed.

    Args:
        candidates: Units and formats.
        sequences: Number of sequences, S.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        base: Values [out_features, in_features] of a weight that the candidates are rendered from, where the model
            holds others; an error is always what leads from the model's own values to the candidate.
        error_bytes: Bound on the bytes of the errors that are kept.
    """

    def __init__(
        self,
        candidates: Candidates,
        sequences: int,
        *,
        quantizer: RenderingRule = "rtn",
        base: Callable[[Weight], Tensor] | None = None,
        error_bytes: int = _DEFAULT_ERROR_BYTES,
    ) -> None:
        self._candidates = candidates
        self._sequences = sequences
        self._quantizer = quantizer
        self._base = base
        self._error_bytes = error_bytes
        self._unit_of = {weight: u for u, unit in enumerate(candidates.units) for weight in unit.weights}
        self._values: Mapping[Weight, Tensor] = {}
        self._formats: dict[Weight, list[int]] = {}
        self._errors: dict[Weight, Tensor] = {}
        self._products: dict[str, Tensor] = {}

    def begin(self, weights: Mapping[Weight, Tensor]) -> int:
        """Renders the errors of a block, keeps those of the weights that fit the bound, and returns their bytes."""
        self._values = weights
        left_bytes = self._error_bytes
        for weight in weights:
            self._products[weight.name] = torch.zeros(self._sequences, len(self._candidates.formats))
            allowed = np.flatnonzero(self._candidates.allowed[self._unit_of[weight]]).tolist()
            errors = torch.empty(min(left_bytes // (4 * weight.weight_count), len(allowed)), weight.weight_count)
            formats: list[int] = []
            for f in allowed:
                error = self._render_error(weight, f)
                if bool(error.any()):
                    if len(formats) < len(errors):
                        errors[len(formats)] = error
                    formats.append(f)
            self._formats[weight] = formats
            # All or none: to render some again for every few sequences, it is better to keep more gradients instead.
            if len(formats) <= len(errors):
                self._errors[weight] = errors[: len(formats)]
                left_bytes -= 4 * weight.weight_count * len(formats)
        return self._error_bytes - left_bytes

    def add(self, weight: Weight, gradients: Tensor, first: int) -> None:
        """Contracts the gradients [B, out_features, in_features] of the sequences ``first`` and on."""
        flat = gradients.flatten(start_dim=1)
        rows = self._products[weight.name][first : first + len(gradients)]
        formats = self._formats[weight]
        if weight in self._errors:
            rows[:, formats] = (self._errors[weight] @ flat.T).T
        else:
            for f in formats:
                rows[:, f] = flat @ self._render_error(weight, f)

    def finish(self) -> dict[str, Tensor]:
        """Returns the inner products of the block and releases its errors."""
        products = self._products
        self._values, self._formats, self._errors, self._products = {}, {}, {}, {}
        return products

    def _render_error(self, weight: Weight, f: int) -> Tensor:
        values = self._values[weight]
        base = values if self._base is None else self._base(weight)
        return render_weight(weight, base, self._candidates.formats[f], self._quantizer).sub_(values).flatten()
