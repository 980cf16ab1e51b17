"""Units of weights: the smallest parts of a model that get one format each (caches: ``cache_units``).

Weights are the nodes of a graph; tied storage and fusion groups are its edges; every connected component
is a unit. A weight is a two-dimensional parameter of an ``nn.Linear`` or ``nn.Embedding``, or one expert's
matrix inside a three-dimensional parameter, as transformers 5 stores the experts of a mixture. Gate and up
projection of an expert are one matrix there, ``gate_up_proj``; an expert that every token takes (``shared_expert``,
``shared_experts``) is an ordinary MLP of three matrices.

The experts of a layer are a stack. Its weights get formats at one of four granularities:

    projection          every matrix of every expert by itself
    expert              the matrices of one expert together
    stack_projection    one projection of all experts of a layer together
    stack               all experts of a layer together

Routers and shared-expert gates stay unquantized unless asked for: they are a handful of rows, and an error in them
changes the routing. So do the weights of modules that compute something of their own, and experts stored transposed
or read in batches only: what replaces them would not do the same.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import networkx as nx
from torch import Tensor, nn

UnitKind = Literal["linear", "embedding", "head", "expert", "router", "key_cache", "value_cache", "activation"]
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
# Embeddings that multiply the rows they read (Gemma, Bart) keep the factor under this name.
EMBEDDING_SCALE = "embed_scale"
# Set on linear layers that are a part of the head (runtime/transforms/tied_head.py).
PART_OF_HEAD = "part_of_head"
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One stored matrix.

    Args:
        parameter: Name of the parameter that holds it, as in ``state_dict``.
        expert_index: Index along the first axis of a three-dimensional parameter, or None.
        shape: (out_features, in_features).
        kind: What reads it: a linear layer, an embedding (tied heads included), the head, an expert, or a router.
        aliases: Other names of the same storage (tied weights).
    """

    parameter: str
    expert_index: int | None
    shape: tuple[int, int]
    kind: UnitKind
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The weight's name: the parameter's, with the expert's index in brackets."""
        return self.parameter if self.expert_index is None else f"{self.parameter}[{self.expert_index}]"

    @property
    def weight_count(self) -> int:
        """Number of weights in the matrix."""
        return self.shape[0] * self.shape[1]


def _stack(weight: Weight) -> str:
    return weight.parameter.rpartition(".")[0]


# Granularity -> what the expert weights that get one format have in common.
EXPERT_GRANULARITIES: dict[str, Callable[[Weight], Hashable]] = {
    "projection": lambda weight: weight.name,
    "expert": lambda weight: (_stack(weight), weight.expert_index),
    "stack_projection": lambda weight: weight.parameter,
    "stack": _stack,
}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What gets one format: one or more weights, what a layer caches of past tokens, or what linear layers read.

    Args:
        name: Readable and unique in its model.
        weights: Its matrices, in model order.
        role: Last part of the module's name (``q_proj``), joined by ``+`` in a fusion group.
        layer_index: Index of the decoder layer, or None outside of the layers.
        expert_index: Index of the expert, or None.
        kind: Kind of its weights.
        cache_shape: (heads, head_dim) of what a cache keeps of one token; None for others. A cache has no weights.
        modules: Linear layers whose inputs an activation unit is; it has no weights either.
    """

    name: str
    weights: tuple[Weight, ...]
    role: str
    layer_index: int | None
    expert_index: int | None
    kind: UnitKind
    cache_shape: tuple[int, int] | None = None
    modules: tuple[str, ...] = ()

    @cached_property
    def weight_count(self) -> int:
        """Number of weights in the unit."""
        return sum(weight.weight_count for weight in self.weights)


def find_units(
    model: nn.Module, *, fuse: Sequence[str] = (), experts: str = "projection", routers: bool = False
) -> tuple[Unit, ...]:
    """Returns the units of a model, in model order.

    Args:
        model: A causal language model.
        fuse: Regular expressions. Weights whose names match one and are equal once the match is replaced
            get one format: ``self_attn\\.(q|k|v)_proj`` fuses the three projections of each layer.
        experts: Name in ``EXPERT_GRANULARITIES``; it says nothing about shared experts.
        routers: Whether routers and shared-expert gates take formats.

    Raises:
        ValueError: If the model has no weight that can be quantized, a pattern is invalid or matches nothing, or
            the granularity is unknown.
    """
    weights = list(list_weights(model, routers=routers).values())
    if not weights:
        msg = f"a model must have nn.Linear, nn.Embedding or fused expert weights: got none in {type(model).__name__}."
        raise ValueError(msg)
    edges = [edge for pattern in fuse for edge in _fusion_edges(weights, pattern)]
    return _connect(weights, [*edges, *_expert_edges(weights, experts)])


def merge_units(units: Sequence[Unit], *, experts: str = "projection", fuse: Sequence[str] = ()) -> tuple[Unit, ...]:
    """Returns the coarser units of the same weights, in the order of the units.

    Units that hold more than is asked for stay together: what is merged is never split.

    Args:
        units: Units of one model, such as those of a profile.
        experts: Name in ``EXPERT_GRANULARITIES``.
        fuse: Regular expressions, as for ``find_units``.

    Raises:
        ValueError: If the granularity is unknown, or a pattern is invalid or matches nothing.
    """
    weights = [weight for unit in units for weight in unit.weights]
    edges = [edge for pattern in fuse for edge in _fusion_edges(weights, pattern)]
    edges.extend(_expert_edges(weights, experts))
    first = 0
    for unit in units:
        edges.extend((first, first + i) for i in range(1, len(unit.weights)))
        first += len(unit.weights)
    return _connect(weights, edges)


def read_weight(model: nn.Module, weight: Weight) -> Tensor:
    """Returns the tensor [out_features, in_features] of a weight: a view, not a copy."""
    data = model.get_parameter(weight.parameter).data
    return data if weight.expert_index is None else data[weight.expert_index]


def list_weights(model: nn.Module, *, routers: bool = False) -> dict[str, Weight]:
    """Returns every weight of a model that can be quantized, by name, in model order.

    Args:
        model: A causal language model.
        routers: Whether routers and shared-expert gates are among them.
    """
    return {weight.name: weight for weight in _list_weights(model) if routers or weight.kind != "router"}


def count_weights(units: Sequence[Unit]) -> int:
    """Returns the number of weights in all units."""
    return sum(unit.weight_count for unit in units)


def _list_weights(model: nn.Module) -> Iterator[Weight]:
    names: dict[int, tuple[list[str], nn.Parameter]] = {}
    for full_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), ([], parameter))[0].append(full_name)
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    kinds: dict[str, UnitKind | None] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            kinds[full_name] = _weight_kind(module_name, module, parameter_name, parameter, head)
    for (name, *aliases), parameter in names.values():
        kind = kinds[name]
        # A module with two names is listed under the first; a weight that a module reads in its own way stays.
        if kind is None or any(kinds.get(alias, kind) is None for alias in aliases):
            continue
        out_features, in_features = parameter.shape[-2:]
        experts: Sequence[int | None] = range(parameter.shape[0]) if parameter.ndim == 3 else (None,)
        for expert in experts:
            yield Weight(
                parameter=name,
                expert_index=expert,
                shape=(out_features, in_features),
                kind=kind,
                aliases=tuple(aliases),
            )


def _weight_kind(
    module_name: str, module: nn.Module, parameter_name: str, parameter: Tensor, head: nn.Module | None
) -> UnitKind | None:
    # Some routers keep their matrix in a module inside them (DBRX, Gemma 4).
    if not ROUTER_NAMES.isdisjoint(module_name.split(".")):
        return "router" if parameter_name == "weight" and parameter.ndim == 2 else None
    # The attribute is there where transformers can read the experts one by one (its eager implementation).
    if parameter.ndim == 3 and "experts" in module_name and not getattr(module, "is_transposed", True):
        return "expert"
    if parameter_name != "weight" or parameter.ndim != 2:
        return None
    if isinstance(module, nn.Embedding) and (
        type(module).forward is nn.Embedding.forward or hasattr(module, EMBEDDING_SCALE)
    ):
        return "embedding"
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "head" if module is head or getattr(module, PART_OF_HEAD, False) else "linear"
    return None


def _fusion_edges(weights: Sequence[Weight], pattern: str) -> list[tuple[int, int]]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        msg = f"fuse must be a regular expression: got '{pattern}' ({error}). Correct the pattern."
        raise ValueError(msg) from error
    first_of: dict[str, int] = {}
    edges = []
    for i, weight in enumerate(weights):
        if expression.search(weight.name):
            edges.append((first_of.setdefault(expression.sub("*", weight.name), i), i))
    if not edges:
        msg = f"fuse must match at least one weight: got '{pattern}', which matches none of {len(weights)} weights."
        raise ValueError(msg)
    return edges


def _expert_edges(weights: Sequence[Weight], experts: str) -> list[tuple[int, int]]:
    if experts not in EXPERT_GRANULARITIES:
        msg = f"experts must be one of {', '.join(EXPERT_GRANULARITIES)}: got '{experts}'. Correct the name."
        raise ValueError(msg)
    first_of: dict[Hashable, int] = {}
    common = EXPERT_GRANULARITIES[experts]
    return [(first_of.setdefault(common(weight), i), i) for i, weight in enumerate(weights) if weight.kind == "expert"]


def _connect(weights: Sequence[Weight], edges: Sequence[tuple[int, int]]) -> tuple[Unit, ...]:
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(weights)))
    graph.add_edges_from(edges)
    components = sorted(sorted(component) for component in nx.connected_components(graph))
    return tuple(_make_unit([weights[i] for i in component]) for component in components)


def _make_unit(weights: Sequence[Weight]) -> Unit:
    names = _unit_names(weights)
    roles = list(dict.fromkeys(_role(weight) for weight in weights))
    layer = _LAYER_INDEX.search(weights[0].parameter)
    experts = {weight.expert_index for weight in weights}
    return Unit(
        name="+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])]),
        weights=tuple(weights),
        role="+".join(roles),
        layer_index=int(layer.group(1)) if layer else None,
        expert_index=experts.pop() if len(experts) == 1 else None,
        kind=weights[0].kind,
    )


def _unit_names(weights: Sequence[Weight]) -> list[str]:
    """Returns the names of a unit's weights, consecutive experts of one projection as one: ``down_proj[0-7]``."""
    runs: list[list[Weight]] = []
    for weight in weights:
        last = runs[-1][-1] if runs else None
        if last and last.parameter == weight.parameter and _follows(last.expert_index, weight.expert_index):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [
        run[0].name.removesuffix(".weight")
        if len(run) == 1
        else f"{run[0].parameter}[{run[0].expert_index}-{run[-1].expert_index}]"
        for run in runs
    ]


def _follows(expert: int | None, next_expert: int | None) -> bool:
    return expert is not None and next_expert == expert + 1


def _role(weight: Weight) -> str:
    return weight.parameter.removesuffix(".weight").rpartition(".")[2]
