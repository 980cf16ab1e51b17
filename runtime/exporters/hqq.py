"""HQQ: the plan as the arguments of transformers' ``HqqConfig``; HQQ then quantizes by itself.

It knows a layer by its type alone (``self_attn.q_proj``); numbers are dropped from names: one format for all layers.
Types that are not listed stay unquantized.
"""

import json
import re
from pathlib import Path
from typing import Any

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import list_modules
from runtime.files import write_text
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule

CONFIG_FILE = "hqq_config.json"
_LAYER = re.compile(r".*?\.\d+\.")


def export_hqq(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``hqq_config.json``; arguments as of ``export``. HQQ's own quantizer takes the place of ours.

    Raises:
        ValueError: If two layers give one type of weight different formats.
    """
    types: dict[str, dict[str, Any]] = {}
    found: dict[str, str] = {}
    for name, format_ in list_modules(reference, formats_by_weight):
        if _LAYER.match(name) is None:
            continue
        role = _LAYER.sub("", name, count=1)
        if found.setdefault(role, format_.name) != format_.name:
            msg = (
                f"all layers must give a type of weight one format for HQQ: got {found[role]} and {format_.name} for "
                f"'{role}'. Plan with --engine hqq."
            )
            raise ValueError(msg)
        if not format_.unquantized:
            types[role] = {"nbits": format_.bits, "group_size": format_.group_size}
    config = {"dynamic_config": types, "skip_modules": ["lm_head"]}
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=1) + "\n")
