"""What each engine can load, as data, so that legality is settled before any solve.

An entry says which formats an engine runs in which kind of weight and at which row lengths, which weights it fuses
(they must agree), how finely experts may differ, and what it would store without a word where a format does not fit.
The entries are in ``runtime/weight_engines.py`` and ``runtime/quantizing_engines.py``; what the rules mean is in
``runtime/engine_rules.py``; who writes the files, in ``runtime/exporters/``.
"""

import re
from typing import TYPE_CHECKING, Any

from runtime.engine_rules import Engine
from runtime.quantizing_engines import QUANTIZING_ENGINES
from runtime.weight_engines import WEIGHT_ENGINES

if TYPE_CHECKING:
    from runtime.formats import Format

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (*WEIGHT_ENGINES, *QUANTIZING_ENGINES)}


def find_engine(name: str) -> Engine:
    """Returns the engine called ``name``.

    Raises:
        ValueError: If there is none; the message lists the known names.
    """
    if name not in ENGINES:
        msg = f"engine must be a known name: got '{name}'. Known engines: {', '.join(ENGINES)}."
        raise ValueError(msg)
    return ENGINES[name]


def engines_of(format_: "Format") -> tuple[str, ...]:
    """Returns the names of the engines that run a format in some weight, bitplan itself first."""
    named = (e.name for e in ENGINES.values() if any(re.fullmatch(rule.formats, format_.name) for rule in e.rules))
    return ("bitplan", *(ENGINES if format_.unquantized else named))


def describe_engines() -> list[dict[str, Any]]:
    """Returns the table as JSON values, one record an engine."""
    return [
        {
            "name": engine.name,
            "reads": engine.reads,
            "formats": [rule.describe() for rule in engine.rules],
            "menu": list(engine.menu),
            "fuse": list(engine.fuse),
            "experts": engine.experts,
            "exporter": engine.exporter,
            "command": engine.command,
            "instead": dict(engine.instead),
            "checked": engine.checked,
            "notes": list(engine.notes),
        }
        for engine in ENGINES.values()
    ]
