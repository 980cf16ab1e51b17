"""bitplan: storage formats for the parts of a network, chosen for a budget, with a proof, verified and applied.

    profile = allocator.measure("path/to/model")                    minutes, once
    plan = allocator.plan(profile, allocator.Budget(memory_bytes=70 * 2**20), verify=False)    milliseconds
    plan = allocator.plan("path/to/model", allocator.Budget(bits_per_weight=3.5))              measured and compared
    allocator.apply("path/to/model", plan, Path("packed"))
    model, tokenizer = allocator.load("packed")

This file is the table of contents; every name is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allocator.artefact_match import ArtefactMismatch
    from allocator.artefacts import Model
    from allocator.budget import Budget, InfeasibleBudget
    from allocator.client import AsyncClient, Client
    from allocator.client_requests import ServiceError
    from allocator.comparing import compare
    from allocator.exporting import Exported, export
    from allocator.format_table import list_formats
    from allocator.frontiers import frontier
    from allocator.measuring import MeasureRequest
    from allocator.pipeline import Applied, apply, evaluate, load, measure, report
    from allocator.plan_files import load_plan, save_plan
    from allocator.plan_query import plan
    from allocator.plans import Evaluation, Plan, UnitPlan
    from allocator.prefixes import PrefixFound, find_prefix
    from allocator.pricing import Priced, price
    from allocator.store import Store
    from runtime.read_widths import set_width_
    from sensitivity.measure_config import MeasureConfig
    from sensitivity.profile import SensitivityProfile
    from sensitivity.profile_files import load_profile, save_profile

_HOME = {
    "Applied": "allocator.pipeline",
    "ArtefactMismatch": "allocator.artefact_match",
    "AsyncClient": "allocator.client",
    "Budget": "allocator.budget",
    "Client": "allocator.client",
    "Evaluation": "allocator.plans",
    "Exported": "allocator.exporting",
    "InfeasibleBudget": "allocator.budget",
    "MeasureConfig": "sensitivity.measure",
    "MeasureRequest": "allocator.measuring",
    "Model": "allocator.artefacts",
    "Plan": "allocator.plans",
    "PrefixFound": "allocator.prefixes",
    "Priced": "allocator.pricing",
    "SensitivityProfile": "sensitivity.profile",
    "ServiceError": "allocator.client_requests",
    "Store": "allocator.store",
    "UnitPlan": "allocator.plans",
    "apply": "allocator.pipeline",
    "compare": "allocator.comparing",
    "evaluate": "allocator.pipeline",
    "export": "allocator.exporting",
    "find_prefix": "allocator.prefixes",
    "frontier": "allocator.frontiers",
    "list_formats": "allocator.format_table",
    "load": "allocator.pipeline",
    "load_plan": "allocator.plan_files",
    "load_profile": "sensitivity.profile_files",
    "measure": "allocator.pipeline",
    "plan": "allocator.plan_query",
    "price": "allocator.pricing",
    "report": "allocator.pipeline",
    "save_plan": "allocator.plan_files",
    "save_profile": "sensitivity.profile_files",
    "set_width_": "runtime.read_widths",
}
__all__ = [
    "Applied",
    "ArtefactMismatch",
    "AsyncClient",
    "Budget",
    "Client",
    "Evaluation",
    "Exported",
    "InfeasibleBudget",
    "MeasureConfig",
    "MeasureRequest",
    "Model",
    "Plan",
    "PrefixFound",
    "Priced",
    "SensitivityProfile",
    "ServiceError",
    "Store",
    "UnitPlan",
    "apply",
    "compare",
    "evaluate",
    "export",
    "find_prefix",
    "frontier",
    "list_formats",
    "load",
    "load_plan",
    "load_profile",
    "measure",
    "plan",
    "price",
    "report",
    "save_plan",
    "save_profile",
    "set_width_",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module 'allocator' has no attribute '{name}'. It has {', '.join(__all__)}."
        raise AttributeError(msg)
    # Kept in the namespace, so that the import system is asked once a name.
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
