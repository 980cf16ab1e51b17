"""CLADO's pairs, measured: the loss of two units quantized together, beside each of them alone.

    interaction(i, j) = P[i, j] - P[i] - P[j]        (i, j candidates of different units),

P the measured KL divergence to the reference, in nats per token. What is measured here holds every order; the inner
products of the logit sketch are the second order of the same quantity at the price of the singles alone, and
`compare_with_gram` says how far they agree. `assemble_pairs` gives the arrays of which the solvers' dense matrix is
built, where it is projected onto the positive semidefinite ones.

Complexity: one pass from the lower unit's layer on for each candidate, and one from the later unit's layer on for
each pair, against the outputs cached with the first unit quantized. All pairs of U units at F formats are
U (U - 1) F^2 / 2: a choice of units or of formats for anything but small models.

Paper: Deng et al. 2023, CLADO (arXiv:2307.05657). We measure the KL to the reference instead of the training loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.apply import simulated_formats
from runtime.candidates import Candidates
from runtime.rendering import RenderingRule
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.sketches.joint_kl import JointKL

UnitFormat = tuple[int, int]
Pair = tuple[UnitFormat, UnitFormat]


@dataclass(frozen=True, kw_only=True)
class PairwiseLosses:
    """Losses of candidates alone and of pairs of them, on the same text.

    Args:
        singles: [C, 2] int64, unit and format of each candidate in a pair.
        single: [C, S] KL of each sequence with this candidate alone, nats per token.
        pairs: [P, 2] int64, rows of ``singles``.
        joint: [P, S] KL of each sequence with both.
    """

    singles: NDArray[np.int64]
    single: NDArray[np.float64]
    pairs: NDArray[np.int64]
    joint: NDArray[np.float64]

    @property
    def interaction(self) -> NDArray[np.float64]:
        """What the two lose together beyond what they lose alone, nats per token, [P]."""
        return np.asarray(self._interactions.mean(axis=1))

    @property
    def std_error(self) -> NDArray[np.float64]:
        """Standard error of the interaction over the sequences, [P]."""
        return np.asarray(self._interactions.std(axis=1, ddof=1) / np.sqrt(self.joint.shape[1]))

    @property
    def _interactions(self) -> NDArray[np.float64]:
        return np.asarray(self.joint - self.single[self.pairs].sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class InteractionComparison:
    """Measured interactions beside the inner products of a sketch.

    Args:
        measured: [P] nats per token.
        predicted: [P] inner products of the same pairs.
        correlation: Pearson's; NaN when either does not vary.
        rank_correlation: Spearman's.
        slope: Least-squares factor from predicted to measured, through zero.
        relative_error: ||measured - predicted|| / ||measured||.
        noise: Share of ||measured||^2 that its own standard errors explain.
    """

    measured: NDArray[np.float64]
    predicted: NDArray[np.float64]
    correlation: float
    rank_correlation: float
    slope: float
    relative_error: float
    noise: float


def list_pairs(candidates: Candidates, units: Sequence[int], formats: Sequence[int]) -> list[Pair]:
    """Returns every pair of allowed candidates of different units among the given units and formats."""
    choices = [[(u, f) for f in formats if candidates.allowed[u, f]] for u in units]
    return [pair for first, second in combinations(choices, 2) for pair in product(first, second)]


def measure_pairs(
    model: nn.Module,
    candidates: Candidates,
    pairs: Sequence[Pair],
    tokens: Tensor,
    *,
    quantizer: RenderingRule = "rtn",
    pieces: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairwiseLosses:
    """Returns the losses of pairs of candidates and of every candidate in them.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        pairs: Two candidates (unit index, format index) each, of different units, each pair once.
        tokens: [S, T] int64, S >= 2, run in one batch.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        pieces: Directory of finished pieces, of these inputs alone; None to keep none.
        progress: Called with (candidates done, candidates in all), each with its pairs.

    Raises:
        ValueError: If a pair is not of two allowed candidates of different units, or is named twice.
    """
    ordered = _check_pairs(candidates, pairs)
    partners: dict[UnitFormat, list[UnitFormat]] = {c: [] for c in sorted({c for pair in ordered for c in pair})}
    for first, second in ordered:
        partners[first].append(second)
    kl: JointKL | None = None

    def measure(first: UnitFormat) -> Piece:
        nonlocal kl
        # Not before it is needed: it runs the model.
        kl = kl or JointKL(model, tokens)
        return _measure_with(kl, model, candidates, first, partners[first], quantizer)

    single, joint = [], {}
    for done, (first, seconds) in enumerate(partners.items()):
        path = None if pieces is None else pieces / f"{first[0]:05d}-{first[1]:02d}.safetensors"
        piece = read_or_measure(path, lambda first=first: measure(first))  # type: ignore[misc]
        single.append(piece["single"])
        joint.update({(first, second): row for second, row in zip(seconds, piece["joint"], strict=True)})
        progress(done + 1, len(partners))
    row_of = {candidate: row for row, candidate in enumerate(partners)}
    return PairwiseLosses(
        singles=np.array(list(partners), dtype=np.int64).reshape(-1, 2),
        single=np.stack(single),
        pairs=np.array([[row_of[first], row_of[second]] for first, second in ordered], dtype=np.int64),
        joint=np.stack([joint[pair] for pair in ordered]),
    )


def assemble_pairs(
    measured: PairwiseLosses, loss: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the losses alone [U, F] and in pairs [U * F, U * F] that the solvers build their dense matrix of.

    Args:
        measured: Pairs; what was measured alone replaces its entry of ``loss``.
        loss: [U, F] nats per token, of the candidates that no pair has. Pairs not measured have no interaction.
    """
    single = loss.astype(np.float64, copy=True)
    single[tuple(measured.singles.T)] = measured.single.mean(axis=1)
    pair = np.add.outer(single.ravel(), single.ravel())
    rows, columns = _flat(measured, loss.shape[1])
    # Added twice, not mirrored: the matrix stays exactly symmetric.
    pair[rows, columns] += measured.interaction
    pair[columns, rows] = pair[rows, columns]
    return single, pair


def compare_with_gram(measured: PairwiseLosses, gram: NDArray[np.floating], n_formats: int) -> InteractionComparison:
    """Returns measured interactions beside the logit sketch's inner products.

    Args:
        measured: At least two pairs.
        gram: [U * F, U * F] inner products, on the same positions for a comparison of orders alone.
        n_formats: F.

    Raises:
        ValueError: If there are fewer than two pairs.
    """
    from scipy.stats import spearmanr

    interaction = measured.interaction
    if len(interaction) < 2:
        msg = f"measured must have at least 2 pairs to compare: got {len(interaction)}. Measure more pairs."
        raise ValueError(msg)
    predicted = gram[_flat(measured, n_formats)].astype(np.float64)
    square = max(float(interaction @ interaction), np.finfo(float).tiny)
    # Entries that are all equal have no correlation: NaN, as documented.
    varies = bool(np.ptp(interaction) > 0 and np.ptp(predicted) > 0)
    return InteractionComparison(
        measured=interaction,
        predicted=predicted,
        correlation=float(np.corrcoef(interaction, predicted)[0, 1]) if varies else float("nan"),
        rank_correlation=float(spearmanr(interaction, predicted).statistic) if varies else float("nan"),
        slope=float(interaction @ predicted / max(float(predicted @ predicted), np.finfo(float).tiny)),
        relative_error=float(np.linalg.norm(interaction - predicted) / np.sqrt(square)),
        noise=float(np.sum(measured.std_error**2) / square),
    )


def _check_pairs(candidates: Candidates, pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the pairs with the candidate of the lower layer first."""
    if not pairs:
        msg = "pairs must hold at least one pair: got none. Name units and formats that have allowed candidates."
        raise ValueError(msg)
    ordered = []
    for first, second in pairs:
        for u, f in (first, second):
            if not (0 <= u < len(candidates.units) and 0 <= f < len(candidates.formats) and candidates.allowed[u, f]):
                msg = f"pairs must be of allowed candidates: got unit {u} with format {f}. Leave the pair out."
                raise ValueError(msg)
        if first[0] == second[0]:
            msg = f"pairs must be of two units: got unit {first[0]} twice, in {(first, second)}. Leave the pair out."
            raise ValueError(msg)
        ordered.append((first, second) if _depth(candidates, first) <= _depth(candidates, second) else (second, first))
    if len(set(ordered)) != len(ordered):
        msg = f"pairs must be named once: got {len(ordered) - len(set(ordered))} repeats. Remove them."
        raise ValueError(msg)
    return ordered


def _depth(candidates: Candidates, candidate: UnitFormat) -> tuple[int, int]:
    # A unit outside of the layers needs the whole model, as one in the first layer does. The index makes it total.
    return candidates.units[candidate[0]].layer_index or 0, candidate[0]


def _measure_with(
    kl: JointKL,
    model: nn.Module,
    candidates: Candidates,
    first: UnitFormat,
    seconds: list[UnitFormat],
    quantizer: RenderingRule,
) -> Piece:
    joint = []
    with kl.branch(), simulated_formats(model, _formats(candidates, first), quantizer=quantizer):
        single = kl.follow(candidates.units[first[0]].layer_index)
        for second in seconds:
            with simulated_formats(model, _formats(candidates, second), quantizer=quantizer):
                joint.append(kl.measure(candidates.units[second[0]].layer_index))
    return {"single": single, "joint": np.array(joint).reshape(len(seconds), len(single))}


def _formats(candidates: Candidates, candidate: UnitFormat) -> dict[str, str]:
    u, f = candidate
    return {weight.name: candidates.formats[f].name for weight in candidates.units[u].weights}


def _flat(measured: PairwiseLosses, n_formats: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    index = measured.singles[:, 0] * n_formats + measured.singles[:, 1]
    return index[measured.pairs[:, 0]], index[measured.pairs[:, 1]]
