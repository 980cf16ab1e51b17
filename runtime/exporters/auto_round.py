"""AutoRound: the plan as ``layer_config.json``, which AutoRound takes; it then quantizes by its own rule.

Every module is named in full: AutoRound escapes dots itself, so that a pattern with escaped dots matches nothing, and a
part of a name matches wherever it occurs.
"""

import json
from pathlib import Path
from typing import Any

from runtime.apply import FormatsByWeight
from runtime.exporters.gptqmodel import gptq_scheme
from runtime.exporters.hugging_face import list_modules
from runtime.files import write_text
from runtime.formats import Format
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule

LAYERS_FILE = "layer_config.json"


def export_auto_round(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``layer_config.json``; arguments as of ``export``. AutoRound's own quantizer takes the place of ours."""
    layers = {name: _scheme(f) for name, f in list_modules(reference, formats_by_weight) if "embed" not in name}
    write_text(directory / LAYERS_FILE, json.dumps(layers, indent=1) + "\n")


def _scheme(format_: Format) -> dict[str, Any]:
    return {"bits": 16} if format_.unquantized else {**gptq_scheme(format_), "data_type": "int"}
