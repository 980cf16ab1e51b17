"""Plans on disk: versioned JSON, written whole or not at all."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from allocator.plans import (
    OPTIONAL_PARTS,
    SCHEMA_VERSION,
    ActivationPlan,
    CachePlan,
    Evaluation,
    Plan,
    RulesPrice,
    UnitPlan,
)
from runtime.files import write_text

# What null stands for.
_UNKNOWN = {"relative_gap": math.inf, "lower_bound": -math.inf, "predicted_kl": math.nan}
# What later steps look up.
_PROVENANCE = ("model", "model_fingerprint", "profile", "quantizer")


def save_plan(plan: Plan, path: Path) -> None:
    """Writes a plan to a JSON file, whole or not at all."""
    write_text(path, json.dumps(plan.to_dict(), indent=1) + "\n")


def load_plan(path: Path) -> Plan:
    """Returns the plan in a JSON file.

    Raises:
        ValueError: If the file is missing, no JSON, of another schema version, or damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"a plan must be a JSON file that 'bitplan plan' wrote: got '{path}' ({error}). Make the plan again."
        raise ValueError(msg) from error
    found = record.get("schema_version") if isinstance(record, dict) else None
    if found != SCHEMA_VERSION:
        msg = f"a plan must have schema_version={SCHEMA_VERSION}: got {found} in '{path}'. Make the plan again."
        raise ValueError(msg)
    known = {f.name for f in dataclasses.fields(Plan)}
    missing, unknown = sorted(known - set(record) - OPTIONAL_PARTS), sorted(set(record) - known)
    if missing or unknown:
        msg = f"a plan must have the fields of its schema: '{path}' lacks {missing} and has unknown {unknown}."
        raise ValueError(msg)
    try:
        return _plan(record)
    except (AttributeError, KeyError, TypeError) as error:
        msg = (
            f"a plan must be complete: got '{path}', which is damaged ({type(error).__name__}: {error}). "
            "Make the plan again."
        )
        raise ValueError(msg) from error


def _plan(record: dict[str, Any]) -> Plan:
    numbers = {name: value if record[name] is None else record[name] for name, value in _UNKNOWN.items()}
    weights = {str(name): str(format_) for name, format_ in record["weights"].items()}
    provenance = {str(name): str(value) for name, value in record["provenance"].items()}
    lacking = [name for name in _PROVENANCE if name not in provenance]
    if lacking:
        msg = f"its provenance lacks {lacking}"
        raise KeyError(msg)
    return Plan(
        **{
            **record,
            **numbers,
            "weights": weights,
            "provenance": provenance,
            "cache": CachePlan(**record["cache"]) if "cache" in record else None,
            "activations": ActivationPlan(**record["activations"]) if "activations" in record else None,
            "units": tuple(UnitPlan(**unit) for unit in record["units"]),
            "rules": record["rules"] and RulesPrice(**record["rules"]),
            "evaluations": tuple(Evaluation(**evaluation) for evaluation in record["evaluations"]),
        }
    )
