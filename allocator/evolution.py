"""Evolution: a plan improved by random switches of formats, kept where the measured KL is lower.

The search of EvoPress, a (1 + lambda) evolution with selection in steps: every generation makes lambda offspring of
the parent, measures all of them on few sequences, the best on more, and in the last step the parent beside them; the
best of that step is the next parent. The sequences are drawn anew for every step. An offspring is one to three level
switches: a unit drawn at random goes one format up, others drawn at random one format down until every limit is kept
again. In the paper units of one shape trade levels; here a limit is in bytes and a switch is mended to the byte.

No slope and no prediction enters, so nothing misleads it, but every step is one of chance, and there must be many:
refinement (`allocator.refinement`) is the way for few passes, and both count them alike.

Source: Sieberling, Kuznedelev, Kurtic and Alistarh, "EvoPress" (2024, arXiv:2410.14649), section 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import Assignment, use_of
from allocator.budget import Budget
from allocator.improvement import PassCount, check_lowers_loss, make_improved
from allocator.level_switches import LevelSwitches
from allocator.problems import build_problem, resolve_limits
from allocator.progress import Progress
from allocator.store import Store
from allocator.verification import score_cached
from runtime.costs import CostTable
from sensitivity.profile import SensitivityProfile

Choice = NDArray[np.int64]
# (choices [U] each, indices of sequences) -> mean loss of each choice over these sequences.
MeasuredLoss = Callable[[Sequence[Choice], NDArray[np.int64]], list[float]]


@dataclass(frozen=True, kw_only=True)
class SelectionStep:
    """A step of the selection within a generation.

    Args:
        sequences: Sequences that everything still in the running is measured on.
        survivors: How many go on.
    """

    sequences: int
    survivors: int


# Few offspring on short text: what matters at some hundreds of passes is the number of generations.
OFFSPRING = 8
STEPS = (SelectionStep(sequences=1, survivors=2), SelectionStep(sequences=8, survivors=1))


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """What a search needs.

    Args:
        profile: The profile; its losses are not looked at.
        budget: The budget; one with limits, not with a ceiling on the KL.
        tables: Resource -> cost table.
        store: Where scores are kept.
        progress: Called with (stage, passes done, passes in all).
        load_model: Gives the reference model.
        passes: The most passes of one sequence; the search ends before a generation that would exceed them.
        offspring: Offspring of a generation.
        steps: The selection; the parent takes part in the last step.
        seed: Seed of switches and of the sequences that are drawn.
        count: Counts the passes.

    Raises:
        ValueError: If the budget is a ceiling, or there are fewer passes than one generation takes.
    """

    profile: SensitivityProfile
    budget: Budget
    tables: Mapping[str, CostTable]
    store: Store
    progress: Progress
    load_model: Callable[[], Any]
    passes: int
    offspring: int = OFFSPRING
    steps: tuple[SelectionStep, ...] = STEPS
    seed: int = 0
    count: PassCount = field(default_factory=PassCount)

    def __post_init__(self) -> None:
        least = count_generation(self.offspring, self.steps, len(self.profile.calibration_tokens))
        if self.passes < least:
            msg = (
                f"passes of evolution must be enough for one generation, {least}: got {self.passes}. Leave evolution "
                "out, or raise them; some hundreds are a start."
            )
            raise ValueError(msg)
        check_lowers_loss(self.budget, "evolution")

    def run(self, start: Assignment) -> Assignment:
        """Returns the best assignment that was found, or the start itself where no generation found a better one.

        Raises:
            ValueError: If the start does not keep the budget.
        """
        limits = resolve_limits(self.profile, self.budget)
        use = use_of(start.choice, {name: self.tables[name] for name in limits})
        over = next((name for name, limit in limits.items() if use[name] > limit), None)
        if over is not None:
            msg = (
                f"the start of a search must keep the budget: got '{start.name}' with {over} {use[over]:.10g}, more "
                f"than {limits[over]:.10g}. Start from a smaller plan."
            )
            raise ValueError(msg)
        loss = np.zeros(self.profile.candidates.allowed.shape)
        switches = LevelSwitches(build_problem(self.profile, loss, limits, self.tables))
        choice = evolve(
            start.choice,
            switches,
            self._measure,
            sequences=len(self.profile.calibration_tokens),
            passes=self.passes,
            offspring=self.offspring,
            steps=self.steps,
            rng=np.random.default_rng(self.seed),
        )
        if np.array_equal(choice, start.choice):
            return start
        return make_improved(self.profile, self.tables, start, choice, how="evolved")

    def _measure(self, choices: Sequence[Choice], sequences: NDArray[np.int64]) -> list[float]:
        self.progress("evolve", min(self.count.passes, self.passes), self.passes)
        candidates = self.profile.candidates
        named = {
            str(i): Assignment(name=str(i), kind="plan", metric="", choice=choice).formats_by_weight(candidates)
            for i, choice in enumerate(choices)
        }
        self.count.add_scores(len(choices), len(sequences))
        scores = score_cached(
            self.profile,
            named,
            self.profile.calibration_tokens[sequences],
            load_model=self.load_model,
            store=self.store,
            progress=lambda *_: None,
        )
        return [float(scores[name].kl.mean()) for name in named]


def evolve(
    start: Choice,
    switches: LevelSwitches,
    measure: MeasuredLoss,
    *,
    sequences: int,
    passes: int,
    offspring: int,
    steps: Sequence[SelectionStep],
    rng: np.random.Generator,
) -> Choice:
    """Returns the last parent [U] of a search.

    Args:
        start: [U] format indices of the first parent, within the limits.
        switches: Makes offspring within the limits.
        measure: Measures choices on sequences.
        sequences: How many sequences there are to draw from.
        passes: The most passes, a pass of the reference in every step included.
        offspring: Offspring of a generation.
        steps: The selection.
        rng: Draws switches and sequences.
    """
    parent = start
    generation_passes = count_generation(offspring, steps, sequences)
    for _ in range(passes // generation_passes):
        children = [switches.mutate(parent, rng) for _ in range(offspring)]
        running = [child for child in children if child is not None]
        for step in steps:
            drawn = np.sort(rng.choice(sequences, min(step.sequences, sequences), replace=False))
            if step is steps[-1]:
                running.append(parent)
            losses = measure(running, drawn)
            best = np.argsort(losses, kind="stable")[: step.survivors]
            running = [running[i] for i in best]
        parent = running[0]
    return parent


def count_generation(offspring: int, steps: Sequence[SelectionStep], sequences: int) -> int:
    """Returns the passes of a generation, as ``PassCount`` counts them.

    Args:
        offspring: Offspring of a generation.
        steps: The selection; the parent takes part in the last step.
        sequences: How many sequences there are to draw from.
    """
    count, running = PassCount(), offspring
    for step in steps:
        running += step is steps[-1]
        count.add_scores(running, min(step.sequences, sequences))
        running = min(step.survivors, running)
    return count.passes
