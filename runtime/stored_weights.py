"""A model larger than memory: built without weights, which are read from its safetensors files block by block.

The files may store weights in other parts than the model holds them (single experts, for one); transformers' own table
of conversions says how they go together. What runs the model as a whole finds each layer's weights in memory while the
layer runs, and those outside of the layers all the while. Memory: the weights of one layer, and those outside of them.
Every run reads the files once.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from runtime.decoder_layers import find_layers
from runtime.heap import return_freed_blocks_
from runtime.loading import (
    ReferenceModel,
    call_transformers,
    check_finite,
    find_unpacked,
    fingerprint_model,
    name_model,
)


def load_stored_reference(source: str) -> ReferenceModel:
    """Returns a model whose weights stay in its files, with its tokenizer.

    Args:
        source: A Hugging Face directory or id.

    Raises:
        ValueError: If the model is a GGUF file, missing, damaged or already packed; a missing or non-finite weight is
            found when its block is read.
        NotLayerwise: If the model has no list of layers.
    """
    path = find_unpacked(source)
    if path.is_file():
        msg = (
            f"a model that is read block by block must be a directory with safetensors: got '{path}'. Convert the GGUF "
            "file, or load it as a whole."
        )
        raise ValueError(msg)
    return_freed_blocks_()
    tokenizer = call_transformers(path, lambda: AutoTokenizer.from_pretrained(path))
    model = call_transformers(path, lambda: build_empty_model(path))
    weights = StoredWeights(model, path)
    weights.page_()
    return ReferenceModel(
        model=model,
        tokenizer=tokenizer,
        name=name_model(source, path),
        fingerprint=fingerprint_model(path),
        residency=weights,
    )


def build_empty_model(directory: Path) -> Any:
    """Returns the causal language model of a Hugging Face directory without weights: they are on the meta device."""
    config = AutoConfig.from_pretrained(directory)
    auto_model: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = auto_model.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model.eval().requires_grad_(False)


class StoredWeights:
    """Brings the weights of a block from the files of a model into memory, in float32, and releases them.

    Args:
        model: A model of ``build_empty_model``.
        directory: Its directory, with config.json and safetensors files.

    Raises:
        NotLayerwise: If the model has no list of layers.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        self._model = model
        self._directory = directory
        self._layers = find_layers(model, otherwise="Load it as a whole.")
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
                self._entries.setdefault(self.block_of(name), {}).setdefault(path, []).append((key, name, pattern))
        self._names: dict[int | None, dict[int, list[str]]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(self.block_of(name), {}).setdefault(id(parameter), []).append(name)
        self._checked: set[int | None] = set()
        self._open: set[int | None] = set()

    @property
    def blocks(self) -> Sequence[int | None]:
        """Outside of the layers, then every layer."""
        return (None, *range(len(self._layers.layers)))

    def block_of(self, parameter: str) -> int | None:
        """Returns the index of the layer that a parameter lies in, or None if it is outside of them."""
        return self._layers.index_of(parameter)

    def page_(self) -> None:
        """Lets every run of the model, and of each of its layers, find its weights in memory; in place."""
        modules: dict[int | None, nn.Module] = {None: self._model, **dict(enumerate(self._layers.layers))}
        for block, module in modules.items():
            stack = ExitStack()
            module.register_forward_pre_hook(partial(self._enter, stack, block))
            module.register_forward_hook(partial(_leave, stack), always_call=True)

    @contextmanager
    def resident(self, block: int | None) -> Iterator[None]:
        """Gives a context in which the weights of a block are in memory; within another of the same it does nothing.

        Raises:
            ValueError: If the files do not hold all of them, or one holds a non-finite value.
        """
        if block in self._open:
            yield
            return
        tensors = self._read(block)
        empty: dict[str, nn.Parameter] = {}
        try:
            self._open.add(block)
            self._fill(block, tensors, empty)
            yield
        finally:
            self._open.discard(block)
            for name, parameter in empty.items():
                self._put(name, parameter)

    def load_(self, block: int | None) -> None:
        """Brings the weights of a block into memory for good; errors as of ``resident``."""
        self._fill(block, self._read(block), {})
        self._open.add(block)

    def _enter(self, stack: ExitStack, block: int | None, _module: nn.Module, _inputs: Any) -> None:
        stack.enter_context(self.resident(block))

    def _fill(self, block: int | None, tensors: dict[str, Tensor], empty: dict[str, nn.Parameter]) -> None:
        """Puts weights in their places, and what was there into ``empty``."""
        for names in self._names.get(block, {}).values():
            # A tied parameter is in the files once, under any of its names.
            found = next((tensors[name] for name in names if name in tensors), None)
            if found is None:
                msg = (
                    f"the files of a model must hold all of its weights: got none for '{names[0]}'. "
                    "Fetch or save the model again."
                )
                raise ValueError(msg)
            if block not in self._checked:
                check_finite(names[0], found, self._directory)
            for name in names:
                empty[name] = self._model.get_parameter(name)
            parameter = nn.Parameter(found, requires_grad=empty[names[0]].requires_grad)
            for name in names:
                self._put(name, parameter)
        self._checked.add(block)

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


def _leave(stack: ExitStack, _module: nn.Module, _inputs: Any, _output: Any) -> None:
    stack.close()
