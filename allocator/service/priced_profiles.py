"""Profiles ready for questions: loaded, joined with a cache or merged for an engine, and priced; kept in memory."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import list_uniform, pick
from allocator.budget import MEMORY
from allocator.engine_files import noted_fixed_bytes
from allocator.engine_rules import price_engine_file, restrict_profile
from allocator.problems import build_cost_tables
from allocator.service.recent import Recent
from allocator.store import Store
from allocator.timings import find_kept_latency
from runtime.costs import CostTable
from runtime.engines import find_engine
from runtime.units import count_weights
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What a profile's candidates depend on, besides the measurement.

    Args:
        profile_id: The profile.
        engine: Name of the engine whose rules hold, or None.
        file_of: Name of the engine whose file's bytes are counted; None for those of a packed model.
        context: Tokens of a cache that is part of the plan, or None.
        batch: Sequences decoded together.
        timed: Whether the latency of the candidates is among their costs.
    """

    profile_id: str
    engine: str | None = None
    file_of: str | None = None
    context: int | None = None
    batch: int = 1
    timed: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class PricedProfile:
    """A profile with its cost tables.

    Args:
        profile: The profile, on the axes that were asked for.
        tables: Resource -> cost table.
        refusals: Reason of the engine -> candidates that it rules out; empty without an engine.
    """

    profile: SensitivityProfile
    tables: dict[str, CostTable]
    refusals: dict[str, int]

    @cached_property
    def uniform(self) -> list[tuple[str, NDArray[np.int64], int]]:
        """The uniform assignments: name, choice [U], bytes."""
        memory = self.tables[MEMORY]
        return [
            (a.name, a.choice, round(float(pick(memory.cost, a.choice).sum() + memory.fixed)))
            for a in list_uniform(self.profile.candidates, "")
        ]

    @cached_property
    def weight_count(self) -> int:
        """Weights in all units."""
        return count_weights(self.profile.candidates.units)

    @cached_property
    def roles(self) -> dict[str, tuple[NDArray[np.int64], int]]:
        """Role -> indices of its units, and their weights."""
        found: dict[str, list[int]] = {}
        for index, unit in enumerate(self.profile.candidates.units):
            found.setdefault(unit.role, []).append(index)
        units = self.profile.candidates.units
        return {role: (np.array(own), count_weights([units[u] for u in own])) for role, own in found.items()}


class UnknownProfile(Exception):
    """The store has no profile of this name."""


class PricedProfiles:
    """The profiles in memory.

    Args:
        store: Where profiles are.
        most: Profiles kept, with and without engines and caches.
    """

    def __init__(self, store: Store, most: int) -> None:
        self.store = store
        self._loaded: Recent[str, SensitivityProfile] = Recent(most)
        self._priced: Recent[Axes, PricedProfile] = Recent(4 * most)

    def load(self, profile_id: str) -> SensitivityProfile:
        """Returns a profile as it was measured.

        Raises:
            UnknownProfile: If it is not in the store.
        """

        def load() -> SensitivityProfile:
            profile = self.store.find_profile(profile_id)
            if profile is None:
                msg = f"a profile must be in the store: got '{profile_id[:64]}', which is not. Measure the model again."
                raise UnknownProfile(msg)
            return profile

        return self._loaded.get_or_make(profile_id, load)

    def find(self, axes: Axes) -> PricedProfile:
        """Returns a profile on the axes, priced.

        Raises:
            UnknownProfile: If it is not in the store.
            ValueError: If the profile knows nothing of caches, the engine is unknown, can have no file of the model or
                runs none of the profile's formats, or latencies are asked for that were not measured.
        """
        return self._priced.get_or_make(axes, lambda: self._price(axes))

    def is_timed(self, profile_id: str) -> bool:
        """Returns whether a profile's candidates were timed, so that latency can be limited.

        Raises:
            UnknownProfile: If it is not in the store.
        """
        return find_kept_latency(self.load(profile_id), self.store) is not None

    def _price(self, axes: Axes) -> PricedProfile:
        profile = self.load(axes.profile_id)
        if axes.file_of is not None:
            engine = find_engine(axes.file_of)
            profile = price_engine_file(profile, engine, noted_fixed_bytes(engine, profile, self.store))
        if axes.context is not None:
            profile = join_cache(profile, context=axes.context, batch=axes.batch)
        refusals: Counter[str] = Counter()
        if axes.engine is not None:
            before = profile.candidates.reasons
            profile = restrict_profile(profile, find_engine(axes.engine))
            known = set(before.values())
            refusals = Counter(reason for reason in profile.candidates.reasons.values() if reason not in known)
        latency = _kept_latency(profile, self.store) if axes.timed else None
        tables = build_cost_tables(profile, latency, batch_tokens=axes.batch)
        return PricedProfile(profile=profile, tables=tables, refusals=dict(refusals))


def _kept_latency(profile: SensitivityProfile, store: Store) -> CostTable:
    found = find_kept_latency(profile, store)
    if found is None:
        msg = (
            "a limit on latency_us needs measured latencies: got a profile that was not timed here. Submit "
            "a job 'measure' with the same options and latency=true."
        )
        raise ValueError(msg)
    return found


def role_rows(priced: PricedProfile, memory_by_unit: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Returns role, bytes and bits per weight of each role.

    Args:
        priced: The profile.
        memory_by_unit: [U] bytes.
    """
    rows = []
    for role, (indices, weights) in priced.roles.items():
        role_bytes = float(memory_by_unit[indices].sum())
        bits = 8.0 * role_bytes / weights if weights else None
        rows.append({"role": role, "bytes": round(role_bytes), "bits_per_weight": bits})
    return rows
