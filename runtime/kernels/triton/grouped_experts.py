"""A mixture's experts, each in its own format, by one launch a projection.

Slots (pairs of token and expert) are sorted by expert and cut into blocks; the blocks of the experts with most bytes
come first, so that none of them is left to the end. All of it stays on the device: the grid is the most blocks there
can be, and programs without a block end at once.

Experts whose weights no ``FragmentWeight`` holds are multiplied one by one, by a function that is given for each. Their
tokens are then cut out of the others, for which the host must know how many they are; the launch reads nothing of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.fragment_layout import TILE_CODES, TILE_ROWS, FragmentWeight
from runtime.kernels.triton.grouped_experts_kernel import grouped_experts_kernel
from runtime.kernels.triton.product_launch import INTERPRETED, pad_rows
from runtime.kernels.triton.row_scaling import needs_scaled_rows, scale_rows, sum_parts

_WARPS = 2
_STAGES = 3
_MOST_REGISTERS = 255
Kind = tuple[int, int, bool, int, str, int]
# (x [tokens, in_features]) -> x W' [tokens, out_features].
Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class FragmentExperts:
    """The weights of one projection of all experts, one buffer each for words, scales and zero points.

    Args:
        shape: (out_features, in_features) of each expert.
        kinds: (bits, group size or 0, symmetric, tiles of a step, type of the scales, mantissa bits of floats or -1) of
            each kind of weight there is.
        kind: [experts] int32, index into ``kinds``, -1 for experts that are multiplied by themselves.
        order: [experts of the launch] int64, by descending bytes.
        words, scale, zero_point: int32, the experts' tensors one after the other, as words.
        offset: [experts, 3] int64, where they begin.
        factor: [experts] float32, what an expert's weights are multiplied by.
        others: The product of each expert that is multiplied by itself.
    """

    shape: tuple[int, int]
    kinds: tuple[Kind, ...]
    kind: Tensor
    order: Tensor
    words: Tensor
    scale: Tensor
    zero_point: Tensor
    offset: Tensor
    factor: Tensor
    others: Mapping[int, Multiply]


def gather_experts(weights: Sequence[FragmentWeight | Multiply], shape: tuple[int, int]) -> FragmentExperts:
    """Returns the experts' weights in one place.

    Args:
        weights: One an expert, of any kinds; a function for an expert that is multiplied by itself.
        shape: (out_features, in_features) of each of them.

    Raises:
        ValueError: If a weight has another shape.
    """
    held = {i: weight for i, weight in enumerate(weights) if isinstance(weight, FragmentWeight)}
    shapes = {weight.shape for weight in held.values()} | {shape}
    if len(shapes) != 1:
        msg = f"experts of one projection must have one shape: got {sorted(shapes)}. Gather each projection by itself."
        raise ValueError(msg)
    kinds = sorted({_find_kind(weight) for weight in held.values()})
    parts = {
        i: (weight.words.flatten(), weight.scale.flatten().view(torch.int32), _list_zeros(weight))
        for i, weight in held.items()
    }
    none = torch.empty(0, dtype=torch.int32)
    words, scale, zero_point = (torch.cat(column) for column in zip(*(parts.values() or [(none,) * 3]), strict=True))
    sizes = torch.zeros((len(weights), 3), dtype=torch.int64)
    kind, factor = torch.full((len(weights),), -1, dtype=torch.int32), torch.ones(len(weights))
    for i, weight in held.items():
        sizes[i] = torch.tensor([part.numel() for part in parts[i]])
        kind[i], factor[i] = kinds.index(_find_kind(weight)), weight.kernel_factor
    order = sorted(held, key=lambda i: held[i].read_bytes, reverse=True)
    device = words.device
    return FragmentExperts(
        shape=shape,
        kinds=tuple(kinds),
        kind=kind.to(device),
        order=torch.tensor(order, dtype=torch.int64, device=device),
        words=words,
        scale=scale,
        zero_point=zero_point if zero_point.numel() else scale,
        offset=(sizes.cumsum(0) - sizes).to(device),
        factor=factor.to(device),
        others={i: weight for i, weight in enumerate(weights) if not isinstance(weight, FragmentWeight)},
    )


def multiply_experts(x: Tensor, token: Tensor, counts: Tensor, experts: FragmentExperts, *, gated: bool) -> Tensor:
    """Returns, for each slot, the product of its token with its expert: [slots, out_features].

    Args:
        x: [tokens, in_features] float16, bfloat16 or float32.
        token: [slots] int64, the row of x of each slot; slots sorted by expert.
        counts: [experts] int64, slots of each expert.
        experts: The weights.
        gated: Rows are a gate's above an up projection's: returns silu(gate) * up, half as wide.
    """
    if not experts.kinds:
        y = x.new_empty((token.shape[0], experts.shape[0] // 2 if gated else experts.shape[0]))
    elif any(needs_scaled_rows(x.dtype, kind[0], kind[5]) for kind in experts.kinds):
        y = _multiply_scaled(x, token, counts, experts, gated=gated)
    else:
        y = _multiply_rows(x, token, counts, experts, gated=gated)
    if experts.others:
        sizes, ends = counts.tolist(), counts.cumsum(0).tolist()
        for expert, multiply in experts.others.items():
            slots = slice(ends[expert] - sizes[expert], ends[expert])
            if sizes[expert]:
                product = multiply(x[token[slots]])
                y[slots] = _apply_gate(product) if gated else product
    return y


def _multiply_rows(x: Tensor, token: Tensor, counts: Tensor, experts: FragmentExperts, *, gated: bool) -> Tensor:
    """Multiplies the rows as they are; the kernel applies the gate where gate and up begin at a block of 8 rows."""
    rows = experts.shape[0]
    padded = pad_rows(x)
    if gated and rows % (2 * TILE_ROWS):
        y = _launch(padded, token, counts, experts, rows, gated=False, out_dtype=torch.float32)
        return _apply_gate(y).to(x.dtype)
    return _launch(padded, token, counts, experts, rows // 2 if gated else rows, gated=gated, out_dtype=x.dtype)


def _launch(
    x: Tensor,
    token: Tensor,
    counts: Tensor,
    experts: FragmentExperts,
    rows: int,
    *,
    gated: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    slots, K = token.shape[0], experts.shape[1]
    y = torch.empty((slots, rows), dtype=out_dtype, device=x.device)
    if slots == 0:
        return y
    block_m = 8 if slots <= TILE_ROWS * counts.shape[0] else 16
    block_expert, block_first, block_last = plan_blocks(counts, experts.order, block_m, slots)
    grouped_experts_kernel[(triton.cdiv(rows, 64 * _WARPS), block_expert.shape[0])](
        x,
        token,
        experts.words,
        experts.scale,
        experts.zero_point,
        experts.offset,
        experts.kind,
        experts.factor,
        block_expert,
        block_first,
        block_last,
        y,
        rows,
        triton.cdiv(experts.shape[0], TILE_ROWS),
        triton.cdiv(K, TILE_CODES),
        x.stride(0),
        KINDS=experts.kinds,
        GATED=gated,
        BLOCK_M=block_m,
        WARPS=_WARPS,
        STAGES=_STAGES,
        UPCAST=INTERPRETED,
        num_warps=_WARPS,
        maxnreg=_MOST_REGISTERS,
    )
    return y


def _multiply_scaled(x: Tensor, token: Tensor, counts: Tensor, experts: FragmentExperts, *, gated: bool) -> Tensor:
    """Multiplies the parts of each row (``scale_rows``), which become neighbouring slots; then applies the gate."""
    scaled = scale_rows(x)
    parts, rows = scaled.exponent.shape
    slots = (token[:, None] + rows * torch.arange(parts, device=x.device)).flatten()
    values = scaled.values.flatten(0, 1)
    y = _launch(values, slots, parts * counts, experts, experts.shape[0], gated=False, out_dtype=torch.float32)
    y = torch.ldexp(sum_parts(y.view(-1, parts, y.shape[1]).transpose(0, 1)), scaled.exponent[0, token, None])
    return (_apply_gate(y) if gated else y).to(x.dtype)


def _apply_gate(y: Tensor) -> Tensor:
    """Returns silu(gate) * up of products with a gate and an up projection side by side."""
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def plan_blocks(counts: Tensor, order: Tensor, block_m: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns expert, first and last slot of each block, experts in the order given; the last blocks may be empty.

    Args:
        counts: [experts] int64, slots of each expert; slots are sorted by expert.
        order: [experts of the launch] int64, the order in which experts' blocks come.
        block_m: Most slots of a block.
        slots: Slots in all.
    """
    experts = order.shape[0]
    # An expert that is taken has one block that is not full at most.
    most = min(slots, experts) + slots // block_m
    ends = counts.cumsum(0)
    blocks = (counts[order] + block_m - 1) // block_m
    block_ends = blocks.cumsum(0)
    block = torch.arange(most, device=counts.device)
    place = torch.searchsorted(block_ends, block, right=True).clamp(max=experts - 1)
    expert = order[place]
    within = block - (block_ends - blocks)[place]
    first = ends[expert] - counts[expert] + within * block_m
    # Past the last block `within` runs on over the last expert's slots, so first >= last there.
    return expert, first, torch.minimum(first + block_m, ends[expert])


def run_experts(
    x: Tensor, expert_index: Tensor, routing_weights: Tensor, gate_up: FragmentExperts, down: FragmentExperts
) -> Tensor:
    """Returns the output of a mixture with gated experts, [tokens, hidden], as transformers computes it.

    Args:
        x: [tokens, hidden] float16, bfloat16 or float32.
        expert_index: [tokens, k] int64, the experts of each token; numbers that are no expert's are skipped.
        routing_weights: [tokens, k], what their outputs are weighted with.
        gate_up: Gate above up projection of every expert.
        down: Down projection of every expert.
    """
    tokens, k = expert_index.shape
    flat = expert_index.flatten()
    slot_order = torch.argsort(flat, stable=True)
    experts = gate_up.kind.shape[0]
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, flat.clamp(max=experts), torch.ones_like(flat))[:experts]
    inner = multiply_experts(x, slot_order // k, counts, gate_up, gated=True)
    slots = torch.arange(tokens * k, device=x.device)
    outer = multiply_experts(inner, slots, counts, down, gated=False)
    # Slots without an expert come last, and nobody has written them.
    by_token = torch.empty_like(outer)
    by_token[slot_order] = torch.where(flat[slot_order].unsqueeze(1) < experts, outer, 0)
    weighted = by_token.view(tokens, k, -1) * routing_weights.unsqueeze(-1).to(outer.dtype)
    return weighted.sum(dim=1)


def _list_zeros(weight: FragmentWeight) -> Tensor:
    """Returns the zero points of an expert as words; those of the next begin at an even one, for reads of two."""
    if weight.zero_point is None:
        return torch.empty(0, dtype=torch.int32, device=weight.words.device)
    words = weight.zero_point.flatten().view(torch.int32)
    return torch.nn.functional.pad(words, (0, words.numel() % 2))


def _find_kind(weight: FragmentWeight) -> Kind:
    tiles = -(-weight.shape[1] // TILE_CODES)
    in_one_group = weight.group_size is None or weight.group_size % (2 * TILE_CODES) == 0
    step = 2 if in_one_group and tiles % 2 == 0 else 1
    return weight.bits, weight.group_size or 0, weight.zero_point is None, step, weight.scale_name, weight.element
