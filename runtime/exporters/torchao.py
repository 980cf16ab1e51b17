"""torchao: the plan as the JSON of an ``FqnToConfig``; torchao then rounds to nearest by itself.

Every module is named in full. Saving sorts the names, so that patterns, of which the first match counts, would change
their meaning; names do not.
"""

import json
from pathlib import Path
from typing import Any

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import list_modules
from runtime.files import write_text
from runtime.formats import Format
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule

CONFIG_FILE = "torchao.json"


def export_torchao(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``torchao.json``; arguments as of ``export``. torchao's own rounding takes the place of ours."""
    modules = {name: _config(f) for name, f in list_modules(reference, formats_by_weight) if "embed" not in name}
    config = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": modules}}
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def _config(format_: Format) -> dict[str, Any] | None:
    """Returns the configuration of a module, or None where it is not quantized."""
    if format_.unquantized:
        return None
    granularity = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": format_.group_size}}
    if format_.group_size is None:
        granularity = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    return {
        "_type": "IntxWeightOnlyConfig",
        "_version": 2,
        "_data": {
            "weight_dtype": {"_type": "torch.dtype", "_data": f"int{format_.bits}"},
            "granularity": granularity,
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if format_.symmetric else "ASYMMETRIC"},
            "scale_dtype": None,
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        },
    }
