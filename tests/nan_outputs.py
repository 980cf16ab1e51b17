"""Memory that nobody wrote shows: for tests of kernels that write into what ``torch.empty`` returns."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN inside the context."""
    # Other libraries turn the filling off when they are imported.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
