"""Activation-aware scales, folded: per site, the power of the inputs' magnitude that leaves least after rounding.

``runtime.quantizers.activation_scaling`` searches the exponent for one weight; here all weights that read one input
take one scale, so their rows are searched together, and the scale is folded into what writes the input, where it costs
nothing. Where query heads share a value head, its channels reach o_proj several times: the columns of each copy are
stacked as rows of their own and share the mean of the copies' second moments (their cross moments are left out of the
error that chooses the exponent). Routed experts have no site between up and down.

Complexity: one run of the text, and ``steps`` roundings of every weight that reads a site.

Paper: Lin et al. 2023, AWQ, arXiv:2306.00978.
"""

import torch
from torch import Tensor, nn

from runtime.formats import find_format
from runtime.quantizers import InputStatistics, find_activation_scale
from runtime.transforms.observation import observe_second_moments
from runtime.transforms.scale_folding import ScaleSite, list_scale_sites


def find_aware_scales(
    model: nn.Module, tokens: Tensor | None, *, format: str = "int4_g64", steps: int = 20
) -> dict[str, Tensor]:
    """Returns site name -> the factors 1/s [C] float64 of what writes the channels.

    Args:
        model: The decoder.
        tokens: [S, T] int64 of calibration text.
        format: The integer format that the exponent is searched for.
        steps: Exponents tried, 0, 1/steps, …; at least one.

    Raises:
        ValueError: If an option is out of range, the format's groups do not divide the channels of a site, there is no
            text, or the model is no decoder of the known kind.
    """
    if steps < 1:
        msg = f"steps must be at least 1: got steps={steps}. Use 20."
        raise ValueError(msg)
    grid = find_format(format)
    if grid.kind != "int":
        msg = f"format must be an integer format: got '{format}'. Use one such as int4_g64."
        raise ValueError(msg)
    sites = list_scale_sites(model)
    for site in sites:
        if not grid.fits(site.channels):
            msg = (
                f"group_size must divide the channels of every site: got group_size={grid.group_size}, "
                f"{site.channels} channels of '{site.name}'. Use another group size or a channel format."
            )
            raise ValueError(msg)
    moments, counts = observe_second_moments(model, tokens, {site.name: site.observed for site in sites})
    exponents = [step / steps for step in range(steps)]
    return {
        site.name: 1
        / find_activation_scale(
            _stack_rows(site), grid, _mean_statistics(site, moments[site.name], counts[site.name]), exponents=exponents
        ).scale.double()
        for site in sites
    }


def _stack_rows(site: ScaleSite) -> Tensor:
    """Returns the rows of all readers, [rows * repeats, C]."""
    rows = torch.cat([reader.detach().reshape(-1, reader.shape[-1]) for reader in site.readers])
    copies = rows.view(len(rows), -1, site.repeats, site.head_dim)
    return copies.transpose(1, 2).reshape(-1, site.channels)


def _mean_statistics(site: ScaleSite, moment: Tensor, count: int) -> InputStatistics:
    """Returns the statistics [C, C] of one copy of the channels, the mean of all."""
    heads = site.channels // site.head_dim
    axes = (heads, site.repeats, site.head_dim)
    blocks = moment.view(*axes, *axes).diagonal(dim1=1, dim2=4)  # [heads, head_dim, heads, head_dim, repeats]
    mean = blocks.mean(dim=-1).reshape(site.channels, site.channels)
    return InputStatistics(second_moment=mean.float(), count=count)
