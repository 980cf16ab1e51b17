"""Cross terms by estimator and regularisation against the diagonal plan, on SmolLM2-135M. Writes interactions.md.

The correlations of the logit sketch are given the Fisher diagonal's losses as their scale. Each regularisation keeps a
positive semidefinite matrix: a product, entry by entry, with a positive semidefinite mask, or a projection.
"""

import sys
from pathlib import Path

import numpy as np
from bench_allocation import EMBEDDING_FORMAT, measured_demo, pin_embedding, width_budget
from machine import describe_machine
from numpy.typing import NDArray

from allocator.assignments import Assignment
from allocator.interactions import sketch_from_gram
from allocator.planning import find_assignment
from allocator.problems import build_cost_tables, build_problem, resolve_limits
from allocator.progress import shown_progress
from allocator.store import Store
from allocator.verification import score_cached
from sensitivity.evaluation import mean_interval
from sensitivity.measure_config import FISHER
from sensitivity.profile import SensitivityProfile
from solvers import SolveResult, solve

WIDTHS = (3.0, 3.5, 4.0)
LOW_RANK = 16
FloatArray = NDArray[np.float64]


def main() -> None:
    store = Store()
    with shown_progress() as progress:
        model, profile = measured_demo(store, progress)
        pinned = pin_embedding(profile)
        plans = {width: make_plans(pinned, width) for width in WIDTHS}
        scores = score_cached(
            pinned,
            {
                f"{width:g} {name}": assignment.formats_by_weight(pinned.candidates)
                for width, named in plans.items()
                for name, assignment in named.items()
            },
            pinned.evaluation_tokens,
            load_model=lambda: model.reference.model,
            store=store,
            progress=progress,
        )
    text = render(pinned, {name: score.kl for name, score in scores.items()})
    (Path(__file__).parent / "interactions.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def make_plans(profile: SensitivityProfile, width: float) -> dict[str, Assignment]:
    """Returns the plans of one budget: the Fisher diagonal's, more cautious ones, and those with cross terms."""
    tables = build_cost_tables(profile)
    budget = width_budget(profile, tables, width)
    limits = resolve_limits(profile, budget)
    table = profile.table(FISHER)

    def named(result: SolveResult, name: str) -> Assignment:
        assert result.choice is not None
        return Assignment(name=name, kind="plan", metric=FISHER, choice=result.choice, result=result)

    plans = {"diagonal": find_assignment(profile, budget, tables, metric=FISHER)}
    for errors in (0.5, 1.0):
        name = f"diagonal + {errors:g} standard errors"
        plans[name] = named(solve(build_problem(profile, table.loss + errors * table.std_error, limits, tables)), name)
    for name, (correlation, factor) in list_correlations(profile).items():
        sketch = sketch_from_gram(correlation, table.loss, most_vectors=len(correlation))
        problem = build_problem(profile, table.loss, limits, tables, sketch=sketch, interaction_scale=factor)
        plans[name] = named(solve(problem, solver="quadratic"), name)
    return plans


def list_correlations(profile: SensitivityProfile) -> dict[str, tuple[FloatArray, float]]:
    """Returns positive semidefinite correlations [U F, U F] by name, each with the factor of its cross terms."""
    assert profile.logit_gram is not None
    halves = [to_correlation(half.astype(np.float64)) for half in profile.logit_gram]
    whole = to_correlation(profile.logit_gram.mean(axis=0).astype(np.float64))
    reliability = find_reliability(profile, *halves)
    found: dict[str, tuple[FloatArray, float]] = {f"all, x {factor:g}": (whole, factor) for factor in (0.25, 0.5, 1.0)}
    found[f"all, x {reliability:.2f} (reliability of the halves)"] = (whole, reliability)
    for name, mask in list_masks(profile).items():
        for factor in (0.5, 1.0):
            found[f"{name}, x {factor:g}"] = (whole * mask, factor)
    found[f"{LOW_RANK} leading directions"] = (keep_leading(whole, LOW_RANK), 1.0)
    found["what both halves agree on"] = (project(agreement(*halves)), 1.0)
    return found


def list_masks(profile: SensitivityProfile) -> dict[str, FloatArray]:
    """Returns positive semidefinite masks [U F, U F]: within a layer, near layers, within a role."""
    formats = len(profile.candidates.formats)
    units = profile.candidates.units
    layer = np.repeat([-9 if unit.layer_index is None else unit.layer_index for unit in units], formats)
    role = np.repeat([unit.role for unit in units], formats)
    # The triangle of width 2 is a convolution of a box with itself, and therefore positive semidefinite.
    near = np.maximum(1.0 - np.abs(layer[:, None] - layer) / 2.0, 0.0)
    return {
        "within a layer": (layer[:, None] == layer).astype(np.float64),
        "within a layer and half to its neighbours": near,
        "within a role": (role[:, None] == role).astype(np.float64),
    }


def to_correlation(gram: FloatArray) -> FloatArray:
    """Returns the matrix scaled to a diagonal of ones, zero where a candidate changes nothing."""
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(gram * inverse[:, None] * inverse)


def find_reliability(profile: SensitivityProfile, first: FloatArray, second: FloatArray) -> float:
    """Returns the share of the variance of cross terms that is no noise, in the mean of two halves (Spearman-Brown)."""
    formats = len(profile.candidates.formats)
    unit = np.repeat(np.arange(len(profile.candidates.units)), formats)
    used = np.flatnonzero(np.diagonal(first) * np.diagonal(second) > 0)
    rows, columns = np.triu_indices(len(used), 1)
    rows, columns = used[rows], used[columns]
    apart = unit[rows] != unit[columns]
    r = float(np.corrcoef(first[rows, columns][apart], second[rows, columns][apart])[0, 1])
    return 2.0 * r / (1.0 + r)


def keep_leading(matrix: FloatArray, rank: int) -> FloatArray:
    """Returns the leading directions of a matrix, with its diagonal: low rank plus diagonal."""
    values, vectors = np.linalg.eigh(matrix)
    leading = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    np.fill_diagonal(leading, np.maximum(np.diagonal(matrix), np.diagonal(leading)))
    return np.asarray(leading)


def agreement(first: FloatArray, second: FloatArray) -> FloatArray:
    """Returns the smaller of two correlations where their signs agree, zero elsewhere."""
    return np.where(first * second > 0, np.sign(first) * np.minimum(np.abs(first), np.abs(second)), 0.0)


def project(matrix: FloatArray) -> FloatArray:
    """Returns the nearest positive semidefinite matrix, scaled to the diagonal that the matrix had."""
    values, vectors = np.linalg.eigh(matrix)
    return to_correlation((vectors * np.maximum(values, 0.0)) @ vectors.T)


def render(profile: SensitivityProfile, kl: dict[str, NDArray[np.float64]]) -> str:
    """Returns the page."""
    assert profile.logit_gram is not None
    names = list(dict.fromkeys(name.partition(" ")[2] for name in kl))
    lines = [
        "# Cross terms against the diagonal, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_interactions.py`. Machine: {describe_machine()}.",
        "",
        f"Held-out KL in nats per token on {profile.evaluation_tokens.size} tokens, at the bytes of uniform 3 and 4 "
        f"bits and midway; linear layers allocated, embedding {EMBEDDING_FORMAT}, as in allocation.md. Losses: the "
        "Fisher diagonal; correlations: the logit sketch. Change: KL minus that of the diagonal plan, 95 % interval of "
        "the paired difference; negative is better.",
        "",
        "| cross terms | " + " | ".join(f"{width:g} bits | change" for width in WIDTHS) + " |",
        "|---|" + "---|---|" * len(WIDTHS),
    ]
    for name in names:
        cells = []
        for width in WIDTHS:
            own, diagonal = kl[f"{width:g} {name}"], kl[f"{width:g} diagonal"]
            mean, low, high = mean_interval(own - diagonal)
            same = np.array_equal(own, diagonal)
            cells += [f"{own.mean():.4f}", "–" if same else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
