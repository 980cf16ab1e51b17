"""Writes the report as one HTML file that opens from disk and loads nothing from anywhere."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from reports import wording
from reports.atomic_files import write_atomically
from reports.glossary import GLOSSARY
from reports.page_parts import Section
from reports.palettes import DARK, LIGHT, css_variables
from reports.report import Report
from reports.sections import build_sections


def render_html(report: Report) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = build_sections(report)
    headline = report.headline
    return environment.get_template("report.html.j2").render(
        report=report,
        headline=headline,
        sections=sections,
        wording=wording,
        glossary=GLOSSARY,
        share=headline.memory_bytes / headline.reference_memory_bytes,
        light_variables=Markup(css_variables(LIGHT)),
        dark_variables=Markup(css_variables(DARK)),
        plotly_script=Markup(script_safe(get_plotlyjs())),
        chart_data=Markup(chart_data(sections)),
    )


def chart_data(sections: tuple[Section, ...]) -> str:
    """The figures of all sections as JSON that cannot end the script element it stands in.

    Returns:
        {chart key: {"wide": figure, "narrow": figure}}; < > & are written as escapes.
    """
    entries = [
        f'"{chart.key}":{{"wide":{chart.wide.to_json()},"narrow":{chart.narrow.to_json()}}}'
        for section in sections
        for chart in section.charts
    ]
    text = "{" + ",".join(entries) + "}"
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def script_safe(script: str) -> str:
    """JavaScript that can stand in a script element: what would end or nest the element is escaped.

    Inside string and regular-expression literals, the only places where code has these, `\\x3c` is `<`.
    """
    return script.replace("</script", "\\x3c/script").replace("<!--", "\\x3c!--")


def write_html(report: Report, path: Path | str) -> Path:
    """Writes the page to a temporary file, then renames it to `path`.

    Returns:
        The path.
    """
    target = Path(path)
    write_atomically(target, render_html(report))
    return target
