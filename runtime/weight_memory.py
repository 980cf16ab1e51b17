"""Packed weights in one piece of memory with large pages, in the order in which a step reads them.

A decode step reads all weights once. In pages of 4 KiB a processor looks up an address for every 64 cache lines, and
most of these look-ups miss; in pages of 2 MiB few do. SmolLM2-135M at 4 bits took 0.85 of the time for a token. And
where matrices lie behind one another, the prefetch at the end of one is the beginning of the next.

Where the system has no large pages on request (other systems than Linux, transparent_hugepage=never) nothing is moved:
small pages of private memory are slower than those of the mapped file.
"""

import mmap
import os
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.kernels.dispatch import selected_kernels
from runtime.kernels.weight_views import execution_bytes, use_execution_
from runtime.packed import PackedExperts, PackedWeight, QuantizedLinear

_LARGE_PAGE_BYTES = 2 << 20
_ALIGNMENT_BYTES = 64
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather_weights_(model: nn.Module) -> bool:
    """Moves the packed weights of a model on the CPU; returns False where it leaves them.

    Weights that the kernels multiply faster, or at all, in an execution layout get one there and stay where they are
    themselves: in a mapped file that takes no memory, and what reads them as they are stored, long prompts and rows of
    a tied embedding, finds them. All are left where there are no large pages or less than twice their bytes of free
    memory.
    """
    kernels = selected_kernels()
    products = [] if kernels is None else list(_list_products(model))
    sizes = {_anchor(w).data_ptr(): size for w in products if kernels and (size := execution_bytes(w, kernels))}
    tensors = list(_list_tensors(model, sizes))
    size = sum(_room_bytes(sizes.get(tensor.data_ptr(), tensor.nbytes)) for _, _, tensor in tensors)
    if not tensors or not has_large_pages() or 2 * size > _free_bytes():
        return False
    memory = reserve_large_pages(size)
    moved: dict[int, Tensor] = {}
    offset = 0
    for weight, name, tensor in tensors:
        address = tensor.data_ptr()
        # A tied table is there twice and moved once.
        if address not in moved:
            place = memory[offset : offset + sizes.get(address, tensor.nbytes)]
            offset += _room_bytes(place.nbytes)
            moved[address] = place if address in sizes else place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if address not in sizes:
            weight._buffers[name] = moved[address]
    for weight in products:
        if kernels is not None and _anchor(weight).data_ptr() in sizes:
            use_execution_(weight, kernels, moved[_anchor(weight).data_ptr()])
    return True


def has_large_pages() -> bool:
    """Returns True where the system gives large pages to those who ask for them."""
    try:
        switch = _SWITCH.read_text(encoding="ascii")
    except OSError:
        return False
    return hasattr(mmap, "MADV_HUGEPAGE") and "[never]" not in switch


def reserve_large_pages(size: int) -> Tensor:
    """Returns ``size`` bytes that begin with a large page, all of them large where the system has so many."""
    length = (size // _LARGE_PAGE_BYTES + 2) * _LARGE_PAGE_BYTES
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    # The tensor keeps the mapping alive.
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _LARGE_PAGE_BYTES
    return whole[start : start + size]


def _list_tensors(model: nn.Module, laid_out: Container[int]) -> Iterator[tuple[PackedWeight, str, Tensor]]:
    """Yields the tensors of the packed weights: codes by layer, tables last, then all that goes with the codes.

    Args:
        model: The model.
        laid_out: Addresses of the first tensors of weights that get an execution layout; of those no others are
            yielded.
    """
    weights = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    weights.sort(key=lambda named: ".layers." not in named[0])
    for place in range(3):
        for _, weight in weights:
            if _anchor(weight).data_ptr() in laid_out:
                if place == 0:
                    yield weight, next(iter(weight._buffers)), _anchor(weight)
                continue
            for name, tensor in weight._buffers.items():
                if tensor is not None and tensor.device.type == "cpu" and _place_of(name) == place:
                    yield weight, name, tensor


def _anchor(weight: PackedWeight) -> Tensor:
    """The first tensor of a weight, by whose address it is known, tied or not."""
    tensor = next(iter(weight._buffers.values()))
    assert tensor is not None
    return tensor


def _place_of(name: str) -> int:
    # Codes that are read at the full width alone do not lie between those that are always read.
    return 0 if name == "codes" else 1 if name.startswith("codes") else 2


def _list_products(model: nn.Module) -> Iterator[PackedWeight]:
    """Yields the packed weights that activations are multiplied with."""
    for module in model.modules():
        weights = list(module.children()) if isinstance(module, PackedExperts) else []
        if isinstance(module, QuantizedLinear):
            weights = [module.weight]
        yield from (weight for weight in weights if isinstance(weight, PackedWeight))


def _room_bytes(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
