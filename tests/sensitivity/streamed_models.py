"""A small streamed Fisher sketch, also run in a process of its own, which is killed there.

``python -m tests.sensitivity.streamed_models <directory>`` measures.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.sketches.fisher_sketch import measure_streamed_fisher_sketch
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_mixtral

FORMATS = ("int2_g64", "int4_g32_sym", "bf16")
SEED = 5
TOKENS = torch.randint(2, VOCABULARY_SIZE, (5, 12), generator=torch.Generator().manual_seed(0))


def make_candidates(model: Any) -> Candidates:
    return list_candidates(find_units(model), FORMATS)


def measure_streamed(
    model: Any,
    directory: Path,
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    candidates: Candidates | None = None,
    **settings: Any,
) -> NDArray[np.float32]:
    return measure_streamed_fisher_sketch(
        model,
        candidates or make_candidates(model),
        TOKENS,
        seed=SEED,
        directory=directory,
        progress=progress,
        **settings,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure_streamed(
        build_tiny_mixtral().requires_grad_(False), Path(sys.argv[1]), lambda done, _: print(done, flush=True)
    )
