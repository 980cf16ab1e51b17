"""Profiles and frontiers as JSON, against the verbs that they are made of."""

import allocator
from allocator.problems import build_cost_tables
from allocator.service.priced_profiles import PricedProfile
from allocator.service.profile_documents import frontier_document
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService
from tests.tiny_measurements import BATCH, CONTEXT


def test_a_frontier_with_caches_is_that_of_the_verb(cache_profile: SensitivityProfile) -> None:
    joined = join_cache(cache_profile, context=CONTEXT, batch=BATCH)
    priced = PricedProfile(profile=joined, tables=build_cost_tables(joined), refusals={})
    points = frontier_document(priced, metric=None, points=5)["points"]
    expected = allocator.frontier(cache_profile, points=5, context=CONTEXT, batch=BATCH)
    assert [point["use"] for point in points] == [point["memory_bytes"] for point in expected]
    assert [point["bits_per_weight"] for point in points] == [point["bits_per_weight"] for point in expected]


def test_a_frontier_with_caches_needs_their_losses(running: RunningService, tiny_profile: SensitivityProfile) -> None:
    profile_id = running.add_profile(tiny_profile.fingerprint)
    answer = running.get(f"/frontiers/{profile_id}?context=64")
    assert (answer.status_code, "needs the losses of caches" in answer.json()["detail"]) == (400, True)


def test_a_profile_names_the_unit_of_each_metric(running: RunningService, tiny_profile: SensitivityProfile) -> None:
    profile_id = running.add_profile(tiny_profile.fingerprint)
    units = running.get(f"/profiles/{profile_id}").json()["metric_units"]
    assert units == {name: table.unit_of_measure for name, table in tiny_profile.losses.items()}
