"""ModelOpt: the plan as ``hf_quant_config.json``, mixed precision, which TensorRT-LLM and vLLM read.

Each quantized module is named in ``quantized_layers`` with its algorithm, each other one in ``exclude_modules``. Only
the configuration is written: the weights come from ModelOpt itself, and nothing here was run on a GPU.
"""

import json
from pathlib import Path
from typing import Any

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import list_modules
from runtime.files import write_text
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule

CONFIG_FILE = "hf_quant_config.json"
# Format -> the algorithm of weights stored so and inputs as they are.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "mxfp8_e4m3": {"quant_algo": "MXFP8", "group_size": 32},
}


def export_modelopt(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``hf_quant_config.json``; arguments as of ``export``. ModelOpt's own quantizer takes the place of ours."""
    layers: dict[str, dict[str, Any]] = {}
    excluded = []
    for name, format_ in list_modules(reference, formats_by_weight):
        if format_.unquantized:
            excluded.append(name)
        else:
            layers[name] = ALGORITHMS[format_.name]
    config = {
        "producer": {"name": "bitplan"},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "exclude_modules": excluded,
            "quantized_layers": layers,
        },
    }
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=1) + "\n")
