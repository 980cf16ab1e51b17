"""Least and greatest over formats, column by column: several times as fast as numpy's reduction over a short axis."""

from functools import reduce

import numpy as np
from numpy.typing import NDArray


def find_least(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the least over the last axis of [..., F]."""
    return np.asarray(reduce(np.minimum, np.moveaxis(table, -1, 0)))


def find_most(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the greatest over the last axis of [..., F]."""
    return np.asarray(reduce(np.maximum, np.moveaxis(table, -1, 0)))
