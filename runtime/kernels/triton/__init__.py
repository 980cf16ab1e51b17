"""Triton kernels that read packed weights, and the layout they read.

``fragment_layout`` and ``launch_table`` need torch alone; what launches or compiles a kernel needs Triton, which comes
with torch's builds for CUDA, or with the extra ``triton``.
"""

import os


def serves(device_type: str) -> bool:
    """Returns True where products with packed weights are Triton's.

    That is on CUDA devices; and everywhere under TRITON_INTERPRET=1, Triton's own switch to its interpreter, which is
    there to check the kernels and takes thousands of times as long.

    Args:
        device_type: Such as ``cuda`` or ``cpu``.
    """
    return device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
