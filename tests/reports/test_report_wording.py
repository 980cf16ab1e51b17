"""Numbers and findings in words."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest

from reports import wording
from reports.glossary import GLOSSARY
from reports.report import Headline, Report


@pytest.fixture
def headline(dense_report: Report) -> Headline:
    """A plan of KL 0.2 [0.19, 0.21] against a uniform baseline of 0.6."""
    return replace(
        dense_report.headline,
        predicted_kl=0.16,
        measured_kl=0.2,
        measured_kl_low=0.19,
        measured_kl_high=0.21,
        best_uniform_name="int4",
        best_uniform_kl=0.6,
        objective=0.16,
        lower_bound=0.158,
        relative_gap=0.0125,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.12345, "0.123"),
        (0.9996, "1.00"),
        (0.00012345, "0.000123"),
        (0.000012345, "1.23e−5"),
        (1.5e-7, "1.50e−7"),
        (-2.5, "−2.50"),
        (1234.5, "1,230"),
        (2.5e8, "2.50e8"),
        (inf, "∞"),
        (-inf, "−∞"),
        (nan, "–"),
        (None, "–"),
    ],
)
def test_numbers_have_three_significant_digits(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("memory_bytes", "text"),
    [
        (500, "500 bytes"),
        (2048, "2.00 KiB"),
        (73_400_320, "70.0 MiB"),
        (3 * 2**30, "3.00 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_sizes_use_the_largest_unit(memory_bytes: int, text: str) -> None:
    assert wording.size(memory_bytes) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.0042, "0.42 %"), (0.271, "27 %"), (1.0, "100 %"), (2.34, "234 %"), (0.0, "0 %")],
)
def test_percentages(fraction: float, text: str) -> None:
    assert wording.percent(fraction) == text


def test_unknown_intervals_are_left_out() -> None:
    assert wording.interval(0.1, nan) == ""
    assert wording.interval(None, 0.1) == ""


@pytest.mark.parametrize(
    ("gap", "text"),
    [(0.0125, "Proven within 1.2 % of the best"), (0.0, "Proven best possible"), (inf, "Nothing was proven")],
)
def test_certificate_says_what_was_proven(headline: Headline, gap: float, text: str) -> None:
    assert wording.certificate_sentence(replace(headline, relative_gap=gap)).startswith(text)


def test_bound_is_named_only_if_there_is_one(headline: Headline) -> None:
    assert "no plan within the budget can be below 0.1580." in wording.bound_sentence(headline)
    assert "below" not in wording.bound_sentence(replace(headline, relative_gap=inf))


@pytest.mark.parametrize(
    ("uniform_kl", "text"),
    [
        (0.6, "3.0 times less than the best uniform baseline, int4 (KL 0.600)."),
        (0.205, "Not distinguishable from the best uniform baseline"),
        (0.1, "2.0 times more than the best uniform baseline"),
        (0.0, "Compare with the best uniform baseline"),
    ],
)
def test_comparison_with_uniform_is_honest(headline: Headline, uniform_kl: float, text: str) -> None:
    assert wording.uniform_sentence(replace(headline, best_uniform_kl=uniform_kl)).startswith(text)


def test_comparison_without_a_baseline(headline: Headline) -> None:
    none = replace(headline, best_uniform_name=None, best_uniform_kl=None)
    assert wording.uniform_sentence(none) == "No uniform baseline fits the same budget."


@pytest.mark.parametrize(
    ("predicted", "text"),
    [
        (0.16, "The whole model was measured to lose 1.2 times the predicted 0.160."),
        (0.2, "Measured as predicted."),
        (0.0, "The prediction was 0, the measurement 0.200."),
    ],
)
def test_prediction_is_held_against_the_measurement(headline: Headline, predicted: float, text: str) -> None:
    assert wording.prediction_sentence(replace(headline, predicted_kl=predicted)) == text


@pytest.mark.parametrize(
    ("perplexity", "text"), [(11.0, "10 % higher than before."), (9.0, "10 % lower"), (10.001, "As good as")]
)
def test_change_of_perplexity(headline: Headline, perplexity: float, text: str) -> None:
    changed = replace(headline, perplexity=perplexity, reference_perplexity=10.0)
    assert wording.perplexity_sentence(changed).startswith(text)


def test_glossary_is_in_alphabetical_order() -> None:
    assert list(GLOSSARY) == sorted(GLOSSARY, key=str.lower)
