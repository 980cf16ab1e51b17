"""What bounds a kernel on the devices that the launch prior and the roofline report speak of: published figures.

A streaming multiprocessor issues at most four warp instructions a clock, one for each of its schedulers; shifts and
logic run at half that rate on compute capability 8.0 and 9.0 (16 lanes a scheduler) and at the full or half rate
elsewhere (CUDA C++ Programming Guide, table of arithmetic throughput).
"""

from dataclasses import dataclass

from runtime.device_models import DEVICE_MODELS

ISSUES_PER_CLOCK = 4
# Time that a load needs to come back under load; with the bandwidth it says how many bytes must be on their way.
LATENCY_S = 7e-7


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU.

    Args:
        name: As its maker calls it.
        architecture: Compute capability times ten.
        processors: Streaming multiprocessors.
        clock_hz: Boost clock.
        read_bytes_per_s: Bandwidth of its memory.
        source: Where the figures are from.
    """

    name: str
    architecture: int
    processors: int
    clock_hz: float
    read_bytes_per_s: float
    source: str

    @property
    def issues_per_s(self) -> float:
        """Warp instructions a second, all processors together."""
        return ISSUES_PER_CLOCK * self.processors * self.clock_hz


DEVICES = {
    "a100": Device(
        name="A100 SXM 80 GB",
        architecture=80,
        processors=108,
        clock_hz=1.41e9,
        read_bytes_per_s=DEVICE_MODELS["a100-sxm-80gb"].read_bytes_per_s,
        source="NVIDIA A100 datasheet (80 GB SXM), A100 architecture whitepaper",
    ),
    "h100": Device(
        name="H100 SXM",
        architecture=90,
        processors=132,
        clock_hz=1.83e9,
        read_bytes_per_s=DEVICE_MODELS["h100-sxm"].read_bytes_per_s,
        source="NVIDIA H100 datasheet (SXM), H100 architecture whitepaper (the clock behind its peak rates)",
    ),
    "rtx4090": Device(
        name="RTX 4090",
        architecture=89,
        processors=128,
        clock_hz=2.52e9,
        read_bytes_per_s=DEVICE_MODELS["rtx-4090"].read_bytes_per_s,
        source="NVIDIA Ada GPU architecture whitepaper",
    ),
}
