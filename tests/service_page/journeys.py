"""What a person does on the page, step by step, by the names that are read out for each control."""

import re

from playwright.sync_api import Locator, Page, expect


def add_model(page: Page, path: str, *, name: str, options: str, timed: bool = False) -> None:
    """Adds a model and has it measured, its formats timed where this is wanted."""
    page.get_by_role("button", name="Add a model").click()
    page.get_by_label("Path, on the server").fill(path)
    page.get_by_label("Name, if not that of the directory").fill(name)
    if timed:
        page.get_by_label("Time its formats on the server too").check()
    page.get_by_text("Options of the measurement").click()
    page.get_by_label("JSON, as the fields of the API").fill(options)
    page.get_by_role("button", name="Add", exact=True).click()


def wait_until_measured(page: Page, name: str) -> None:
    """Waits for the link that a measured model has."""
    expect(page.get_by_role("link", name=f"Plan {name}", exact=True)).to_be_visible(timeout=180_000)


def open_plan(page: Page, name: str) -> None:
    """Opens the page of a measured model and waits for its frontier and its plan."""
    page.get_by_role("link", name=f"Plan {name}", exact=True).click()
    wait_for_plan(page)


def compare_two(page: Page) -> None:
    """Pins the plan that is shown, and compares it with the largest one."""
    page.get_by_role("button", name="Pin, to compare").click()
    slider(page).focus()
    page.keyboard.press("End")
    wait_for_plan(page)
    page.get_by_role("link", name="Compare with the pinned plan").click()
    expect(page.get_by_text("units are stored otherwise")).to_be_visible()


def wait_for_plan(page: Page) -> None:
    """Waits until the plan of the present budget and the frontier are there."""
    expect(slider(page)).to_be_visible()
    expect(page.get_by_role("region", name="Plan", exact=True)).to_have_attribute("aria-busy", "false")
    expect(figure(page, "bytes")).to_be_visible()


def slider(page: Page) -> Locator:
    """Returns the budget's handle."""
    return page.get_by_role("slider", name=re.compile("Budget"))


def figure(page: Page, name: str) -> Locator:
    """Returns one of the plan's large numbers: loss, bytes or bits."""
    return page.locator(f"[data-figure={name}]")


def number_of(text: str) -> float:
    """Returns the first number of a text."""
    found = re.search(r"\d+(\.\d+)?(e[−-]?\d+)?", text)
    assert found is not None, text
    return float(found[0].replace("−", "-"))
