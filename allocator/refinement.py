"""Refinement: a plan improved step by step around itself, every step confirmed by measurement.

The additive model is a model of single changes to the reference. Where plans lose much (4 bits and below) the changes
interact, and around the plan another model is truer (`allocator.local_model`). Each round takes the slope of the
measured KL at the plan, solves for the best plans with at most k changed units (a trust region, several k), measures
them on calibration text that the slope was not taken from, corrects the model by what was measured
(`allocator.local_posterior`), solves and measures once more, and goes on from the best, if it is better at all. Slopes
at earlier plans count on, less and less; where a plan is not left, further text makes its slope more certain, and what
was measured before is not proposed again.

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
from allocator.local_posterior import LocalPosterior, Observations, observe
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
ACCEPTANCE_SHARE = 1 / 6  # of the calibration sequences, at least two
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
        tokens = self.profile.calibration_tokens
        kept_apart = max(2, round(ACCEPTANCE_SHARE * len(tokens)))
        measured = _Measured(measure=lambda choices: self._measure(choices, tokens[:kept_apart]))
        measured.add(self._starts(start))
        slopes = _Slopes(sequences=np.arange(kept_apart, len(tokens)))
        factor, failures = FIRST_FACTOR, 0
        for r in range(self.rounds):
            own = slopes.next_sequences(measured.best)
            if len(own):
                slopes.add(limit_norms(self._slope(measured.best, tokens[own], r)))
            model = build_local_model(measured.best, slopes.measured, self.profile.fisher_sketch, factor)
            before = measured.least
            factor = self._improve(model, measured, np.random.default_rng(r)).factor
            failures = 0 if measured.least < before else failures + 1
            if failures == FAILURES:
                break
        if np.array_equal(measured.best, start.choice):
            return start
        return make_improved(self.profile, self.tables, start, measured.best, how="refined")

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

    def _improve(self, model: LocalModel, measured: "_Measured", rng: np.random.Generator) -> LocalModel:
        """Measures what the model proposes, again with what that says, and returns the fitted model."""
        for _ in range(SOLVES):
            observed = measured.observe(model.choice)
            model = model.fit(list(observed.choices), observed.change.tolist())
            posterior = LocalPosterior(model, observed)
            proposed = measured.list_new(self._propose(model.choice, posterior.cautious))
            if len(proposed) < len(MOST_CHANGES):
                drawn = measured.list_new(self._propose(model.choice, posterior.draw(rng)))
                proposed = [*proposed, *drawn][: len(MOST_CHANGES)]
            if not proposed:
                break
            measured.add(proposed)
        return model

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


@dataclass(kw_only=True)
class _Measured:
    """The choices measured so far.

    Args:
        measure: Gives what each choice loses on each sequence [S], nats per token.
        choices: [U] format indices each.
        losses: [S] each.
    """

    measure: Callable[[list[IntArray]], list[FloatArray]]
    choices: list[IntArray] = field(default_factory=list)
    losses: list[FloatArray] = field(default_factory=list)

    @property
    def best(self) -> IntArray:
        """The best choice [U]; the first of those that lose as much."""
        return self.choices[int(np.argmin([loss.mean() for loss in self.losses]))]

    @property
    def least(self) -> float:
        """What the best choice loses, nats per token."""
        return float(min(loss.mean() for loss in self.losses))

    def list_new(self, choices: list[IntArray]) -> list[IntArray]:
        """Returns the choices that have not been measured."""
        known = {choice.tobytes() for choice in self.choices}
        return [choice for choice in choices if choice.tobytes() not in known]

    def add(self, choices: list[IntArray]) -> None:
        """Measures choices."""
        self.losses += self.measure(choices)
        self.choices += choices

    def observe(self, plan: IntArray) -> Observations:
        """Returns what the choices near one of them say about its changes."""
        return observe(plan, self.choices, np.array(self.losses), within=MOST_CHANGES[-1])


@dataclass(kw_only=True)
class _Slopes:
    """The slopes that count around the plan of a round.

    Args:
        sequences: Indices of the sequences that slopes are taken from, in turn.
        measured: The slopes.
    """

    sequences: IntArray
    measured: list[MeasuredSlope] = field(default_factory=list)
    _plan: IntArray | None = None
    _first: int = 0  # of the next sequences
    _left: int = 0  # sequences without a slope at the plan

    def next_sequences(self, plan: IntArray) -> IntArray:
        """Returns the sequences for the next slope: none, where all have one at this plan."""
        if self._plan is None or not np.array_equal(plan, self._plan):
            self._plan, self._left = plan, len(self.sequences)
            aged = [MeasuredSlope(values=slope.values, age=slope.age + 1) for slope in self.measured]
            self.measured = [slope for slope in aged if slope.age <= OLDEST]
        own = self.sequences[(self._first + np.arange(min(ROUND_SEQUENCES, self._left))) % len(self.sequences)]
        self._first, self._left = self._first + len(own), self._left - len(own)
        return np.sort(own)

    def add(self, values: FloatArray) -> None:
        """Takes the slope [S, U, F] at the plan of the round."""
        self.measured.append(MeasuredSlope(values=values))
