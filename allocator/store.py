"""The store: profiles, their half-finished pieces, and measurements of plans, in one directory tree.

    <root>/profiles/<fingerprint>/            a finished profile
    <root>/pieces/<fingerprint>/              pieces of a measurement that is not finished
    <root>/renderings/<fingerprint>/          input statistics that a profile's quantizer reads, and rendered weights
    <root>/transforms/<hash>.safetensors      tensors that a reference model's transforms were folded by
    <root>/evaluations/<hash>.safetensors     per-sequence KL and log-likelihood of one assignment on one text
    <root>/latencies/<hash>.safetensors       microseconds of every candidate on one device
    <root>/timed/<fingerprint>.json           the device on which a profile's candidates were timed last
    <root>/engine_files/<fingerprint>.json    bytes of engines' files of a profile's model that no choice changes
    <root>/latest/<model fingerprint>.json    which profile was measured last for a model
    <root>/texts/sampled-<hash>.safetensors   calibration text that a model sampled
    <root>/shortlists/<hash>.safetensors      errors of all formats on a few rows, of which a shortlist is taken

Everything is keyed by content, written whole or not at all, and safe to delete at any time. What no profile needs any
more is deleted by ``prune``: renderings and notes of profiles that are neither there nor being measured, and what a
killed process left under a temporary name.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from runtime.files import atomic_path, write_text
from sensitivity.profile import SensitivityProfile
from sensitivity.profile_files import load_profile, save_profile

CACHE_VARIABLE = "BITPLAN_CACHE"
TIMED, ENGINE_FILES = NOTES = ("timed", "engine_files")
KINDS = ("profiles", "pieces", "renderings", "evaluations", "latencies", "latest", "texts", "shortlists", *NOTES)


def default_root() -> Path:
    """Returns the directory of ``BITPLAN_CACHE``, else ``bitplan`` below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitplan"


class Store:
    """A directory tree of finished and half-finished measurements.

    Args:
        root: Its directory; None for the default.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = default_root() if root is None else root

    def pieces(self, fingerprint: str) -> Path:
        """Returns the directory for the pieces of an unfinished measurement."""
        return self.root / "pieces" / fingerprint

    def rendering(self, fingerprint: str) -> Path:
        """Returns the directory for a profile's input statistics and rendered weights, where its quantizer has any."""
        return self.root / "renderings" / fingerprint

    def find_profile(self, fingerprint: str) -> SensitivityProfile | None:
        """Returns the finished profile of a fingerprint, or None where there is none or it is damaged."""
        try:
            return load_profile(self.root / "profiles" / fingerprint)
        except ValueError:
            return None

    def find_latest_profile(self, model_fingerprint: str) -> SensitivityProfile | None:
        """Returns the profile measured last for a model, or None."""
        try:
            fingerprint = str(json.loads(self._latest(model_fingerprint).read_text(encoding="utf-8"))["profile"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return self.find_profile(fingerprint)

    def save_profile(self, profile: SensitivityProfile) -> None:
        """Keeps a finished profile, makes it the model's latest, and drops its pieces."""
        save_profile(profile, self.root / "profiles" / profile.fingerprint)
        self.make_latest(profile)
        shutil.rmtree(self.pieces(profile.fingerprint), ignore_errors=True)

    def make_latest(self, profile: SensitivityProfile) -> None:
        """Makes a profile the one that is taken when a query names only the model."""
        record = json.dumps({"profile": profile.fingerprint}) + "\n"
        write_text(self._latest(profile.provenance["model_fingerprint"]), record)

    def list_kinds(self) -> dict[str, tuple[int, int]]:
        """Returns the name of each directory of the store -> entries and bytes in it."""
        return {
            kind: (len(list((self.root / kind).glob("*"))), _count_bytes(self.root / kind))
            for kind in KINDS
            if (self.root / kind).is_dir()
        }

    def prune(self) -> int:
        """Deletes what no profile needs, and returns its bytes. No measurement may run meanwhile."""
        needed = {path.name for kind in ("profiles", "pieces") for path in (self.root / kind).glob("*")}
        beside = [path for kind in ("renderings", *NOTES) for path in (self.root / kind).glob("*")]
        stale = [path for path in beside if path.name.partition(".")[0] not in needed and path.name[0] != "."]
        # rglob finds what lies below another one as well.
        left = [path for kind in KINDS for end in ("tmp", "old") for path in (self.root / kind).rglob(f".*.{end}")]
        freed_bytes = 0
        for path in [*stale, *left]:
            freed_bytes += _count_bytes(path)
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return freed_bytes

    def find_evaluation(self, key: str) -> dict[str, NDArray[np.float64]] | None:
        """Returns the per-sequence numbers kept under a key, or None."""
        return _read_arrays(self._evaluation(key))

    def save_evaluation(self, key: str, arrays: dict[str, NDArray[np.float64]]) -> None:
        """Keeps per-sequence numbers under a key."""
        with atomic_path(self._evaluation(key)) as temporary:
            save_file(arrays, temporary)

    def find_transforms(self, key: str) -> dict[str, NDArray[np.float64]] | None:
        """Returns the tensors of transforms kept under a key, or None."""
        return _read_arrays(self._transforms(key))

    def save_transforms(self, key: str, arrays: dict[str, NDArray[np.float64]]) -> None:
        """Keeps the tensors of transforms under a key."""
        with atomic_path(self._transforms(key)) as temporary:
            save_file(arrays, temporary)

    def find_latency(self, key: str) -> NDArray[np.float64] | None:
        """Returns the microseconds [U, F] kept under a key, or None."""
        arrays = _read_arrays(self._latency(key))
        return None if arrays is None else arrays["latency_us"]

    def save_latency(self, key: str, latency_us: NDArray[np.float64]) -> None:
        """Keeps microseconds [U, F] under a key."""
        with atomic_path(self._latency(key)) as temporary:
            save_file({"latency_us": latency_us}, temporary)

    def find_note(self, kind: str, fingerprint: str) -> dict[str, Any] | None:
        """Returns what is noted of a profile under a kind in ``NOTES``, or None."""
        try:
            found = json.loads(self._note(kind, fingerprint).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def save_note(self, kind: str, fingerprint: str, note: Mapping[str, Any]) -> None:
        """Notes JSON values of a profile under a kind in ``NOTES``."""
        write_text(self._note(kind, fingerprint), json.dumps(dict(note)) + "\n")

    def _note(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / f"{fingerprint}.json"

    def _transforms(self, key: str) -> Path:
        return self.root / "transforms" / f"{key}.safetensors"

    def _latency(self, key: str) -> Path:
        return self.root / "latencies" / f"{key}.safetensors"

    def _latest(self, model_fingerprint: str) -> Path:
        return self.root / "latest" / f"{model_fingerprint}.json"

    def _evaluation(self, key: str) -> Path:
        return self.root / "evaluations" / f"{key}.safetensors"


def _count_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())


def _read_arrays(path: Path) -> dict[str, NDArray[np.float64]] | None:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
