"""Shrinks the losses of rarely taken experts towards what their layer says (empirical Bayes).

An expert that n of N tokens take has a loss l measured on those n tokens alone; with few of them it is noise, and with
none it is zero, which would give the expert the smallest format for free. Losses are means of squares: their error is
in proportion to their size, so the model is one of logarithms. In one layer, projection and format, the loss per visit
r = l N / n of an expert is taken as

    log r_e ~ (log theta_e, c / n_e),     log theta_e ~ (mu, tau^2),

with moments in closed form (a one-way analysis of variance), sums over the experts seen, E of them:

    mu    = sum n log r / sum n
    c     = sum n^2 (std_error / l)^2 / sum n                               relative variance of one visit
    tau^2 = [sum n (log r - mu)^2 - (E - 1) c] / (sum n - sum n^2 / sum n)  at least 0
    k     = c / tau^2,     w = n / (n + k)
    shrunk loss = z l^w (q e^mu)^(1 - w),     q = (n + 1/2) / (N + 1)

q is the expected frequency (Krichevsky and Trofimov's estimate, not zero for an expert not yet seen), and the factor z
keeps the sum of the layer's losses. So n -> inf keeps the measured loss, n = 0 gives the layer's loss per visit, and
w = 0 for all divides the layer's loss by frequency. The relative variance left is (1 - w) tau^2 + (1 - w)^2 c / sum n.
A metric without standard errors (c = 0) is shrunk for n = 0 only.

On a trained mixture of 16 experts the same with plain instead of logarithmic moments shrank too much: the errors of the
largest losses set the variance of all.

Complexity: O(U F). Limits: a loss is taken as proportional to the visits; tau^2 of a layer of few experts is itself a
rough estimate.
Source: C. Morris, "Parametric empirical Bayes inference", JASA 1983; R. DerSimonian and N. Laird 1986, eq. (8).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from sensitivity.experts.routing import RoutingStatistics

LEAST_TOKENS = 64
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShrunkLosses:
    """Losses after the shrinkage.

    Args:
        loss: [U, F], as measured for units that are not of one expert.
        std_error: [U, F].
        weight: [U, F], the share w of the measured loss in the shrunk one; 1 where nothing was shrunk.
        rare: Names of the units whose expert fewer tokens than asked for took, with that number of tokens.
    """

    loss: Floats
    std_error: Floats
    weight: Floats
    rare: dict[str, float]


def shrink_rare_losses(
    loss: Floats,
    std_error: Floats,
    routing: RoutingStatistics,
    candidates: Candidates,
    *,
    measured_tokens: int | None = None,
    least_tokens: int = LEAST_TOKENS,
) -> ShrunkLosses:
    """Returns the losses with those of every expert shrunk towards its layer's, by the tokens that took it.

    Args:
        loss: [U, F] of one metric.
        std_error: [U, F].
        routing: Routing of the text that the losses were measured on, or of text like it.
        candidates: Units and formats; units of one expert are shrunk, those of a whole stack are not.
        measured_tokens: Tokens that the losses were measured on; None for those of the routing.
        least_tokens: Units whose expert fewer tokens than this took are listed.

    Raises:
        ValueError: If a table is not [U, F], or a layer of the candidates is not in the routing.
    """
    shape = candidates.allowed.shape
    if loss.shape != shape or std_error.shape != shape:
        msg = f"tables must be [U, F] = {shape}: got loss {loss.shape}, std_error {std_error.shape}."
        raise ValueError(msg)
    total = float(routing.tokens.sum() if measured_tokens is None else measured_tokens)
    result = ShrunkLosses(loss=loss.copy(), std_error=std_error.copy(), weight=np.ones(shape), rare={})
    for units in _expert_groups(candidates):
        row = routing.row_of(candidates.units[units[0]].layer_index or 0)
        visits = total * routing.frequency[row, [candidates.units[u].expert_index or 0 for u in units]]
        for f in range(shape[1]):
            inside = candidates.allowed[units, f]
            members, seen = np.array(units)[inside], visits[inside]
            if members.size:
                moments = _shrink(loss[members, f], std_error[members, f], seen, total)
                result.loss[members, f], result.std_error[members, f], result.weight[members, f] = moments
        names = (candidates.units[u].name for u in units)
        result.rare.update((name, n) for name, n in zip(names, visits.tolist(), strict=True) if n < least_tokens)
    return result


def _expert_groups(candidates: Candidates) -> list[list[int]]:
    groups: dict[tuple[int | None, str], list[int]] = {}
    for u, unit in enumerate(candidates.units):
        if unit.kind == "expert" and unit.expert_index is not None:
            groups.setdefault((unit.layer_index, unit.role), []).append(u)
    return list(groups.values())


def _shrink(loss: Floats, std_error: Floats, visits: Floats, total: float) -> tuple[Floats, Floats, Floats]:
    """Returns the shrunk losses, their standard errors and the weights of the measured ones, [E] each."""
    seen = (visits > 0) & (loss > 0)
    if not seen.any():
        # Nothing is lost, or nothing was seen of this layer: there is nothing to shrink towards.
        return loss, std_error, np.ones_like(loss)
    n = visits[seen]
    rate = np.log(loss[seen] * total / n)
    mean = n @ rate / n.sum()
    visit_variance = float(n**2 @ np.square(std_error[seen] / loss[seen]) / n.sum())
    between = n @ np.square(rate - mean) - (len(n) - 1) * visit_variance
    freedom = n.sum() - n @ n / n.sum()
    expert_variance = max(float(between / freedom), 0.0) if freedom > 0.0 else 0.0
    # n / (n + c / tau^2), written so that neither variance need be above zero.
    weight = np.where(seen, 1.0, 0.0)
    if visit_variance > 0.0:
        weight[seen] = n * expert_variance / (n * expert_variance + visit_variance)
    measured = np.log(np.where(seen, loss, 1.0))
    shrunk = np.exp(weight * measured + (1.0 - weight) * (np.log((visits + 0.5) / (total + 1.0)) + mean))
    shrunk *= loss[seen].sum() / shrunk[seen].sum()
    variance = (1.0 - weight) * expert_variance + np.square(1.0 - weight) * visit_variance / n.sum()
    return shrunk, shrunk * np.sqrt(variance), weight
