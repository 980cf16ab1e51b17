"""llama.cpp: a finished GGUF file, and the list of tensor types for its own quantizer.

Tensors are named as llama.cpp names them. Where it rotates neighbouring pairs and not halves (its architecture
``llama``), rows of query and key projections are put in its order; formats work along rows, so that their blocks move
unchanged. Experts are one tensor a projection, of one type; gate and up projections, which transformers stores as one,
are two. Norms, biases and routers are float32, as llama.cpp keeps them.

``tensor-types.txt`` says the same to ``llama-quantize --tensor-type-file``: one anchored line for each tensor that
takes a type, because its patterns match anywhere, the first match wins, and what is not named is mixed by rules of its
own. It is read only under a quantized base type.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TensorNameMap, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig

from runtime.apply import FormatsByWeight
from runtime.checkpoint import distinct_tensors
from runtime.exporters.gguf_blocks import gguf_bytes, gguf_type
from runtime.exporters.gguf_metadata import add_model, add_tokenizer, find_architecture, find_rope_factors
from runtime.files import write_text
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule, encode_weight
from runtime.units import Weight, list_weights, read_weight

MODEL_FILE = "model.gguf"
TYPES_FILE = "tensor-types.txt"
ROPE_FACTORS = "rope_freqs.weight"
# A tensor's parts by name, each with the rows [first, last) that it has of the parameter.
_Part = tuple[str, slice]


def export_llama_cpp(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``model.gguf`` and ``tensor-types.txt``; arguments as of ``export``.

    Raises:
        ValueError: If the architecture, the tokenizer or a format is none that can be written here.
    """
    types = list_tensor_types(reference, formats_by_weight)
    writer = start_file(reference, directory / MODEL_FILE)
    for name, values, type_name in _list_tensors(reference, formats_by_weight, quantizer):
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_text(directory / TYPES_FILE, "".join(f"^{re.escape(n)}$={t.lower()}\n" for n, t in types.items()))


def llama_cpp_fixed_bytes(reference: ReferenceModel, *, routers: bool = False) -> int:
    """Returns the bytes of a GGUF file that no choice of formats changes: metadata, tensors' names, the rest's values.

    Args:
        reference: The model.
        routers: Whether routers take formats too.

    The file is as long as these and ``Format.storage_bytes`` of all weights together, where every weight's bytes are a
    multiple of the alignment: out_features a multiple of 16 does it for every type.

    Raises:
        ValueError: If the architecture or the tokenizer is none that can be written here.
    """
    names = find_name_map(reference.model.config)
    weights = {weight.parameter: weight for weight in list_weights(reference.model, routers=routers).values()}
    rest_bytes = 0
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_FILE
        writer = start_file(reference, path)
        factors = find_rope_factors(reference.model)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, list(factors.shape), np.dtype(np.float32), 0)
            rest_bytes += GGUFWriter.ggml_pad(4 * factors.numel(), writer.data_alignment)
        for name, tensor in distinct_tensors(reference.model).items():
            shape, weight = list(tensor.shape), weights.get(name)
            if weight is None:
                rest_bytes += GGUFWriter.ggml_pad(4 * tensor.numel(), writer.data_alignment)
            # A tensor's entry is as long for any type and any sizes.
            for tensor_name in [_tensor_name(name, names)] if weight is None else dict(list_parts(weight, names)):
                writer.add_tensor_info(tensor_name, shape, np.dtype(np.float32), 0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return GGUFWriter.ggml_pad(path.stat().st_size, writer.data_alignment) + rest_bytes


def start_file(reference: ReferenceModel, path: Path) -> GGUFWriter:
    """Returns a writer that holds everything about a model but its tensors."""
    config = reference.model.config
    writer = GGUFWriter(str(path), find_architecture(config))
    add_model(writer, config, reference.name)
    add_tokenizer(writer, reference.tokenizer, config.vocab_size)
    return writer


def list_tensor_types(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> dict[str, str]:
    """Returns tensor name -> llama.cpp type for every tensor that takes a format.

    Raises:
        ValueError: If a format has no type, or the experts of a tensor have several.
    """
    names = find_name_map(reference.model.config)
    types: dict[str, str] = {}
    for name, weight in list_weights(reference.model, routers=True).items():
        if name not in formats_by_weight:
            continue
        found = gguf_type(find_format(formats_by_weight[name]))
        if found is None:
            msg = (
                f"a format must be one that llama.cpp stores bit for bit: got '{formats_by_weight[name]}' for weight "
                f"'{name}'. Plan with --engine llama.cpp."
            )
            raise ValueError(msg)
        for tensor_name, _ in list_parts(weight, names):
            if types.setdefault(tensor_name, found) != found:
                msg = (
                    f"all experts of a tensor must have one type: got {types[tensor_name]} and {found} in "
                    f"'{tensor_name}'. Plan with --engine llama.cpp."
                )
                raise ValueError(msg)
    return types


def _list_tensors(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, quantizer: RenderingRule
) -> Iterator[tuple[str, NDArray[np.generic], str]]:
    """Yields name, values or bytes, and type of every tensor of the file."""
    names = find_name_map(reference.model.config)
    factors = find_rope_factors(reference.model)
    if factors is not None:
        yield ROPE_FACTORS, factors.numpy(), "F32"
    weights: dict[str, list[Weight]] = {}
    for weight in list_weights(reference.model, routers=True).values():
        if weight.name in formats_by_weight:
            weights.setdefault(weight.parameter, []).append(weight)
    for name, tensor in distinct_tensors(reference.model).items():
        if name not in weights:
            rest = _order_rows(reference, name, tensor.detach().to(torch.float32))
            yield _tensor_name(name, names), rest.contiguous().numpy(), "F32"
            continue
        group = weights[name]
        format_ = find_format(formats_by_weight[group[0].name])
        stacked = torch.stack([_bytes_of(reference, weight, format_, quantizer) for weight in group])
        type_name = gguf_type(format_)
        assert type_name is not None, "the types have been listed before"
        for tensor_name, rows in list_parts(group[0], names):
            part = stacked[:, rows]
            yield tensor_name, (part if group[0].expert_index is not None else part[0]).contiguous().numpy(), type_name


def _bytes_of(reference: ReferenceModel, weight: Weight, format_: Format, quantizer: RenderingRule) -> Tensor:
    stored = encode_weight(weight, read_weight(reference.model, weight), format_, quantizer)
    return _order_rows(reference, weight.parameter, gguf_bytes(stored, format_))


def _order_rows(reference: ReferenceModel, parameter: str, rows: Tensor) -> Tensor:
    """Returns the rows, those of a query or key projection (or its bias) with the halves of each head interleaved."""
    config = reference.model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    role = parameter.split(".")[-2]
    if role not in heads or find_architecture(config) != "llama":
        return rows
    halves = rows.view(heads[role], 2, len(rows) // heads[role] // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def find_name_map(config: PretrainedConfig) -> TensorNameMap:
    """Returns llama.cpp's names of a model's tensors.

    Raises:
        ValueError: If the architecture is none that can be written here.
    """
    architecture = find_architecture(config)
    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(key, config.num_hidden_layers)


def list_parts(weight: Weight, names: TensorNameMap) -> list[_Part]:
    """Returns the tensors that a weight becomes, with the rows of it that each takes."""
    if not weight.parameter.endswith("experts.gate_up_proj"):
        return [(_tensor_name(weight.parameter, names), slice(None))]
    stem, half = weight.parameter.removesuffix("gate_up_proj"), weight.shape[0] // 2
    return [
        (_tensor_name(f"{stem}gate_proj", names), slice(0, half)),
        (_tensor_name(f"{stem}up_proj", names), slice(half, None)),
    ]


def _tensor_name(parameter: str, names: TensorNameMap) -> str:
    """Returns llama.cpp's name of a parameter.

    Raises:
        ValueError: If it has none in this architecture.
    """
    found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
    if found is None:
        msg = (
            f"every tensor must have a name in llama.cpp: got '{parameter}', which gguf does not know in this "
            "architecture. Convert the model with llama.cpp's own script."
        )
        raise ValueError(msg)
    return found if found.endswith((".weight", ".bias")) else f"{found}.weight"
