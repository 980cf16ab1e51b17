"""The pieces that notebooks show: escaped, cut, tinted by bits."""

import pytest

from runtime.notebook_html import MOST_ROWS, bits_shade, html_heading, html_table


def test_everything_is_escaped() -> None:
    shown = html_heading("<b>", "<i>") + html_table(["<script>"], [["</td>", "<img src=x>"]])
    for tag in ("<b>", "<i>", "<script>", "<img", "</td><", "</td>&"):
        assert tag not in shown.replace("</td></tr>", "")
    assert "&lt;img src=x&gt;" in shown


def test_long_tables_are_cut_and_say_so() -> None:
    shown = html_table(["n"], [[i] for i in range(MOST_ROWS + 5)])
    assert shown.count("<tr>") == MOST_ROWS + 1
    assert "5 more rows." in shown


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (float("nan"), "–"), (None, "–"), (3, "3"), ("x", "x")]
)
def test_numbers_are_short(value: object, text: str) -> None:
    assert f"<td>{text}</td>" in html_table(["a", "b"], [["row", value]])


def test_more_bits_are_tinted_more_strongly_within_bounds() -> None:
    shades = [bits_shade(bits) for bits in (0, 1, 2, 3, 4, 8, 16, 32)]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (pytest.approx(0.1), pytest.approx(0.7))
    assert "rgba(70, 120, 220, 0.70)" in html_table(["", "q"], [["layer 0", "bf16"]], shades=[[bits_shade(16)]])
