"""The packed model on disk: a directory with the checkpoint, the model's configuration and its tokenizer.

``model.safetensors`` is what the budget counts; ``config.json`` and the tokenizer stay on the host.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from runtime.apply import FormatsByWeight, apply_formats_, install_empty_formats_
from runtime.cached_attention import read_packed_caches_
from runtime.checkpoint import (
    CHECKPOINT_FILE,
    fixed_bytes,
    further_header_bytes,
    header_reserve_bytes,
    load_tensors,
    read_metadata,
    save_checkpoint,
)
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.decoder_tensors import NotCompiled, check_shape
from runtime.file_bytes import weight_bytes
from runtime.files import atomic_directory, check_replaceable, write_text
from runtime.formats import find_format
from runtime.kernels.dispatch import uses_triton
from runtime.loading import PACKED_CONFIG_KEY, ReferenceModel, call_transformers
from runtime.quantized_cache import QuantizedCache
from runtime.rendering import RenderingRule
from runtime.simulated_activations import ActivationScheme, install_activations_, simulated_activations
from runtime.stored_weights import build_empty_model
from runtime.transforms import has_map, install_map_
from runtime.units import list_weights
from runtime.weight_memory import gather_weights_

FORMATS_KEY = "bitplan.formats"
# In the configuration: a rotated model whose embedding is tied has a matrix behind its last norm.
MAP_KEY = "matrix_after_norm"
_CACHE_FORMATS, _SOURCE = "cache_formats", "weights_fingerprint"
ACTIVATIONS_KEY = "activations"


def save_packed_(
    reference: ReferenceModel,
    formats_by_weight: FormatsByWeight,
    directory: Path,
    *,
    metadata: Mapping[str, str],
    quantizer: RenderingRule = "rtn",
    formats_by_cache: Mapping[str, str] = MappingProxyType({}),
    activations: ActivationScheme = MappingProxyType({}),
) -> int:
    """Packs the model in place, writes it to a directory, and returns the bytes of the weight file.

    Args:
        reference: The model; its weights are packed afterwards, and in memory as such.
        formats_by_weight: Weight name -> format name, for every weight that can be quantized.
        directory: Replaced as a whole once the new content is complete; it must be free or hold a packed model.
        metadata: Strings kept in the checkpoint's header.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        formats_by_cache: Cache unit -> format name, for all of them or none; kept in the configuration.
        activations: Linear layer -> format of its input and static scale; kept in the configuration.

    Raises:
        ValueError: If a weight has no format or one it cannot take, the metadata does not fit the header, or the
            directory holds something else.
    """
    check_packed_place(directory)
    left = [name for name in list_weights(reference.model) if name not in formats_by_weight]
    if left:
        msg = (
            f"every weight must have a format: got none for {len(left)} weights, first '{left[0]}', in "
            f"'{reference.name}'. Use the plan that was made for this model."
        )
        raise ValueError(msg)
    if formats_by_cache:
        # Refuses names that are no caches of this model, and caches without a format, before anything is packed.
        QuantizedCache(reference.model, formats_by_cache)
    with simulated_activations(reference.model, activations):
        pass  # Refuses likewise.
    weights = list_weights(reference.model, routers=True)
    routers = any(weight.kind == "router" and name in formats_by_weight for name, weight in weights.items())
    header_bytes = header_reserve_bytes(reference.model, routers=routers)
    header_bytes += sum(further_header_bytes(weights[name], find_format(f)) for name, f in formats_by_weight.items())
    apply_formats_(reference.model, formats_by_weight, quantizer=quantizer, residency=reference.residency)
    with atomic_directory(directory) as temporary:
        reference.tokenizer.save_pretrained(temporary)
        config = reference.model.config.to_dict()
        # For transformers' own loader: runtime/transformers_quantizer.py.
        config["quantization_config"] = {"quant_method": PACKED_CONFIG_KEY, "formats": dict(formats_by_weight)}
        config[PACKED_CONFIG_KEY] = {
            "schema_version": 1,
            _SOURCE: reference.weights_fingerprint,
            **({MAP_KEY: True} if has_map(reference.model) else {}),
            **({_CACHE_FORMATS: dict(formats_by_cache)} if formats_by_cache else {}),
            **({ACTIVATIONS_KEY: dict(activations)} if activations else {}),
        }
        write_text(temporary / "config.json", json.dumps(config, indent=2, default=str) + "\n")
        formats = json.dumps(dict(formats_by_weight), separators=(",", ":"))
        return save_checkpoint(
            reference.model,
            temporary / CHECKPOINT_FILE,
            {**metadata, FORMATS_KEY: formats},
            header_bytes=header_bytes,
        )


def packed_bytes(reference: ReferenceModel, formats_by_weight: FormatsByWeight, *, routers: bool) -> int:
    """Returns the bytes of the file that ``save_packed_`` writes, from shapes and formats alone.

    Args:
        reference: The model.
        formats_by_weight: Weight name -> format name.
        routers: Whether routers are among them.
    """
    weights = list_weights(reference.model, routers=True)
    stored = sum(weight_bytes(weights[name], find_format(f)) for name, f in formats_by_weight.items())
    return stored + fixed_bytes(reference.model, routers=routers, residency=reference.residency)


def check_packed_place(directory: Path) -> None:
    """Checks that a packed model may be written to a directory: it is free, empty, or holds a packed model.

    Raises:
        ValueError: If something else is there.
    """
    check_replaceable(directory, is_own=_is_packed, content="a packed model")


def _is_packed(directory: Path) -> bool:
    try:
        return PACKED_CONFIG_KEY in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def load_packed(directory: Path) -> tuple[Any, PreTrainedTokenizerBase, dict[str, str]]:
    """Returns a packed model, its tokenizer and the strings of its header.

    Raises:
        ValueError: If the directory holds no packed model, or its file is incomplete.
    """
    path = directory / CHECKPOINT_FILE
    metadata = read_metadata(path)
    if FORMATS_KEY not in metadata:
        msg = f"a packed model must name its formats in the header: got none in '{path}'. Make it with 'bitplan apply'."
        raise ValueError(msg)
    model = call_transformers(directory, lambda: _build_empty(directory))
    install_empty_formats_(model, json.loads(metadata[FORMATS_KEY]))
    _load_tensors_(model, load_tensors(path), path)
    install_activations_(model, getattr(model.config, PACKED_CONFIG_KEY, {}).get(ACTIVATIONS_KEY, {}))
    tokenizer = call_transformers(directory, lambda: AutoTokenizer.from_pretrained(directory))
    model.eval().requires_grad_(False)
    prepare_generation_(model)
    return model, tokenizer, metadata


def prepare_generation_(model: Any) -> None:
    """Lets a packed model generate by the compiled decoder, its weights in large pages, where it has the shape for it.

    Args:
        model: With its weights.
    """
    try:
        check_shape(model)
    except NotCompiled:
        return
    # First: some formats are read in an execution layout alone.
    gather_weights_(model)
    install_compiled_decoder_(model)


def _build_empty(directory: Path) -> Any:
    model = build_empty_model(directory)
    if getattr(model.config, PACKED_CONFIG_KEY, {}).get(MAP_KEY):
        install_map_(model, device="meta")
    return model


def find_source(model: Any) -> str:
    """Returns the fingerprint of the weights that a packed model was made from; empty where it says none."""
    source: str = getattr(model.config, PACKED_CONFIG_KEY, {}).get(_SOURCE, "")
    return source


def make_packed_cache(model: Any) -> QuantizedCache | None:
    """Returns an empty cache in the formats that a packed model was saved with; None where it was saved with none.

    Args:
        model: As ``load_packed`` returns it.
    """
    formats = getattr(model.config, PACKED_CONFIG_KEY, {}).get(_CACHE_FORMATS)
    if not formats:
        return None
    if uses_triton(model.device):
        read_packed_caches_(model)
    return QuantizedCache(model, formats)


def _load_tensors_(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    names_by_tensor: dict[int, list[str]] = {}
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        names_by_tensor.setdefault(id(tensor), []).append(name)
    expected = {names[0]: names for names in names_by_tensor.values()}
    wrong = [n for n in expected if n not in tensors or tensors[n].shape != own[n].shape]
    wrong += [n for n in tensors if n not in expected]
    if wrong:
        msg = (
            f"a packed file must hold exactly the tensors of its model: got {len(wrong)} missing, unknown or of "
            f"another shape in '{path}', first '{wrong[0]}'. Write it again with this version."
        )
        raise ValueError(msg)
    # The file holds float32 numbers in narrower types; a tied tensor is there once, under its first name.
    ready: dict[str, Tensor] = {}
    for name, names in expected.items():
        tensor = tensors[name].to(own[name].dtype)
        ready |= dict.fromkeys(names, nn.Parameter(tensor, False) if isinstance(own[name], nn.Parameter) else tensor)
    model.load_state_dict(ready, strict=True, assign=True)
