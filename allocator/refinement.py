"""Refinement: a plan improved step by step around itself, every step confirmed by measurement.

The additive model is a model of single changes to the reference. Where plans lose much (4 bits and below) the changes
interact, and around the plan another model is truer (`allocator.local_model`). Each round takes the slope of the
measured KL at the plan, solves for the best plans with at most k changed units (a trust region, several k), measures
them beside the plan on other calibration text, corrects the model by what was measured (`allocator.local_posterior`),
solves and measures once more, and goes on from the plan that all of that says is best. Slopes at earlier plans and
comparisons of earlier rounds count on; what was measured before is not proposed again. The text is dealt anew in every
round: plans chosen among many on always the same sequences suit only these.

The narrowest format is worth less in the company of others than alone, so the first step is from the best measured of
the start and of the plans that count the losses of that format more. Whether the refined plan ships is decided on
selection text, like any rival's.

Source: successive linearisation with a trust region, Conn, Gould and Toint, "Trust-region methods" (2000); compare
EvoPress (Sieberling et al. 2024, arXiv:2410.14649), which searches by mutation, without a slope.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from allocator.assignments import Assignment
from allocator.budget import Budget
from allocator.improvement import PassCount, check_lowers_loss, make_improved
from allocator.local_model import (
    FIRST_FACTOR,
    FloatArray,
    IntArray,
    LocalModel,
    MeasuredSlope,
    build_local_model,
    limit_norms,
)
from allocator.local_posterior import Comparison, LocalPosterior, observe
from allocator.problems import build_problem, resolve_limits
from allocator.progress import Progress
from allocator.renderings import rendering_of
from allocator.store import Store
from allocator.verification import score_cached
from runtime.costs import CostTable
from sensitivity.profile import SensitivityProfile, fingerprint_of
from sensitivity.sketches.plan_slope import measure_plan_slope
from solvers import AllocationProblem, SolveParams, TrustRegion, solve

MOST_CHANGES = (4, 8, 16, 32, 64)
JUDGED_SHARE = 1 / 6  # of the calibration sequences, at least two; others in every round, or plans suit only them
ROUND_SEQUENCES = 32
OLDEST = 2  # plans before the present one whose slopes still count
SOLVES = 2  # a round, the later ones with what the proposals of the earlier ones have lost
NARROW_FACTORS = (1.5, 2.0, 3.0)  # times the narrowest format's losses, for other starts
FAILURES = 3  # rounds in a row without a better plan, after which there is no other
SLOPE_VERSION = 1


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
        if self.budget.context is not None:
            msg = (
                f"refinement follows the slopes of weights, and a cache has none: got '{self.budget.describe()}'. "
                "Leave the context out, or do not refine."
            )
            raise ValueError(msg)
        check_lowers_loss(self.budget, "refinement")

    def run(self, start: Assignment) -> Assignment:
        """Returns the refined assignment, or the start itself where no round found a better one."""
        assert self.profile.fisher_sketch is not None
        plan = self._first_plan(start)
        slopes: list[MeasuredSlope] = []
        comparisons: list[Comparison] = []
        factor, failures = FIRST_FACTOR, 0
        for r in range(self.rounds):
            judged, own, rng = self._deal(r)
            values = limit_norms(self._slope(plan, own, r))
            slopes = [*(s for s in slopes if s.age <= OLDEST), MeasuredSlope(values=values)]
            model = build_local_model(plan, slopes, self.profile.fisher_sketch, factor)
            better, factor = self._improve(model, comparisons, judged, rng)
            failures = failures + 1 if better is None else 0
            if failures == FAILURES:
                break
            if better is not None:
                plan = better
                slopes = [MeasuredSlope(values=s.values, age=s.age + 1) for s in slopes]
        if np.array_equal(plan, start.choice):
            return start
        return make_improved(self.profile, self.tables, start, plan, how="refined")

    def _deal(self, r: int) -> tuple[IntArray, IntArray, np.random.Generator]:
        """Returns the sequences that a round measures plans on, those of its slope, and its random numbers."""
        tokens, rng = self.profile.calibration_tokens, np.random.default_rng(r)
        order = rng.permutation(len(tokens))
        judged = max(2, round(JUDGED_SHARE * len(tokens)))
        return tokens[np.sort(order[:judged])], tokens[np.sort(order[judged : judged + ROUND_SEQUENCES])], rng

    def _first_plan(self, start: Assignment) -> IntArray:
        """Returns the best measured of the starts."""
        judged, _, _ = self._deal(0)
        starts = self._starts(start)
        return starts[int(np.argmin([losses.mean() for losses in self._measure(starts, judged)]))]

    def _starts(self, start: Assignment) -> list[IntArray]:
        """Returns the start and the plans by its metric that count the losses of the narrowest format more."""
        loss = self.profile.table(start.metric).loss
        bits = np.array([format_.bits for format_ in self.profile.candidates.formats])
        starts = [start.choice]
        for narrow in NARROW_FACTORS:
            tilted = np.where(bits == bits.min(), narrow * loss, loss)
            found = solve(self._problem(tilted)).choice
            starts += [] if found is None else [found]
        return starts

    def _improve(
        self, model: LocalModel, comparisons: list[Comparison], tokens: IntArray, rng: np.random.Generator
    ) -> tuple[IntArray | None, float]:
        """Measures what the model proposes, again with what that says, and returns the best plan and the factor.

        Args:
            model: Around the plan.
            comparisons: Those of earlier rounds; takes those of this one.
            tokens: [S, T] text that plans are measured on.
            rng: For draws.

        Returns:
            The plan that all that is known says is best, or None where that is the plan of the model; the factor.
        """
        plan, tried = model.choice, [c.choice for c in comparisons]
        own: list[IntArray] = []
        base: FloatArray | None = None
        for _ in range(SOLVES):
            model, posterior = self._know(model, comparisons)
            proposed = _list_new(self._propose(plan, posterior.cautious), [*tried, *own])
            if len(proposed) < len(MOST_CHANGES):
                drawn = _list_new(self._propose(plan, posterior.draw(rng)), [*tried, *own, *proposed])
                proposed = [*proposed, *drawn][: len(MOST_CHANGES)]
            if not proposed:
                break
            if base is None:
                base, *losses = self._measure([plan, *proposed], tokens)
            else:
                losses = self._measure(proposed, tokens)
            own += proposed
            comparisons += [
                Comparison(choice=choice, base=plan, difference=loss - base)
                for choice, loss in zip(proposed, losses, strict=True)
            ]
        model, posterior = self._know(model, comparisons)
        units = np.arange(len(plan))
        change = [float(posterior.mean[units, choice].sum()) for choice in own]
        if not own or min(change) >= 0.0:
            return None, model.factor
        return own[int(np.argmin(change))], model.factor

    def _know(self, model: LocalModel, comparisons: list[Comparison]) -> tuple[LocalModel, LocalPosterior]:
        observed = observe(model.choice, comparisons, within=MOST_CHANGES[-1])
        model = model.fit(observed)
        return model, LocalPosterior(model, observed)

    def _slope(self, choice: IntArray, tokens: IntArray, round_index: int) -> FloatArray:
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

    def _propose(self, plan: IntArray, change: FloatArray) -> list[IntArray]:
        """Returns the best choices with at most so many changes of a plan each, without repetition."""
        # One more nat for every unit: an objective near zero has no relative gap to speak of.
        problem = self._problem(1.0 + change - change.min())
        found: dict[bytes, IntArray] = {}
        for most in MOST_CHANGES:
            region = TrustRegion(reference=plan, max_changes=most)
            result = solve(problem, params=SolveParams(trust_region=region))
            if result.choice is not None and not np.array_equal(result.choice, plan):
                found.setdefault(result.choice.tobytes(), result.choice)
        return list(found.values())

    def _problem(self, loss: FloatArray) -> AllocationProblem:
        return build_problem(self.profile, loss, resolve_limits(self.profile, self.budget), self.tables)

    def _measure(self, choices: list[IntArray], tokens: IntArray) -> list[FloatArray]:
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
        return [np.asarray(scores[name].kl, dtype=np.float64) for name in named]


def _list_new(choices: list[IntArray], known: list[IntArray]) -> list[IntArray]:
    """Returns the choices that are not known."""
    seen = {choice.tobytes() for choice in known}
    return [choice for choice in choices if choice.tobytes() not in seen]
