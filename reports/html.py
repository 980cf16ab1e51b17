"""Writes a report as one HTML file that opens from disk and loads nothing from anywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from reports import wording
from reports.atomic_files import write_atomically
from reports.glossary import GLOSSARY
from reports.page_parts import Chart, Section
from reports.palettes import DARK, LIGHT, css_variables
from reports.report import Report
from reports.sections import build_sections

# Beside the sections, in the list of links.
_REPORT_LINKS = (("provenance", "Where the numbers come from"), ("glossary", "Glossary"))


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _plotly_script() -> Markup:
    return Markup(script_safe(get_plotlyjs()))


def render_page(template: str, sections: tuple[Section, ...], **values: Any) -> str:
    """A page of a template as text, everything that it shows inside it.

    Args:
        template: name of the template's file.
        sections: the sections with charts.
        values: what else the template names.
    """
    charts = [chart for section in sections for chart in section.charts]
    return (
        _environment()
        .get_template(template)
        .render(
            sections=sections,
            wording=wording,
            light_variables=Markup(css_variables(LIGHT)),
            dark_variables=Markup(css_variables(DARK)),
            plotly_script=_plotly_script() if charts else "",
            chart_data=Markup(figures_json(charts)),
            **values,
        )
    )


def render_html(report: Report) -> str:
    """The whole page as text."""
    headline = report.headline
    return render_page(
        "report.html.j2",
        build_sections(report),
        title=report.title,
        report=report,
        headline=headline,
        glossary=GLOSSARY,
        share=headline.memory_bytes / headline.reference_memory_bytes,
        further_links=_REPORT_LINKS,
    )


def figures_json(charts: list[Chart]) -> str:
    """Figures as JSON that cannot end the script element it stands in.

    Returns:
        {chart key: {"wide": figure, "narrow": figure}}; < > & are written as escapes.
    """
    entries = [f'"{chart.key}":{{"wide":{chart.wide.to_json()},"narrow":{chart.narrow.to_json()}}}' for chart in charts]
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
