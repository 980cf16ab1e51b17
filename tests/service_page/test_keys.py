"""A service that asks for keys: the page asks the person, keeps the key for the tab, and sends it everywhere."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.service_page.journeys import add_model, wait_until_measured
from tests.service_page.service_process import environment_of, serve

# The first test of a session waits for processes that import torch and measure.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[tuple[str, str]]:
    """The address of a service that asks for keys, and a key for everything."""
    cache = tmp_path_factory.mktemp("guarded_service") / "cache"
    command = [sys.executable, "-m", "allocator.cli", "keys", "add", "page", "--scope", "admin"]
    made = subprocess.run(command, env=environment_of(cache), capture_output=True, text=True, check=True)
    key = made.stdout.split()[-1]
    with serve(cache, [model_root], ["--require-keys"]) as url:
        yield url, key


@pytest.fixture
def guarded_page(browser: Browser, guarded: tuple[str, str]) -> Iterator[Page]:
    """A tab that knows no key."""
    context = browser.new_context(base_url=guarded[0])
    page = context.new_page()
    page.goto("/")
    yield page
    context.close()


def enter_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_wrong_key_is_refused_and_asked_for_again(guarded_page: Page, guarded: tuple[str, str]) -> None:
    enter_key(guarded_page, "wrong")
    expect(guarded_page.get_by_role("alert")).to_contain_text("did not accept")
    enter_key(guarded_page, guarded[1])
    expect(guarded_page.get_by_text("No model is known yet")).to_be_visible()
    guarded_page.reload()
    expect(guarded_page.get_by_text("No model is known yet")).to_be_visible()


def test_the_key_goes_with_event_streams(guarded_page: Page, guarded: tuple[str, str], measure_options: str) -> None:
    enter_key(guarded_page, guarded[1])
    add_model(guarded_page, "tiny", name="guarded", options=measure_options)
    wait_until_measured(guarded_page, "guarded")
    # Kept in this tab alone.
    stored = guarded_page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
    assert guarded[1] in stored[0]
    assert guarded[1] not in stored[1]
