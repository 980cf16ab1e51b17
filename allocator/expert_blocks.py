"""MC-MoE's plan: the experts of every layer by themselves, to one mean width, everything else in one format.

    minimise  sum loss[u, f]   over the experts of one layer
    such that sum bits[f] n[u] <= mean_bits sum n,   and at least one expert in each of some formats,

bits being the code width and n the weights of a unit. The loss is
`sensitivity.experts.expert_error.weigh_by_routing`; any other table does as well, which tells what the loss and what
the blocks are worth. The published settings are widths of 1, 2 and 3 bits, at least one expert at 2 and at 3, and 4
bits for everything else.

Complexity: one integer program a layer. Limits: code widths, not bytes, are what the paper budgets; no layer gives
bits to another.
Source: W. Huang et al. 2024, "MC-MoE", arXiv:2410.06270, section 3.2.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import Assignment, use_of
from allocator.budget import Budget
from allocator.improvement import bound_by
from allocator.problems import resolve_limits
from runtime.candidates import Candidates
from runtime.costs import CostTable
from runtime.formats import Format
from sensitivity.profile import SensitivityProfile
from solvers import AllocationProblem, CountLimit, SolveParams, SolveResult, add_constraints
from solvers.baselines.block_budgets import solve_block_budgets
from solvers.constraints import trim_resources

CODE_BITS = "code_bits"
OTHER_BITS = 4  # of everything that is no expert


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertBlocks:
    """The plan of all experts, layer by layer.

    Args:
        units: [M] int64, the expert units among the U.
        choice: [U] int64 format indices of all units, or None when a layer has no plan.
        result: The solver's result over the expert units.
    """

    units: NDArray[np.int64]
    choice: NDArray[np.int64] | None
    result: SolveResult


def solve_expert_blocks(
    candidates: Candidates,
    loss: NDArray[np.float64],
    *,
    mean_bits: float,
    other_format: str,
    used_formats: Sequence[str] = (),
    params: SolveParams | None = None,
) -> ExpertBlocks:
    """Returns the plan of least loss that gives every layer's experts the same mean code width.

    Args:
        candidates: Units and formats.
        loss: [U, F]; only the rows of experts are read.
        mean_bits: Most mean code width of a layer's experts, in bits per weight.
        other_format: Format of all other units; a unit that may not take it takes the first that it may.
        used_formats: Formats that at least one unit of every layer's experts takes.
        params: Limits of the solver.

    Raises:
        ValueError: If there is no expert unit, or a format is not among the candidates.
    """
    units = np.array([u for u, unit in enumerate(candidates.units) if unit.kind == "expert"], dtype=np.int64)
    if not units.size:
        msg = f"candidates must hold experts: got none among {len(candidates.units)} units. Use another solver."
        raise ValueError(msg)
    other = candidates.format_index(other_format)
    problem, layer, weights = _build_problem(candidates, loss, units, mean_bits)
    # Layers have equal numbers of weights, so each gets an equal part of the limits: one unit a layer.
    counted = tuple(
        CountLimit(
            name=f"{name} used",
            units=np.ones(len(units), dtype=np.bool_),
            format_index=candidates.format_index(name),
            at_least=len(np.unique(layer)),
        )
        for name in used_formats
    )
    result = solve_block_budgets(
        add_constraints(problem, counted), params or SolveParams(), block=layer, n_weights=weights
    )
    result = trim_resources(result, len(problem.resources))
    if result.choice is None:
        return ExpertBlocks(units=units, choice=None, result=result)
    choice = np.where(candidates.allowed[:, other], other, candidates.allowed.argmax(axis=1)).astype(np.int64)
    choice[units] = result.choice
    return ExpertBlocks(units=units, choice=choice, result=result)


def find_block_assignment(
    profile: SensitivityProfile, budget: Budget, tables: Mapping[str, CostTable], optimum: Assignment
) -> Assignment | None:
    """Returns MC-MoE's plan at the largest mean width, in eighths of a bit, that keeps a budget.

    Args:
        profile: The profile.
        budget: The budget.
        tables: Resource -> cost table.
        optimum: The solver's answer to this budget; its metric's losses are used here too.

    Returns:
        The plan; None without experts, under a ceiling on the loss, and where the narrowest experts do not fit.
    """
    candidates = profile.candidates
    widths = [
        f.bits for u, unit in enumerate(candidates.units) if unit.kind == "expert" for f in _allowed(candidates, u)
    ]
    if not widths or budget.max_kl is not None:
        return None
    wide_enough = [f for f in candidates.formats if f.bits >= OTHER_BITS] or candidates.formats
    other = min(wide_enough, key=lambda f: f.bits).name
    limits = resolve_limits(profile, budget)

    def solve_at(eighths: int) -> NDArray[np.int64] | None:
        """Returns the choice at a mean width, if there is one and it keeps the budget."""
        loss = profile.table(optimum.metric).loss
        choice = solve_expert_blocks(candidates, loss, mean_bits=eighths / 8, other_format=other).choice
        if choice is None:
            return None
        use = use_of(choice, {name: tables[name] for name in limits})
        return choice if all(use[name] <= limit for name, limit in limits.items()) else None

    # Stored bytes grow with the width but for a few scales: what bisection finds keeps the budget, and is the largest
    # or close to it.
    eighths = bisect_left(range(8 * min(widths), 8 * max(widths) + 1), True, key=lambda e: solve_at(e) is None)
    largest = 8 * min(widths) + eighths - 1
    choice = solve_at(largest)
    if choice is None:
        return None
    name = f"experts layer by layer, {largest / 8:g} bits"
    detail = (
        f"the experts of each layer by themselves at a mean code width of {largest / 8:g} bits, the rest in {other}"
    )
    result = bound_by(profile, tables, optimum, choice, detail=detail)
    return Assignment(name=name, kind="plan", metric=optimum.metric, choice=choice, result=result)


def _allowed(candidates: Candidates, u: int) -> list[Format]:
    return [candidates.formats[f] for f in np.flatnonzero(candidates.allowed[u])]


def _build_problem(
    candidates: Candidates, loss: NDArray[np.float64], units: NDArray[np.int64], mean_bits: float
) -> tuple[AllocationProblem, NDArray[np.int64], NDArray[np.float64]]:
    """Returns the problem of the expert units, with the layer and the weights of each, [M]."""
    weights = np.array([candidates.units[u].weight_count for u in units], dtype=np.float64)
    layer = np.array([candidates.units[u].layer_index or 0 for u in units], dtype=np.int64)
    bits = np.array([f.bits for f in candidates.formats], dtype=np.float64)
    problem = AllocationProblem(
        loss=loss[units],
        cost=(weights[:, None] * bits)[None],
        limit=np.array([mean_bits * weights.sum()]),
        allowed=candidates.allowed[units],
        resources=(CODE_BITS,),
    )
    return problem, layer, weights
