"""Checks that everybody can use a page: names of controls, contrast of text, visible focus, no sideways scroll."""

from typing import Any

from playwright.sync_api import Page

CONTROLS = {
    *("button", "checkbox", "combobox", "dialog", "grid", "img", "link", "progressbar", "radio", "slider", "textbox"),
    *("region", "Canvas", "image"),
}
LEAST_CONTRAST = 4.5

# Every text that is shown, with its contrast to what lies behind it (WCAG 2.2, 1.4.3): relative luminance of sRGB,
# translucent grounds laid over each other from the outermost inwards.
_CONTRASTS = """() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const context = canvas.getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const groundOf = (element) => {
    const chain = [];
    for (let e = element; e; e = e.parentElement) chain.push(rgba(getComputedStyle(e).backgroundColor));
    return chain.reverse().reduce((below, top) => over(top, below), [1, 1, 1, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const element = walker.currentNode.parentElement;
    const style = getComputedStyle(element);
    const box = element.getBoundingClientRect();
    if (!text || !element.checkVisibility({ visibilityProperty: true }) || style.fontSize === '0px') continue;
    if (box.width < 2 || box.height < 2 || element.closest('script, style, :disabled, .visually-hidden')) continue;
    const ground = groundOf(element);
    const ink = over(rgba(element.closest('svg') ? style.fill : style.color), ground);
    const [light, dark] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    found.push({ text: text.slice(0, 60), contrast: (light + 0.05) / (dark + 0.05) });
  }
  return found;
}"""

# What has the focus after the Tab key, and whether it, or what stands for it, is outlined.
_FOCUS = """() => {
  const element = document.activeElement;
  const outlined = (e) => {
    const style = e && getComputedStyle(e);
    return style && style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1;
  };
  const stands = [element, element.closest('label'), element.querySelector('.grip')];
  return {
    name: element === document.body ? '' : element.outerHTML.slice(0, 120),
    visible: stands.some(outlined),
  };
}"""


def list_nameless(page: Page) -> list[str]:
    """Returns the controls, pictures and regions that have no accessible name, as the browser computes it."""
    session = page.context.new_cdp_session(page)
    nodes: list[dict[str, Any]] = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]
    assert shown, "a page without controls is not what was meant to be checked"
    return [node["role"]["value"] for node in shown if not node.get("name", {}).get("value", "").strip()]


def list_faint(page: Page) -> list[dict[str, Any]]:
    """Returns the texts whose contrast is below 4.5."""
    texts: list[dict[str, Any]] = page.evaluate(_CONTRASTS)
    assert len(texts) > 5, "a page without text is not what was meant to be checked"
    return [text for text in texts if text["contrast"] < LEAST_CONTRAST]


def list_unfocused(page: Page, most: int) -> tuple[list[str], list[str]]:
    """Walks through the page by the Tab key; returns the stops, and those of them whose focus is not to be seen."""
    stops: list[str] = []
    hidden: list[str] = []
    page.evaluate("document.activeElement?.blur()")
    for _ in range(most):
        page.keyboard.press("Tab")
        stop = page.evaluate(_FOCUS)
        if not stop["name"] or (stops and stop["name"] == stops[0]):
            break
        stops.append(stop["name"])
        if not stop["visible"]:
            hidden.append(stop["name"])
    return stops, hidden


def sideways_scroll(page: Page) -> int:
    """Returns how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))
