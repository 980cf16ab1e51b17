"""A service with tiny models, and a browser to look at its page."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from sensitivity.measure_config import MeasureConfig
from tests.service_page.service_process import serve
from tests.tiny_measurements import CACHE_FORMATS, CONFIG, FORMATS

ROOT = Path(__file__).parents[2]
# A name that would run, were it ever taken for HTML.
WILD_NAME = "<script>window.broken = true</script><img src=x onerror='window.broken = true'>"
MIXTURE = "mixture"


@pytest.fixture(scope="session")
def measure_options() -> str:
    """The options of a tiny measurement, as they are typed into the page."""
    amounts = {f.name: getattr(CONFIG, f.name) for f in fields(MeasureConfig)}
    changed = {name: value for name, value in amounts.items() if value != getattr(MeasureConfig(), name)}
    text = {"calibration": "calibration.txt", "formats": FORMATS, "cache_formats": CACHE_FORMATS}
    return json.dumps({**text, **changed})


@pytest.fixture(scope="session")
def model_root(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, tiny_qwen_moe_dir: Path, tiny_text: Path
) -> Path:
    """A directory that the service may read: a dense model, a mixture of experts, and text."""
    root = tmp_path_factory.mktemp("page_models")
    shutil.copytree(tiny_llama_dir, root / "tiny")
    shutil.copytree(tiny_qwen_moe_dir, root / "mixture")
    shutil.copy(tiny_text, root / "calibration.txt")
    return root


@pytest.fixture(scope="session")
def service_url(tmp_path_factory: pytest.TempPathFactory, model_root: Path) -> Iterator[str]:
    """The address of a service that knows no model yet."""
    with serve(tmp_path_factory.mktemp("page_service") / "cache", [model_root]) as url:
        yield url


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser's program."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    return Path(found)


# Not of the session: as long as it runs, no other test of this process can run an event loop.
@pytest.fixture(scope="module")
def playwright_driver() -> Iterator[Playwright]:
    """Playwright, which stops with the tests of a file."""
    # Workers of other tests share the cores; nothing here measures time.
    expect.set_options(timeout=120_000)
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(chromium: Path, playwright_driver: Playwright) -> Iterator[Browser]:
    """A browser without a window."""
    # A sandbox of its own is not to be had inside a container.
    launched = playwright_driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    yield launched
    launched.close()


@pytest.fixture(scope="session")
def measured_models(service_url: str, measure_options: str) -> None:
    """Both models, measured by the service's worker; the dense one's formats are timed too."""
    with httpx2.Client(base_url=service_url, timeout=60.0) as client:
        for path, name in (("tiny", WILD_NAME), ("mixture", MIXTURE)):
            model = client.post("/models", json={"path": path, "name": name}).json()
            options = {**json.loads(measure_options), "latency": path == "tiny"}
            body = {"kind": "measure", "model_id": model["id"], "options": options}
            job = client.post("/jobs", json=body).json()
            with client.stream("GET", f"/jobs/{job['id']}/events", timeout=600.0) as events:
                assert "event: end" in list(events.iter_lines())
            assert client.get(f"/jobs/{job['id']}").json()["state"] == "succeeded"


@pytest.fixture
def page(browser: Browser, service_url: str) -> Iterator[Page]:
    """A tab with an empty session at the service; what goes wrong in it fails the test."""
    context = browser.new_context(base_url=service_url, viewport={"width": 1600, "height": 1000})
    # Of the context, so that it holds for pages that a link opens too.
    context.set_default_timeout(120_000)
    tab = context.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    # Answers such as 422 are told by the browser as errors of loading; the page shows them itself.
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" and "status of 4" not in m.text else None)
    yield tab
    context.close()
    assert errors == []
