"""The way of a person through the page, in a real browser on a real service: from a directory to files and a report."""

import json
import re
import tarfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.service_page.conftest import MIXTURE, WILD_NAME
from tests.service_page.journeys import (
    add_model,
    compare_two,
    figure,
    number_of,
    open_plan,
    slider,
    wait_for_plan,
    wait_until_measured,
)

# The first test of a session waits for processes that import torch and measure.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def plan_page(page: Page, measured_models: None) -> Page:
    """The page of the dense model."""
    page.goto("/")
    open_plan(page, WILD_NAME)
    return page


def test_measurement_is_watched(page: Page, measure_options: str) -> None:
    page.goto("/")
    options = json.dumps({**json.loads(measure_options), "seed": 1})
    add_model(page, "tiny", name=WILD_NAME, options=options, timed=True)
    row = page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=WILD_NAME))
    expect(row.get_by_role("progressbar")).to_be_visible()
    wait_until_measured(page, WILD_NAME)
    expect(row.get_by_role("progressbar")).to_have_count(0)
    # The name is text, wherever it stands.
    assert page.evaluate("window.broken") is None
    assert page.locator("main img, main script").count() == 0


def test_a_path_outside_is_refused_in_words(page: Page) -> None:
    page.goto("/")
    add_model(page, "../..", name="", options="")
    expect(page.get_by_role("dialog").get_by_role("alert")).to_be_visible()


def test_budget_is_dragged_and_the_plan_follows(plan_page: Page) -> None:
    before = figure(plan_page, "bytes").inner_text()
    plot = plan_page.locator(".u-over").bounding_box()
    assert plot is not None
    middle = plot["y"] + plot["height"] / 2
    plan_page.mouse.move(plot["x"] + 0.3 * plot["width"], middle)
    plan_page.mouse.down()
    for step in range(10):
        plan_page.mouse.move(plot["x"] + (0.3 + 0.05 * step) * plot["width"], middle)
    plan_page.mouse.up()
    wait_for_plan(plan_page)
    expect(figure(plan_page, "bytes")).not_to_have_text(before)
    # What is shown belongs to where the handle is: within the budget, and near it.
    limit = float(slider(plan_page).get_attribute("aria-valuenow") or "nan")
    assert 0.9 * limit / 1024 <= number_of(figure(plan_page, "bytes").inner_text()) <= limit / 1024 + 0.5
    assert plan_page.evaluate("performance.getEntriesByName('bitplan:budget-to-plan').length") >= 1


def test_budget_is_moved_by_keys(plan_page: Page) -> None:
    handle = slider(plan_page)
    handle.focus()
    plan_page.keyboard.press("Home")
    wait_for_plan(plan_page)
    least = number_of(figure(plan_page, "loss").inner_text())
    for key in ("PageUp", "ArrowRight", "End"):
        value = float(handle.get_attribute("aria-valuenow") or "nan")
        plan_page.keyboard.press(key)
        wait_for_plan(plan_page)
        assert float(handle.get_attribute("aria-valuenow") or "nan") > value
    assert number_of(figure(plan_page, "loss").inner_text()) < least


@pytest.mark.parametrize(("kind", "field"), [("Bits per weight", "4"), ("KL ceiling", "0.02")])
def test_other_kinds_of_budget(plan_page: Page, kind: str, field: str) -> None:
    plan_page.get_by_label(kind, exact=True).check()
    plan_page.get_by_label("At most").fill(field)
    plan_page.get_by_label("At most").press("Enter")
    wait_for_plan(plan_page)
    reached = figure(plan_page, "bits" if kind.startswith("Bits") else "loss").inner_text()
    assert 0 < number_of(reached) <= float(field)
    expect(slider(plan_page)).to_have_attribute("aria-valuenow", field)


def test_an_infeasible_budget_says_what_can_be_reached(plan_page: Page) -> None:
    plan_page.get_by_label("At most").fill("1 KiB")
    plan_page.get_by_label("At most").press("Enter")
    alert = plan_page.get_by_role("alert")
    expect(alert).to_contain_text("The least that can be reached")
    expect(figure(plan_page, "loss")).to_have_count(0)
    alert.get_by_role("button").click()
    wait_for_plan(plan_page)


def test_latency_is_dragged_on_its_own_axis(plan_page: Page) -> None:
    plan_page.get_by_label("Latency", exact=True).check()
    expect(plan_page.get_by_role("heading", name="Least predicted loss at every latency")).to_be_visible()
    handle = slider(plan_page)
    # A key meant for the axis before would be lost.
    expect(handle).to_have_attribute("aria-valuetext", re.compile("µs"))
    wait_for_plan(plan_page)
    # Both ends, and no more: where the quickest format is also the best, they are one.
    for key, end in (("Home", "aria-valuemin"), ("End", "aria-valuemax")):
        handle.press(key)
        wait_for_plan(plan_page)
        limit = handle.get_attribute(end) or "nan"
        expect(handle).to_have_attribute("aria-valuenow", limit)
        assert float(limit) > 0
    expect(plan_page.locator("dl.figures")).to_contain_text("per token")


def test_a_latency_needs_measured_latencies(page: Page, measured_models: None) -> None:
    page.goto("/")
    open_plan(page, MIXTURE)
    expect(page.get_by_label("Latency", exact=True)).to_be_disabled()


def test_a_cache_shares_the_budget(plan_page: Page) -> None:
    kib = number_of(figure(plan_page, "bytes").inner_text())
    plan_page.get_by_label("Context for the cache").fill("2048")
    plan_page.get_by_label("Context for the cache").press("Enter")
    plan_page.get_by_label("At most").fill("300 KiB")
    plan_page.get_by_label("At most").press("Enter")
    wait_for_plan(plan_page)
    expect(plan_page.get_by_text("Cache:")).to_be_visible()
    assert number_of(figure(plan_page, "bytes").inner_text()) > kib
    # The curve is that of weights and cache: what the line can be dragged to begins where no cache is free.
    assert float(slider(plan_page).get_attribute("aria-valuemin") or "nan") > 0
    expect(plan_page.get_by_label("Latency", exact=True)).to_be_disabled()


def test_a_unit_explains_its_format(plan_page: Page) -> None:
    cell = plan_page.get_by_role("grid").get_by_role("button").first
    cell.focus()
    plan_page.keyboard.press("ArrowRight")
    plan_page.keyboard.press("Enter")
    dialog = plan_page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name="Why model.layers.1")).to_be_visible()
    expect(dialog).to_contain_text("nats per MiB")
    # One row a format, one of them chosen.
    assert dialog.get_by_role("row").count() == 6
    expect(dialog.get_by_text("chosen", exact=False).last).to_be_visible()
    plan_page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)


def test_two_plans_are_compared(plan_page: Page) -> None:
    compare_two(plan_page)
    changes = plan_page.get_by_role("region", name="Units that differ", exact=True).first
    assert changes.get_by_role("row").count() >= 2


def test_every_chart_is_a_table_too(plan_page: Page) -> None:
    tables = plan_page.locator("main").get_by_text("as a table")
    assert tables.count() == 3
    for index in range(3):
        tables.nth(index).click()
    for caption in ("The frontier", "Bits by layer and role", "Bytes by role"):
        assert plan_page.get_by_role("region", name=caption, exact=True).last.get_by_role("row").count() > 2


def test_verified_plans_are_drawn(plan_page: Page) -> None:
    plan_page.get_by_role("button", name="Verify").click()
    expect(plan_page.get_by_text("Verification finished").first).to_be_visible(timeout=120_000)
    plan_page.get_by_text("The frontier as a table").click()
    table = plan_page.get_by_role("region", name="The frontier", exact=True)
    expect(plan_page.locator("dl.figures")).to_contain_text("95 % between")
    # Measured with an interval: the plan, and uniform formats beside it.
    expect(table.get_by_role("row").filter(has_text=" – ")).not_to_have_count(0)


def test_export_names_the_price_and_gives_the_files(plan_page: Page, tmp_path: Path) -> None:
    plan_page.get_by_role("button", name="Export …").click()
    dialog = plan_page.get_by_role("dialog")
    expect(dialog.get_by_text("The rules cost")).to_be_visible()
    dialog.get_by_role("button", name="Export for").click()
    with plan_page.expect_download(timeout=120_000) as download:
        dialog.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "export.tar")
    with tarfile.open(tmp_path / "export.tar") as archive:
        assert any(name.endswith((".safetensors", ".gguf", ".json")) for name in archive.getnames())


def test_report_opens(plan_page: Page) -> None:
    plan_page.get_by_role("button", name="Report …").click()
    dialog = plan_page.get_by_role("dialog")
    dialog.get_by_label("One page as PDF").check()
    dialog.get_by_role("button", name="Write the report").click()
    expect(dialog.get_by_role("button", name="Save report.pdf")).to_be_visible()
    check_report_opens(plan_page, "report.html")


def test_report_of_two_plans_opens(plan_page: Page) -> None:
    compare_two(plan_page)
    plan_page.get_by_role("button", name="Report of both …").click()
    plan_page.get_by_role("dialog").get_by_role("button", name="Write the report").click()
    check_report_opens(plan_page, "comparison.html")


def check_report_opens(page: Page, name: str) -> None:
    link = page.get_by_role("dialog").get_by_role("link", name=f"Open {name}")
    expect(link).to_be_visible()
    with page.context.expect_page() as opened:
        link.click()
    report = opened.value
    report.wait_for_load_state()
    expect(report.get_by_role("heading").first).to_be_visible()
