"""The README's Python calls run as they stand there."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from allocator.artefacts import Model
from sensitivity.profile import SensitivityProfile

README = Path(__file__).parent.parent / "README.md"


def test_interactions(tiny_profile: SensitivityProfile, tiny_llama_dir: Path) -> None:
    [block] = [b for b in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "measure_pairs" in b]
    names: dict[str, Any] = {"model": Model(str(tiny_llama_dir)), "profile": tiny_profile}
    exec(block, names)
    assert np.isfinite(names["pairs"].interaction).all()
    assert len(names["values"]) == len(tiny_profile.candidates.units)
    assert names["losses"].names == ("prose/kl", "code/kl")
