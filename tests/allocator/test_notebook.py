"""What a notebook shows of plans, profiles and frontiers."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import allocator
from allocator.budget import Budget
from allocator.notebook import Frontier, frontier_html
from allocator.store import Store
from sensitivity.profile import SensitivityProfile

HOSTILE = "=cmd()</table><script>alert(1)</script>"


def tags_of(text: str) -> list[str]:
    """Returns the tags of a piece of HTML, each closed in its turn."""
    seen: list[str] = []
    open_tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, _attrs: object) -> None:
            seen.append(tag)
            if tag != "br":
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Reader().feed(text)
    return seen


def test_a_plan_shows_the_formats_of_its_layers(tiny_profile: SensitivityProfile) -> None:
    plan = allocator.plan(tiny_profile, Budget(bits_per_weight=4.5), verify=False)
    shown = plan._repr_html_()
    layers = {unit.layer_index for unit in plan.units if unit.layer_index is not None}
    assert tags_of(shown).count("tr") == len(layers) + 1
    for layer in layers:
        row = re.search(rf"<tr><th>layer {layer}</th>(.*?)</tr>", shown)
        assert row is not None
        formats = [unit.format for unit in plan.units if unit.layer_index == layer]
        assert re.findall(r"<td[^>]*>([^<]*)</td>", row[1]) == formats
    assert f"predicted KL {plan.predicted_kl:.4g}" in shown
    for unit in plan.units:
        assert unit.layer_index is not None or f"{unit.unit} {unit.format}" in shown


def test_names_in_a_plan_stay_text(tiny_profile: SensitivityProfile) -> None:
    plan = allocator.plan(tiny_profile, Budget(bits_per_weight=4.5), verify=False)
    units = [replace(unit, unit=HOSTILE, role=HOSTILE, format=HOSTILE) for unit in plan.units]
    shown = replace(plan, name=HOSTILE, verdict=HOSTILE, budget=HOSTILE, units=units)._repr_html_()
    assert "script" not in tags_of(shown)
    assert "&lt;script&gt;" in shown


def test_a_profile_shows_the_mean_loss_of_each_role(tiny_profile: SensitivityProfile) -> None:
    shown = tiny_profile._repr_html_()
    metric = [name for name, t in tiny_profile.losses.items() if t.unit_of_measure == "nats/token"][-1]
    assert f"by &#x27;{metric}&#x27;" in shown
    f = tiny_profile.candidates.format_index("int3_g64")
    for role in {unit.role for unit in tiny_profile.candidates.units}:
        members = [
            u
            for u, unit in enumerate(tiny_profile.candidates.units)
            if unit.role == role and tiny_profile.candidates.allowed[u, f]
        ]
        row = re.search(rf"<tr><th>{role}</th>(.*?)</tr>", shown)
        assert row is not None
        cell = re.findall(r"<td>([^<]*)</td>", row[1])[1 + f]
        mean = sum(tiny_profile.losses[metric].loss[u, f] for u in members) / len(members) if members else None
        assert cell == ("–" if mean is None else f"{mean:.4g}")


def test_names_in_a_profile_stay_text(tiny_profile: SensitivityProfile) -> None:
    hostile = replace(tiny_profile, provenance={**tiny_profile.provenance, "model": HOSTILE})
    assert "script" not in tags_of(hostile._repr_html_())


def test_a_frontier_is_a_list_that_shows_a_line(tiny_profile: SensitivityProfile, tiny_store: Store) -> None:
    found = allocator.frontier(tiny_profile, points=5, store=tiny_store)
    assert isinstance(found, list) and isinstance(found, Frontier)
    shown = found._repr_html_()
    assert tags_of(shown).count("tr") == len(found) + 1
    line = re.search(r'points="([^"]*)"', shown)
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line[1].split()]
    assert len(places) == sum(point["predicted_loss"] > 0 for point in found)
    # More memory is further right, and loses no more: further down.
    assert places == sorted(places)
    assert [y for _, y in places] == sorted(y for _, y in places)


def test_a_frontier_of_one_point_has_no_line() -> None:
    point = {"memory_bytes": 1.0, "bits_per_weight": 4.0, "predicted_loss": 0.1, "lower_bound": 0.1}
    shown = frontier_html([{**point, "shadow_price_per_mib": float("nan")}])
    assert "svg" not in tags_of(shown)
    assert "<td>–</td>" in shown
