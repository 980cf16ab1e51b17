"""Latency tables of devices that are not at hand: a roofline of published figures.

A weight in one format takes, in a decode step of b tokens,

    max(bytes read / bandwidth, work(format, shape, tokens) / rate),

bytes as ``costs.read_cost`` counts them, and activations; work by the device's law (``precision_laws``). What no format
changes takes the time of its bytes. Nothing runs faster than that; launches, caches and kernels that fall short are not
in it, so a plan's time is a bound, and the ratio of two plans is worth more than either.
"""

from collections.abc import Mapping

import numpy as np

from runtime.candidates import Candidates
from runtime.costs import CostTable, fill_costs, read_share, visit_share
from runtime.device_models import DeviceModel
from runtime.formats import Format
from runtime.units import Unit, Weight

_BYTES_PER_ACTIVATION = 2


def model_latency(
    candidates: Candidates,
    device: DeviceModel,
    fixed_bytes: int,
    *,
    expert_share: float = 1.0,
    expert_frequency: Mapping[tuple[int, int], float] | None = None,
    batch_tokens: int = 1,
) -> CostTable:
    """Returns the modelled microseconds of each candidate in one decode step.

    Args:
        candidates: Units and formats.
        device: The device.
        fixed_bytes: Bytes of the unquantized rest, read once a step.
        expert_share: Experts a token visits / experts of a layer; every expert's part where none is measured.
        expert_frequency: (layer index, expert index) -> share of tokens that take the expert; None when not measured.
        batch_tokens: Sequences decoded together.
    """

    def unit_us(unit: Unit, format_: Format) -> float:
        return 1e6 * sum(
            _weight_s(weight, format_, device, visit_share(unit, weight, expert_share, expert_frequency), batch_tokens)
            for weight in unit.weights
        )

    return CostTable(
        resource="latency_us",
        cost=fill_costs(candidates, unit_us),
        fixed=1e6 * fixed_bytes / device.read_bytes_per_s,
        unit_of_measure="us",
        source="modelled",
        device=f"{device.description} (roofline by the {device.law} law)",
    )


def _weight_s(weight: Weight, format_: Format, device: DeviceModel, frequency: float, batch_tokens: int) -> float:
    tokens = frequency * batch_tokens
    read_bytes = read_share(weight, frequency, batch_tokens) * format_.storage_bytes(weight.shape)
    if weight.kind == "embedding" and not weight.aliases:
        return read_bytes / device.read_bytes_per_s
    read_bytes += _BYTES_PER_ACTIVATION * tokens * float(np.sum(weight.shape))
    work = device.work(format_, weight.shape, tokens, device.activation_bits)
    return max(read_bytes / device.read_bytes_per_s, work / device.products_per_s)
