"""Experts of different widths in one launch, in Triton's interpreter, against float64."""

import pytest
import torch
from torch import Tensor

from runtime.kernels.triton.grouped_experts import (
    FragmentExperts,
    gather_experts,
    multiply_experts,
    plan_blocks,
    run_experts,
)
from tests.gpu_kernels.interpreted.products import Case, bound_error, draw_weight

WIDTHS = (2, 3, 4, 8, 4)


def draw_experts(rows: int, count: int, seed: int = 0) -> tuple[FragmentExperts, list[Tensor], list[Tensor]]:
    """Returns experts of many kinds, their weights and the scales of each element in float64."""
    generator = torch.Generator().manual_seed(seed)
    cases = [
        Case(bits=bits, out_features=rows, in_features=count, group_size=group_size, symmetric=symmetric)
        for bits, group_size, symmetric in zip(WIDTHS, (64, 128, 32, None, 64), (False, True) * 3, strict=False)
    ]
    weights, dense, scales = zip(*(draw_weight(case, generator) for case in cases), strict=True)
    return gather_experts(list(weights)), list(dense), list(scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("counts", [[1, 0, 3, 2, 1], [0, 0, 0, 0, 1], [9, 1, 50, 0, 17]], ids=str)
def test_every_slot_gets_its_expert(counts: list[int], dtype: torch.dtype) -> None:
    experts, dense, scales = draw_experts(72, 128)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 128, generator=generator).to(dtype)
    token = torch.randint(0, 7, (sum(counts),), generator=generator)
    y = multiply_experts(x, token, torch.tensor(counts), experts, gated=False)
    assert y.dtype == dtype
    first = 0
    for expert, count in enumerate(counts):
        rows = x[token[first : first + count]]
        expected = rows.double() @ dense[expert].t()
        case = Case(bits=WIDTHS[expert], dtype=dtype, in_features=128)
        bound = bound_error(case, rows, scales[expert], expected)
        assert bool(((y[first : first + count].double() - expected).abs() <= bound).all()), expert
        first += count


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_a_mixture_equals_its_definition(dtype: torch.dtype) -> None:
    """Gate, up, activation, down and routing against a loop over tokens in float64; one slot has no expert."""
    gate_up, dense_gate_up, _ = draw_experts(2 * 128, 128, seed=1)
    down, dense_down, _ = draw_experts(128, 128, seed=2)
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(6, 128, generator=generator) / 8).to(dtype)
    index = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(6)])
    index[2, 1] = 5
    weights = torch.rand(6, 2, generator=generator)
    y = run_experts(x, index, weights, gate_up, down)
    expected = torch.zeros(6, 128, dtype=torch.float64)
    greatest = torch.zeros(6, 128, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(6), torch.arange(2)).tolist():
        expert, weight = int(index[token, slot]), weights[token, slot].double()
        if expert < 5:
            gate, up = (dense_gate_up[expert] @ x[token].double()).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += weight * (dense_down[expert] @ inner)
            greatest[token] += weight * (dense_down[expert].abs() @ inner.abs())
    # The type rounds the inner activations, each expert's output, its product with the weight, and the sum; the sums of
    # 128 codes inside are worth no more than those four again.
    rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-19
    assert bool(((y.double() - expected).abs() <= 8 * rounding * greatest.max()).all())


def test_blocks_cover_every_slot_once_heaviest_experts_first() -> None:
    counts = torch.tensor([3, 0, 17, 8, 1])
    order = torch.tensor([2, 4, 0, 1, 3])
    expert, first, last = plan_blocks(counts, order, 8, int(counts.sum()))
    full = first < last
    taken = [slot for a, b in zip(first[full].tolist(), last[full].tolist(), strict=True) for slot in range(a, b)]
    assert sorted(taken) == list(range(29))
    assert expert[full].tolist() == [2, 2, 2, 4, 0, 3]
    slots = torch.repeat_interleave(torch.arange(5), counts)
    for e, a, b in zip(expert[full].tolist(), first[full].tolist(), last[full].tolist(), strict=True):
        assert slots[a:b].tolist() == [e] * (b - a)


def test_heaviest_experts_are_ordered_first() -> None:
    experts, _, _ = draw_experts(16, 128)
    assert experts.order.tolist()[0] == WIDTHS.index(8)
    assert experts.order.tolist()[-1] == WIDTHS.index(2)
    assert len(experts.kinds) == 5


def test_no_slots_make_no_launch() -> None:
    experts, _, _ = draw_experts(16, 128)
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.ones(1, 128, dtype=torch.float16)
    y = multiply_experts(x, none, torch.zeros(5, dtype=torch.int64), experts, gated=False)
    assert y.shape == (0, 16)


def test_what_cannot_be_grouped_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [draw_weight(Case(bits=4, out_features=rows), generator)[0] for rows in (16, 24)]
    with pytest.raises(ValueError, match="must have one shape: got"):
        gather_experts(weights)
    experts, _, _ = draw_experts(2 * 12, 128)
    x, token = torch.ones(1, 128, dtype=torch.float16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple of 8 rows: got rows=12"):
        multiply_experts(x, token, torch.tensor([1, 0, 0, 0, 0]), experts, gated=True)
