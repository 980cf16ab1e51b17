"""The page on SmolLM2-135M in a browser: from a move of the budget to its plan on the screen. Writes page.md.

    python benchmarks/bench_page.py [--screenshot FILE]

The whole way of a person: add the model, watch it measured, drag the budget, look at a unit, export, open the report.
The measurement is a light one (the Fisher sketch on 12 sequences) and is kept in the cache, so a second run starts at
the drag. Times are the page's own (`performance.measure`): from the event of the pointer to the task after the frame
in which the plan, its heat map, its bars and its chart were drawn. Needs chromium (Debian: apt-get install chromium).
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
from pathlib import Path

from machine import describe_machine
from playwright.sync_api import Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))

from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from tests.service_page.journeys import add_model, figure, open_plan, slider, wait_for_plan, wait_until_measured
from tests.service_page.service_process import serve

NAME = "SmolLM2-135M"
MEASURE = "bitplan:budget-to-plan"
MOVES, EVERY_MS = 200, 16
OPTIONS = {
    "metrics": ["weight_error", "fisher"],
    "fisher_sequences": 12,
    "fit_plans": None,
    "selection_sequences": 2,
    "evaluation_sequences": 4,
    "evaluation_sequence_tokens": 96,
    "calibration": "calibration.jsonl",
}


def drag(page: Page) -> tuple[list[float], int, float]:
    """Returns what came of dragging the budget: the times of the plans that were drawn, in ms, the questions that were
    asked, and the ms of processor time that the page's thread took for each plan."""
    asked = 0
    browser = page.context.new_cdp_session(page)
    browser.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy_s() -> float:
        found = {entry["name"]: entry["value"] for entry in browser.send("Performance.getMetrics")["metrics"]}
        return float(found["TaskDuration"])

    def count(method: str) -> None:
        nonlocal asked
        asked += method == "POST"

    page.on("request", lambda request: count(request.method))
    page.evaluate(f"performance.clearMeasures('{MEASURE}')")
    before_s = busy_s()
    plot = page.locator(".u-over").bounding_box()
    assert plot is not None
    height = plot["y"] + plot["height"] / 2
    page.mouse.move(plot["x"] + 0.1 * plot["width"], height)
    page.mouse.down()
    for step in range(MOVES):
        page.mouse.move(plot["x"] + (0.1 + 0.8 * step / MOVES) * plot["width"], height)
        page.wait_for_timeout(EVERY_MS)
    page.mouse.up()
    wait_for_plan(page)
    page.wait_for_timeout(200)
    times = page.evaluate(f"performance.getEntriesByName('{MEASURE}').map((entry) => entry.duration)")
    return sorted(times), asked, 1e3 * (busy_s() - before_s) / len(times)


def walk(page: Page, model: str, screenshot: Path | None) -> str:
    """Goes the whole way and returns the row of the drag."""
    page.goto("/")
    page.get_by_role("heading", name="Models").wait_for()
    add_model(page, model, name=NAME, options=json.dumps(OPTIONS))
    wait_until_measured(page, NAME)
    open_plan(page, NAME)
    times, asked, busy_ms = drag(page)
    page.get_by_label("At most").fill("70")
    page.get_by_label("At most").press("Enter")
    wait_for_plan(page)
    if screenshot is not None:
        page.mouse.move(0, 0)
        page.screenshot(path=screenshot, full_page=True)
    page.get_by_role("grid").get_by_role("button").nth(7).click()
    expect(page.get_by_role("dialog").get_by_text("Price = loss")).to_be_visible()
    page.keyboard.press("Escape")
    solve_ms = re.search(r"solved in ([\d.]+) ms", page.locator("dl.figures").inner_text())
    print(figure(page, "loss").inner_text(), slider(page).get_attribute("aria-valuetext"), file=sys.stderr)
    export_and_report(page)
    shown = [statistics.median(times), times[int(0.95 * len(times))], times[-1], busy_ms]
    cells = [MOVES, asked, len(times), *(f"{ms:.0f}" for ms in shown), "–" if solve_ms is None else solve_ms[1]]
    return f"| {' | '.join(map(str, cells))} |"


def export_and_report(page: Page) -> None:
    """Has the plan packed and its report written, and opens the report."""
    page.get_by_role("button", name="Export …").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Export for").click()
    expect(dialog.get_by_role("button", name="Download")).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Report …").click()
    dialog.get_by_role("button", name="Write the report").click()
    with page.context.expect_page() as opened:
        dialog.get_by_role("link", name="Open report.html").click()
    expect(opened.value.get_by_role("heading").first).to_be_visible()
    page.keyboard.press("Escape")


def main() -> None:
    """Runs the walk and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshot", type=Path, help="where to keep a picture of the page")
    arguments = parser.parse_args()
    other_work = os.getloadavg()[0]
    root = Store().root
    model = prepare_demo_model(root)
    chromium = shutil.which("chromium")
    assert chromium is not None, "needs chromium"
    roots = [root, Path(__file__).parent.parent / "allocator" / "texts"]
    with serve(root, roots) as url, sync_playwright() as driver:
        expect.set_options(timeout=600_000)
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(base_url=url, viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(600_000)
        row = walk(page, str(model), arguments.screenshot)
        browser.close()
    header = (
        "| moves | questions | plans drawn | median ms | p95 ms | most ms | page's processor ms a plan | solve ms |\n"
        f"|{'---|' * 8}"
    )
    text = (
        "# The page: from a move of the budget to its plan on the screen\n\n"
        f"SmolLM2-135M, 211 units × 7 formats; server, worker and browser on one machine: {describe_machine()}.\n"
        f"The pointer moves every {EVERY_MS} ms. Load average of other work before it began: {other_work:.0f}. "
        f"Written by `benchmarks/bench_page.py`.\n\n{header}\n{row}\n"
    )
    (Path(__file__).parent / "page.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
