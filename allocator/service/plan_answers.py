"""Budgets to plans: one solve of a profile in memory, kept as the question, the choice and the solver's proof.

A plan's id is a hash of its question, so that the same question has the same answer and is stored once. What is
shown is made again from the profile, which never changes.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Row

from allocator.artefacts import provenance
from allocator.assignments import Assignment
from allocator.budget import LATENCY, MEMORY, Budget
from allocator.engine_rules import Optimum, price_rules
from allocator.planning import default_metric, find_assignment, make_plan
from allocator.plans import Plan, RulesPrice
from allocator.service.priced_profiles import Axes, PricedProfile, PricedProfiles
from allocator.service.recent import Recent
from allocator.service.records import Records
from allocator.service.schema import plans
from allocator.store import Store
from runtime.engines import find_engine
from sensitivity.profile import fingerprint_of
from solvers import SolveResult, Termination

# Raised whenever the same question would have another answer.
ANSWER_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a profile.

    Args:
        profile_id: The profile.
        budget: The budget.
        metric: Metric to plan with; None for the best one held.
        engine: Engine whose rules the plan keeps, or None.
    """

    profile_id: str
    budget: Budget
    metric: str | None = None
    engine: str | None = None

    @property
    def axes(self) -> Axes:
        """The axes of the candidates."""
        return Axes(
            profile_id=self.profile_id,
            engine=self.engine,
            file_of=self.engine,
            context=self.budget.context,
            batch=self.budget.batch,
            timed=LATENCY in self.budget.limits,
        )

    @cached_property
    def plan_id(self) -> str:
        """Hash of the question."""
        return fingerprint_of({"version": ANSWER_VERSION, **self.to_record()})[:32]

    def to_record(self) -> dict[str, Any]:
        """Returns the question as JSON values."""
        record = asdict(self)
        record["budget"] = {**record["budget"], "limits": dict(sorted(self.budget.limits.items()))}
        return record


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A plan as it is kept.

    Args:
        plan_id: Its id.
        model_id: The model.
        created_at: When it was made, seconds since 1970; None where it was made just now.
        question: What was asked.
        priced: The profile on the question's axes.
        assignment: The choice, and how good it is.
        rules: What the engine's rules cost, or None.
    """

    plan_id: str
    model_id: str
    created_at: float | None
    question: Question
    priced: PricedProfile
    assignment: Assignment
    rules: RulesPrice | None


class PlanAnswers:
    """Answers questions, from memory, from the database, or by a solve.

    Args:
        records: Where plans are kept.
        profiles: Profiles in memory.
        most: Answers kept in memory.
    """

    def __init__(self, records: Records, profiles: PricedProfiles, most: int) -> None:
        self.records = records
        self.profiles = profiles
        self._recent: Recent[str, Answer] = Recent(most)

    def holds(self, question: Question) -> bool:
        """Returns whether a question's plan is in memory."""
        return self._recent.get(question.plan_id) is not None

    def answer(self, question: Question, model_id: str) -> Answer:
        """Returns the plan of a question.

        Raises:
            InfeasibleBudget: If nothing keeps the budget.
            UnknownProfile: If the profile is not in the store.
            ValueError: If the metric, the engine or the context does not fit the profile.
        """
        return self._recent.get_or_make(question.plan_id, lambda: self._find_or_solve(question, model_id))

    def find(self, plan_id: str) -> Answer | None:
        """Returns a plan by its id, or None."""
        held = self._recent.get(plan_id)
        if held is not None:
            return held
        row = self.records.find(plans, plan_id)
        if row is None:
            return None
        return self._recent.get_or_make(plan_id, lambda: read_answer(row, self.profiles))

    def _find_or_solve(self, question: Question, model_id: str) -> Answer:
        row = self.records.find(plans, question.plan_id)
        if row is None:
            answer = solve_question(question, model_id, self.profiles)
            created_at = self.records.add_plan(**_row_of(answer))
            if created_at is not None:
                return replace(answer, created_at=created_at)
            # Another process was first; its numbers are the plan's.
            row = self.records.find(plans, question.plan_id)
            assert row is not None
        return read_answer(row, self.profiles)


def solve_question(question: Question, model_id: str, profiles: PricedProfiles) -> Answer:
    """Returns the plan of a question, solved now."""
    budget, engine = question.budget, question.engine
    if engine is not None and budget.context is not None:
        msg = (
            f"an engine's rules say nothing of caches: got engine='{engine}' and context={budget.context}. Leave one "
            "of them out."
        )
        raise ValueError(msg)
    best = _optimum(question, profiles.find(question.axes))
    rules = None
    if engine is not None:
        # The same file without the rules, so that the rules alone make the difference.
        free = _optimum(question, profiles.find(replace(question.axes, engine=None)))
        rules = price_rules(find_engine(engine), kept=best, free=free)
    return Answer(
        plan_id=question.plan_id,
        model_id=model_id,
        created_at=None,
        question=question,
        priced=profiles.find(question.axes),
        assignment=best.assignment,
        rules=rules,
    )


def read_answer(row: Row[Any], profiles: PricedProfiles) -> Answer:
    """Returns the answer that a row of the table of plans keeps."""
    record, solution = json.loads(row.question), json.loads(row.solution)
    question = Question(**{**record, "budget": Budget(**record["budget"])})
    choice = np.frombuffer(row.choice, dtype="<u2").astype(np.int64)
    rules = solution.pop("rules")
    metric = solution.pop("metric")
    result = _read_result(solution, choice)
    return Answer(
        plan_id=row.id,
        model_id=row.model_id,
        created_at=row.created_at,
        question=question,
        priced=profiles.find(question.axes),
        assignment=Assignment(name=metric, kind="plan", metric=metric, choice=choice, result=result),
        rules=None if rules is None else RulesPrice(**rules),
    )


def make_full_plan(answer: Answer) -> Plan:
    """Returns an answer as the plan that the verbs of ``allocator`` take."""
    priced, budget = answer.priced, answer.question.budget
    made = make_plan(priced.profile, answer.assignment, budget, priced.tables, provenance())
    return replace(made, rules=answer.rules)


def rebuild_plan(row: Row[Any], store: Store) -> Plan:
    """Returns the plan of a row, for a process that keeps no profiles."""
    return make_full_plan(read_answer(row, PricedProfiles(store, 1)))


def _optimum(question: Question, priced: PricedProfile) -> Optimum:
    metric = question.metric or default_metric(priced.profile)
    found = find_assignment(priced.profile, question.budget, priced.tables, metric=metric, draft=True)
    return Optimum(profile=priced.profile, tables=priced.tables, assignment=found)


def _row_of(answer: Answer) -> dict[str, Any]:
    result = answer.assignment.result
    assert result is not None, "plans are solved"
    solution = {
        "metric": answer.assignment.metric,
        "rules": answer.rules and asdict(answer.rules),
        "objective": result.objective,
        "lower_bound": _finite(result.lower_bound),
        "use": result.use.tolist(),
        "shadow_price": [_finite(price) for price in result.shadow_price.tolist()],
        "least_use": result.least_use.tolist(),
        "resources": list(result.resources),
        "termination": result.termination.value,
        "limit_hit": result.limit_hit,
        "solver": result.solver,
        "seconds": result.seconds,
        "detail": result.detail,
    }
    return {
        "id": answer.plan_id,
        "profile_id": answer.question.profile_id,
        "model_id": answer.model_id,
        "question": json.dumps(answer.question.to_record(), sort_keys=True),
        "choice": answer.assignment.choice.astype("<u2").tobytes(),
        "solution": json.dumps(solution),
    }


def _read_result(solution: dict[str, Any], choice: NDArray[np.int64]) -> SolveResult:
    bound = solution["lower_bound"]
    return SolveResult(
        **{
            **solution,
            "choice": choice,
            "lower_bound": -math.inf if bound is None else bound,
            "use": np.array(solution["use"]),
            "shadow_price": np.array([math.nan if p is None else p for p in solution["shadow_price"]]),
            "least_use": np.array(solution["least_use"]),
            "resources": tuple(solution["resources"]),
            "termination": Termination(solution["termination"]),
            "resource_at_fault": None,
            "sketch_sum": None,
        }
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def memory_price(answer: Answer) -> float:
    """Returns the shadow price of memory: loss that one more byte buys; zero where memory binds nothing.

    Under a ceiling on the loss memory is what is minimised, and the price is that of the ceiling, inverted.
    """
    result = answer.assignment.result
    assert result is not None
    prices = {n: float(p) for n, p in zip(result.resources, result.shadow_price, strict=True) if math.isfinite(p)}
    if answer.question.budget.max_kl is None:
        return prices.get(MEMORY, 0.0)
    bytes_per_loss = next((price for name, price in prices.items() if name != MEMORY), 0.0)
    return 1.0 / bytes_per_loss if bytes_per_loss > 0 else 0.0
