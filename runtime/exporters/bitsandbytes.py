"""bitsandbytes: a plan of two formats as the arguments of a ``BitsAndBytesConfig``; it then quantizes by itself.

It loads a model at 8 bits, or at 4, and leaves the modules of one list as they are: no other mix can be said. Of its
types only that of 8 bits is among our formats, so a plan for it is that and 16 bits.
"""

import json
from pathlib import Path

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import list_modules
from runtime.files import write_text
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule

CONFIG_FILE = "bitsandbytes_config.json"


def export_bitsandbytes(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``bitsandbytes_config.json``; arguments as of ``export``. Its own rounding takes the place of ours."""
    skipped = [name for name, format_ in list_modules(reference, formats_by_weight) if format_.unquantized]
    # Inputs beyond the threshold would be multiplied with unquantized columns: zero turns that off.
    config = {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": skipped}
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=1) + "\n")
