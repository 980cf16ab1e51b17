"""Plans as files: everything comes back, and what is damaged is named."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allocator.artefacts import provenance
from allocator.assignments import list_uniform
from allocator.budget import Budget
from allocator.plan_files import load_plan, save_plan
from allocator.plan_query import plan as make
from allocator.planning import make_plan
from allocator.plans import Plan
from allocator.problems import build_cost_tables
from sensitivity.profile import SensitivityProfile


@pytest.fixture(scope="module")
def plan(tiny_profile: SensitivityProfile) -> Plan:
    return make(tiny_profile, Budget(bits_per_weight=4.5), verify=False)


@pytest.fixture(scope="module")
def uniform_plan(tiny_profile: SensitivityProfile) -> Plan:
    """A plan of a rule: nothing bounds it."""
    [assignment] = [a for a in list_uniform(tiny_profile.candidates, "combined") if a.name == "uniform int4_g64"]
    budget = Budget(bits_per_weight=5)
    return make_plan(tiny_profile, assignment, budget, build_cost_tables(tiny_profile), provenance())


def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "new" / "plan.json")
    assert load_plan(tmp_path / "new" / "plan.json") == plan


def test_round_trip_without_a_bound(uniform_plan: Plan, tmp_path: Path) -> None:
    assert uniform_plan.relative_gap == math.inf
    save_plan(replace(uniform_plan, predicted_kl=math.nan), tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text(), parse_constant=pytest.fail)
    assert record["relative_gap"] is None and record["lower_bound"] is None and record["predicted_kl"] is None
    loaded = load_plan(tmp_path / "plan.json")
    assert math.isnan(loaded.predicted_kl)
    assert replace(loaded, predicted_kl=0.0) == replace(uniform_plan, predicted_kl=0.0)


def test_round_trip_without_a_correction(plan: Plan, tmp_path: Path) -> None:
    assert plan.corrected_kl is not None and plan.correction_error is not None
    without = replace(plan, corrected_kl=None, correction_error=None)
    save_plan(without, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == without


def _change(record: dict[str, Any], **changes: Any) -> str:
    return json.dumps({name: value for name, value in {**record, **changes}.items() if value != "gone"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 7}, r"schema_version=3: got 7 in '.*plan.json'"),
        ({"schema_version": 1}, r"schema_version=3: got 1 in '.*plan.json'"),
        ({"schema_version": "gone"}, r"schema_version=3: got None"),
        ({"corrected_kl": "gone"}, r"lacks \['corrected_kl'\]"),
        ({"units": "gone"}, r"lacks \['units'\] and has unknown \[\]"),
        ({"colour": "red"}, r"lacks \[\] and has unknown \['colour'\]"),
        ({"units": [{"unit": "a"}]}, r"which is damaged \(TypeError: .*missing"),
        ({"weights": ["int4_g64"]}, r"which is damaged \(AttributeError"),
        ({"evaluations": 3}, r"which is damaged \(TypeError"),
        ({"provenance": {"model": "m"}}, r"lacks \['model_fingerprint', 'profile', 'quantizer'\]"),
    ],
)
def test_damaged_plans(plan: Plan, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(_change(plan.to_dict(), **changes))
    with pytest.raises(ValueError, match=message):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", None])
def test_what_is_no_plan(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a plan must .*plan.json.*Make the plan again"):
        load_plan(path)
