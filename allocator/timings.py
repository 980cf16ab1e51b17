"""Latency of every candidate: on the device at hand, measured once and kept, or modelled for one that is not."""

from collections.abc import Mapping
from dataclasses import asdict

from allocator.budget import LATENCY
from allocator.progress import Progress
from allocator.store import TIMED, Store
from runtime.costs import CostTable
from runtime.device_models import find_device_model
from runtime.latency import device_name, measure_latency
from runtime.modelled_latency import model_latency
from sensitivity.profile import SensitivityProfile, fingerprint_of

# Raised whenever the same candidates on the same device would be timed in another way.
TIMING_VERSION = 6


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


def find_modelled_latency(profile: SensitivityProfile, device: str, *, batch_tokens: int = 1) -> CostTable:
    """Returns the latency table of a profile's candidates on a device that need not be at hand.

    Args:
        profile: The profile.
        device: Name in ``DEVICE_MODELS``.
        batch_tokens: Sequences decoded together.

    Raises:
        ValueError: If there is no such device.
    """
    return model_latency(
        profile.candidates,
        find_device_model(device),
        profile.fixed_bytes,
        expert_share=profile.expert_share,
        expert_frequency=_frequency(profile),
        batch_tokens=batch_tokens,
    )


def describe_latency(tables: Mapping[str, CostTable]) -> dict[str, str]:
    """Returns the entry ``latency`` of a plan's provenance: whether measured or modelled, and for what device."""
    if LATENCY not in tables:
        return {}
    return {"latency": f"{tables[LATENCY].source} for {tables[LATENCY].device}"}


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
