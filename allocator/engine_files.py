"""Bytes of engines' files that no choice changes, noted while a model is at hand for who plans from its profile alone.

A server answers budgets from profiles in memory and loads no model; ``bitplan plan --engine`` counts these bytes from
the model itself. The note is kept beside the profile, so that both give the same plan.
"""

from allocator.artefacts import Model
from allocator.engine_rules import engine_fixed_bytes, price_engine_file
from allocator.store import ENGINE_FILES, Store
from runtime.engine_rules import Engine
from runtime.engines import ENGINES
from sensitivity.profile import SensitivityProfile


def count_engine_file(
    model: Model | SensitivityProfile, profile: SensitivityProfile, engine: Engine, store: Store
) -> SensitivityProfile:
    """Returns a profile whose bytes are those of an engine's file, where they are known and a model is at hand.

    Args:
        model: The profile's model, or a profile where there is none.
        profile: The profile.
        engine: The engine.
        store: Where what the profile's transforms found is kept.

    Raises:
        ValueError: If the engine can have no file of the model.
    """
    if not isinstance(model, Model):
        return profile
    return price_engine_file(profile, engine, _fixed_bytes(engine, model, profile, store))


def note_engine_files(model: Model, profile: SensitivityProfile, store: Store) -> None:
    """Keeps the bytes of every engine's file for the model of a profile, or why it has none.

    Args:
        model: The profile's model.
        profile: The profile.
        store: Where the note is kept.
    """
    if store.find_note(ENGINE_FILES, profile.fingerprint) is not None:
        return
    found: dict[str, int | str | None] = {}
    for engine in ENGINES.values():
        try:
            found[engine.name] = _fixed_bytes(engine, model, profile, store)
        except ValueError as error:
            found[engine.name] = str(error)
    store.save_note(ENGINE_FILES, profile.fingerprint, found)


def noted_fixed_bytes(engine: Engine, profile: SensitivityProfile, store: Store) -> int | None:
    """Returns the bytes of an engine's file that no choice changes, or None where these are not known beforehand.

    Raises:
        ValueError: If the engine can have no file of the model, or nothing was noted.
    """
    note = store.find_note(ENGINE_FILES, profile.fingerprint)
    if note is None or engine.name not in note:
        msg = (
            f"a plan for {engine.name} counts the bytes of its file, which a measurement notes: got profile "
            f"'{profile.fingerprint[:16]}' without. Submit its job 'measure' again: what is measured is kept."
        )
        raise ValueError(msg)
    found = note[engine.name]
    if isinstance(found, str):
        raise ValueError(found)
    return None if found is None else int(found)


def _fixed_bytes(engine: Engine, model: Model, profile: SensitivityProfile, store: Store) -> int | None:
    routers = any(unit.kind == "router" for unit in profile.candidates.units)
    return engine_fixed_bytes(engine, model.reference_of(profile, store), routers=routers)
