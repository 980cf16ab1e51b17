"""Named problems with their optimum, the published tables of HAWQ-V3, and generators by seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solvers import AllocationProblem

# Solvers that claim the optimum of every problem they take; quadratic claims it without interactions.
EXACT = ("knapsack", "multi_knapsack", "lagrangian", "milp", "cbc", "pulp_highs", "exhaustive")
ONE_LIMIT_ONLY = ("knapsack", "budget_grid")
INTERACTING = ("quadratic", "exhaustive")

# HAWQ-V3, ResNet18, 19 layers in the order s1u1c1 .. s4u2c2 (Yao et al. 2021, arXiv 2011.10680; MIT licence).
HAWQ_TRACE = """.06857826 .03162379 .03298575 .01205663 .02222431 .00596336 .06931772 .00807129 .00372905 .00530698
    .00209011 .00737569 .00210454 .00151197 .00158041 .00078146 .00451841 .00098745 .00072944"""
HAWQ_ERROR_8 = """.0235 .0125 .0102 .0082 .0145 .0344 .0023 .0287 .0148 .0333 .0682 .0027 .0448 .0336 .0576 .1130
    .0102 .0947 .0532"""
HAWQ_ERROR_4 = """6.7430 3.9691 3.3281 2.6796 4.7277 10.5966 .6827 9.0942 4.8857 10.7599 21.7546 .8603 14.5324 10.9651
    18.7706 36.4044 3.1572 29.6994 17.4016"""
HAWQ_PARAMETERS = """36864 36864 36864 36864 73728 147456 8192 147456 147456 294912 589824 32768 589824 589824 1179648
    2359296 131072 2359296 2359296"""
HAWQ_MACS = """115605504 115605504 115605504 115605504 57802752 115605504 6422528 115605504 115605504 57802752
    115605504 6422528 115605504 115605504 57802752 115605504 6422528 115605504 115605504"""
HAWQ_LATENCY_4 = """.21094404 .21092674 .21104113 .21086851 .13642465 .19167506 .02532183 .19148203 .19142914 .11395316
    .20556011 .01917474 .20566918 .20566509 .13185102 .22287786 .01790088 .22304611 .22286099"""
HAWQ_LATENCY_8 = """.36189111 .36211718 .31141909 .30454471 .19184896 .38948934 .0334169 .38904905 .3892859 .19134735
    .34307431 .02802354 .34313329 .34310756 .21117103 .37376585 .02896843 .37398187 .37405185"""
# A residual block's first and downsampling convolution share their input, so they share their bits.
HAWQ_TIES = ((4, 6), (9, 11), (14, 16))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A problem, its optimum (None: no choice keeps every limit), and why it is here."""

    name: str
    problem: AllocationProblem
    optimum: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class HawqCase:
    """A published problem: resource, limit, summed perturbation to its five printed digits, and the bits."""

    resource: str
    limit: float
    omega: float
    bits: str


HAWQ_CASES = (
    HawqCase(resource="size", limit=9.3105, omega=0.03344, bits="8888888888888488884"),
    HawqCase(resource="size", limit=7.9805, omega=0.07451, bits="8888888888888884844"),
    HawqCase(resource="size", limit=6.6504, omega=0.11830, bits="8888888888888844444"),
    HawqCase(resource="bops", limit=86.102, omega=0.07996, bits="8888888848888484884"),
    HawqCase(resource="bops", limit=66.232, omega=0.21569, bits="8884888848884444444"),
    HawqCase(resource="bops", limit=46.363, omega=0.46042, bits="8884848444444444444"),
    HawqCase(resource="latency", limit=4.7949, omega=0.07996, bits="8888888848888484884"),
    HawqCase(resource="latency", limit=4.2462, omega=0.20267, bits="8888848848884484844"),
    HawqCase(resource="latency", limit=3.6974, omega=0.46042, bits="8884848444444444444"),
)


def takes(solver: str, problem: AllocationProblem) -> bool:
    """Returns whether a solver takes a problem; the others must refuse it."""
    if not problem.is_separable:
        return solver in INTERACTING
    return len(problem.binding) <= 1 or solver not in ONE_LIMIT_ONLY


def claims_optimum(solver: str, problem: AllocationProblem) -> bool:
    """Returns whether a solver promises the optimum of a problem that it takes."""
    return solver in EXACT or (solver == "quadratic" and problem.is_separable)


def parse_row(text: str) -> NDArray[np.float64]:
    return np.array(text.split(), dtype=np.float64)


def group_hawq_layers() -> list[list[int]]:
    """Returns the layers of every unit: tied layers are one unit, at the place of its first."""
    tied_to = {second: first for first, second in HAWQ_TIES}
    return [[i, *(s for s, f in tied_to.items() if f == i)] for i in range(19) if i not in tied_to]


def build_hawq_layers(case: HawqCase) -> AllocationProblem:
    """Returns the problem over all 19 layers and formats (4 bits, 8 bits), without the ties; size in MiB, ms."""
    trace = parse_row(HAWQ_TRACE)
    parameters, macs = parse_row(HAWQ_PARAMETERS), parse_row(HAWQ_MACS) / 1e6
    tables = {
        "size": (parameters / 2 / 2**20, parameters / 2**20),
        "bops": (macs / 64, macs / 16),
        "latency": (parse_row(HAWQ_LATENCY_4), parse_row(HAWQ_LATENCY_8)),
    }
    return build_problem(
        loss=np.stack([trace * parse_row(HAWQ_ERROR_4), trace * parse_row(HAWQ_ERROR_8)], axis=1),
        cost=np.stack(tables[case.resource], axis=1)[None],
        limit=[case.limit],
        resources=(case.resource,),
    )


def build_hawq_problem(case: HawqCase) -> AllocationProblem:
    """Returns the problem over 16 units, the tied layers summed by hand."""
    layers = build_hawq_layers(case)
    units = group_hawq_layers()
    return build_problem(
        loss=[layers.loss[members].sum(axis=0) for members in units],
        cost=[[layers.cost[0, members].sum(axis=0) for members in units]],
        limit=[case.limit],
        resources=(case.resource,),
    )


def build_problem(
    *,
    loss: object,
    cost: object,
    limit: object,
    allowed: object = None,
    resources: tuple[str, ...] | None = None,
    sketch: object = None,
    interaction_scale: float = 1.0,
) -> AllocationProblem:
    """Returns a problem from nested lists or arrays of any number type."""
    losses = np.asarray(loss, dtype=np.float64)
    costs = np.asarray(cost, dtype=np.float64)
    return AllocationProblem(
        loss=losses,
        cost=costs,
        limit=np.asarray(limit, dtype=np.float64),
        allowed=np.ones(losses.shape, dtype=bool) if allowed is None else np.asarray(allowed, dtype=bool),
        resources=resources or tuple(f"resource{r}" for r in range(costs.shape[0])),
        sketch=None if sketch is None else np.asarray(sketch, dtype=np.float64),
        interaction_scale=interaction_scale,
    )


def build_planted_interaction() -> AllocationProblem:
    """Returns four equal units, two of which must be kept high; errors of units 0 and 1 add up, of 2 and 3 cancel.

    Alone every low unit costs 1/2. Low {0, 1}: 1/2 (1+1)^2 = 2. Low {2, 3}: 1/2 (1-1)^2 = 0. Mixed: 1.
    """
    sketch = np.zeros((2, 4, 2))
    sketch[0, :2, 0] = 1.0
    sketch[1, 2, 0], sketch[1, 3, 0] = 1.0, -1.0
    return build_problem(loss=[[0.5, 0.0]] * 4, cost=[[[1.0, 2.0]] * 4], limit=[6.0], sketch=sketch)


CASES = (
    Case(
        name="one_unit",
        problem=build_problem(loss=[[3.0, 1.0, 2.0]], cost=[[[1.0, 2.0, 3.0]]], limit=[2.5]),
        optimum=1.0,
        reason="the loss is not monotone: the dearest format is not the best",
    ),
    Case(
        name="limit_met_exactly",
        problem=build_problem(loss=[[2.0, 0.0], [2.0, 0.0]], cost=[[[0.1, 0.2], [0.1, 0.2]]], limit=[0.1 + 0.2]),
        optimum=2.0,
        reason="0.1 + 0.2 exceeds 0.3 in floating point by rounding alone",
    ),
    Case(
        name="zero_cost_formats",
        problem=build_problem(loss=[[5.0, 4.0, 0.0], [3.0, 1.0, 0.5]], cost=[[[0, 0, 2], [0, 0, 1]]], limit=[2.0]),
        optimum=1.0,
        reason="two formats cost nothing, and one of them is dominated",
    ),
    Case(
        name="optimum_off_the_hull",
        problem=build_problem(loss=[[10.0, 9.0, 0.0], [10.0, 6.0, 0.0]], cost=[[[0, 5, 10], [0, 4, 10]]], limit=[9.0]),
        optimum=15.0,
        reason="the hull of each unit skips its middle format, which the optimum needs in both units",
    ),
    Case(
        name="greedy_is_wrong",
        problem=build_problem(loss=[[6.0, 0.0], [5.0, 0.0], [5.0, 0.0]], cost=[[[0, 6], [0, 5], [0, 5]]], limit=[10.0]),
        optimum=6.0,
        reason="equal slopes: taking the first step blocks the two that fill the budget",
    ),
    Case(
        name="negative_losses",
        problem=build_problem(loss=[[-1.0, -3.0], [2.0, -4.0]], cost=[[[1, 4], [1, 3]]], limit=[5.0]),
        optimum=-5.0,
        reason="estimates may be negative; the objective is too",
    ),
    Case(
        name="masked_candidates_are_nan",
        problem=build_problem(
            loss=[[np.nan, 1.0, 0.0], [2.0, np.inf, 0.0]],
            cost=[[[np.nan, 1.0, 3.0], [1.0, np.nan, 3.0]]],
            limit=[4.0],
            allowed=[[False, True, True], [True, False, True]],
        ),
        optimum=1.0,
        reason="what is not allowed is never read",
    ),
    Case(
        name="unlimited",
        problem=build_problem(loss=[[1.0, 0.2], [3.0, 0.1]], cost=[[[1, 2], [1, 2]]], limit=[np.inf]),
        optimum=0.3,
        reason="without a limit every unit takes its best format",
    ),
    Case(
        name="all_equal",
        problem=build_problem(loss=[[1.0, 1.0]] * 5, cost=[[[2, 2]] * 5], limit=[10.0]),
        optimum=5.0,
        reason="every candidate ties with every other",
    ),
    Case(
        name="out_of_reach",
        problem=build_problem(loss=[[1.0, 0.0], [1.0, 0.0]], cost=[[[2, 3], [2, 3]]], limit=[3.0]),
        optimum=None,
        reason="the cheapest choice uses 4",
    ),
    Case(
        name="two_limits",
        problem=build_problem(
            loss=[[4.0, 2.0, 0.0], [4.0, 1.0, 0.0]],
            cost=[[[0, 1, 2], [0, 1, 2]], [[0, 3, 1], [0, 1, 3]]],
            limit=[3.0, 2.0],
        ),
        optimum=1.0,
        reason="each limit alone allows a better choice",
    ),
    Case(
        name="jointly_out_of_reach",
        problem=build_problem(
            loss=[[1.0, 0.0], [1.0, 0.0]], cost=[[[0, 1], [0, 1]], [[1, 0], [1, 0]]], limit=[0.5, 0.5]
        ),
        optimum=None,
        reason="each limit can be kept, both cannot",
    ),
    Case(
        name="integrally_out_of_reach",
        problem=build_problem(
            loss=[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]],
            cost=[[[0, 1], [0, 1], [0, 1]], [[1, 0], [1, 0], [1, 0]]],
            limit=[1.5, 1.5],
        ),
        optimum=None,
        reason="fractions keep both limits, whole formats cannot",
    ),
    Case(
        name="planted_interaction",
        problem=build_planted_interaction(),
        optimum=0.0,
        reason="the errors of two units cancel, which no sum over units can see",
    ),
)
