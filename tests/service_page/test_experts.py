"""The page of a mixture's experts, against what the service says of them."""

import httpx2
import pytest
from playwright.sync_api import Page, expect

from tests.service_page.conftest import MIXTURE
from tests.service_page.journeys import open_plan

# The first test of a session waits for processes that import torch and measure.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def experts_page(page: Page, measured_models: None) -> Page:
    """The experts of the mixture."""
    page.goto("/")
    open_plan(page, MIXTURE)
    page.get_by_role("link", name="Experts").click()
    expect(page.get_by_role("region", name="Experts by layer")).to_be_visible()
    return page


def test_table_says_what_was_measured(experts_page: Page, service_url: str) -> None:
    models = httpx2.get(f"{service_url}/models").json()["items"]
    [profile_id] = [model["profiles"][0]["id"] for model in models if model["name"] == MIXTURE]
    layers = httpx2.get(f"{service_url}/profiles/{profile_id}").json()["experts"]["layers"]
    experts_page.get_by_text("Experts as a table").click()
    rows = experts_page.get_by_role("region", name="Experts", exact=True).get_by_role("row")
    expect(rows).to_have_count(1 + sum(len(layer["frequency"]) for layer in layers))
    cells = rows.nth(1).get_by_role("cell").all_inner_texts()
    assert cells[3] == str(layers[0]["coverage"][0])
    assert float(cells[2].removesuffix(" %")) == pytest.approx(100 * layers[0]["frequency"][0], abs=0.5)


def test_map_is_read_by_keys(experts_page: Page) -> None:
    experts_page.get_by_label("Bits", exact=True).check()
    experts_page.locator("canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        experts_page.keyboard.press(key)
    expect(experts_page.get_by_text("Layer 1, expert 1:")).to_contain_text(".")
    # The graph follows the layer.
    expect(experts_page.get_by_role("combobox", name="Layer")).to_have_value("1")


def test_graph_has_every_expert(experts_page: Page) -> None:
    graph = experts_page.get_by_role("img", name="Affinity of the experts of layer 0")
    expect(graph.locator("circle")).to_have_count(4)
    expect(graph.locator("line").first).to_be_attached()
