"""The combination of two estimates of one loss: their geometric mean.

The Fisher sketch sees many sequences but only second order; the measured single-unit KL sees every order but few
positions. Both err by a factor more than by an amount, so they are averaged in the logarithm; the standard error
follows by the delta method for independent errors, se/loss = 1/2 sqrt((se_a/a)^2 + (se_b/b)^2). A completed loss was
predicted from the other table and errs with it: there the relative errors are added, se/loss = 1/2 (se_a/a + se_b/b).
"""

import numpy as np
from numpy.typing import NDArray

from sensitivity.profile import NATS, LossTable

COMBINED = "combined"


def combine(a: LossTable, b: LossTable, allowed: NDArray[np.bool_]) -> LossTable:
    """Returns the geometric mean of two tables in nats per token.

    Args:
        a: Losses [U, F], not negative.
        b: Losses [U, F], not negative.
        allowed: [U, F] bool.
    """
    left, right = np.maximum(a.loss, 0.0), np.maximum(b.loss, 0.0)
    loss = np.where(allowed, np.sqrt(left * right), 0.0)
    measured = b.measured if a.measured is None else a.measured if b.measured is None else a.measured & b.measured
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = 0.5 * np.hypot(a.std_error / left, b.std_error / right)
        if measured is not None:
            relative = np.where(measured, relative, 0.5 * (a.std_error / left + b.std_error / right))
    std_error = np.where(loss > 0.0, loss * np.nan_to_num(relative), 0.0)
    return LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS, measured=measured)
