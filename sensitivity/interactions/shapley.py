"""Shapley values of units: what lowering one costs, on average over what else is lowered already.

All units start at one format. Along a random permutation they are lowered to another format one at a time, each
rendered from its reference weight, and the change of the KL divergence to the reference is the unit's marginal:

    marginal[m, u] = KL(u and those before it in permutation m) - KL(those before it),  phi[u] = mean_m marginal[m, u].

The marginals of a permutation sum to the whole change (efficiency), so the values share out the true loss of the
joint assignment, interactions of every order included, where losses of single units miss them. An antithetic
permutation is the reverse of the one before it: a unit late in one is early in the other, so the pair's mean has no
error from pairwise interactions at all (of units i and j, exactly one of the two sees the other lowered).

Complexity: U + 1 passes a permutation, each from the changed unit's layer on. Memory: the model twice.
Limits: one pair of formats at a time; the standard error of a value falls with the root of the permutations.

Paper: Shapley-based progressive quantization of CoopQ/IMPQ (arXiv:2509.15455), which lowers from 4 to 2 bits and
measures the negative log-likelihood; we measure the KL to the reference. Antithetic permutations: Mitchell et al.
2022 (arXiv:2104.12199).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.apply import simulated_formats
from runtime.candidates import Candidates
from runtime.rendering import render
from runtime.units import Unit, read_weight
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.sketches.joint_kl import JointKL


@dataclass(frozen=True, kw_only=True)
class ShapleyConfig:
    """Which formats are compared, and how long.

    Args:
        start_format: Name of the format that all units have at first.
        target_format: Name of the format that they are lowered to.
        permutations: The most permutations.
        antithetic: Every second permutation is the reverse of the one before it.
        max_passes: The most passes of the model; only whole permutations (and whole antithetic pairs) are measured,
            so that every unit has equally many marginals and the values stay unbiased. None for no limit.
        quantizer: Name in ``QUANTIZERS``.
        seed: Seed of the permutations.

    Raises:
        ValueError: If the formats are the same, or the permutations are too few for a standard error.
    """

    start_format: str
    target_format: str
    permutations: int = 50
    antithetic: bool = True
    max_passes: int | None = None
    quantizer: str = "rtn"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.start_format == self.target_format:
            msg = f"target_format must differ from start_format: got '{self.start_format}' twice. Choose a lower one."
            raise ValueError(msg)
        if self.permutations < self.least_permutations or self.permutations % self.step:
            rule = "even and at least 4 (two antithetic pairs)" if self.antithetic else "at least 2"
            msg = f"permutations must be {rule}, for a standard error: got {self.permutations}. Raise it."
            raise ValueError(msg)

    @property
    def step(self) -> int:
        """Permutations that belong together: 2 when antithetic."""
        return 2 if self.antithetic else 1

    @property
    def least_permutations(self) -> int:
        """Fewest permutations with a standard error."""
        return 2 * self.step

    def count_permutations(self, n_players: int) -> int:
        """Returns how many permutations of ``n_players`` units are measured.

        Raises:
            ValueError: If the passes allow too few for a standard error.
        """
        if self.max_passes is None:
            return self.permutations
        afforded = self.max_passes // (n_players + 1) // self.step * self.step
        if afforded < self.least_permutations:
            msg = (
                f"max_passes must allow {self.least_permutations} permutations of {n_players} units, "
                f"{self.least_permutations * (n_players + 1)} passes: got max_passes={self.max_passes}. Raise it, "
                "or fuse units."
            )
            raise ValueError(msg)
        return min(self.permutations, afforded)


@dataclass(frozen=True, kw_only=True)
class ShapleyMarginals:
    """Marginal losses of every permutation.

    Args:
        config: What was measured.
        players: [P] int64, units that may have both formats, in ascending order.
        start_kl: [S] KL of each sequence with all units at the start, nats per token.
        orders: [M, P] int64, players in the order in which each permutation lowers them.
        marginal: [M, S, P] change of the KL of each sequence by each player.
    """

    config: ShapleyConfig
    players: NDArray[np.int64]
    start_kl: NDArray[np.float64]
    orders: NDArray[np.int64]
    marginal: NDArray[np.float64]

    @property
    def value(self) -> NDArray[np.float64]:
        """Shapley values [P], nats per token."""
        return np.asarray(self.marginal.mean(axis=(0, 1)))

    @property
    def permutation_error(self) -> NDArray[np.float64]:
        """Standard error of the values by the choice of permutations alone, [P]."""
        means = self.marginal.mean(axis=1)
        # An antithetic pair is one sample: its two members are anything but independent.
        samples = means.reshape(-1, self.config.step, means.shape[1]).mean(axis=1)
        return np.asarray(samples.std(axis=0, ddof=1) / np.sqrt(len(samples)))

    @property
    def std_error(self) -> NDArray[np.float64]:
        """Standard error of the values by permutations and by text, [P]: the two in quadrature, a little too large."""
        by_sequence = self.marginal.mean(axis=0)
        of_text = by_sequence.std(axis=0, ddof=1) / np.sqrt(len(by_sequence))
        return np.asarray(np.hypot(self.permutation_error, of_text))

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance C of the marginals over permutations, [P, P], squared nats per token."""
        return np.cov(self.marginal.mean(axis=1), rowvar=False).reshape(len(self.players), -1)

    def shrunk_covariance(self, shrinkage: float) -> NDArray[np.float64]:
        """Returns K = (1 - a) C + a diag(C), [P, P].

        Args:
            shrinkage: a, 0 (C as it is) to 1 (its diagonal).

        Raises:
            ValueError: If a is not between 0 and 1.
        """
        if not 0.0 <= shrinkage <= 1.0:
            msg = f"shrinkage must be between 0 and 1: got {shrinkage}. CoopQ uses 0.5."
            raise ValueError(msg)
        C = self.covariance
        return (1.0 - shrinkage) * C + shrinkage * np.diag(np.diag(C))


def measure_shapley(
    model: nn.Module,
    candidates: Candidates,
    tokens: Tensor,
    config: ShapleyConfig,
    *,
    pieces: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShapleyMarginals:
    """Returns the marginals of random permutations.

    Units that may not have both formats are no players: they keep the start format where they may have it, and
    otherwise the allowed format of the most bits.

    Args:
        model: The reference model in float32.
        candidates: Units and formats, both of the configuration among them.
        tokens: [S, T] int64, S >= 2, run in one batch.
        config: Formats and permutations.
        pieces: Directory of finished permutations, of these inputs alone; None to keep none. More permutations of
            the same seed take up those that are there.
        progress: Called with (permutations done, permutations in all).

    Raises:
        ValueError: If no unit may have both formats, or the passes do not suffice.
    """
    start, target = candidates.format_index(config.start_format), candidates.format_index(config.target_format)
    players = np.flatnonzero(candidates.allowed[:, start] & candidates.allowed[:, target])
    if not len(players):
        msg = (
            f"a unit must be allowed both formats: got none for '{config.start_format}' and "
            f"'{config.target_format}'. Choose formats that fit the units' shapes."
        )
        raise ValueError(msg)
    total = config.count_permutations(len(players))
    orders = np.stack([players[draw_permutation(config, m, len(players))] for m in range(total)])
    walk: _Walk | None = None

    def measure(m: int) -> Piece:
        nonlocal walk
        # Not before it is needed: it runs the model.
        walk = walk or _Walk(model, candidates, tokens, config)
        return walk.run(orders[m])

    marginals = []
    for m in range(total):
        path = None if pieces is None else pieces / f"{m:05d}.safetensors"
        piece = read_or_measure(path, lambda m=m: measure(m))  # type: ignore[misc]
        marginals.append(_marginals(piece["kl"], orders[m]))
        progress(m + 1, total)
    return ShapleyMarginals(
        config=config, players=players, start_kl=piece["kl"][0], orders=orders, marginal=np.stack(marginals)
    )


def draw_permutation(config: ShapleyConfig, m: int, n_players: int) -> NDArray[np.int64]:
    """Returns permutation ``m`` of 0 .. n_players - 1, which depends on the seed, m and n_players alone."""
    order = np.random.default_rng([config.seed % 2**63, m // config.step]).permutation(n_players)
    return order[::-1].copy() if m % config.step else order


class _Walk:
    """Lowers units one at a time; the model is the reference again after each walk."""

    def __init__(self, model: nn.Module, candidates: Candidates, tokens: Tensor, config: ShapleyConfig) -> None:
        self._model = model
        self._candidates = candidates
        self._config = config
        self._kl = JointKL(model, tokens)

    @torch.no_grad()
    def run(self, order: NDArray[np.int64]) -> Piece:
        """Returns the KL [P + 1, S] at the start and after each step."""
        units, target = self._candidates.units, self._config.target_format
        # The context below gives the parameters other storage, so these keep the reference's values.
        reference = {weight.name: read_weight(self._model, weight) for unit in units for weight in unit.weights}
        format_ = self._candidates.formats[self._candidates.format_index(target)]
        with simulated_formats(self._model, self._start_formats(), quantizer=self._config.quantizer):
            kl = [self._kl.follow(None)]
            for u in order.tolist():
                for weight in units[u].weights:
                    rendered = render(reference[weight.name], format_, self._config.quantizer)
                    read_weight(self._model, weight).copy_(rendered)
                kl.append(self._kl.follow(units[u].layer_index))
        return {"kl": np.stack(kl)}

    def _start_formats(self) -> dict[str, str]:
        start = self._candidates.format_index(self._config.start_format)
        return {
            weight.name: self._candidates.formats[self._start_format(unit, u, start)].name
            for u, unit in enumerate(self._candidates.units)
            for weight in unit.weights
        }

    def _start_format(self, unit: Unit, u: int, start: int) -> int:
        allowed = self._candidates.allowed[u]
        return start if allowed[start] else max(np.flatnonzero(allowed).tolist(), key=self._bits)

    def _bits(self, f: int) -> int:
        return self._candidates.formats[f].bits


def _marginals(kl: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the marginals [S, P] of the players in ascending order."""
    return np.diff(kl, axis=0)[np.argsort(order)].T


def fingerprint_parts(config: ShapleyConfig) -> dict[str, object]:
    """Returns what the pieces of a configuration depend on, for the fingerprint of their directory."""
    return {name: value for name, value in asdict(config).items() if name not in ("permutations", "max_passes")}
