"""Logit sketch: measured single-unit KL, and all cross terms at the price of the diagonal.

One unit is quantized at a time and the model run from its layer on (the prefix is cached). The loss of the entry is
the measured KL divergence to the reference, exactly and over the whole vocabulary. Beside it the sketch

    v_uf = sqrt(p / N) * (dz - E_p dz)      on the K most likely tokens of each of N positions

of the logit change dz is kept: 1/2 |v_uf|^2 approximates that KL to second order, and the joint effect of two
changes is 1/2 |v_i + v_j|^2, so the inner product <v_i, v_j> is their interaction. All of CLADO's pairs (Deng et
al. 2023, arXiv:2307.05657) therefore cost U * F suffix passes instead of (U * F)^2 / 2, and the matrix of inner
products is positive semidefinite by construction.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.apply import simulated_formats
from runtime.candidates import Candidates
from runtime.formats import Format
from runtime.rendering import RenderingRule, render_weight
from runtime.units import Unit, read_weight
from sensitivity.sketches.joint_kl import kl_by_position
from sensitivity.streaming.suffix import SuffixRunner


@dataclass(frozen=True, kw_only=True)
class UnitLogits:
    """What one unit's formats do to the logits.

    Args:
        kl: [F, N] float32, KL of each position in nats; zero for formats not allowed.
        sketch: [F, N, K] float16, the vectors v times sqrt(N).
    """

    kl: NDArray[np.float32]
    sketch: NDArray[np.float16]


class LogitSketch:
    """Measures units one by one on fixed tokens.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [B, T] int64; N = B * T positions.
        top_tokens: K.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
    """

    def __init__(
        self,
        model: nn.Module,
        candidates: Candidates,
        tokens: Tensor,
        *,
        top_tokens: int,
        quantizer: RenderingRule = "rtn",
    ) -> None:
        self._model = model
        self._candidates = candidates
        self._quantizer = quantizer
        self._runner = SuffixRunner(model, tokens)
        logits = self._runner.reference_logits.flatten(0, 1)
        self._log_p = torch.log_softmax(logits, dim=-1)
        self._p = self._log_p.exp()
        self._top = torch.topk(logits, min(top_tokens, logits.shape[-1]), dim=-1)
        top_p = torch.gather(self._p, 1, self._top.indices)
        self._root_p = top_p.sqrt()
        self._top_share = top_p / top_p.sum(dim=-1, keepdim=True)

    def measure(self, u: int) -> UnitLogits:
        """Returns the effect on the logits of every allowed format of unit ``u``."""
        candidates, unit = self._candidates, self._candidates.units[u]
        positions, top = self._top.values.shape
        kl = np.zeros((len(candidates.formats), positions), dtype=np.float32)
        sketch = np.zeros((len(candidates.formats), positions, top), dtype=np.float16)
        for f in np.flatnonzero(candidates.allowed[u]):
            if self._is_lossless(unit, candidates.formats[f]):
                continue
            formats = {weight.name: candidates.formats[f].name for weight in unit.weights}
            with simulated_formats(self._model, formats, quantizer=self._quantizer):
                logits = self._runner.logits(unit.layer_index).flatten(0, 1)
            kl[f] = kl_by_position(self._log_p, self._p, logits).numpy()
            sketch[f] = self._sketch(logits).to(torch.float16).numpy()
        return UnitLogits(kl=kl, sketch=sketch)

    def _is_lossless(self, unit: Unit, format_: Format) -> bool:
        # Worth asking: a bfloat16 model loses nothing at bf16, and a pass of the model is saved.
        if not format_.unquantized:
            return False
        weights = [(weight, read_weight(self._model, weight)) for weight in unit.weights]
        return all(torch.equal(render_weight(w, values, format_, self._quantizer), values) for w, values in weights)

    def _sketch(self, logits: Tensor) -> Tensor:
        change = torch.gather(logits, 1, self._top.indices) - self._top.values
        mean = (self._top_share * change).sum(dim=-1, keepdim=True)
        return self._root_p * (change - mean)


def gram_of(sketches: NDArray[np.float16]) -> NDArray[np.float64]:
    """Returns the inner products [M, M] of M = U * F sketch vectors.

    Args:
        sketches: [M, N, K] float16 on N positions.
    """
    count, positions, _ = sketches.shape
    gram = np.zeros((count, count))
    block = max(1, 8192 // sketches.shape[2])
    for start in range(0, positions, block):
        part = sketches[:, start : start + block].reshape(count, -1).astype(np.float32)
        gram += part @ part.T
    gram /= positions
    return gram
