"""What a table was measured on: processor, cores, memory, versions. No host names."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(libraries: tuple[str, ...] = ("torch", "transformers", "numpy", "scipy")) -> str:
    """Returns one line about the machine and the versions of libraries."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB; Python {platform.python_version()}, {versions}"
