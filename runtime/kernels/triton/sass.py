"""Reads what the assembler made of a kernel: registers, spills, and the instructions of its main loop.

A loop is a stretch between a backward branch and its target, the main loop the longest of them. The tools that take a
cubin apart come with Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_COPY_BITS = re.compile(r"^LDGSTS\.(?:[A-Z]+\.)*?(?:BYPASS\.)?(\d+)$")


@dataclass(frozen=True, kw_only=True)
class KernelCode:
    """The machine code of a kernel.

    Args:
        registers: Registers of a thread.
        spill_bytes: Local memory of a thread.
        loop: How often each instruction stands in the main loop, full names (``HMMA.16816.F32``).
        whole: The same for the whole kernel.
        loop_lengths: Instructions of each loop, longest first.
    """

    registers: int
    spill_bytes: int
    loop: Counter[str]
    whole: Counter[str]
    loop_lengths: tuple[int, ...]

    @property
    def loop_length(self) -> int:
        """Instructions in the main loop."""
        return self.loop.total()

    def count(self, *names: str) -> int:
        """Returns how many instructions of the main loop begin with one of the names, up to a dot."""
        return sum(n for name, n in self.loop.items() if name.split(".")[0] in names)


def count_copies(code: Counter[str], bits: int) -> int:
    """Returns the asynchronous copies from global to shared memory of a width."""
    return sum(n for name, n in code.items() if name.startswith("LDGSTS") and _copy_bits(name) == bits)


def read_code(cubin: bytes) -> KernelCode:
    """Returns the registers, spills and main loop of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _RESOURCES.search(_run("cuobjdump", "-res-usage", str(path)))
        assert resources, "cuobjdump names the registers of every kernel"
        instructions, targets = _parse(_run("nvdisasm", "-c", str(path)))
    loops = _find_loops(instructions, targets)
    return KernelCode(
        registers=int(resources.group(1)),
        spill_bytes=int(resources.group(2)),
        loop=Counter(name for loop in loops[:1] for name, _ in instructions[loop]),
        whole=Counter(name for name, _ in instructions),
        loop_lengths=tuple(loop.stop - loop.start for loop in loops),
    )


def _run(tool: str, *arguments: str) -> str:
    finished = subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True)
    return finished.stdout + finished.stderr


def _parse(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Returns (name, operands) of each instruction, and before which of them each label stands."""
    instructions: list[tuple[str, str]] = []
    targets: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            targets[label.group(1)] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append((instruction.group(1), instruction.group(2)))
    return instructions, targets


def _find_loops(instructions: list[tuple[str, str]], targets: dict[str, int]) -> list[slice]:
    """Returns where the loops are, longest first; the branch to itself that ends the code is none."""
    loops = []
    for i, (name, operands) in enumerate(instructions):
        label = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        first = targets.get(label.group(0), i) if label else i
        if first < i:
            loops.append(slice(first, i + 1))
    return sorted(loops, key=lambda loop: loop.start - loop.stop)


def _copy_bits(name: str) -> int:
    width = _COPY_BITS.match(name)
    return int(width.group(1)) if width else 32
