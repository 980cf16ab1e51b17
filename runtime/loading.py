"""Models in: a Hugging Face directory or id, or a GGUF file, read by transformers into float32.

The fingerprint is a hash of the content of the model's files, never of its name: a model fine-tuned in place is
another model.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PACKED_CONFIG_KEY = "bitplan"
_Loaded = TypeVar("_Loaded")
_FINGERPRINTED = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """A model as it was trained, in float32, with its tokenizer.

    Args:
        model: The causal language model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        name: Directory or file name, or hub id.
        fingerprint: Hash of the content of its files.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str


def find_model(source: str) -> Path:
    """Returns the local directory or GGUF file of a model, fetching a hub id first.

    Raises:
        ValueError: If there is no such model, or the directory holds no safetensors weights.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            msg = f"a model file must be a GGUF file: got '{path}'. Name the directory of a Hugging Face model instead."
            raise ValueError(msg)
        return path
    if not path.is_dir():
        path = _fetch_from_hub(source)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        msg = (
            f"a model directory must hold config.json and *.safetensors: got '{path}' with "
            f"{sorted(p.name for p in path.iterdir())[:8]}. Save the model with save_pretrained (safetensors)."
        )
        raise ValueError(msg)
    return path


def fingerprint_model(path: Path) -> str:
    """Returns a hash of the content of a model's files, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted({p for pattern in _FINGERPRINTED for p in path.glob(pattern)})
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load_reference(source: str) -> ReferenceModel:
    """Returns a model in float32 with its tokenizer.

    Args:
        source: A Hugging Face directory or id, or a GGUF file.

    Raises:
        ValueError: If the model is missing, damaged, already packed, or has a non-finite weight.
    """
    path = find_model(source)
    tokenizer, model = _call_transformers(path, lambda: _load(path))
    _check_finite(model, path)
    return ReferenceModel(
        model=model,
        tokenizer=tokenizer,
        name=path.stem if path.is_file() else path.name,
        fingerprint=fingerprint_model(path),
    )


def _load(path: Path) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    elif hasattr(AutoConfig.from_pretrained(path), PACKED_CONFIG_KEY):
        msg = f"a reference model must not be packed already: got '{path}'. Name the model the plan was made for."
        raise ValueError(msg)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, use_safetensors=True)
    model.eval().requires_grad_(False)
    return tokenizer, model


def _call_transformers(path: Path, load: Callable[[], _Loaded]) -> _Loaded:
    try:
        return load()
    except (OSError, ImportError, RuntimeError, KeyError, EOFError, ValueError) as error:
        if isinstance(error, ValueError) and "must" in str(error).partition(":")[0]:
            raise
        msg = (
            f"a model must be readable by transformers: got '{path}', {type(error).__name__}: {error} "
            "Check that its files are complete and that the extra 'gguf' is installed for GGUF files."
        )
        raise ValueError(msg) from error


def _fetch_from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        msg = (
            f"a model must be a directory, a GGUF file or a Hugging Face id: got '{source}', which is no local path and "
            f"could not be fetched ({type(error).__name__}). Check the spelling, or fetch the model beforehand."
        )
        raise ValueError(msg) from error


def _check_finite(model: nn.Module, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            msg = (
                f"weights must be finite: got {count} non-finite values in '{name}' of '{path}'. "
                "The file is damaged or training diverged; fetch or train the model again."
            )
            raise ValueError(msg)
