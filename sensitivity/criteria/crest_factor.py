"""Noise-to-signal power ratio that an integer grid is predicted to have, from the crest factor of its groups.

A uniform grid of 2^b levels over a range r has the step r / (2^b - 1) and, by the usual model, noise step^2 / 12:

    ratio_uf = sum_g n_g r_g^2 / (12 (2^b - 1)^2) / sum w^2,

r_g = 2 max|w| for symmetric formats and max(w, 0) - min(w, 0) for asymmetric ones. For one symmetric group it is
kappa^2 / (3 (2^b - 1)^2) with the crest factor kappa = max|w| / rms, i.e. in dB 4.77 + 20 log10(2^b - 1) - 20 log10
kappa. Nothing is rendered; one reduction for each group size. The noise model overstates few wide groups of very few
levels and weights that already lie on a grid, and it knows no quantizer. Of formats that
are no integers, and of scales that are powers of two, it says nothing: they have their measured ratio.

Source: the crest-factor analysis of Chen et al. 2025 (INT v.s. FP, arXiv:2510.25602), for our grids.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.formats import Format
from runtime.rendering import render
from runtime.units import read_weight
from sensitivity.criteria.weight_error import measure_weight_power, relative_error

_Grid = tuple[int | None, bool]


def predict_grid_noise(model: nn.Module, candidates: Candidates) -> NDArray[np.float64]:
    """Returns the predicted noise-to-signal power ratio [U, F] of every allowed candidate (zero elsewhere)."""
    noise = np.zeros(candidates.allowed.shape)
    for u, unit in enumerate(candidates.units):
        for weight in unit.weights:
            values = read_weight(model, weight)
            squared_ranges: dict[_Grid, float] = {}
            for f in np.flatnonzero(candidates.allowed[u]).tolist():
                format_ = candidates.formats[f]
                if format_.kind != "int" or format_.scale_type == "pow2":
                    noise[u, f] += float((render(values, format_) - values).square().sum())
                    continue
                grid = (format_.group_size, format_.symmetric)
                if grid not in squared_ranges:
                    squared_ranges[grid] = _sum_squared_ranges(values, format_)
                noise[u, f] += squared_ranges[grid] / (12.0 * ((1 << format_.bits) - 1) ** 2)
    return relative_error(noise, measure_weight_power(model, candidates.units))


def _sum_squared_ranges(values: Tensor, format_: Format) -> float:
    rows, in_features = values.shape
    groups = format_.group_count(in_features)
    grouped = values.reshape(rows, groups, -1)
    if format_.symmetric:
        ranges = 2.0 * grouped.abs().amax(-1)
    else:
        ranges = grouped.amax(-1).clamp(min=0.0) - grouped.amin(-1).clamp(max=0.0)
    return float(ranges.double().square().sum()) * (in_features // groups)
