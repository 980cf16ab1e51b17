"""Experts of different formats in one launch, in Triton's interpreter, against float64."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from runtime.apply import pack_weight
from runtime.formats import FORMATS
from runtime.kernels.triton.grouped_experts import (
    FragmentExperts,
    gather_experts,
    multiply_experts,
    plan_blocks,
    run_experts,
)
from runtime.kernels.triton.packed_fragments import fits_kernels, make_fragments
from runtime.packed import PackedWeight
from tests.gpu_kernels.interpreted.products import ROUNDING, Case, bound_error, bound_sums, draw_weight

WIDTHS = (2, 3, 4, 8, 4)


def draw_experts(rows: int, count: int, seed: int = 0) -> tuple[FragmentExperts, list[Tensor], list[Tensor]]:
    """Returns experts of many kinds, their weights and the scales of each element in float64."""
    generator = torch.Generator().manual_seed(seed)
    cases = [
        Case(bits=bits, out_features=rows, in_features=count, group_size=group_size, symmetric=symmetric)
        for bits, group_size, symmetric in zip(WIDTHS, (64, 128, 32, None, 64), (False, True) * 3, strict=False)
    ]
    weights, dense, scales = zip(*(draw_weight(case, generator) for case in cases), strict=True)
    return gather_experts(list(weights), (rows, count)), list(dense), list(scales)


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


MIXED = (
    ("int4_g64", "mxfp4", "nvfp4", "fp8_e4m3_channel", "ternary_g64"),
    ("int1_g64", "mxfp6_e2m3", "int3_g32_pow2", "mxint8", "fp6_e3m2_g64"),
    ("nvint4", "mxfp8_e5m2", "int1_channel_sym", "ternary_channel", "int7_g16_sym"),
)


def pack_experts(names: Sequence[str], rows: int, count: int) -> tuple[FragmentExperts, list[PackedWeight]]:
    """Returns experts in formats, gathered where the launch holds them, and multiplied in float64 where not."""
    generator = torch.Generator().manual_seed(0)
    weights = [pack_weight(torch.randn(rows, count, generator=generator) / 8, FORMATS[name]) for name in names]

    def multiply_exactly(x: Tensor, weight: PackedWeight) -> Tensor:
        return (x.double() @ weight().double().t()).to(x.dtype)

    made = [
        (make_fragments(weight) if fits_kernels(weight.format) else None) or partial(multiply_exactly, weight=weight)
        for weight in weights
    ]
    return gather_experts(made, (rows, count)), weights


def check_slots(
    counts: list[int], dtype: torch.dtype, experts: FragmentExperts, weights: list[PackedWeight], *, gated: bool
) -> None:
    """Every slot of a launch against float64, silu(gate) * up included."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, experts.shape[1], generator=generator)
    x[:, 5] *= 20
    x = x.to(dtype)
    token = torch.randint(0, 7, (sum(counts),), generator=generator)
    y = multiply_experts(x, token, torch.tensor(counts), experts, gated=gated)
    assert y.dtype == dtype and y.shape == (sum(counts), experts.shape[0] // (1 + gated))
    for weight, rows, some in zip(weights, x[token].split(counts), y.split(counts), strict=True):
        expected = rows.double() @ weight().double().t()
        alone = not fits_kernels(weight.format)
        bound = ROUNDING[dtype] * expected.abs() if alone else bound_sums(rows, weight)
        if gated:
            gate, up = expected.chunk(2, dim=1)
            of_gate, of_up = bound.chunk(2, dim=1)
            # The slope of silu is below 1.1, and |silu(g)| <= |g|; sigmoid in float32 is good to 2**-21. Those that are
            # multiplied alone have it rounded to their type.
            of_silu = ROUNDING[dtype] if alone else 2.0**-20
            bound = 1.1 * of_gate * (up.abs() + of_up) + gate.abs() * of_up + of_silu * (gate * up).abs()
            expected = torch.nn.functional.silu(gate) * up
        assert bool(((some.double() - expected).abs() <= bound + ROUNDING[dtype] * expected.abs()).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_formats_of_any_kind_share_a_launch(names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Rows that are no multiple of a program's, an odd number of tiles, experts without tokens and with one."""
    experts, weights = pack_experts(names, 88, 192)
    assert len(experts.kinds) == len(names) and not experts.others
    for counts in ([1, 0, 3, 9, 2], [0, 1, 0, 0, 0]):
        check_slots(counts, dtype, experts, weights, gated=False)
    check_slots([2, 1, 1, 0, 11], dtype, experts, weights, gated=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_a_gate_may_begin_anywhere(dtype: torch.dtype) -> None:
    """With 11 rows the up projection begins inside a block of 8: the gate is applied after the launch."""
    experts, weights = pack_experts(MIXED[0], 22, 64)
    check_slots([2, 0, 1, 3, 1], dtype, experts, weights, gated=True)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_only_experts_that_cannot_be_grouped_are_multiplied_alone(dtype: torch.dtype, gated: bool) -> None:
    experts, weights = pack_experts(("mxfp4", "nested8_g64", "int4_g64", "bf16", "bcq3_g64"), 48, 128)
    assert set(experts.others) == {1, 3, 4} and len(experts.kinds) == 2
    for counts in ([2, 1, 0, 5, 1], [0, 0, 0, 2, 0], [3, 0, 1, 0, 0]):
        check_slots(counts, dtype, experts, weights, gated=gated)
    alone, weights = pack_experts(("bf16", "nested8_g64"), 48, 128)
    check_slots([1, 2], dtype, alone, weights, gated=gated)


def test_every_expert_has_its_own_factor() -> None:
    """NVFP4 has one number for a whole weight, and E4M3 scales are read as a 256th."""
    experts, weights = pack_experts(("nvfp4", "nvfp4", "mxint8", "int4_g64"), 16, 64)
    assert len(experts.kinds) == 3
    units = [256 * float(weight.scale_unit) * 2.0**14 for weight in weights[:2]]
    assert experts.factor.tolist() == [*units, 2.0**-6, 1.0]
    assert units[0] != units[1]


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
        gather_experts(weights, (16, 128))
