"""A layer of experts at 2, 3, 4 and 8 bits on the CPU: time against the bytes of those used. Writes mixture.md.

One call of the experts of Mixtral, as its own forward makes it, for a token or some; every call on another copy of the
layer, so that weights come from memory, and in turns with all others. The 10th percentile is compared.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cpu_kernels import copy_packed, time_in_turns
from machine import describe_machine
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from runtime.apply import pack_weight
from runtime.experts_forward import EXPERTS_IMPLEMENTATION
from runtime.formats import find_format
from runtime.kernels.dispatch import kernel_path, selected_kernels
from runtime.packed import PackedExperts, PackedWeight
from runtime.weight_memory import gather_weights_

HIDDEN, FEED_FORWARD, EXPERTS, COPIES = 2048, 2048, 8, 4
BITS = (2, 3, 4, 8)
ROUNDS = 20
# Expert i has BITS[i % 4].
USED = ([0], [1], [2], [3], [0, 1], [2, 3], [0, 1, 2, 3], [3, 7], [0, 4, 1, 5], list(range(EXPERTS)))
Layers = list[Any]


def main() -> None:
    torch.set_num_threads(1)
    kernels = selected_kernels()
    assert kernels is not None, "the CPU kernels must be there to be timed"
    with torch.no_grad():
        text = "\n".join([*_describe(kernels.level), *_rows(build_layers()), ""])
    (Path(__file__).parent / "mixture.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _describe(level: str) -> list[str]:
    return [
        "# A layer of experts of several widths",
        "",
        f"Made by `python benchmarks/bench_mixture.py`. Machine: {describe_machine(('torch',))}; instruction set "
        f"{level}.",
        f"{EXPERTS} experts of {', '.join(map(str, BITS))} bits in turn, group 128, hidden {HIDDEN}, feed-forward "
        f"{FEED_FORWARD}, one thread, one token that visits the experts named: one call of the layer, its gate and its "
        "weighted sum included. *Sum*: time over that of layers in which the same experts were visited alone. Error: "
        "relative, of the output, against the reference (dequantized weights).",
        "",
        "| experts used | MB | ms | GB/s | sum | error |",
        "|---|---|---|---|---|---|",
    ]


def build_layers() -> Layers:
    """Returns copies of one layer."""
    sizes = ((2 * FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD))
    generator = torch.Generator().manual_seed(3)
    first, last = (
        [pack_weight(torch.randn(size, generator=generator) / 64, find_format(f"int{bits}_g128")) for bits in BITS]
        for size in sizes
    )
    layers = [_build_layer(first, last) for _ in range(COPIES)]
    gather_weights_(nn.ModuleList(layers))
    return layers


def _build_layer(first: list[PackedWeight], last: list[PackedWeight]) -> Any:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_local_experts=EXPERTS)
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    with torch.device("meta"):
        layer: Any = MixtralExperts(config)
    for name, weights in (("gate_up_proj", first), ("down_proj", last)):
        delattr(layer, name)
        packed = [copy_packed(weights[i % len(weights)]) for i in range(EXPERTS)]
        layer.add_module(name, PackedExperts(packed))
    return layer


def _rows(layers: Layers) -> list[str]:
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(4))
    calls: dict[str, list[Callable[[], object]]] = {
        str(used): [partial(layer, x, *route_to(used)) for layer in layers] for used in USED
    }
    times = time_in_turns(calls, rounds=ROUNDS)
    alone = {bits: times[str([i])] for i, bits in enumerate(BITS)}
    lines, sizes = [], []
    for used in USED:
        widths = [BITS[i % len(BITS)] for i in used]
        size = sum(_expert_bytes(bits) for bits in widths)
        seconds = times[str(used)]
        sizes.append(size)
        cells = (f"{size / 1e6:.2f}", f"{seconds * 1e3:.3f}", f"{size / seconds / 1e9:.1f}")
        total = sum(alone[bits] for bits in widths)
        error = _error(layers[0], x, used)
        lines.append(
            f"| {', '.join(map(str, widths))} bits | {' | '.join(cells)} | {seconds / total:.2f} | {error:.0e} |"
        )
    return [*lines, "", _fit(np.array(sizes) / 1e6, np.array([times[str(used)] for used in USED]) * 1e3)]


def _fit(megabytes: NDArray[np.float64], milliseconds: NDArray[np.float64]) -> str:
    """Returns how near to a line over the bytes of the experts used the times are, by least squares of ratios."""
    columns = np.stack([np.ones_like(megabytes), megabytes], axis=1) / milliseconds[:, None]
    start, each = np.linalg.lstsq(columns, np.ones_like(milliseconds), rcond=None)[0]
    off = np.abs((start + each * megabytes) / milliseconds - 1)
    return (
        f"Time over bytes: {start:.3f} ms and {each:.4f} ms for each MB ({1 / each:.1f} GB/s), at most {off.max():.1%} "
        "off. The start is what Python does around the call."
    )


def route_to(used: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor([used]), torch.full((1, len(used)), 1 / len(used))


def _expert_bytes(bits: int) -> int:
    format_ = find_format(f"int{bits}_g128")
    return format_.storage_bytes((2 * FEED_FORWARD, HIDDEN)) + format_.storage_bytes((HIDDEN, FEED_FORWARD))


def _error(layer: Any, x: Tensor, used: list[int]) -> float:
    y = layer(x, *route_to(used))
    with kernel_path("reference"):
        expected = layer(x, *route_to(used))
    return float((y - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
