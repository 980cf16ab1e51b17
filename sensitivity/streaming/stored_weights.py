"""A model larger than memory: built without weights, which are read from its safetensors files layer by layer.

The files may store weights in other parts than the model holds them (single experts, for one); transformers' own table
of conversions says how they go together. Memory: the weights of one layer, or those outside of the layers.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from sensitivity.streaming.decoder_layers import find_layers


def build_empty_model(directory: Path) -> Any:
    """Returns the causal language model of a Hugging Face directory without weights: they are on the meta device."""
    config = AutoConfig.from_pretrained(directory)
    auto_model: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = auto_model.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model.eval().requires_grad_(False)


class StoredWeights:
    """Brings the weights of a layer from the files of a model into memory, in float32, and releases them.

    Args:
        model: A model of ``build_empty_model``.
        directory: Its directory, with config.json and safetensors files.

    Raises:
        NotLayerwise: If the model has no list of layers.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        self._model = model
        layers = find_layers(model, otherwise="Load it as a whole.")
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        # By block and file: name in the file, name in the model, pattern of the conversion.
        self._entries: dict[int | None, dict[Path, list[tuple[str, str, str | None]]]] = {}
        state = model.state_dict()
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                keys = sorted(file.keys(), key=dot_natural_key)
            for key in keys:
                name, pattern = self._rename(key, state)
                self._entries.setdefault(layers.index_of(name), {}).setdefault(path, []).append((key, name, pattern))
        self._names: dict[int | None, dict[int, list[str]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(layers.index_of(name), {}).setdefault(id(parameter), []).append(name)

    @contextmanager
    def resident(self, layer_index: int | None) -> Iterator[None]:
        """Gives a context in which the weights of a layer are in memory; None: those outside of the layers.

        Raises:
            ValueError: If the files do not hold all of them.
        """
        tensors = self._read(layer_index)
        empty: dict[str, nn.Parameter] = {}
        try:
            for names in self._names.get(layer_index, {}).values():
                # A tied parameter is in the files once, under any of its names.
                found = next((tensors[name] for name in names if name in tensors), None)
                if found is None:
                    msg = (
                        f"the files of a model must hold all of its weights: got none for '{names[0]}'. "
                        "Fetch or save the model again."
                    )
                    raise ValueError(msg)
                for name in names:
                    empty[name] = self._model.get_parameter(name)
                parameter = nn.Parameter(found, requires_grad=empty[names[0]].requires_grad)
                for name in names:
                    self._put(name, parameter)
            yield
        finally:
            for name, parameter in empty.items():
                self._put(name, parameter)

    def _rename(self, key: str, state: dict[str, Tensor]) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._model.base_model_prefix, state)
        return (key, None) if name not in state and key in state else (name, pattern)

    def _read(self, block: int | None) -> dict[str, Tensor]:
        converters = {pattern: c for c in self._converters for pattern in c.source_patterns}
        mappings: dict[str, Any] = {}
        for path, entries in self._entries.get(block, {}).items():
            with safe_open(path, framework="pt") as file:
                for key, name, pattern in entries:
                    if name not in mappings:
                        mappings[name] = copy.deepcopy(converters[pattern]) if pattern else WeightRenaming(key, name)
                    tensor = file.get_tensor(key).to(torch.float32, copy=True)
                    mappings[name].add_tensor(name, key, pattern or key, tensor)
        tensors: dict[str, Tensor] = {}
        for name, mapping in mappings.items():
            for target, value in mapping.convert(name, model=self._model, config=self._model.config).items():
                tensors[target] = value[0] if isinstance(value, list) else value
        return tensors

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module_name, _, attribute = name.rpartition(".")
        self._model.get_submodule(module_name).register_parameter(attribute, parameter)
