"""Memory of freed tensors goes back to the system."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from pathlib import Path
import torch
from runtime.heap import return_freed_blocks_

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

assert return_freed_blocks_()
torch.zeros(1 << 20).sum()
before = resident_mib()
kept = []
for _ in range(16):
    # A large block is freed, and a smaller one kept where it was: what makes a common heap grow.
    large = torch.ones(4 << 20)
    kept.append(torch.ones(1 << 19))
    del large
print(resident_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_kept_does_not_hold_what_was_freed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True
    )
    kept_mib = 16 * 2
    assert kept_mib <= int(done.stdout) <= kept_mib + 8
