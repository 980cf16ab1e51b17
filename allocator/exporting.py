"""Exports: a plan written as the files that an engine loads, and the command that runs them there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from allocator.artefact_match import check_same_model
from allocator.artefacts import Model, open_model, plans_routers
from allocator.plans import Plan
from allocator.renderings import rendering_of_plan
from allocator.store import Store
from allocator.transformed import TRANSFORMS
from runtime.drawn_tokens import DRAWN, draw_tokens
from runtime.engine_rules import Engine, check_legal
from runtime.engines import find_engine
from runtime.files import atomic_path
from runtime.loading import ReferenceModel
from runtime.quantizers import TEXTLESS
from runtime.transforms import has_map
from runtime.units import Unit, find_units, list_weights
from sensitivity.weight_inputs import find_statistics


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export on disk.

    Args:
        directory: Where it is.
        engine: Name of the engine it is for.
        files: File name -> bytes.
        predicted_bytes: Bytes of its weight file that the plan predicted; None where the engine's file is not
            known beforehand, or the plan was made for another engine.
        command: What runs it there.
    """

    directory: Path
    engine: str
    files: dict[str, int]
    predicted_bytes: int | None
    command: str


def export(
    model: str | Model, plan: Plan, engine: str, out: Path, *, imatrix: bool = False, store: Store | None = None
) -> Exported:
    """Writes a plan of a model as the files that an engine loads; the directory is replaced as a whole.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        engine: Name in ``ENGINES``.
        out: Directory of the files.
        imatrix: Whether to write llama.cpp's importance matrix too, from the calibration text of the plan's profile,
            or from drawn tokens where the plan's quantizer reads these.
        store: Where the plan's profile is kept, which only some quantizers and the importance matrix need; None for
            the default.

    Raises:
        ArtefactMismatch: If the plan was made for another model.
        ValueError: If the engine is unknown or cannot load the plan, something else is at ``out``, or a transform of
            the plan's has put a matrix into the model that no engine knows, or an importance matrix is asked for of
            an engine that reads none or without the plan's profile.
    """
    from runtime.exporters import check_export_place
    from runtime.exporters import export as write

    target = find_engine(engine)
    model, store = open_model(model), store or Store()
    check_same_model(plan, model.fingerprint, str(model.path))
    check_export_place(out)
    if imatrix and target.exporter != "llama.cpp":
        msg = f"an importance matrix is a file of llama.cpp's: got engine='{engine}'. Leave it out."
        raise ValueError(msg)
    reference = model.reference_of(plan, store)
    if has_map(reference.model):
        msg = (
            f"an engine computes what the architecture says: got a plan under '{plan.provenance[TRANSFORMS]}', which "
            "puts a matrix before the tied head. Measure with the transform 'untie' before the rotation."
        )
        raise ValueError(msg)
    check_legal(target, units_of_engine(reference.model, target, plan), plan.weights)
    rule = rendering_of_plan(plan, reference.model, store)
    scheme = None if plan.activations is None else plan.activations.scheme
    write(reference, plan.weights, out, exporter=target.exporter, quantizer=rule, activations=scheme)
    if imatrix:
        _write_imatrix(reference, plan, out, store)
    files = {str(p.relative_to(out)): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    known = plan.rules is not None and plan.rules.exporter == target.exporter
    return Exported(
        directory=out,
        engine=engine,
        files=files,
        predicted_bytes=plan.memory_bytes if known else None,
        command=target.command.format(out=out, model=model.source),
    )


def _write_imatrix(reference: ReferenceModel, plan: Plan, out: Path, store: Store) -> None:
    from runtime.exporters.gguf_imatrix import IMATRIX_FILE, write_importance_matrix

    fingerprint = plan.provenance["profile"]
    profile = store.find_profile(fingerprint)
    if profile is None:
        msg = (
            f"an importance matrix is of the calibration text of the plan's profile, which must be stored: got none of "
            f"'{fingerprint[:16]}' in '{store.root}'. Measure and plan again, or leave the importance matrix out."
        )
        raise ValueError(msg)
    tokens, source = torch.from_numpy(profile.calibration_tokens), profile.provenance["calibration"]
    if plan.provenance["quantizer"] in TEXTLESS:
        tokens, source = draw_tokens(reference.model), DRAWN
    statistics = find_statistics(reference.model, tokens, directory=store.rendering(fingerprint))
    with atomic_path(out / IMATRIX_FILE) as path:
        write_importance_matrix(
            reference, statistics, path, source=source, tokens_shape=(tokens.shape[0], tokens.shape[1])
        )


def units_of_engine(model: Any, engine: Engine, plan: Plan) -> tuple[Unit, ...]:
    """Returns the units of a model under an engine's fusions and granularity, those with a format in the plan."""
    weights = list_weights(model, routers=True)
    routers = plans_routers(model, plan)
    return find_units(model, fuse=engine.fusions(weights), experts=engine.experts, routers=routers)
