"""Instructions of products with weights of several parts, beside what a device can issue while they are read."""

from roofline_traffic import make_key

from runtime.formats import Format, find_format
from runtime.kernels.triton.aot import CompiledProduct
from runtime.kernels.triton.aot_parts import compile_group_mixture, compile_parted_product, compile_residual_product
from runtime.kernels.triton.devices import Device
from runtime.kernels.triton.group_mixture_linear import plan_mixture
from runtime.kernels.triton.packed_parts import PARTED_KINDS, list_parts
from runtime.kernels.triton.parted_linear import plan_parts
from runtime.kernels.triton.residual_linear import find_residual_launch

NAMES = (
    "bcq2_g128",
    "bcq3_g128",
    "bcq4_g128",
    "bcq3_g128_pow2",
    "dual_binary_g128",
    "nested8_g128",
    "nested4_6_g128",
    "nested4_8_g128",
    "int2_mix25int4_g64",
    "int2_mix25int4_g32",
    "bitstack4_r4",
    "bitstack4_r16",
)
SHAPE = (4096, 4096)
_WARP = 32


def compile_product(device: Device, format_: Format) -> tuple[CompiledProduct, int]:
    """Returns the product of one float16 row with a weight, and how many times a weight of 4096 x 4096 goes through."""
    if format_.kind == "residual_blocks":
        launch = find_residual_launch(
            device, rows=format_.rank, out_features=format_.bits * SHAPE[0], in_features=SHAPE[1]
        )
        product = compile_residual_product(launch, architecture=device.architecture, rank=format_.rank, x_parts=1)
        return product, format_.bits
    key = make_key(device, format_.bits, SHAPE, 1, format_.group_size)
    if format_.kind not in PARTED_KINDS:
        return compile_group_mixture(key, plan_mixture(key, device), dtype="fp16"), 1
    product = compile_parted_product(
        key,
        plan_parts(key, device),
        tuple(list_parts(format_)[format_.bits]),
        each_scaled=format_.kind == "planes",
        dtype="fp16",
        scale="e8m0" if format_.scale_type == "pow2" else "fp16",
    )
    return product, 1


def list_part_products(device: Device) -> list[str]:
    """Returns the table of products of one float16 row with weights of several parts."""
    lines = [
        "| format | bits a weight | instructions | budget | share of the bandwidth | registers | shared KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        format_ = find_format(name)
        product, passes = compile_product(device, format_)
        bytes_per_weight = format_.storage_bytes(SHAPE) / (SHAPE[0] * SHAPE[1])
        budget = device.issues_per_s * _WARP / (device.read_bytes_per_s / bytes_per_weight)
        issued = passes * product.instructions_per_weight
        lines.append(
            f"| {name} | {8 * bytes_per_weight:.2f} | {issued:.2f} | {budget:.2f} | "
            f"{100 * min(1.0, budget / issued):.0f}% | {product.code.registers} | {product.shared_bytes / 1024:.0f} |"
        )
        print(device.name, lines[-1], flush=True)
    return lines
