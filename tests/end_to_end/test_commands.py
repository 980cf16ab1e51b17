"""The command through its real entry point: one document on stdout, everything else on stderr, its exit code."""

import json
from pathlib import Path

import pytest

from allocator.store import Store
from sensitivity.profile import SensitivityProfile
from tests.end_to_end.commands import finish, start
from tests.tiny_measurements import FLAGS


@pytest.fixture(scope="module")
def cache(tiny_store: Store, tiny_profile: SensitivityProfile) -> Path:
    """A cache that holds the profile of the dense model."""
    tiny_store.make_latest(tiny_profile)
    return tiny_store.root


def test_measure(tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path, tiny_profile: SensitivityProfile) -> None:
    arguments = ("measure", tiny_llama_dir, "--calibration", tiny_text, *FLAGS, "--json")
    code, out, err = finish(start(*arguments, cache=tmp_path))
    assert code == 0, err
    assert out.count("\n") == 1
    assert json.loads(out)["profile"] == tiny_profile.fingerprint
    assert "Fisher sketch: 7/7" in err and "single-unit KL" in err


def test_several_budgets_print_one_document(tiny_llama_dir: Path, cache: Path) -> None:
    """A budget that HiGHS, where it solves it, writes a line of its own to the standard output about."""
    budget = ("--memory", "159503.55742353483", "--limit", "read_bytes=86235.75578214505")
    code, out, err = finish(start("plan", tiny_llama_dir, *budget, "--no-verify", "--json", cache=cache))
    assert code == 0, err
    assert out.count("\n") == 1
    document = json.loads(out)
    assert "knapsack" in document["solver"]
    for name, limit in document["limits"].items():
        assert document["use"][name] <= limit


def test_infeasible(tiny_llama_dir: Path, cache: Path) -> None:
    code, out, err = finish(start("plan", tiny_llama_dir, "--memory", "1KiB", "--json", cache=cache))
    assert code == 3
    assert list(json.loads(out)["least_use"]) == ["memory_bytes"]
    assert err.startswith("infeasible budget: ")
