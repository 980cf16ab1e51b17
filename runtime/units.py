"""Units: the smallest parts of a model that get one format each.

Weights are the nodes of a graph; tied storage and fusion groups are its edges; every connected component
is a unit. A weight is a two-dimensional parameter of an ``nn.Linear`` or ``nn.Embedding``, or one expert's
matrix inside a three-dimensional parameter, as transformers 5 stores the experts of a mixture. Routers and
shared-expert gates stay unquantized: they are a handful of rows, and an error in them changes the routing.
So do the weights of modules that compute something of their own, and experts stored transposed or read in
batches only: what replaces them would not do the same.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
from torch import Tensor, nn

UnitKind = Literal["linear", "embedding", "head", "expert"]
ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})
# Embeddings that multiply the rows they read (Gemma, Bart) keep the factor under this name.
EMBEDDING_SCALE = "embed_scale"
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One stored matrix.

    Args:
        parameter: Name of the parameter that holds it, as in ``state_dict``.
        expert_index: Index along the first axis of a three-dimensional parameter, or None.
        shape: (out_features, in_features).
        kind: What reads it: a linear layer, an embedding (tied heads included), the head, or an expert.
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


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One or more weights that get one format together.

    Args:
        name: Readable and unique in its model.
        weights: Its matrices, in model order.
        role: Last part of the module's name (``q_proj``), joined by ``+`` in a fusion group.
        layer_index: Index of the decoder layer, or None outside of the layers.
        expert_index: Index of the expert, or None.
        kind: Kind of its weights.
    """

    name: str
    weights: tuple[Weight, ...]
    role: str
    layer_index: int | None
    expert_index: int | None
    kind: UnitKind

    @property
    def weight_count(self) -> int:
        """Number of weights in the unit."""
        return sum(weight.weight_count for weight in self.weights)


def find_units(model: nn.Module, *, fuse: Sequence[str] = ()) -> tuple[Unit, ...]:
    """Returns the units of a model, in model order.

    Args:
        model: A causal language model.
        fuse: Regular expressions. Weights whose names match one and are equal once the match is replaced
            get one format: ``self_attn\\.(q|k|v)_proj`` fuses the three projections of each layer.

    Raises:
        ValueError: If the model has no weight that can be quantized, or a pattern is invalid or matches nothing.
    """
    weights = list(_list_weights(model))
    if not weights:
        msg = f"a model must have nn.Linear, nn.Embedding or fused expert weights: got none in {type(model).__name__}."
        raise ValueError(msg)
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(len(weights)))
    for pattern in fuse:
        graph.add_edges_from(_fusion_edges(weights, pattern))
    components = sorted(sorted(component) for component in nx.connected_components(graph))
    return tuple(_make_unit([weights[i] for i in component]) for component in components)


def read_weight(model: nn.Module, weight: Weight) -> Tensor:
    """Returns the tensor [out_features, in_features] of a weight: a view, not a copy."""
    data = model.get_parameter(weight.parameter).data
    return data if weight.expert_index is None else data[weight.expert_index]


def list_weights(model: nn.Module) -> dict[str, Weight]:
    """Returns every weight of a model that can be quantized, by name, in model order."""
    return {weight.name: weight for weight in _list_weights(model)}


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
    if module_name.rpartition(".")[2] in ROUTER_NAMES:
        return None
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
        return "head" if module is head else "linear"
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


def _make_unit(weights: Sequence[Weight]) -> Unit:
    names = [_unit_name(weight) for weight in weights]
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


def _unit_name(weight: Weight) -> str:
    return weight.name.removesuffix(".weight")


def _role(weight: Weight) -> str:
    return weight.parameter.removesuffix(".weight").rpartition(".")[2]
