"""Refinement: a plan improved step by step around itself, every step confirmed by measurement.

The additive model is a model of single changes to the reference. Where plans lose much (4 bits and below) the changes
interact, and around the plan another model is truer: for a further change of unit u to format f,

    change[u, f] = mean_s slope[s, u, f] + 1/2 mean_s (sketch[s, u, f] - sketch[s, u, plan_u])^2 + caution * std_error,

the slope of the measured KL at the plan (`sensitivity.sketches.plan_slope`), which holds the interactions with all
other units, the curvature of the Fisher sketch, and an allowance for what is not known: an optimizer takes what looks
good by chance first. Each round solves this for at most k changed units (a trust region, several k), measures the
results on calibration text that the slope was not taken from, and goes on from the best, if it is better at all. The
slopes of earlier rounds count on, less and less. Whether the refined plan ships is decided on selection text, like any
rival's.

Source: successive linearisation with a trust region, Conn, Gould and Toint, "Trust-region methods" (2000); compare
EvoPress (Sieberling et al. 2024, arXiv:2410.14649), which searches by mutation, without a slope.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from allocator.assignments import Assignment
from allocator.budget import Budget
from allocator.improvement import PassCount, check_lowers_loss, make_improved
from allocator.problems import build_problem, resolve_limits
from allocator.progress import Progress
from allocator.renderings import rendering_of
from allocator.store import Store
from allocator.verification import score_cached
from runtime.costs import CostTable
from sensitivity.profile import SensitivityProfile, fingerprint_of
from sensitivity.sketches.plan_slope import measure_plan_slope
from solvers import SolveParams, TrustRegion, solve

MOST_CHANGES = (4, 8, 16, 32)
ACCEPTANCE_SHARE = 0.125  # of the calibration sequences, at least two
ROUND_SEQUENCES = 32
KEPT_ROUNDS = 3
FORGETTING = 0.6  # weight of a round's slopes against those of the round after it
CAUTION = 0.5  # standard errors
# A sequence whose slopes are larger than so many times the median sequence's counts for no more than that: where the
# quantized model fails on one sequence, its slope says little of the others and outweighs them all.
LARGEST_NORM = 2.0
FAILURES = 2  # rounds in a row without a better plan, after which there is no other
SLOPE_VERSION = 1

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """What a refinement needs.

    Args:
        profile: The profile, with a Fisher sketch.
        budget: The budget; one with limits, not with a ceiling on the KL.
        tables: Resource -> cost table.
        store: Where slopes and scores are kept.
        progress: Called with (stage, done, total).
        load_model: Gives the reference model.
        rounds: The most rounds.
        count: Counts the passes.
    """

    profile: SensitivityProfile
    budget: Budget
    tables: Mapping[str, CostTable]
    store: Store
    progress: Progress
    load_model: Callable[[], Any]
    rounds: int
    count: PassCount = field(default_factory=PassCount)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            msg = f"rounds of refinement must be at least 1: got {self.rounds}. Leave refinement out, or raise it."
            raise ValueError(msg)
        if self.profile.fisher_sketch is None:
            msg = "refinement needs the Fisher sketch: the profile holds none. Measure with the metric 'fisher'."
            raise ValueError(msg)
        check_lowers_loss(self.budget, "refinement")

    def run(self, start: Assignment) -> Assignment:
        """Returns the refined assignment, or the start itself where no round found a better one."""
        tokens = self.profile.calibration_tokens
        kept_apart = max(2, round(ACCEPTANCE_SHARE * len(tokens)))
        acceptance, slope_tokens = tokens[:kept_apart], tokens[kept_apart:]
        choice = start.choice
        loss = self._measure([choice], acceptance)[0]
        rounds: list[FloatArray] = []
        failures = 0
        for r in range(self.rounds):
            own = np.arange(r * ROUND_SEQUENCES, (r + 1) * ROUND_SEQUENCES) % len(slope_tokens)
            rounds = [*rounds, limit_norms(self._slope(choice, slope_tokens[np.unique(own)], r))]
            rounds = rounds[-KEPT_ROUNDS:]
            tried = self._propose(choice, *combine_slopes(rounds, choice))
            losses = self._measure(tried, acceptance)
            if losses and min(losses) < loss:
                loss, choice, failures = min(losses), tried[int(np.argmin(losses))], 0
                continue
            failures += 1
            if failures == FAILURES:
                break
        if choice is start.choice:
            return start
        return make_improved(self.profile, self.tables, start, choice, how="refined")

    def _slope(self, choice: NDArray[np.int64], tokens: NDArray[np.int64], round_index: int) -> FloatArray:
        key = fingerprint_of(
            {
                "version": SLOPE_VERSION,
                "profile": self.profile.fingerprint,
                "allowed": self.profile.candidates.allowed.astype(int).tolist(),
                "choice": choice.tolist(),
                "tokens": fingerprint_of({"tokens": tokens.tolist()}),
            }
        )
        self.count.add_slope(len(tokens))
        found = self.store.find_evaluation(key)
        if found is None:
            stage = f"refine, round {round_index + 1} of {self.rounds}"
            model = self.load_model()
            slope = measure_plan_slope(
                model,
                self.profile.candidates,
                choice,
                torch.from_numpy(tokens),
                directory=self.store.pieces(key),
                progress=lambda done, total: self.progress(stage, done, total),
                quantizer=rendering_of(self.profile, model, self.store),
            )
            found = {"slope": slope}
            self.store.save_evaluation(key, found)
            shutil.rmtree(self.store.pieces(key), ignore_errors=True)
        return found["slope"]

    def _propose(self, choice: NDArray[np.int64], slope: FloatArray, error: FloatArray) -> list[NDArray[np.int64]]:
        """Returns the best choices with at most so many changes each, without repetition."""
        assert self.profile.fisher_sketch is not None
        units = np.arange(len(choice))
        sketch = self.profile.fisher_sketch.astype(np.float64)
        curvature = 0.5 * np.square(sketch - sketch[:, units, choice][:, :, None]).mean(axis=0)
        change = slope + curvature + CAUTION * error
        # One more nat for every unit: an objective near zero has no relative gap to speak of.
        problem = build_problem(self.profile, 1.0 + change, resolve_limits(self.profile, self.budget), self.tables)
        found: dict[bytes, NDArray[np.int64]] = {}
        for most in MOST_CHANGES:
            region = TrustRegion(reference=choice, max_changes=most)
            result = solve(problem, params=SolveParams(trust_region=region))
            if result.choice is not None and not np.array_equal(result.choice, choice):
                found.setdefault(result.choice.tobytes(), result.choice)
        return list(found.values())

    def _measure(self, choices: list[NDArray[np.int64]], tokens: NDArray[np.int64]) -> list[float]:
        named = {
            str(i): Assignment(name=str(i), kind="plan", metric="", choice=choice).formats_by_weight(
                self.profile.candidates
            )
            for i, choice in enumerate(choices)
        }
        self.count.add_scores(len(choices), len(tokens))
        scores = score_cached(
            self.profile, named, tokens, load_model=self.load_model, store=self.store, progress=self.progress
        )
        return [float(scores[name].kl.mean()) for name in named]


def limit_norms(slope: FloatArray) -> FloatArray:
    """Returns slopes [S, U, F] with no sequence's norm above ``LARGEST_NORM`` times the median one."""
    norms = np.sqrt(np.square(slope).sum(axis=(1, 2)))
    most = LARGEST_NORM * np.median(norms)
    scale = np.divide(most, norms, out=np.ones_like(norms), where=norms > most)
    return np.asarray(slope * scale[:, None, None])


def combine_slopes(rounds: list[FloatArray], choice: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
    """Returns the mean slope [U, F] at a choice and its standard error [U, F], later rounds weighing more.

    Args:
        rounds: [S, U, F] each, the earliest first, each relative to a choice of its own.
        choice: [U] format indices that the result is relative to.
    """
    weights = np.concatenate([np.full(len(r), FORGETTING**age) for age, r in enumerate(rounds[::-1])][::-1])
    weights /= weights.sum()
    slopes = np.concatenate(rounds)
    slopes -= slopes[:, np.arange(len(choice)), choice][:, :, None]
    mean = np.einsum("s,suf->uf", weights, slopes)
    variance = np.einsum("s,suf->uf", weights, np.square(slopes - mean))
    return mean, np.sqrt(variance * np.square(weights).sum())
