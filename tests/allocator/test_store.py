"""The store: everything by content, the latest by model, and damage is as good as nothing there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from allocator.store import Store, default_root
from sensitivity.profile import SensitivityProfile


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def rename(profile: SensitivityProfile, fingerprint: str) -> SensitivityProfile:
    return replace(profile, provenance={**profile.provenance, "profile": fingerprint})


def test_profile_by_fingerprint(store: Store, tiny_profile: SensitivityProfile) -> None:
    assert store.find_profile(tiny_profile.fingerprint) is None
    store.save_profile(tiny_profile)
    found = store.find_profile(tiny_profile.fingerprint)
    assert found is not None
    assert found.candidates.units == tiny_profile.candidates.units
    np.testing.assert_array_equal(found.table("combined").loss, tiny_profile.table("combined").loss)


def test_saving_drops_the_pieces(store: Store, tiny_profile: SensitivityProfile) -> None:
    pieces = store.pieces(tiny_profile.fingerprint)
    pieces.mkdir(parents=True)
    (pieces / "piece").write_text("")
    store.save_profile(tiny_profile)
    assert not pieces.exists()


def test_latest_profile_of_a_model(store: Store, tiny_profile: SensitivityProfile) -> None:
    model = tiny_profile.provenance["model_fingerprint"]
    assert store.find_latest_profile(model) is None
    first, second = rename(tiny_profile, "a" * 64), rename(tiny_profile, "b" * 64)
    for profile, expected in [(first, first), (second, second)]:
        store.save_profile(profile)
        latest = store.find_latest_profile(model)
        assert latest is not None and latest.fingerprint == expected.fingerprint
    store.make_latest(first)
    latest = store.find_latest_profile(model)
    assert latest is not None and latest.fingerprint == first.fingerprint
    assert store.find_latest_profile("0" * 64) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", json.dumps({"profile": "gone"}), json.dumps({"profile": 3})])
def test_damaged_record_of_the_latest(content: str, store: Store) -> None:
    (store.root / "latest").mkdir(parents=True)
    (store.root / "latest" / "model.json").write_text(content)
    assert store.find_latest_profile("model") is None


@pytest.mark.parametrize("name", ["profile.json", "arrays.safetensors"])
def test_damaged_profile_is_not_there_and_can_be_saved_again(
    name: str, store: Store, tiny_profile: SensitivityProfile
) -> None:
    store.save_profile(tiny_profile)
    path = store.root / "profiles" / tiny_profile.fingerprint / name
    path.write_bytes(path.read_bytes()[:100])
    assert store.find_profile(tiny_profile.fingerprint) is None
    store.save_profile(tiny_profile)
    assert store.find_profile(tiny_profile.fingerprint) is not None


def test_evaluations(store: Store) -> None:
    assert store.find_evaluation("key") is None
    store.save_evaluation("key", {"kl": np.array([0.25, 0.5]), "nll": np.array([1.0, 2.0])})
    found = store.find_evaluation("key")
    assert found is not None
    np.testing.assert_array_equal(found["kl"], [0.25, 0.5])
    [path] = (store.root / "evaluations").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert store.find_evaluation("key") is None


def test_latencies(store: Store) -> None:
    assert store.find_latency("key") is None
    store.save_latency("key", np.array([[1.5, np.nan]]))
    np.testing.assert_array_equal(store.find_latency("key"), [[1.5, np.nan]])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"BITPLAN_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/bitplan"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/bitplan"),
        ({"BITPLAN_CACHE": "~/kept", "HOME": "/home/me"}, "/home/me/kept"),
    ],
)
def test_default_root(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BITPLAN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_root() == Path(expected)
    assert Store().root == Path(expected)


def test_prune_keeps_what_a_profile_or_a_measurement_needs(store: Store, tiny_profile: SensitivityProfile) -> None:
    store.save_profile(tiny_profile)
    store.save_evaluation("key", {"kl": np.zeros(3)})
    for fingerprint in (tiny_profile.fingerprint, "being-measured", "gone"):
        (store.rendering(fingerprint) / "rendered").mkdir(parents=True)
        (store.rendering(fingerprint) / "rendered" / "weight.safetensors").write_bytes(bytes(1000))
    pieces = store.pieces("being-measured") / "fisher"
    pieces.mkdir(parents=True)
    (pieces / "piece.safetensors").write_bytes(bytes(10))
    # Left by killed processes.
    (pieces / ".piece.safetensors.x1.tmp").write_bytes(bytes(200))
    half = store.root / "profiles" / ".half.x2.tmp"
    half.mkdir()
    (half / "arrays.safetensors").write_bytes(bytes(30))
    kept = {kind: entries for kind, (entries, _) in store.list_kinds().items()}
    assert store.prune() == 1230
    assert store.prune() == 0
    assert not store.rendering("gone").exists() and not half.exists()
    assert store.rendering(tiny_profile.fingerprint).exists() and store.rendering("being-measured").exists()
    assert [p.name for p in pieces.iterdir()] == ["piece.safetensors"]
    assert store.find_profile(tiny_profile.fingerprint) is not None and store.find_evaluation("key") is not None
    assert store.list_kinds()["renderings"] == (2, 2000)
    assert {kind: entries for kind, (entries, _) in store.list_kinds().items()} == {
        **kept,
        "renderings": kept["renderings"] - 1,
        "profiles": kept["profiles"] - 1,
    }


def test_an_empty_store_has_nothing_to_prune(store: Store) -> None:
    assert store.list_kinds() == {} and store.prune() == 0
