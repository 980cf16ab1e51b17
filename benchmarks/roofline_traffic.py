"""Bytes of the products of the roofline: what the kernels read and write, beside the least there is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.formats import Format
from runtime.kernels.triton.devices import DEVICES, Device
from runtime.kernels.triton.fragment_layout import SCALE_DTYPES, pack_fragments
from runtime.kernels.triton.launch_table import Launch, LaunchKey, find_launch

BITS = tuple(range(1, 9))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of one product.

    Args:
        minimum: Weight as the checkpoint stores it, activations and results.
        moved: Weight as the kernel reads it, activations and results.
        partial: Written and read again by the splits of k.
    """

    minimum: int
    moved: int
    partial: int


def make_key(device: Device, bits: int, shape: tuple[int, int], rows: int, group_size: int | None) -> LaunchKey:
    """Returns the key of a product on a device."""
    return LaunchKey(
        architecture=device.architecture,
        bits=bits,
        rows=max(8, rows),
        out_features=shape[0],
        in_features=shape[1],
        group_size=group_size,
    )


def make_format(bits: int, group_size: int | None) -> Format:
    """Returns an asymmetric integer format."""
    return Format(name=f"int{bits}", kind="int", bits=bits, group_size=group_size, symmetric=False)


def count_traffic(shape: tuple[int, int], rows: int, format_: Format, launch: Launch) -> Traffic:
    """Returns the bytes of a product of ``rows`` rows of float16 with a weight of one format."""
    out_features, in_features = shape
    groups = format_.group_count(in_features)
    # Shapes alone: nothing is packed on the meta device.
    weight = pack_fragments(
        torch.empty(shape, dtype=torch.uint8, device="meta"),
        torch.empty((out_features, groups), dtype=SCALE_DTYPES[format_.scale_type], device="meta"),
        None if format_.symmetric else torch.empty((out_features, groups), dtype=torch.uint8, device="meta"),
        bits=format_.bits,
        group_size=format_.group_size,
    )
    activations = 2 * rows * (in_features + out_features)
    return Traffic(
        minimum=format_.storage_bytes(shape) + activations,
        moved=weight.read_bytes + activations,
        partial=8 * launch.splits * rows * out_features if launch.splits > 1 else 0,
    )


def list_bytes(shapes: Sequence[tuple[int, int]], group_sizes: Sequence[int]) -> list[str]:
    """Returns the table of bytes moved over the least possible, for each width, shape and group, one row of x."""
    device = DEVICES["h100"]
    columns = [(shape, group_size) for shape in shapes for group_size in group_sizes]
    names = [f"{out} x {count}, g{group_size}" for (out, count), group_size in columns]
    lines = [f"| bits | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for bits in BITS:
        cells = []
        for shape, group_size in columns:
            launch = find_launch(make_key(device, bits, shape, 1, group_size), device)
            traffic = count_traffic(shape, 1, make_format(bits, group_size), launch)
            partial = f" + {traffic.partial / traffic.minimum:.3f}" if traffic.partial else ""
            cells.append(f"{traffic.moved / traffic.minimum:.3f}{partial}")
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    return lines
