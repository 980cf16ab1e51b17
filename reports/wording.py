"""Numbers and findings in words that a person who has never seen the tool understands."""

from __future__ import annotations

import math

import pandas as pd

from reports.report import Headline
from reports.tables import MIB


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits: '0.0123', '1,234', '2.5e-7'; a dash for a missing one."""
    if value is None or pd.isna(value):
        return "–"
    if not math.isfinite(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    # Rounded first: 0.9996 has the size of 1.00.
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    places = digits - 1 - int(exponent)
    readable = -5 < int(exponent) < 7
    text = f"{round(value, places):,.{max(0, places)}f}" if readable else f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def size(memory_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves a number of 1 or more: '69.9 MiB'."""
    for unit, scale in (("TiB", MIB**2), ("GiB", MIB * 1024), ("MiB", MIB), ("KiB", 1024)):
        if memory_bytes >= scale:
            return f"{number(memory_bytes / scale)} {unit}"
    return f"{number(memory_bytes)} bytes"


def percent(fraction: float) -> str:
    """A fraction as a percentage: 0.0042 -> '0.42 %'."""
    return f"{number(100 * fraction, digits=2 if abs(fraction) < 1 else 3)} %"


def interval(low: float | None, high: float | None) -> str:
    """'[0.11, 0.13]', or nothing where it is unknown."""
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{number(low)},\u00a0{number(high)}]"


def certificate_sentence(headline: Headline) -> str:
    """What was proven about the plan, and under which assumption."""
    if math.isinf(headline.relative_gap):
        return "Nothing was proven: the solver gave no lower bound, so a better plan may exist."
    if headline.relative_gap < 1e-9:
        return "Proven best possible under its own predictions."
    return f"Proven within {percent(headline.relative_gap)} of the best possible under its own predictions."


def uniform_sentence(headline: Headline) -> str:
    """The plan against the best uniform baseline."""
    name, uniform_kl = headline.best_uniform_name, headline.best_uniform_kl
    if name is None or uniform_kl is None:
        return "No uniform baseline fits the same budget."
    against = f"the best uniform baseline, {name} (KL {number(uniform_kl)})"
    if headline.measured_kl <= 0 or uniform_kl <= 0:
        return f"Compare with {against}."
    if uniform_kl > headline.measured_kl_high:
        return f"{number(uniform_kl / headline.measured_kl, 2)} times less than {against}."
    if uniform_kl >= headline.measured_kl_low:
        return f"Not distinguishable from {against}."
    return f"{number(headline.measured_kl / uniform_kl, 2)} times more than {against}."


def perplexity_sentence(headline: Headline) -> str:
    """The change of perplexity."""
    change = headline.perplexity / headline.reference_perplexity - 1
    if abs(change) < 5e-4:
        return "As good as unchanged."
    return f"{percent(abs(change))} {'higher' if change > 0 else 'lower'} than before."


def prediction_sentence(headline: Headline) -> str:
    """How well the prediction of the shipped plan held."""
    predicted, measured = headline.predicted_kl, headline.measured_kl
    if math.isnan(predicted):
        return f"Measured {number(measured)}; the metric of this plan predicts no nats per token."
    if predicted <= 0:
        return f"The prediction was {number(predicted)}, the measurement {number(measured)}."
    ratio = measured / predicted
    if 0.95 <= ratio <= 1.05:
        return "Measured as predicted."
    return f"The whole model was measured to lose {number(ratio, 2)} times the predicted {number(predicted)}."


def count(amount: int, noun: str) -> str:
    """'1 unit', '211 units'."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def bound_sentence(headline: Headline) -> str:
    """The two numbers of the certificate."""
    minimised = {"nats per token": "predicted loss", "bytes": "size"}.get(headline.objective_unit, "minimised error")
    found = f"This plan's {minimised} is {number(headline.objective, 4)} {headline.objective_unit}"
    if math.isinf(headline.relative_gap):
        return f"{found}."
    return f"{found}; no plan within the budget can be below {number(headline.lower_bound, 4)}."
