"""Packed weights in one piece of memory with large pages, in the order in which a step reads them.

A decode step reads all weights once. In pages of 4 KiB a processor looks up an address for every 64 cache lines, and
most of these look-ups miss; in pages of 2 MiB few do. SmolLM2-135M at 4 bits took 0.85 of the time for a token. And
where matrices lie behind one another, the prefetch at the end of one is the beginning of the next.

Where the system has no large pages on request (other systems than Linux, transparent_hugepage=never) nothing is moved:
small pages of private memory are slower than those of the mapped file.
"""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.packed import PackedWeight

_LARGE_PAGE_BYTES = 2 << 20
_ALIGNMENT_BYTES = 64
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather_weights_(model: nn.Module) -> bool:
    """Moves the packed weights of a model on the CPU; returns False where it leaves them.

    They are left where there are no large pages or less than twice their bytes of free memory.
    """
    tensors = list(_list_tensors(model))
    size = sum(_room_bytes(tensor) for _, _, tensor in tensors)
    if not tensors or not has_large_pages() or 2 * size > _free_bytes():
        return False
    memory = reserve_large_pages(size)
    moved: dict[int, Tensor] = {}
    offset = 0
    for weight, name, tensor in tensors:
        # A tied table is there twice and moved once.
        if tensor.data_ptr() not in moved:
            place = memory[offset : offset + tensor.numel() * tensor.element_size()]
            moved[tensor.data_ptr()] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            offset += _room_bytes(tensor)
        weight._buffers[name] = moved[tensor.data_ptr()]
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


def _list_tensors(model: nn.Module) -> Iterator[tuple[PackedWeight, str, Tensor]]:
    """Yields every tensor of the packed weights: codes by layer, tables last, then the rest."""
    weights = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedWeight)]
    weights.sort(key=lambda named: ".layers." not in named[0])
    for place in range(3):
        for _, weight in weights:
            for name, tensor in weight._buffers.items():
                if tensor is not None and tensor.device.type == "cpu" and _place_of(name) == place:
                    yield weight, name, tensor


def _place_of(name: str) -> int:
    # Codes that are read at the full width alone do not lie between those that are always read.
    return 0 if name == "codes" else 1 if name.startswith("codes") else 2


def _room_bytes(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
