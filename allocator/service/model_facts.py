"""What can be said of a model before it is measured: from its configuration; no weight is read."""

from pathlib import Path
from typing import Any

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def describe_model(path: Path) -> dict[str, Any]:
    """Returns architecture, parameters, units, layers, experts per layer and bytes of a model.

    Args:
        path: Its directory, or a GGUF file, of which only the bytes are known before it is measured.

    Raises:
        ValueError: If it is no model that can be measured.
    """
    from runtime.loading import find_model

    path = find_model(str(path))
    if path.is_file():
        unknown = dict.fromkeys(("parameters", "units", "layers", "experts_per_layer"))
        return {"architecture": "GGUF", **unknown, "bytes": path.stat().st_size}
    return {**_describe_architecture(path), "bytes": sum(f.stat().st_size for f in path.glob("*.safetensors"))}


def content_signature(path: Path) -> list[list[Any]]:
    """Returns names, sizes and times of the files of a model or text: they change when it is changed in its place."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _describe_architecture(path: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from runtime.units import count_weights, find_units

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        units = find_units(model)
    except (OSError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        msg = f"a model's config.json must describe a decoder that transformers knows: got '{path.name}' ({error})."
        raise ValueError(msg) from error
    text_config = config.get_text_config()
    experts = next((found for name in _EXPERT_COUNTS if (found := getattr(text_config, name, None))), None)
    return {
        "architecture": (config.architectures or [type(model).__name__])[0],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights": count_weights(units),
        "units": len(units),
        "layers": int(text_config.num_hidden_layers),
        "experts_per_layer": experts,
    }
