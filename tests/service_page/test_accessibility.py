"""Every view in both widths and both themes: names, contrast, focus, width; screenshots of each are kept."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.service_page.accessibility import list_faint, list_nameless, list_unfocused, sideways_scroll
from tests.service_page.conftest import MIXTURE, WILD_NAME
from tests.service_page.journeys import open_plan, slider, wait_for_plan

# The first test of a session waits for processes that import torch and measure.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Not below pytest's directory: they are there to be looked at.
SCREENSHOTS = Path(__file__).parents[2] / "build" / "page-screenshots"
WIDTHS = (400, 1600)
Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")


def show_models(page: Page) -> None:
    expect(page.get_by_role("link", name="Plan").first).to_be_visible()


def show_plan(page: Page) -> None:
    open_plan(page, WILD_NAME)


def show_unit(page: Page) -> None:
    open_plan(page, WILD_NAME)
    page.get_by_role("grid").get_by_role("button").first.click()
    expect(page.get_by_role("dialog").get_by_role("row").first).to_be_visible()


def show_export(page: Page) -> None:
    open_plan(page, WILD_NAME)
    page.get_by_role("button", name="Export …").click()
    expect(page.get_by_role("dialog").get_by_text("The rules cost")).to_be_visible()


def show_report(page: Page) -> None:
    open_plan(page, WILD_NAME)
    page.get_by_role("button", name="Report …").click()
    expect(page.get_by_role("dialog").get_by_role("button", name="Write the report")).to_be_visible()


def show_latency(page: Page) -> None:
    open_plan(page, WILD_NAME)
    page.get_by_label("Latency", exact=True).check()
    expect(page.get_by_role("heading", name="Least predicted loss at every latency")).to_be_visible()
    wait_for_plan(page)


def show_comparison(page: Page) -> None:
    open_plan(page, WILD_NAME)
    page.get_by_role("button", name="Pin, to compare").click()
    slider(page).focus()
    page.keyboard.press("PageUp")
    page.keyboard.press("PageUp")
    wait_for_plan(page)
    page.get_by_role("link", name="Compare with the pinned plan").click()
    expect(page.get_by_text("units are stored otherwise")).to_be_visible()


def show_experts(page: Page) -> None:
    open_plan(page, MIXTURE)
    page.get_by_role("link", name="Experts").click()
    expect(page.get_by_role("region", name="Affinity", exact=True)).to_be_visible()


def show_adding(page: Page) -> None:
    page.get_by_role("button", name="Add a model").click()
    page.get_by_text("Options of the measurement").click()


VIEWS: dict[str, Callable[[Page], None]] = {
    "models": show_models,
    "adding": show_adding,
    "plan": show_plan,
    "unit": show_unit,
    "export": show_export,
    "report": show_report,
    "latency": show_latency,
    "comparison": show_comparison,
    "experts": show_experts,
}


@pytest.fixture(params=[(width, theme) for width in WIDTHS for theme in THEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def window(
    browser: Browser, service_url: str, measured_models: None, request: pytest.FixtureRequest
) -> Iterator[tuple[Page, str]]:
    """A window of one width in one theme, and both as a text."""
    width, theme = request.param
    context = browser.new_context(
        base_url=service_url, viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce"
    )
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto("/")
    yield page, f"{width}-{theme}"
    context.close()


@pytest.mark.parametrize("view", VIEWS)
def test_view(window: tuple[Page, str], view: str) -> None:
    page, name = window
    VIEWS[view](page)
    page.mouse.move(0, 0)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{view}-{name}.png", full_page=page.get_by_role("dialog").count() == 0)
    assert list_nameless(page) == []
    assert list_faint(page) == []
    assert sideways_scroll(page) <= 0


def test_every_stop_of_the_tab_key_is_seen(page: Page, measured_models: None) -> None:
    page.goto("/")
    open_plan(page, WILD_NAME)
    stops, hidden = list_unfocused(page, most=60)
    assert hidden == []
    # Of the grid one cell is a stop; the others are reached by arrow keys.
    assert sum('class="cell' in stop for stop in stops) <= 1 + page.locator(".outside .cell").count()
    assert any('role="slider"' in stop for stop in stops)


def test_theme_is_changed_and_kept(page: Page) -> None:
    page.goto("/")

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    page.get_by_role("button", name="Theme: system").click()
    light = ground()
    page.get_by_role("button", name="Theme: light").click()
    assert ground() != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert ground() != light
