"""What it costs that parts must agree on a format: coarser experts, and an engine's formats, fusions and granularity.

Every rule is priced from the same measurement, at the bytes of one plan: the least predicted loss

    min sum of loss[m, f]   such that   sum of bytes[m, f] <= bytes of the plan,

over the units m that the rule leaves. A rule that only joins units or forbids formats can never lose less than none.
For an engine that demands one format for many experts there are two rows: its formats and fusions with every expert
free, and all its rules. Their difference is the price of that one demand.

Complexity: one solve a rule, milliseconds each. Limits: losses of joined units add, as in
`sensitivity.experts.granularity`; a plan whose budget also holds a cache or activations is not priced, for its
weights' part of the budget would change with the rule.
"""

from dataclasses import dataclass, replace

from allocator.budget import MEMORY
from allocator.engine_rules import restrict_profile
from allocator.planning import predicting_metric
from allocator.plans import Plan
from allocator.problems import build_cost_tables, build_problem
from runtime.engines import find_engine
from sensitivity.experts.granularity import list_granularities, merge_candidates
from sensitivity.profile import NATS, SensitivityProfile
from solvers import solve

FREE = "Every measured unit by itself"
EXPERTS_FREE = "every expert free"
ALL_RULES = "All rules of"
_SHARED_BY = {
    "expert": "One format for each expert",
    "stack_projection": "One format for all experts of a projection",
    "stack": "One format for all experts of a layer",
}


@dataclass(frozen=True, kw_only=True)
class RulePrice:
    """The optimum under a rule.

    Args:
        rule: The rule, in words.
        against: The rule of the list that it only adds one demand to; None for the first.
        units: Units that it leaves.
        predicted_loss: Least loss, nats per token; None where nothing keeps the bytes.
        memory_bytes: Bytes of the weight file of that optimum; None likewise.
    """

    rule: str
    against: str | None
    units: int
    predicted_loss: float | None
    memory_bytes: float | None


def price_rules_of(profile: SensitivityProfile, plan: Plan) -> list[RulePrice]:
    """Returns what rules cost at a plan's bytes, the freest first; empty where there is no rule to speak of.

    Args:
        profile: The profile the plan was made from, as it was measured, with the fixed bytes of the plan's file.
        plan: The plan.
    """
    metric = predicting_metric(profile, plan.metric)
    if profile.cache_load is not None or profile.activations_joined or profile.table(metric).unit_of_measure != NATS:
        return []
    under = {FREE: profile, **_coarser(profile, metric), **_under_engine(profile, plan)}
    if len(under) == 1:
        return []
    freer = next((rule for rule in under if rule.endswith(EXPERTS_FREE)), FREE)
    prices = []
    for rule, of in under.items():
        against = None if rule == FREE else freer if rule.startswith(ALL_RULES) else FREE
        prices.append(_price(rule, against, of, metric, plan.memory_bytes))
    return prices


def _coarser(profile: SensitivityProfile, metric: str) -> dict[str, SensitivityProfile]:
    found = {}
    for name in list_granularities(profile.candidates.units)[1:]:
        merged = merge_candidates(profile.candidates, name)
        table = profile.table(metric)
        losses = {metric: replace(table, loss=merged.sum_table(table.loss), measured=None)}
        found[_SHARED_BY[name]] = replace(profile, candidates=merged.candidates, losses=losses)
    return found


def _under_engine(profile: SensitivityProfile, plan: Plan) -> dict[str, SensitivityProfile]:
    if plan.rules is None:
        return {}
    engine = find_engine(plan.rules.engine)
    found = {}
    if engine.experts in _SHARED_BY and any(unit.kind == "expert" for unit in profile.candidates.units):
        free = restrict_profile(profile, replace(engine, experts="projection"))
        found[f"Formats and fusions of {engine.name}, {EXPERTS_FREE}"] = free
    name = f"{ALL_RULES} {engine.name}"
    shared = f": {_SHARED_BY[engine.experts].lower()}" if found else ""
    return {**found, name + shared: restrict_profile(profile, engine)}


def _price(rule: str, against: str | None, profile: SensitivityProfile, metric: str, memory_bytes: float) -> RulePrice:
    tables = build_cost_tables(profile)
    result = solve(build_problem(profile, profile.table(metric).loss, {MEMORY: memory_bytes}, tables))
    use = None if result.choice is None else float(result.use[0]) + tables[MEMORY].fixed
    return RulePrice(
        rule=rule,
        against=against,
        units=len(profile.candidates.units),
        predicted_loss=None if result.choice is None else result.objective,
        memory_bytes=use,
    )
