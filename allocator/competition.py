"""The competition: what is measured beside the best predicted plan, and which of all ships.

Under a ceiling on KL the predicted plan is only a first guess: measured loss is close to proportional to the predicted
one, so a few rounds, each aimed by the ratio of the last, find a smaller plan that keeps the ceiling as measured.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from allocator.assignments import Assignment, keep_best_activations, keep_widest_caches, list_uniform, use_of
from allocator.budget import MEMORY, Budget, InfeasibleBudget
from allocator.expert_blocks import find_block_assignment
from allocator.improvement import Improve
from allocator.planning import find_assignment, find_interacting_assignment, find_least_loss, make_plan
from allocator.plans import Plan
from allocator.problems import resolve_limits
from allocator.progress import Progress
from allocator.reachable import MAX_KL
from allocator.store import Store
from allocator.verification import choose_best, describe_choice, make_evaluation, score_cached
from runtime.costs import CostTable
from sensitivity.evaluation import SequenceScores
from sensitivity.measure_config import FISHER, SINGLE_UNIT_KL
from sensitivity.profile import NATS, SensitivityProfile

_ROUNDS = 4
_CLOSE = 0.95  # A measured loss of this share of the ceiling is not worth another round.
_AIM = 0.98


def list_rivals(
    profile: SensitivityProfile,
    budget: Budget,
    tables: Mapping[str, CostTable],
    best: Assignment,
    *,
    only_metric: bool = False,
) -> list[Assignment]:
    """Returns what is measured beside the best predicted assignment.

    These are the plans by other metrics, with cross terms, of a mixture's experts layer by layer as MC-MoE makes them,
    and the uniform formats that fit.
    """
    rivals: list[Assignment] = []
    if not only_metric:
        others = [m for m in (FISHER, SINGLE_UNIT_KL) if m in profile.losses and m != best.metric]
        for metric in others:
            try:
                rivals.append(find_assignment(profile, budget, tables, metric=metric))
            except InfeasibleBudget:
                # This metric expects a ceiling on the loss to be out of reach. Measurement decides about the others.
                continue
    if profile.logit_gram is not None and budget.max_kl is None and profile.table(best.metric).unit_of_measure == NATS:
        rivals.append(find_interacting_assignment(profile, budget, tables, metric=best.metric)[0])
    by_blocks = (
        None if only_metric or profile.activations_joined else find_block_assignment(profile, budget, tables, best)
    )
    rivals += [] if by_blocks is None else [by_blocks]
    limits = resolve_limits(profile, budget)
    fitting = [
        a
        for a in list_uniform(profile.candidates, best.metric)
        if all(use_of(a.choice, tables)[name] <= limit for name, limit in limits.items())
    ]
    fitting = keep_widest_caches(fitting, profile.candidates, tables[MEMORY])
    rivals += keep_best_activations(fitting, profile, best.metric) if profile.activations_joined else fitting
    return _distinct([best, *rivals])[1:]


@dataclass(frozen=True, kw_only=True)
class Competition:
    """What a competition needs.

    Args:
        profile: The profile.
        budget: The budget.
        tables: Resource -> cost table.
        store: Where scores are kept.
        progress: Called with (stage, done, total).
        load_model: Gives the reference model; called only when something must be measured.
        provenance: Versions, for the plan.
    """

    profile: SensitivityProfile
    budget: Budget
    tables: Mapping[str, CostTable]
    store: Store
    progress: Progress
    load_model: Callable[[], Any]
    provenance: Mapping[str, str]

    def run(
        self,
        best: Assignment,
        rivals: Sequence[Assignment],
        improvements: Sequence[Improve] = (),
    ) -> Plan:
        """Returns the plan of the best measured assignment.

        Args:
            best: The best predicted assignment.
            rivals: What is measured beside it.
            improvements: Each improves the best measured assignment, which its result is then measured against.

        Raises:
            InfeasibleBudget: If nothing keeps a ceiling on KL as measured.
        """
        assignments = [best, *rivals]
        scores = self._score(assignments)
        if self.budget.max_kl is not None:
            assignments = self._approach_ceiling(best, assignments, self.budget.max_kl)
            scores = self._score(assignments)
        winner = choose_best(assignments, scores, self.tables[MEMORY], self.budget)
        if winner is None:
            assignments = _distinct([*assignments, self._least_loss(best.metric)])
            scores = self._score(assignments)
            winner = choose_best(assignments, scores, self.tables[MEMORY], self.budget)
        if winner is None:
            raise self._unreachable(best.metric, assignments, scores)
        for improve in improvements:
            assignments = _distinct([*assignments, improve(winner)])
            scores = self._score(assignments)
            winner = choose_best(assignments, scores, self.tables[MEMORY], self.budget) or winner
        made = make_plan(self.profile, winner, self.budget, self.tables, self.provenance)
        return replace(
            made,
            evaluations=tuple(self._evaluation(a, scores, winner) for a in assignments),
            verdict=describe_choice(winner, assignments, scores),
        )

    def _score(self, assignments: Sequence[Assignment]) -> dict[str, SequenceScores]:
        return score_cached(
            self.profile,
            {a.name: a.formats_by_name(self.profile.candidates) for a in assignments},
            self.profile.selection_tokens,
            load_model=self.load_model,
            store=self.store,
            progress=self.progress,
        )

    def _evaluation(self, assignment: Assignment, scores: Mapping[str, SequenceScores], winner: Assignment) -> Any:
        return make_evaluation(
            self.profile,
            assignment,
            scores[assignment.name],
            self.profile.selection_tokens,
            self.tables[MEMORY],
            shipped=assignment is winner,
        )

    def _approach_ceiling(self, best: Assignment, assignments: list[Assignment], ceiling: float) -> list[Assignment]:
        target = ceiling
        for attempt in range(2, _ROUNDS + 2):
            measured = float(self._score([best])[best.name].kl.mean())
            if measured <= 0 or _CLOSE * ceiling <= measured <= ceiling:
                break
            target *= _AIM * ceiling / measured
            try:
                found = find_assignment(self.profile, self.budget, self.tables, metric=best.metric, max_loss=target)
            except InfeasibleBudget:
                break
            assignments = _distinct([*assignments, replace(found, name=f"{best.metric}, round {attempt}")])
            # One that is there already keeps its name.
            best = next(a for a in assignments if a.choice.tobytes() == found.choice.tobytes())
        return assignments

    def _least_loss(self, metric: str) -> Assignment:
        return find_least_loss(self.profile, self.budget, self.tables, metric=metric)

    def _unreachable(
        self, metric: str, assignments: Sequence[Assignment], scores: Mapping[str, SequenceScores]
    ) -> InfeasibleBudget:
        # Of those alone that every query with these limits measures, so that the value named is reached again.
        always = {
            a.choice.tobytes() for a in (self._least_loss(metric), *list_uniform(self.profile.candidates, metric))
        }
        least = min(float(scores[a.name].kl.mean()) for a in assignments if a.choice.tobytes() in always)
        msg = (
            f"a ceiling on KL must be reachable: got '{self.budget.describe()}', which no measured plan keeps. The "
            f"least measured is {least:.6g} nats per token. Raise the ceiling or allow wider formats."
        )
        return InfeasibleBudget(msg, least_use={MAX_KL: least})


def _distinct(assignments: Iterable[Assignment]) -> list[Assignment]:
    """Returns the assignments without those whose choice an earlier one has."""
    found: dict[bytes, Assignment] = {}
    for assignment in assignments:
        found.setdefault(assignment.choice.tobytes(), assignment)
    return list(found.values())
