"""The packed model on disk: a directory with the checkpoint, the model's configuration and its tokenizer.

``model.safetensors`` is what the budget counts; ``config.json`` and the tokenizer stay on the host.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from runtime.apply import FormatsByWeight, apply_formats_, install_empty_formats_
from runtime.checkpoint import (
    CHECKPOINT_FILE,
    header_reserve_bytes,
    load_tensors,
    read_metadata,
    save_checkpoint,
)
from runtime.files import atomic_directory, write_text
from runtime.loading import PACKED_CONFIG_KEY, ReferenceModel

FORMATS_KEY = "bitplan.formats"


def save_packed_(
    reference: ReferenceModel,
    formats_by_weight: FormatsByWeight,
    directory: Path,
    *,
    metadata: Mapping[str, str],
    quantizer: str = "rtn",
) -> int:
    """Packs the model in place, writes it to a directory, and returns the bytes of the weight file.

    Args:
        reference: The model; its weights are packed afterwards.
        formats_by_weight: Weight name -> format name, for every weight that can be quantized.
        directory: Replaced as a whole once the new content is complete.
        metadata: Strings kept in the checkpoint's header.
        quantizer: Name in ``QUANTIZERS``.
    """
    header_bytes = header_reserve_bytes(reference.model)
    apply_formats_(reference.model, formats_by_weight, quantizer=quantizer)
    with atomic_directory(directory) as temporary:
        reference.tokenizer.save_pretrained(temporary)
        config = reference.model.config.to_dict()
        config.pop("quantization_config", None)
        config[PACKED_CONFIG_KEY] = {"schema_version": 1}
        write_text(temporary / "config.json", json.dumps(config, indent=2, default=str) + "\n")
        formats = json.dumps(dict(formats_by_weight), separators=(",", ":"))
        return save_checkpoint(
            reference.model,
            temporary / CHECKPOINT_FILE,
            {**metadata, FORMATS_KEY: formats},
            header_bytes=header_bytes,
        )


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
    config = AutoConfig.from_pretrained(directory)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    install_empty_formats_(model, json.loads(metadata[FORMATS_KEY]))
    _load_tensors_(model, load_tensors(path), path)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(directory), metadata


def _load_tensors_(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    packed_names = {name for name, _ in model.named_buffers()}
    ready = {n: t if n in packed_names else _widen(t) for n, t in tensors.items()}
    result = model.load_state_dict(ready, strict=False, assign=True)
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if left or result.unexpected_keys:
        msg = (
            f"a packed file must hold exactly the tensors of its model: got {len(left)} missing and "
            f"{len(result.unexpected_keys)} unknown in '{path}', first '{[*left, *result.unexpected_keys][0]}'. "
            "Write it again with this version."
        )
        raise ValueError(msg)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
