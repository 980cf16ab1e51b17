"""Which number types the processor multiplies by itself."""

from pathlib import Path

# x86 and ARM, as Linux names them.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_PROCESSOR = Path("/proc/cpuinfo")


def choose_dtype(description: Path = _PROCESSOR) -> str:
    """Returns ``bfloat16`` where the processor multiplies it by itself, else ``float32``.

    Args:
        description: What the system says of its processor; where there is nothing to read, float32 is safe.
    """
    try:
        words = description.read_text(encoding="utf-8").split()
    except OSError:
        return "float32"
    return "float32" if _BFLOAT16_FLAGS.isdisjoint(words) else "bfloat16"
