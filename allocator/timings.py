"""Latency of every candidate on the device at hand, measured once and kept: a second query answers from the store."""

from dataclasses import asdict

from allocator.budget import LATENCY
from allocator.progress import Progress
from allocator.store import TIMED, Store
from runtime.costs import CostTable
from runtime.latency import device_name, measure_latency
from sensitivity.profile import SensitivityProfile, fingerprint_of

# Raised whenever the same candidates on the same device would be timed in another way.
TIMING_VERSION = 2


def find_latency(profile: SensitivityProfile, store: Store, progress: Progress) -> CostTable:
    """Returns the latency table of a profile's candidates on this device, from the store or measured now.

    The device is noted beside the profile, for ``find_kept_latency``.

    Args:
        profile: The profile.
        store: Where tables are kept.
        progress: Called with (stage, done, total).
    """
    device = device_name()
    if (store.find_note(TIMED, profile.fingerprint) or {}).get("device") != device:
        store.save_note(TIMED, profile.fingerprint, {"device": device})
    kept = _read_table(profile, store, device)
    if kept is not None:
        return kept
    table = measure_latency(
        profile.candidates,
        expert_share=profile.expert_share,
        expert_frequency=_frequency(profile),
        progress=lambda done, total: progress("latency", done, total),
    )
    store.save_latency(_timing_key(profile, device), table.cost)
    return table


def find_kept_latency(profile: SensitivityProfile, store: Store) -> CostTable | None:
    """Returns the latency table of a profile's candidates on the device that timed it last, or None where none did.

    Nothing is asked of the device at hand: to name it is to select its kernels, which a checkout compiles first.
    """
    note = store.find_note(TIMED, profile.fingerprint)
    return None if note is None else _read_table(profile, store, str(note["device"]))


def _read_table(profile: SensitivityProfile, store: Store, device: str) -> CostTable | None:
    kept = store.find_latency(_timing_key(profile, device))
    if kept is None:
        return None
    return CostTable(resource=LATENCY, cost=kept, fixed=0.0, unit_of_measure="us", source="measured", device=device)


def _frequency(profile: SensitivityProfile) -> dict[tuple[int, int], float] | None:
    return None if profile.routing is None else profile.routing.frequency_by_expert()


def _timing_key(profile: SensitivityProfile, device: str) -> str:
    candidates, frequency = profile.candidates, _frequency(profile)
    return fingerprint_of(
        {
            "version": TIMING_VERSION,
            "device": device,
            "weights": [[asdict(weight) for weight in unit.weights] for unit in candidates.units],
            "formats": [f.name for f in candidates.formats],
            "allowed": candidates.allowed.astype(int).tolist(),
            "expert_share": profile.expert_share,
            "expert_frequency": frequency and sorted(frequency.items()),
        }
    )
