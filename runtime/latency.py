"""Latency tables: microseconds of the weights in one decode step, measured on the device at hand.

Every distinct (shape, format) is timed once, one token, after a warm-up, as the median over copies that lie in
different memory, so that the weights come from DRAM as they do when a whole model runs, and in large pages as they do
there. What the CPU kernels compute is timed in calls of many products each, as a compiled decoder makes them; the rest
through the module that will run it. All of it is done in turns, and of each the fastest counts: other work on the
machine comes and goes and would make some formats look slower than others. An embedding costs its one row, an expert
its share of the tokens. What a step does besides its weights (attention, norms, the way in and out) is the same for
every plan and not in the table.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.costs import CostTable, visit_share
from runtime.formats import Format
from runtime.kernels.cpu import Product
from runtime.kernels.dispatch import selected_kernels
from runtime.kernels.weight_views import find_matrix
from runtime.packed import PackedWeight, QuantizedEmbedding, QuantizedLinear
from runtime.packing import pack_codes
from runtime.storage import ROWS_OF_A_MASK, Mixture
from runtime.units import Unit, Weight
from runtime.weight_memory import gather_weights_

# More than the last cache of common processors, so that a copy is gone from it when its turn comes again.
_COLD_BYTES = 64 << 20
_MOST_COPIES = 512
_LEAST_SAMPLES = 24
# Products of one timed call: many enough that the call itself is nothing, few enough to be over soon.
_CALL_BYTES = 4 << 20
_TURNS = 3

Key = tuple[tuple[int, int], str, bool]


def device_name() -> str:
    """Returns what the timings hold for: processor, kernels, threads, and the versions that run it."""
    kernels = selected_kernels()
    path = "reference" if kernels is None else f"{kernels.level} kernels"
    return f"{platform.machine()} {_processor()} {path} x{torch.get_num_threads()} torch {torch.__version__}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def measure_latency(
    candidates: Candidates,
    *,
    expert_share: float,
    expert_frequency: Mapping[tuple[int, int], float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CostTable:
    """Returns the microseconds of each candidate in one decode step of batch 1.

    Args:
        candidates: Units and formats.
        expert_share: Experts a token visits / experts of a layer; every expert's part where none is measured.
        expert_frequency: (layer index, expert index) -> share of tokens that take the expert; None when not measured.
        progress: Called with (timings made, timings in all), which are ``_TURNS`` of each shape and format.
    """
    keys = {
        _key(weight, candidates.formats[f])
        for u, f in zip(*np.nonzero(candidates.allowed), strict=True)
        for weight in candidates.units[u].weights
    }
    timed = dict.fromkeys(sorted(keys), math.inf)
    formats = {f.name: f for f in candidates.formats}
    for i, key in enumerate([*timed] * _TURNS, 1):
        timed[key] = min(timed[key], _time_us(key[0], formats[key[1]], reads_rows=key[2]))
        progress(i, len(keys) * _TURNS)
    cost = np.full(candidates.allowed.shape, np.nan)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        cost[u, f] = _unit_us(candidates.units[u], candidates.formats[f], timed, expert_share, expert_frequency)
    return CostTable(
        resource="latency_us", cost=cost, fixed=0.0, unit_of_measure="us", source="measured", device=device_name()
    )


def _unit_us(
    unit: Unit,
    format_: Format,
    timed: dict[Key, float],
    expert_share: float,
    expert_frequency: Mapping[tuple[int, int], float] | None,
) -> float:
    return sum(
        timed[_key(weight, format_)] * visit_share(unit, weight, expert_share, expert_frequency)
        for weight in unit.weights
    )


def _key(weight: Weight, format_: Format) -> Key:
    # A tied table is read in full by the head; the one row of the lookup beside it is nothing.
    return weight.shape, format_.name, weight.kind == "embedding" and not weight.aliases


def _time_us(shape: tuple[int, int], format_: Format, *, reads_rows: bool) -> float:
    copies = max(2, min(_MOST_COPIES, _COLD_BYTES // format_.storage_bytes(shape)))
    modules = [_module(shape, format_, reads_rows) for _ in range(copies)]
    gather_weights_(nn.ModuleList(modules))
    products_of_call = max(1, min(copies // 2, _CALL_BYTES // format_.storage_bytes(shape)))
    with torch.no_grad():
        calls = None if reads_rows else _list_calls(modules, shape[1], products_of_call)
        if calls is not None:
            return _median_us(calls) / products_of_call
        x = torch.zeros(1, 1, dtype=torch.int64) if reads_rows else torch.ones(1, 1, shape[1])
        return _median_us([partial(module, x) for module in modules])


def _list_calls(modules: list[nn.Module], columns: int, products_of_call: int) -> list[Callable[[], object]] | None:
    """Returns calls of the CPU kernels, each over as many of the modules; None where they do not compute these."""
    kernels = selected_kernels()
    weights = [module.weight for module in modules]
    if kernels is None:
        return None
    matrices = [find_matrix(weight, torch.device("cpu")) for weight in weights if isinstance(weight, PackedWeight)]
    products = [Product(torch.ones(1, columns), matrix) for matrix in matrices if matrix is not None]
    if len(products) < len(modules):
        return None
    starts = range(0, len(products) - products_of_call + 1, products_of_call)
    return [kernels.prepare(products[start : start + products_of_call])[1] for start in starts]


def _median_us(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    seconds = []
    for _ in range(-(-_LEAST_SAMPLES // len(calls))):
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e6


def _make_mask(format_: Format, mixture: Mixture, shape: tuple[int, int]) -> Tensor:
    """Returns a mask of as many wide columns or groups as the format has, the first ones."""
    if format_.kind == "column_mixture":
        length = format_.group_size or 1
        wide = torch.arange(shape[1]) < mixture.wide_count(shape[1] // length) * length
        return pack_codes(wide.to(torch.uint8)[None], 1)[0]
    groups = format_.group_count(shape[1])
    wide = torch.arange(groups) < mixture.wide_count(groups)
    return pack_codes(wide.to(torch.uint8).expand(-(-shape[0] // ROWS_OF_A_MASK), -1), 1)


def _module(shape: tuple[int, int], format_: Format, reads_rows: bool) -> nn.Module:
    weight = PackedWeight(format_, shape)
    # Zeros, not empty memory: pages must be there before they are timed.
    for name, buffer in list(weight.named_buffers()):
        setattr(weight, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    if format_.mixture is not None and "mask" in weight.tensors:
        weight.mask = _make_mask(format_, format_.mixture, shape)
    return QuantizedEmbedding(weight) if reads_rows else QuantizedLinear(weight)
