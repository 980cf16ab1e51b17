"""Budgets by HTTP: the same plans as the verb's, kept once, with the reasons for each format."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import allocator
from allocator.budget import MEMORY, Budget, InfeasibleBudget
from allocator.plan_files import load_plan
from allocator.problems import build_cost_tables
from allocator.service.plan_answers import PlanAnswers, Question
from allocator.service.priced_profiles import Axes, PricedProfiles
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService


@pytest.fixture
def profile_id(running: RunningService, tiny_profile: SensitivityProfile) -> str:
    return running.add_profile(tiny_profile.fingerprint)


def ask(running: RunningService, profile_id: str, **budget: Any) -> dict[str, Any]:
    answer = running.post("/plans", {"profile_id": profile_id, "budget": budget})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize(
    ("sent", "budget"),
    [
        ({"bits_per_weight": 4.5}, Budget(bits_per_weight=4.5)),
        ({"bytes": 100_000}, Budget(memory_bytes=100_000)),
        ({"memory": "120kB"}, Budget(memory_bytes=120_000)),
        ({"max_kl": 0.01}, Budget(max_kl=0.01)),
    ],
    ids=str,
)
def test_a_plan_is_that_of_the_verb(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile, sent: dict[str, Any], budget: Budget
) -> None:
    expected = allocator.plan(tiny_profile, budget, verify=False)
    found = ask(running, profile_id, **sent)
    assert found["choice"] == {unit.unit: unit.format for unit in expected.units}
    assert found["predicted_loss"] == pytest.approx(expected.predicted_kl)
    assert found["standard_error"] == pytest.approx(expected.predicted_std_error)
    assert (found["bytes"], found["bits_per_weight"]) == (expected.memory_bytes, expected.bits_per_weight)
    assert found["lower_bound"] == pytest.approx(expected.lower_bound)
    assert found["termination"] == expected.termination
    assert sum(role["bytes"] for role in found["bytes_by_role"]) == expected.memory_bytes - expected.fixed_bytes


def test_the_file_of_a_plan_is_one_that_the_command_takes(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile, tmp_path: Any
) -> None:
    found = ask(running, profile_id, bits_per_weight=4.5)
    path = tmp_path / "plan.json"
    path.write_bytes(running.get(f"/plans/{found['id']}/file").content)
    loaded, expected = load_plan(path), allocator.plan(tiny_profile, Budget(bits_per_weight=4.5), verify=False)
    assert (loaded.weights, loaded.predicted_kl) == (expected.weights, expected.predicted_kl)
    assert loaded.provenance["profile"] == tiny_profile.fingerprint


def test_the_same_question_is_one_plan(running: RunningService, profile_id: str) -> None:
    first = ask(running, profile_id, bits_per_weight=4.25)
    assert ask(running, profile_id, bits_per_weight=4.25) == first
    read = running.get(f"/plans/{first['id']}")
    assert read.json() == first
    again = running.get(f"/plans/{first['id']}", headers={"If-None-Match": read.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    listed = running.get("/plans?limit=200").json()["items"]
    assert [item["id"] for item in listed].count(first["id"]) == 1


def test_a_plan_that_is_no_longer_in_memory_is_the_same(running: RunningService, profile_id: str) -> None:
    first = ask(running, profile_id, bits_per_weight=5.0)
    service = running.service
    forgetful = PlanAnswers(service.records, PricedProfiles(service.profiles.store, 1), 1)
    found = forgetful.find(first["id"])
    held = service.plans.find(first["id"])
    assert found is not None and held is not None and found.assignment.result is not None
    assert held.assignment.result is not None
    assert np.array_equal(found.assignment.choice, held.assignment.choice)
    assert found.assignment.result.objective == held.assignment.result.objective
    assert np.array_equal(found.assignment.result.shadow_price, held.assignment.result.shadow_price)


def test_every_plan_of_a_sweep_costs_no_more_than_it_may_and_loses_less_with_more(
    running: RunningService, profile_id: str
) -> None:
    plans = [ask(running, profile_id, bits_per_weight=bits) for bits in np.linspace(4.0, 9.0, 11)]
    assert all(p["bits_per_weight"] <= p["budget"]["bits_per_weight"] for p in plans)
    assert all(a["predicted_loss"] >= b["predicted_loss"] for a, b in itertools.pairwise(plans))


def test_the_chosen_format_has_the_least_price_up_to_the_gap_of_rounding(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile
) -> None:
    plan = ask(running, profile_id, bits_per_weight=4.6)
    price = plan["shadow_price"]
    assert price > 0
    excess = 0.0
    for unit, chosen in plan["choice"].items():
        document = running.get(f"/plans/{plan['id']}/units/{unit}").json()
        assert document["chosen"] == chosen
        allowed = [row for row in document["curve"] if row["allowed"]]
        for row in allowed:
            assert row["price"] == pytest.approx(row["loss"] + price * row["bytes"])
        own = next(row for row in allowed if row["chosen"])
        excess += own["price"] - min(row["price"] for row in allowed)
    # Weak duality: what the chosen formats cost above the least prices is the gap of the Lagrangian bound, less what
    # the price makes of the bytes that are left over; so it is at most that bound's whole distance.
    tables = build_cost_tables(tiny_profile)
    left = plan["budget"]["bits_per_weight"] * sum(u.weight_count for u in tiny_profile.candidates.units) / 8
    left -= plan["bytes"] - tables[MEMORY].fixed
    assert excess >= 0
    assert left >= 0
    table = tiny_profile.table(plan["metric"]).loss
    relaxed = sum(
        min(table[u, f] + price * tables[MEMORY].cost[u, f] for f in np.flatnonzero(row))
        for u, row in enumerate(tiny_profile.candidates.allowed)
    )
    spent = plan["predicted_loss"] + price * (plan["bytes"] - tables[MEMORY].fixed)
    assert excess == pytest.approx(spent - relaxed, abs=1e-12)


def test_points_on_the_hull_are_those_that_some_price_chooses(running: RunningService, profile_id: str) -> None:
    plan = ask(running, profile_id, bits_per_weight=4.6)
    unit = next(iter(plan["choice"]))
    rows = [r for r in running.get(f"/plans/{plan['id']}/units/{unit}").json()["curve"] if r["allowed"]]
    prices = np.concatenate([[0.0], np.logspace(-14, 2, 4000)])
    loss, size = np.array([r["loss"] for r in rows]), np.array([r["bytes"] for r in rows])
    chosen = {rows[int(np.argmin(loss + price * size))]["format"] for price in prices}
    assert chosen <= {r["format"] for r in rows if r["on_hull"]}


def test_an_infeasible_budget_says_what_can_be_reached(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile
) -> None:
    answer = running.post("/plans", {"profile_id": profile_id, "budget": {"bits_per_weight": 1}})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    problem = answer.json()
    with pytest.raises(InfeasibleBudget) as expected:
        allocator.plan(tiny_profile, Budget(bits_per_weight=1), verify=False)
    assert problem["least_reachable"]["bits_per_weight"] == expected.value.least_use["bits_per_weight"]
    assert problem["least_reachable"]["bytes"] == expected.value.least_use["memory_bytes"]
    assert problem["status"] == 422 and problem["instance"] == "/plans"
    # One step above the least is reachable.
    ask(running, profile_id, bytes=problem["least_reachable"]["bytes"])


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "exactly one of memory, bits_per_weight and max_kl"),
        ({"bits_per_weight": 4, "max_kl": 0.1}, "exactly one of memory, bits_per_weight and max_kl"),
        ({"bytes": 10, "memory": "10B"}, "must give its memory once"),
        ({"memory": "much"}, "a size must be a number and a unit of bytes"),
        ({"bits_per_weight": -1}, "/body/budget/bits_per_weight"),
        ({"bits_per_weight": "4"}, "/body/budget/bits_per_weight"),
        ({"typo": 4}, "/body/budget/typo"),
        ({"latency_us": 100}, "a limit on latency_us needs measured latencies"),
    ],
    ids=str,
)
def test_a_wrong_budget_is_refused(
    running: RunningService, profile_id: str, budget: dict[str, Any], words: str
) -> None:
    answer = running.post("/plans", {"profile_id": profile_id, "budget": budget})
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "guess"}, "metric must be one the profile holds"),
        ({"engine": "guess"}, "engine must be a known name"),
        ({"context": 4096, "budget": {"bytes": 1e6}}, "cache"),
        ({"engine": "llama.cpp", "context": 5, "budget": {"bytes": 1e6}}, "an engine's rules say nothing of caches"),
    ],
    ids=str,
)
def test_what_the_profile_cannot_answer_is_refused(
    running: RunningService, profile_id: str, change: dict[str, Any], words: str
) -> None:
    answer = running.post("/plans", {"profile_id": profile_id, "budget": {"bits_per_weight": 5}, **change})
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


def test_an_engine_states_what_its_rules_cost(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile, tiny_llama_dir: Path
) -> None:
    body = {"profile_id": profile_id, "budget": {"bits_per_weight": 9}, "engine": "mlx-lm"}
    plan = running.post("/plans", body).json()
    budget = Budget(bits_per_weight=9)
    expected = allocator.plan(str(tiny_llama_dir), budget, verify=False, profile=tiny_profile, engine="mlx-lm")
    assert expected.rules is not None
    assert plan["choice"] == {unit.unit: unit.format for unit in expected.units}
    assert plan["engine_price"]["unrestricted_loss"] == pytest.approx(expected.rules.unrestricted_kl)
    assert plan["engine_price"]["unrestricted_bytes"] == expected.rules.unrestricted_bytes


@pytest.mark.parametrize("engine", ["llama.cpp", "onnxruntime", "mlx-lm"])
def test_an_engines_plan_counts_the_file_that_the_command_counts(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile, tiny_llama_dir: Path, engine: str
) -> None:
    body = {"profile_id": profile_id, "budget": {"bits_per_weight": 16}, "engine": engine}
    plan = running.post("/plans", body).json()
    budget = Budget(bits_per_weight=16)
    expected = allocator.plan(str(tiny_llama_dir), budget, verify=False, profile=tiny_profile, engine=engine)
    assert expected.rules is not None
    assert (plan["bytes"], plan["bits_per_weight"]) == (expected.memory_bytes, expected.bits_per_weight)
    assert plan["engine_price"]["unrestricted_bytes"] == expected.rules.unrestricted_bytes
    written = running.get(f"/plans/{plan['id']}/file").json()
    assert written["memory_bytes"] == expected.memory_bytes
    points = running.get(f"/frontiers/{profile_id}?points=3&engine={engine}").json()["points"]
    assert points[-1]["bytes"] == expected.memory_bytes


def test_what_is_not_there_is_not_found(running: RunningService, profile_id: str) -> None:
    plan = ask(running, profile_id, bits_per_weight=4.5)
    for path in ("/plans/0", f"/plans/{plan['id']}/units/none", "/profiles/0", "/frontiers/0", "/models/0", "/jobs/0"):
        answer = running.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    body = {"profile_id": "abc", "budget": {"bits_per_weight": 4}}
    assert running.post("/plans", body).status_code == 404


def test_a_profile_shows_its_tables(running: RunningService, profile_id: str, tiny_profile: SensitivityProfile) -> None:
    document = running.get(f"/profiles/{profile_id}").json()
    table = tiny_profile.table(document["default_metric"])
    for u, unit in enumerate(document["units"]):
        for name, loss in unit["loss_by_format"].items():
            assert loss == table.loss[u, document["formats"].index(name)]
    widest = next(row for row in document["uniform"] if row["format"] == "bf16")
    assert widest["bytes"] == document["fixed_bytes"] + sum(u["bytes_by_format"]["bf16"] for u in document["units"])
    assert widest["predicted_loss"] == pytest.approx(sum(u["loss_by_format"]["bf16"] for u in document["units"]))


def test_a_frontier_is_that_of_the_verb(
    running: RunningService, profile_id: str, tiny_profile: SensitivityProfile
) -> None:
    document = running.get(f"/frontiers/{profile_id}?points=5&metric=fisher").json()
    expected = allocator.frontier(tiny_profile, points=5, metric="fisher")
    assert [p["use"] for p in document["points"]] == [p["memory_bytes"] for p in expected]
    assert [p["predicted_loss"] for p in document["points"]] == [p["predicted_loss"] for p in expected]
    read = running.get(f"/frontiers/{profile_id}?points=5&metric=fisher&resource=read_bytes").json()
    expected = allocator.frontier(tiny_profile, points=5, metric="fisher", resource="read_bytes")
    assert [(p["use"], p["bytes"]) for p in read["points"]] == [(p["read_bytes"], p["memory_bytes"]) for p in expected]
    for wrong in ("metric=guess", "resource=weight", "resource=latency_us", "engine=guess"):
        refused = running.get(f"/frontiers/{profile_id}?{wrong}")
        assert (refused.status_code, refused.json()["title"]) == (400, "Bad Request")


def test_profiles_are_loaded_once_for_many(running: RunningService, tiny_profile: SensitivityProfile) -> None:
    from tests.allocator.service.test_job_queue import run_together

    profiles = PricedProfiles(running.service.profiles.store, 2)
    axes = [Axes(profile_id=tiny_profile.fingerprint)] * 6
    found = run_together(profiles.find, list(axes))
    assert all(priced is found[0] for priced in found)


@pytest.fixture
def forty_questions(tiny_profile: SensitivityProfile) -> Iterator[list[Question]]:
    budgets = [Budget(bits_per_weight=4.0 + 0.1 * i) for i in range(40)]
    yield [Question(profile_id=tiny_profile.fingerprint, budget=budget) for budget in budgets]


def test_questions_have_ids_of_their_own(forty_questions: list[Question]) -> None:
    assert len({question.plan_id for question in forty_questions}) == 40
