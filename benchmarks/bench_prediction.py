"""Predicted against measured KL of random and optimised plans between 3 and 6 bits, SmolLM2-135M. Writes prediction.md.

The plans are drawn anew: none of them is among those that the profile's correction was fitted to, and the text is not
the one it was fitted on.
"""

import sys
from pathlib import Path

import numpy as np
from bench_allocation import measured_demo
from machine import describe_machine
from scipy.stats import spearmanr

from allocator.assignments import Assignment, bits_per_weight
from allocator.problems import build_cost_tables
from allocator.progress import shown_progress
from allocator.store import Store
from allocator.verification import score_cached
from sensitivity.measure_config import FISHER
from sensitivity.prediction.prediction_fit import draw_choices

PLANS = 36
SEED = 100  # not the measurement's


def main() -> None:
    store = Store()
    with shown_progress() as progress:
        model, profile = measured_demo(store, progress)
        memory = build_cost_tables(profile)["memory_bytes"]
        weights = np.array([unit.weight_count for unit in profile.candidates.units], dtype=np.float64)
        choices = draw_choices(
            profile.losses[FISHER].loss, memory.cost, profile.candidates.allowed, weights, count=PLANS, seed=SEED
        )
        formats = {
            f"{p:02d}": Assignment(name=f"{p:02d}", kind="plan", metric=FISHER, choice=choice).formats_by_weight(
                profile.candidates
            )
            for p, choice in enumerate(choices)
        }
        scores = score_cached(
            profile,
            formats,
            profile.selection_tokens,
            load_model=lambda: model.reference.model,
            store=store,
            progress=progress,
        )
    measured = np.array([scores[name].kl.mean() for name in formats])
    units = np.arange(len(weights))
    bits = [bits_per_weight(profile, float(memory.cost[units, choice].sum()) + memory.fixed) for choice in choices]
    lines = [
        "# Predicted against measured KL, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_prediction.py`. Machine: {describe_machine()}.",
        "",
        f"{PLANS} plans of {min(bits):.2f} to {max(bits):.2f} stored bits per weight, every second one optimised for "
        f"its size, the others random; KL measured on {profile.selection_tokens.size} tokens. Corrected: by the "
        "power law that `measure` fitted to other plans on calibration text. Slope: of measured on predicted.",
        "",
        "| metric | Spearman | slope, uncorrected | slope, corrected | median factor, corrected | error that reports "
        "state |",
        "|---|---|---|---|---|---|",
    ]
    for metric, fit in profile.prediction_fits.items():
        predicted = profile.losses[metric].loss[units, choices].sum(axis=1)
        corrected = np.array([fit.correct(p) for p in predicted])
        factor = float(np.exp(np.median(np.abs(np.log(measured / corrected)))))
        lines.append(
            f"| {metric} | {spearmanr(predicted, measured).statistic:.4f} | {slope(predicted, measured):.3f} | "
            f"{slope(corrected, measured):.3f} | {factor:.3f} | {fit.error_factor:.3f} |"
        )
    lines += ["", "| bits per weight | plan | predicted (fisher) | corrected | measured |", "|---|---|---|---|---|"]
    fit = profile.prediction_fits[FISHER]
    for p, choice in enumerate(choices):
        predicted_kl = float(profile.losses[FISHER].loss[units, choice].sum())
        kind = "random" if p % 2 else "optimised"
        lines.append(
            f"| {bits[p]:.2f} | {kind} | {predicted_kl:.4f} | {fit.correct(predicted_kl):.4f} | {measured[p]:.4f} |"
        )
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "prediction.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the slope of y on x with an intercept."""
    return float(np.polyfit(x, y, 1)[0])


if __name__ == "__main__":
    main()
