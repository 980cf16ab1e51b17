"""GPTQModel: the plan as ``quantize_config.json``; GPTQModel then quantizes with calibration data of its own.

The commonest format is the base; every other one is a rule of ``dynamic``, a pattern that is matched from the start of
a module's name. Each names its modules in full, layers as an alternative, so that no two rules match one module. Where
the projections that vLLM fuses agree, one rule names them and the fused module as well: vLLM looks rules up under the
fused name, and would silently give the base to a rule that names the parts alone.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import list_modules
from runtime.files import write_text
from runtime.formats import Format
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule

CONFIG_FILE = "quantize_config.json"
# Parts -> the alternative that names them and what they are fused to.
FUSED = {("q_proj", "k_proj", "v_proj"): "(q|k|v|qkv)_proj", ("gate_proj", "up_proj"): "(gate|up|gate_up)_proj"}
_MODULE = re.compile(r"(?P<stem>.*\.)(?P<layer>\d+)(?P<path>\..*\.)(?P<role>\w+)")


def export_gptqmodel(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes ``quantize_config.json``; arguments as of ``export``. GPTQModel's quantizer takes the place of ours."""
    config = gptqmodel_config(reference, formats_by_weight)
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def gptqmodel_config(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> dict[str, Any]:
    """Returns the configuration of a plan, ``dynamic`` included.

    Raises:
        ValueError: If no weight inside a layer takes a quantized format.
    """
    modules = {name: f for name, f in list_modules(reference, formats_by_weight) if _MODULE.fullmatch(name)}
    common = Counter(f for f in modules.values() if not f.unquantized).most_common(1)
    if not common:
        msg = "a plan for GPTQModel must quantize a weight of a layer: got none. Use a smaller budget."
        raise ValueError(msg)
    base = common[0][0]
    rules: dict[tuple[str, Format], list[str]] = {}
    for stem, layer, path, role in _fused_names(modules):
        format_ = modules[f"{stem}{layer}{path}{role[0]}"]
        if format_ != base:
            named = FUSED.get(role, role[0])
            rules.setdefault((f"{re.escape(stem)}LAYERS{re.escape(path)}{named}", format_), []).append(layer)
    dynamic: dict[str, dict[str, Any]] = {}
    for (pattern, format_), layers in rules.items():
        sign = "-:" if format_.unquantized else "+:"
        dynamic[f"{sign}^{pattern.replace('LAYERS', '(' + '|'.join(layers) + ')')}$"] = (
            {} if format_.unquantized else gptq_scheme(format_)
        )
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **gptq_scheme(base),
        "desc_act": False,
        "lm_head": False,
        "dynamic": dynamic,
    }


def gptq_scheme(format_: Format) -> dict[str, Any]:
    """Returns an integer format in the words of GPTQ's configurations."""
    return {"bits": format_.bits, "group_size": format_.group_size or -1, "sym": format_.symmetric}


def _fused_names(modules: dict[str, Format]) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """Returns (stem, layer, path, roles) of every rule: fused parts that agree together, all others alone."""
    found, taken = [], set()
    for name, format_ in modules.items():
        match = _MODULE.fullmatch(name)
        assert match is not None, "other names have been left out"
        if name in taken:
            continue
        stem, layer, path, role = match.group("stem", "layer", "path", "role")
        parts = next((parts for parts in FUSED if role in parts), (role,))
        members = [f"{stem}{layer}{path}{part}" for part in parts]
        if any(modules.get(member) != format_ for member in members):
            parts, members = (role,), [name]
        taken.update(members)
        found.append((stem, layer, path, parts))
    return found
