"""A profile as a notebook shows it: the mean loss of each role at each format."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from runtime.notebook_html import html_heading, html_table


def profile_html(title: str, lines: Sequence[str], candidates: Candidates, loss: NDArray[np.float64]) -> str:
    """Returns a profile as HTML.

    Args:
        title: The heading.
        lines: What is said of the whole.
        candidates: Units, formats, allowed pairs.
        loss: [U, F] of the metric that is shown.
    """
    roles = np.array([unit.role for unit in candidates.units])
    rows = []
    for role in dict.fromkeys(roles.tolist()):
        members = roles == role
        allowed = candidates.allowed[members]
        total, count = np.where(allowed, loss[members], 0.0).sum(axis=0), allowed.sum(axis=0)
        means = [float(t / c) if c else float("nan") for t, c in zip(total, count, strict=True)]
        rows.append([role, int(members.sum()), *means])
    return html_heading(title, *lines) + html_table(["role", "units", *(f.name for f in candidates.formats)], rows)
