"""Exporters: a model in its chosen formats, written as the files that an engine loads.

Every exporter is a function ``(reference, formats_by_weight, directory, *, quantizer) -> None`` that fills an empty
directory. ``export`` gives it that directory and puts it in place once everything is written. The codes of a plan are
written unchanged wherever the engine's format holds them bit for bit.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from runtime.apply import FormatsByWeight, check_formats_by_weight
from runtime.exporters.auto_round import export_auto_round
from runtime.exporters.bitsandbytes import export_bitsandbytes
from runtime.exporters.compressed_tensors import export_compressed_tensors
from runtime.exporters.gptqmodel import export_gptqmodel
from runtime.exporters.hqq import export_hqq
from runtime.exporters.hugging_face import hugging_face_fixed_bytes
from runtime.exporters.llama_cpp import export_llama_cpp, llama_cpp_fixed_bytes
from runtime.exporters.mlx import export_mlx
from runtime.exporters.modelopt import export_modelopt
from runtime.exporters.onnx_model import export_onnx, onnx_fixed_bytes
from runtime.exporters.torchao import export_torchao
from runtime.files import atomic_directory, check_replaceable, write_text
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule
from runtime.simulated_activations import ActivationScheme
from runtime.units import list_weights

Exporter = Callable[..., None]
EXPORTERS: dict[str, Exporter] = {
    "compressed-tensors": export_compressed_tensors,
    "compressed-tensors for vLLM": partial(export_compressed_tensors, split_experts=True),
    "llama.cpp": export_llama_cpp,
    "mlx-lm": export_mlx,
    "gptqmodel": export_gptqmodel,
    "auto-round": export_auto_round,
    "onnx": export_onnx,
    "torchao": export_torchao,
    "modelopt": export_modelopt,
    "hqq": export_hqq,
    "bitsandbytes": export_bitsandbytes,
}
# Those that write what layers do to their inputs.
ACTIVATION_EXPORTERS = ("compressed-tensors", "compressed-tensors for vLLM")
# Exporters whose file is known to the byte beforehand -> its bytes besides those of the weights
# (`runtime.file_bytes`), a function ``(reference, *, routers)`` of the model and of whether routers take formats too.
FIXED_BYTES: dict[str, Callable[..., int]] = {
    "compressed-tensors": hugging_face_fixed_bytes,
    "compressed-tensors for vLLM": hugging_face_fixed_bytes,
    "llama.cpp": llama_cpp_fixed_bytes,
    "mlx-lm": hugging_face_fixed_bytes,
    "onnx": onnx_fixed_bytes,
}
# Says that a directory is an export and may be replaced by another one.
MANIFEST = "bitplan-export.json"

__all__ = ["EXPORTERS", "FIXED_BYTES", "MANIFEST", "Exporter", "check_export_place", "export"]


def export(
    reference: ReferenceModel,
    formats_by_weight: FormatsByWeight,
    directory: Path,
    *,
    exporter: str,
    quantizer: RenderingRule = "rtn",
    activations: ActivationScheme | None = None,
) -> None:
    """Writes a model in its chosen formats to a directory, which is replaced as a whole.

    Args:
        reference: The model; it is left as it is.
        formats_by_weight: Weight name -> format name, for every weight that can be quantized.
        directory: It must be free or hold an earlier export.
        exporter: Name in ``EXPORTERS``.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        activations: Linear layer -> format of its input and static scale; None where they are unquantized.

    Raises:
        ValueError: If the exporter is unknown or knows nothing of activations that are given, a weight has no format or
            one it cannot take, or the directory holds something else.
    """
    if exporter not in EXPORTERS:
        msg = f"exporter must be one of {', '.join(EXPORTERS)}: got '{exporter}'. Correct the name."
        raise ValueError(msg)
    check_export_place(directory)
    check_formats_by_weight(reference.model, formats_by_weight)
    left = [name for name in list_weights(reference.model) if name not in formats_by_weight]
    if left:
        msg = (
            f"every weight must have a format: got none for {len(left)} weights, first '{left[0]}', in "
            f"'{reference.name}'. Use the plan that was made for this model."
        )
        raise ValueError(msg)
    if activations and exporter not in ACTIVATION_EXPORTERS:
        msg = (
            f"activations can be written by {', '.join(ACTIVATION_EXPORTERS)} alone: got formats of {len(activations)} "
            f"for '{exporter}'. Plan without a limit on bit operations."
        )
        raise ValueError(msg)
    options: dict[str, Any] = {"activations": activations} if activations else {}
    with atomic_directory(directory) as temporary:
        EXPORTERS[exporter](reference, formats_by_weight, temporary, quantizer=quantizer, **options)
        manifest = {"exporter": exporter, "model": reference.name, "formats": dict(formats_by_weight)}
        write_text(temporary / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def check_export_place(directory: Path) -> None:
    """Checks that an export may be written to a directory: it is free, empty, or holds an earlier export.

    Raises:
        ValueError: If something else is there.
    """
    check_replaceable(directory, is_own=lambda path: (path / MANIFEST).is_file(), content="an export")
