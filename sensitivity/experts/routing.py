"""Routing statistics of a mixture: how often each expert is taken, with what weight, and together with which others.

Over N tokens, with k experts taken by each of them in a layer of E experts:

    frequency[l, e]   = tokens that take e / N                 (sums to k over the experts of a layer)
    gate weight[l, e] = sum over these tokens of what e's output is multiplied by
    together[l, e, e'] = tokens that take both                 (its diagonal is the number of tokens of e)
    usage spread[l]   = standard deviation of frequency[l, :]

The usage spread is the "standard deviation on frequency of expert" by which MoEQuant compares calibration texts
(Chen et al. 2025, arXiv:2505.03804); its printed formula sqrt(E / (E - 1) sum (u - mean)^2) is sqrt(E) times it.
The experts that are taken together are the edges of a graph, one a layer, and its communities the groups of experts
that work as one.

On disk the statistics are a directory: ``routing.json`` (names) and ``routing.safetensors`` (counts).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from runtime.files import atomic_directory, check_replaceable, write_text

SCHEMA_VERSION = 1
_FILES = {"routing.json", "routing.safetensors"}


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingStatistics:
    """Counts of a pass of the model over D domains of text, L layers with experts and E experts in each.

    Args:
        layers: Indices of the layers with experts.
        domains: Names of the domains.
        tokens: [D] int64, tokens of each domain.
        visits: [D, L, E] int64, tokens that take the expert.
        gate_weight: [D, L, E] float64, sum of the gate weights of these tokens.
        together: [L, E, E] int64, tokens that take both experts.

    Raises:
        ValueError: If the arrays do not fit each other.
    """

    layers: tuple[int, ...]
    domains: tuple[str, ...]
    tokens: NDArray[np.int64]
    visits: NDArray[np.int64]
    gate_weight: NDArray[np.float64]
    together: NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = (len(self.domains), len(self.layers), self.visits.shape[-1])
        found = (self.tokens.shape, self.visits.shape, self.gate_weight.shape, self.together.shape)
        if found != (shape[:1], shape, shape, (*shape[1:], shape[2])):
            msg = (
                f"routing statistics must be [D], [D, L, E], [D, L, E] and [L, E, E]: got {found} for {shape[0]} "
                f"domains and {shape[1]} layers. Measure the routing again."
            )
            raise ValueError(msg)

    @property
    def expert_visits(self) -> NDArray[np.int64]:
        """Tokens that take each expert, [L, E]."""
        return np.asarray(self.visits.sum(axis=0))

    @property
    def frequency(self) -> NDArray[np.float64]:
        """Share of all tokens that take each expert, [L, E]."""
        return np.asarray(self.expert_visits / self.tokens.sum())

    @property
    def domain_frequency(self) -> NDArray[np.float64]:
        """Share of a domain's tokens that take each expert, [D, L, E]."""
        return np.asarray(self.visits / self.tokens[:, None, None])

    @property
    def gate_weight_sum(self) -> NDArray[np.float64]:
        """Sum of the gate weights of each expert, [L, E]."""
        return np.asarray(self.gate_weight.sum(axis=0))

    @property
    def gate_weight_mean(self) -> NDArray[np.float64]:
        """Mean gate weight of the tokens that take each expert, [L, E]; zero where there is none."""
        return np.asarray(self.gate_weight_sum / np.maximum(self.expert_visits, 1))

    @property
    def usage_spread(self) -> NDArray[np.float64]:
        """Standard deviation of the frequencies of a layer's experts, [L]; zero when all are taken as often."""
        return spread(self.frequency)

    def frequency_by_expert(self) -> dict[tuple[int, int], float]:
        """Returns (layer index, expert index) -> share of tokens, as ``read_cost`` takes it."""
        return {
            (layer, expert): float(share)
            for layer, shares in zip(self.layers, self.frequency, strict=True)
            for expert, share in enumerate(shares)
        }

    def rare_experts(self, least_tokens: int) -> dict[tuple[int, int], int]:
        """Returns (layer index, expert index) -> tokens of the experts that fewer than ``least_tokens`` tokens take."""
        visits = self.expert_visits
        return {(self.layers[row], int(e)): int(visits[row, e]) for row, e in np.argwhere(visits < least_tokens)}

    def row_of(self, layer_index: int) -> int:
        """Returns the row of a layer in the arrays.

        Raises:
            ValueError: If the layer has no experts.
        """
        if layer_index not in self.layers:
            msg = (
                f"layer_index must be that of a layer with experts: got layer_index={layer_index}, layers with "
                f"experts are {list(self.layers)}. Measure the routing of this model."
            )
            raise ValueError(msg)
        return self.layers.index(layer_index)

    def affinity_graph(self, layer_index: int) -> "nx.Graph[int]":
        """Returns the graph of a layer's experts: ``tokens`` on its nodes, tokens of both as ``weight`` on its edges.

        Raises:
            ValueError: If the layer has no experts.
        """
        counts = self.together[self.row_of(layer_index)]
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from((e, {"tokens": int(counts[e, e])}) for e in range(len(counts)))
        pairs = np.argwhere(np.triu(counts, k=1)).tolist()
        graph.add_weighted_edges_from((a, b, int(counts[a, b])) for a, b in pairs)
        return graph

    def communities(self, layer_index: int, *, seed: int) -> tuple[tuple[int, ...], ...]:
        """Returns the groups of a layer's experts that are taken together, by greatest modularity (Louvain).

        Args:
            layer_index: Index of the layer.
            seed: Seed of the order in which experts are moved between groups.

        Raises:
            ValueError: If the layer has no experts.
        """
        found = nx.community.louvain_communities(self.affinity_graph(layer_index), weight="weight", seed=seed)
        return tuple(sorted(tuple(sorted(community)) for community in found))


def spread(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the standard deviation over the last axis [..., E], with E - 1; zero for a single expert."""
    if frequency.shape[-1] == 1:
        return np.zeros(frequency.shape[:-1])
    return np.asarray(frequency.std(axis=-1, ddof=1))


def save_routing(statistics: RoutingStatistics, directory: Path) -> None:
    """Writes routing statistics to a directory, whole or not at all.

    Raises:
        ValueError: If the directory holds anything else.
    """
    check_replaceable(directory, is_own=_is_routing, content="routing statistics")
    document = {
        "schema_version": SCHEMA_VERSION,
        "layers": list(statistics.layers),
        "domains": list(statistics.domains),
    }
    arrays = {
        "tokens": statistics.tokens,
        "visits": statistics.visits,
        "gate_weight": statistics.gate_weight,
        "together": statistics.together,
    }
    with atomic_directory(directory) as temporary:
        save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary / "routing.safetensors")
        write_text(temporary / "routing.json", json.dumps(document, indent=1) + "\n")


def load_routing(directory: Path) -> RoutingStatistics:
    """Returns the routing statistics in a directory.

    Raises:
        ValueError: If there are none, they are damaged, or a newer version wrote them.
    """
    try:
        document = json.loads((directory / "routing.json").read_text(encoding="utf-8"))
        arrays = load_file(directory / "routing.safetensors")
        if document["schema_version"] == SCHEMA_VERSION:
            return _statistics(document, arrays)
        version = document["schema_version"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        msg = (
            f"routing statistics must be a directory that save_routing wrote: got '{directory}' "
            f"({type(error).__name__}: {error}). Measure the routing again."
        )
        raise ValueError(msg) from error
    msg = (
        f"routing statistics must have schema_version={SCHEMA_VERSION}: got {version} in '{directory}'. "
        "Use the version of bitplan that wrote them, or measure again."
    )
    raise ValueError(msg)


def _statistics(document: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> RoutingStatistics:
    return RoutingStatistics(
        layers=tuple(document["layers"]),
        domains=tuple(document["domains"]),
        tokens=arrays["tokens"],
        visits=arrays["visits"],
        gate_weight=arrays["gate_weight"],
        together=arrays["together"],
    )


def _is_routing(directory: Path) -> bool:
    return {p.name for p in directory.iterdir()} <= _FILES
