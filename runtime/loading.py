"""Models in: a Hugging Face directory or id, or a GGUF file, read by transformers into float32.

The fingerprint is a hash of the content of the model's files, never of its name: a model fine-tuned in place is
another model.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from runtime.checkpoint import reference_bytes
from runtime.residency import InMemory, Residency
from runtime.transforms.record import TransformRecord

PACKED_CONFIG_KEY = "bitplan"
_Loaded = TypeVar("_Loaded")
_FINGERPRINTED = ("*.safetensors", "*.gguf", "config.json", "tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """A model as it was trained, in float32, with its tokenizer; its function may be written in other weights.

    Args:
        model: The causal language model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        name: Directory or file name, or hub id.
        fingerprint: Hash of the content of its files.
        transforms: What rewrote its weights, or None where they are those of the files.
        residency: Brings its weights into memory where they are not.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str
    transforms: TransformRecord | None = None
    residency: Residency = field(default_factory=InMemory)

    @property
    def weights_fingerprint(self) -> str:
        """Hash of everything the weights depend on: that of the files, and of the transforms where there are any."""
        if self.transforms is None:
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint} {self.transforms.content}".encode()).hexdigest()

    @property
    def reference_bytes(self) -> int:
        """Bytes of the model of the files, each tensor in its narrowest exact type."""
        if self.transforms is not None:
            return self.transforms.reference_bytes
        return reference_bytes(self.model, residency=self.residency)

    @property
    def stored_weights(self) -> Residency | None:
        """What brings the weights into memory block by block; None where they all are."""
        return None if isinstance(self.residency, InMemory) else self.residency


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
    if path.is_file():
        return _hash_file(path)
    digest = hashlib.sha256()
    for file in sorted({p for pattern in _FINGERPRINTED for p in path.glob(pattern)}):
        digest.update(f"{file.name}:{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_reference(source: str) -> ReferenceModel:
    """Returns a model in float32 with its tokenizer.

    Args:
        source: A Hugging Face directory or id, or a GGUF file.

    Raises:
        ValueError: If the model is missing, damaged, already packed, or has a missing or non-finite weight.
    """
    path = find_unpacked(source)
    tokenizer, model, missing = call_transformers(path, lambda: _load(path))
    if missing:
        msg = (
            f"a model must hold all of its weights: got {len(missing)} missing, first '{missing[0]}', in '{path}'. "
            "Fetch or save the model again."
        )
        raise ValueError(msg)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter, path)
    return ReferenceModel(
        model=model,
        tokenizer=tokenizer,
        name=name_model(source, path),
        fingerprint=fingerprint_model(path),
    )


def find_unpacked(source: str) -> Path:
    """Returns the local directory or GGUF file of a model that may be a reference.

    Raises:
        ValueError: If it is missing, damaged or already packed.
    """
    path = find_model(source)
    if path.is_dir() and hasattr(call_transformers(path, lambda: AutoConfig.from_pretrained(path)), PACKED_CONFIG_KEY):
        msg = f"a reference model must not be packed already: got '{path}'. Name the model the plan was made for."
        raise ValueError(msg)
    return path


def name_model(source: str, path: Path) -> str:
    """Returns what a model is called: its directory's or file's name, or its hub id."""
    if path.is_file():
        return path.stem
    # A fetched model lies in a directory that is named after a commit, and "." has no name at all.
    return path.resolve().name if Path(source).expanduser().is_dir() else source


def call_transformers(path: Path, load: Callable[[], _Loaded]) -> _Loaded:
    """Returns what ``load`` reads from ``path`` with transformers.

    Raises:
        ValueError: If it fails.
    """
    try:
        return load()
    # The parsers below it answer a damaged file with whatever it made them trip over: struct.error, OverflowError,
    # SafetensorError, and more. All of them are kept as the cause.
    except Exception as error:
        msg = (
            f"a model must be readable by transformers: got '{path}', {type(error).__name__}: "
            f"{str(error).rstrip('.')}. Check that its files are complete, and that the extra 'gguf' is installed if "
            "it is a GGUF file."
        )
        raise ValueError(msg) from error


def _load(path: Path) -> tuple[PreTrainedTokenizerBase, nn.Module, list[str]]:
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
    if path.is_file():
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers fills a weight that is not in the files with random numbers, and says so in its log only.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    return tokenizer, model.eval().requires_grad_(False), sorted(info["missing_keys"])


def _fetch_from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        msg = (
            f"a model must be a directory, a GGUF file or a Hugging Face id: got '{source}', which is no local path "
            f"and could not be fetched ({type(error).__name__}). Check the spelling, or fetch the model beforehand."
        )
        raise ValueError(msg) from error


def check_finite(name: str, values: Tensor, path: Path) -> None:
    """Checks that a parameter holds numbers only.

    Raises:
        ValueError: If it holds infinities or no numbers.
    """
    if not bool(torch.isfinite(values).all()):
        count = int((~torch.isfinite(values)).sum())
        msg = (
            f"weights must be finite: got {count} non-finite values in '{name}' of '{path}'. "
            "The file is damaged or training diverged; fetch or train the model again."
        )
        raise ValueError(msg)
