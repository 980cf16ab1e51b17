"""Apply formats to a model: for good (packed modules) or for a while (rendered weights, then put back).

Both give the same logits bit for bit in float32: a packed module dequantizes to exactly the rendered weight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from runtime.decoder_layers import find_layers
from runtime.experts_forward import EXPERTS_IMPLEMENTATION
from runtime.formats import Format, find_format
from runtime.packed import PackedExperts, PackedWeight, QuantizedEmbedding, QuantizedLinear, pack_in_place_
from runtime.rendering import RenderingRule, encode, encode_weight, render_weight
from runtime.residency import InMemory, Residency
from runtime.units import EMBEDDING_SCALE, Weight, list_weights, read_weight

FormatsByWeight = Mapping[str, str]
# Weight name -> format name and the weight's values as rendered in it.
KeptRenderings = dict[str, tuple[str, Tensor]]
_Pack = Callable[[Weight], PackedWeight]


def check_formats_by_weight(model: nn.Module, formats_by_weight: FormatsByWeight) -> dict[str, Weight]:
    """Returns the weights that get a format, by name.

    Raises:
        ValueError: If a name is not a weight of the model, a format is unknown, or a weight does not fit it.
    """
    weights = list_weights(model, routers=True)
    unknown = [name for name in formats_by_weight if name not in weights]
    if unknown:
        msg = (
            f"formats must be given for weights of the model: got {len(unknown)} unknown names, first '{unknown[0]}' "
            f"in {type(model).__name__}. Use the plan that was made for this model."
        )
        raise ValueError(msg)
    for name, format_name in formats_by_weight.items():
        format_, in_features = find_format(format_name), weights[name].shape[1]
        refusal = format_.refusal(in_features)
        if refusal is not None:
            msg = (
                f"a weight must fit its format: got format '{format_name}' for weight '{name}', but {refusal}. "
                "Use another group size or a channel format."
            )
            raise ValueError(msg)
    return {name: weights[name] for name in formats_by_weight}


@contextmanager
def simulated_formats(
    model: nn.Module,
    formats_by_weight: FormatsByWeight,
    *,
    quantizer: RenderingRule = "rtn",
    kept: KeptRenderings | None = None,
) -> Iterator[None]:
    """Gives the model the weights it would read back from the formats, and its own again on exit.

    Args:
        model: The reference model.
        formats_by_weight: Weight name -> format name; weights not named keep their values.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        kept: What the last context with the same quantizer rendered, brought up to date: where assignments differ in
            few weights, only these are rendered. Holds as many bytes as the weights; experts are rendered each time.

    Raises:
        ValueError: If a name is not a weight of the model, a format is unknown, or a weight does not fit it.
    """
    weights = check_formats_by_weight(model, formats_by_weight)
    absent = {name: w for name, w in weights.items() if model.get_parameter(w.parameter).device.type == "meta"}
    present = {name: weight for name, weight in weights.items() if name not in absent}

    def render(group: Mapping[str, Weight], kept: KeptRenderings | None) -> AbstractContextManager[None]:
        return _rendered(model, group, formats_by_weight, quantizer, kept)

    with _eager_experts(model, weights), ExitStack() as stack:
        stack.enter_context(render(present, kept))
        for module, group in _group_by_block(model, absent):
            # Kept, they would be a second model in memory.
            stack.enter_context(_run_under(module, partial(render, group, None)))
        yield


@contextmanager
def _rendered(
    model: nn.Module,
    weights: Mapping[str, Weight],
    formats_by_weight: FormatsByWeight,
    quantizer: RenderingRule,
    kept: KeptRenderings | None,
) -> Iterator[None]:
    """Gives weights that are in memory their rendered values, and their own again on exit."""
    saved: dict[str, Tensor] = {}
    try:
        for name, weight in weights.items():
            parameter, format_name = model.get_parameter(weight.parameter), formats_by_weight[name]
            earlier_format, rendered = (None, None) if kept is None else kept.pop(name, (None, None))
            if rendered is None or earlier_format != format_name:
                rendered = render_weight(weight, read_weight(model, weight), find_format(format_name), quantizer)
            if weight.expert_index is None:
                if kept is not None:
                    kept[name] = (format_name, rendered)
                saved[weight.parameter] = parameter.data
                parameter.data = rendered.to(parameter.dtype)
                continue
            if weight.parameter not in saved:
                saved[weight.parameter] = parameter.data
                parameter.data = parameter.data.clone()
            parameter.data[weight.expert_index] = rendered.to(parameter.dtype)
        yield
    finally:
        for parameter_name, data in saved.items():
            model.get_parameter(parameter_name).data = data


def _group_by_block(model: Any, weights: Mapping[str, Weight]) -> Iterator[tuple[nn.Module, dict[str, Weight]]]:
    """Yields each layer with its weights, and the model itself with those outside of the layers."""
    groups: dict[int | None, dict[str, Weight]] = {}
    layers = find_layers(model, otherwise="Load it as a whole.") if weights else None
    for name, weight in weights.items():
        assert layers is not None
        groups.setdefault(layers.index_of(weight.parameter), {})[name] = weight
    for block, group in groups.items():
        assert layers is not None
        yield (model if block is None else layers.layers[block]), group


@contextmanager
def _run_under(module: nn.Module, make_context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Lets every run of a module happen in a context, inside what its hooks do: they bring the weights in."""
    forward, own = module.forward, vars(module).get("forward")

    def run(*args: Any, **kwargs: Any) -> Any:
        with make_context():
            return forward(*args, **kwargs)

    module.forward = run
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def apply_formats_(
    model: nn.Module,
    formats_by_weight: FormatsByWeight,
    *,
    quantizer: RenderingRule = "rtn",
    residency: Residency | None = None,
) -> None:
    """Replaces the named weights by packed ones, in place; every expert of a touched projection must be named.

    Args:
        model: The reference model; its dense weights are released one by one.
        formats_by_weight: Weight name -> format name.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        residency: Brings the weights into memory, each block once: what takes no format stays there.

    Raises:
        ValueError: If a name or format is unknown or does not fit, or only some experts of a projection are named
            (the model is unchanged then), or a weight is outside the range of its format.
    """
    weights = check_formats_by_weight(model, formats_by_weight)

    def pack(weight: Weight) -> PackedWeight:
        format_ = find_format(formats_by_weight[weight.name])
        tensors = encode_weight(weight, read_weight(model, weight), format_, quantizer)
        return PackedWeight.from_tensors(tensors, format_, weight.shape)

    residency = residency or InMemory()
    _check_all_experts(model, weights)
    for block in residency.blocks:
        residency.load_(block)
        _install_packed(model, {n: w for n, w in weights.items() if residency.block_of(w.parameter) == block}, pack)


def install_empty_formats_(model: nn.Module, formats_by_weight: FormatsByWeight) -> None:
    """Replaces the named weights by packed modules without data (on the meta device), to be loaded into.

    Raises:
        ValueError: If a name or format is unknown or does not fit, or only some experts of a projection are named.
    """
    weights = check_formats_by_weight(model, formats_by_weight)
    _check_all_experts(model, weights)
    _install_packed(model, weights, lambda w: PackedWeight(find_format(formats_by_weight[w.name]), w.shape))


def pack_weight(weight: Tensor, format_: Format, quantizer: str = "rtn") -> PackedWeight:
    """Returns the weight [out_features, in_features] packed in a format."""
    shape = (weight.shape[0], weight.shape[1])
    return PackedWeight.from_tensors(encode(weight, format_, quantizer), format_, shape)


def _install_packed(model: nn.Module, weights: Mapping[str, Weight], pack: _Pack) -> None:
    for parameter_name, group in _group_by_parameter(weights).items():
        if group[0].expert_index is not None:
            _install_experts(model, parameter_name, group, pack)
            continue
        packed = pack(group[0])
        for name in (parameter_name, *group[0].aliases):
            _install_module(model, name.rpartition(".")[0], packed)


def _install_module(model: nn.Module, module_name: str, packed: PackedWeight) -> None:
    module = model.get_submodule(module_name)
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, EMBEDDING_SCALE, 1.0))
        model.set_submodule(module_name, QuantizedEmbedding(packed, scale))
    elif not isinstance(module, nn.Linear):
        pack_in_place_(module, packed)
    else:
        bias = module.bias if isinstance(module.bias, nn.Parameter) else None
        model.set_submodule(module_name, QuantizedLinear(packed, bias))


def _group_by_parameter(weights: Mapping[str, Weight]) -> dict[str, list[Weight]]:
    by_parameter: dict[str, list[Weight]] = {}
    for weight in weights.values():
        by_parameter.setdefault(weight.parameter, []).append(weight)
    return by_parameter


def _check_all_experts(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    for parameter_name, group in _group_by_parameter(weights).items():
        expert_count = model.get_parameter(parameter_name).shape[0]
        if group[0].expert_index is not None and len(group) != expert_count:
            msg = (
                f"every expert of a projection must have a format: got {len(group)} of {expert_count} experts of "
                f"'{parameter_name}'. Name the others as well (bf16 leaves an expert unquantized)."
            )
            raise ValueError(msg)


def _install_experts(model: nn.Module, parameter_name: str, group: list[Weight], pack: _Pack) -> None:
    module_name, _, attribute = parameter_name.rpartition(".")
    module = model.get_submodule(module_name)
    packed = PackedExperts([pack(weight) for weight in sorted(group, key=lambda w: w.expert_index or 0)])
    delattr(module, attribute)
    module.add_module(attribute, packed)
    # The batched forwards of transformers want one dense parameter.
    for config in _expert_configs(model, group):
        config._experts_implementation = EXPERTS_IMPLEMENTATION


@contextmanager
def _eager_experts(model: nn.Module, weights: Mapping[str, Weight]) -> Iterator[None]:
    """Lets mixtures whose experts are among the weights read them one by one, as packed experts are read.

    The batched forwards add the experts of a token in another order, and so round differently.
    """
    implementations = [(config, config._experts_implementation) for config in _expert_configs(model, weights.values())]
    try:
        for config, _ in implementations:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in implementations:
            config._experts_implementation = implementation


def _expert_configs(model: nn.Module, weights: Iterable[Weight]) -> list[Any]:
    modules = {w.parameter.rpartition(".")[0] for w in weights if w.expert_index is not None}
    configs = [model.get_submodule(name).config for name in modules]
    return list({id(config): config for config in configs}.values())
