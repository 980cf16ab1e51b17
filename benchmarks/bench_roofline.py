"""What the Triton kernels can reach on GPUs that are not at hand: bytes and instructions, read from the machine code.

    python benchmarks/bench_roofline.py

Nothing is run on a GPU. The kernels are compiled for each of them, and the instructions of the main loop are counted;
the rest is arithmetic with published bandwidths and clocks (``runtime/kernels/triton/devices.py``). About two minutes.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from machine import describe_machine
from roofline_parts import list_part_products
from roofline_traffic import BITS, count_traffic, list_bytes, make_format, make_key

from runtime.cache_formats import TokenBlockFormat, find_cache_formats
from runtime.elements import ELEMENTS
from runtime.formats import find_format
from runtime.kernels.triton.aot import compile_integer_product, compile_weight_only
from runtime.kernels.triton.aot_attention import compile_decode_attention
from runtime.kernels.triton.decode_attention import describe_states
from runtime.kernels.triton.devices import DEVICES, Device
from runtime.kernels.triton.launch_table import find_attention_launch, find_launch

GROUP_SIZE = 128
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
# SmolLM2-135M, whose rows are no multiple of 128.
SMALL_SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))
LOGIC = ("LOP3", "SHF", "PRMT")
WARP = 32
CACHES = ("fp16", "int8_g32", "int6_g32", "int4_g32", "int4_channel", "int4_t32", "int3_g32", "int2_g32", "int2_t32")
HEAD_DIM = 128
OTHER_CODES = (
    ("int8_g128", "bf16"),
    ("mxfp4", "fp16"),
    ("nvfp4", "fp16"),
    ("mxfp6_e2m3", "fp16"),
    ("mxfp6_e3m2", "fp16"),
    ("mxfp8_e4m3", "fp16"),
    ("fp8_e4m3_channel", "fp16"),
    ("fp8_e5m2_channel", "bf16"),
)


def list_instructions(device: Device, rows: int) -> list[str]:
    """Returns the table of instructions a weight beside what a device can issue at its bandwidth."""
    lines = [
        "| bits | instructions | of them logic | budget | share of the bandwidth | bound by | registers | shared KiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for bits in BITS:
        key = make_key(device, bits, (4096, 4096), rows, GROUP_SIZE)
        launch = find_launch(key, device)
        product = compile_weight_only(key, launch, dtype="fp16")
        # Each block of rows of x goes through the weight again.
        passes = -(-rows // launch.block_m)
        issued = passes * product.instructions_per_weight
        logic = passes * product.code.count(*LOGIC) / product.weights_per_step
        weights_per_s = device.read_bytes_per_s / (make_format(bits, GROUP_SIZE).storage_bytes((1, 4096)) / 4096)
        budget = device.issues_per_s * WARP / weights_per_s
        # Logic goes to a unit of half the width, on all three devices.
        shares = {"bytes": 1.0, "instructions": budget / issued, "logic": budget / 2 / logic}
        bound = min(shares, key=lambda name: shares[name])
        lines.append(
            f"| {bits} | {issued:.2f} | {logic:.2f} | {budget:.2f} | {100 * shares[bound]:.0f}% | {bound} | "
            f"{product.code.registers} | {product.shared_bytes / 1024:.0f} |"
        )
        print(device.name, lines[-1], flush=True)
    return lines


def list_other_codes(device: Device) -> list[str]:
    """Returns the table of floats of few bits, and of 8 bits with bfloat16 activations, one row of them."""
    lines = [
        "| format | activations | bytes / least | instructions | budget | share of the bandwidth | registers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, dtype in OTHER_CODES:
        format_ = find_format(name)
        key = make_key(device, format_.bits, (4096, 4096), 1, format_.group_size)
        element = ELEMENTS[format_.element].mantissa_bits if format_.element else -1
        product = compile_weight_only(
            key,
            find_launch(key, device),
            dtype=dtype,
            symmetric=format_.symmetric,
            element=element,
            scale=format_.scale_type,
        )
        weights_per_s = device.read_bytes_per_s / (format_.storage_bytes((1, 4096)) / 4096)
        budget = device.issues_per_s * WARP / weights_per_s
        issued = product.instructions_per_weight
        traffic = count_traffic((4096, 4096), 1, format_, find_launch(key, device))
        lines.append(
            f"| {name} | {dtype} | {traffic.moved / traffic.minimum:.3f} | {issued:.2f} | {budget:.2f} | "
            f"{100 * min(1.0, budget / issued):.0f}% | {product.code.registers} |"
        )
        print(device.name, lines[-1], flush=True)
    return lines


def list_integer_products(device: Device, rows: int = 1) -> list[str]:
    """Returns the table of products with activations of 8 bits, beside what a device can issue at its bandwidth."""
    lines = [
        "| bits | instructions | of them logic | budget | share of the bandwidth | bound by | registers |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in BITS:
        key = replace(make_key(device, bits, (4096, 4096), rows, GROUP_SIZE), activation_bits=8)
        product = compile_integer_product(key, find_launch(key, device))
        logic = product.code.count(*LOGIC) / product.weights_per_step
        weights_per_s = device.read_bytes_per_s / (make_format(bits, GROUP_SIZE).storage_bytes((1, 4096)) / 4096)
        budget = device.issues_per_s * WARP / weights_per_s
        shares = {"bytes": 1.0, "instructions": budget / product.instructions_per_weight, "logic": budget / 2 / logic}
        bound = min(shares, key=lambda name: shares[name])
        lines.append(
            f"| {bits} | {product.instructions_per_weight:.2f} | {logic:.2f} | {budget:.2f} | "
            f"{100 * shares[bound]:.0f}% | {bound} | {product.code.registers} |"
        )
        print(device.name, "A8", lines[-1], flush=True)
    return lines


def list_attention(device: Device) -> list[str]:
    """Returns the table of attention over packed caches, 128 numbers a head, four float16 query heads a key head."""
    lines = [
        "| keys and values | instructions | budget | share of the bandwidth | registers | shared KiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in CACHES:
        [format_] = find_cache_formats([name])
        block = format_.token_block if isinstance(format_, TokenBlockFormat) else 0
        row = format_.row_format if isinstance(format_, TokenBlockFormat) else format_
        states, length = describe_states(row, block), block or HEAD_DIM
        product = compile_decode_attention(
            states,
            states,
            architecture=device.architecture,
            dtype="fp16",
            head_dim=HEAD_DIM,
            shared=4,
            launch=find_attention_launch(device, 8, 8192, 2 * HEAD_DIM),
        )
        budget = device.issues_per_s * WARP / (device.read_bytes_per_s / (row.storage_bytes((1, length)) / length))
        issued = product.instructions_per_weight
        lines.append(
            f"| {name} | {issued:.2f} | {budget:.2f} | {100 * min(1.0, budget / issued):.0f}% | "
            f"{product.code.registers} | {product.shared_bytes / 1024:.0f} |"
        )
        print(device.name, lines[-1], flush=True)
    return lines


def tabulate(table: Callable[[Device], list[str]], names: Sequence[str]) -> list[str]:
    """Returns a table for each of several devices, under its name."""
    return [line for name in names for line in ("", f"{DEVICES[name].name}:", "", *table(DEVICES[name]))]


def describe_devices() -> list[str]:
    """Returns the table of devices, with the source of each figure."""
    lines = ["| device | processors | clock, GHz | bandwidth, TB/s | source |", "|---|---|---|---|---|"]
    lines += [
        f"| {device.name} | {device.processors} | {device.clock_hz / 1e9:.2f} | "
        f"{device.read_bytes_per_s / 1e12:.3f} | {device.source} |"
        for device in DEVICES.values()
    ]
    return lines


def main() -> None:
    """Compiles the kernels and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("roofline.md"))
    options = parser.parse_args()
    lines = [
        "# Static roofline of the Triton kernels",
        "",
        "Written by `benchmarks/bench_roofline.py`. **No GPU was at hand: no time in here is measured.** Instructions",
        "are those of the main loop in the machine code that Triton's compiler makes for each device, for one weight",
        "and one thread; a device's budget is what its processors can issue while that weight comes from memory.",
        "Asymmetric formats of group 128, float16 activations.",
        "",
        f"Machine that compiled: {describe_machine(('torch', 'triton'))}.",
        "",
        *describe_devices(),
    ]
    for rows in (1, 16):
        for name in options.devices:
            device = DEVICES[name]
            lines += ["", f"## {device.name}, {rows} row{'s' if rows > 1 else ''} of activations", ""]
            lines += list_instructions(device, rows)
    lines += [
        "",
        "## Other codes, H100 SXM, 1 row of activations",
        "",
        "8 bits are no bfloat16 number, so bfloat16 activations become float16 rows and powers of two, by a launch",
        "before. Compiled and dropped, in instructions a weight: two operands of four bits 3.36; 7 bits and the sign",
        "in one operand, the sign alone in another 2.87; one operand, the difference of two such floats 3.15; the byte",
        "in the mantissa and the exponent's last bit, put right by two multiply-adds 3.70.",
        "",
        *list_other_codes(DEVICES["h100"]),
        "",
        "## Weights of several parts, 1 row of activations",
        "",
        "Sums of binary planes, nested weights at their full width, groups of 2 and 4 bits (low halves of codes are",
        "read where they are, and multiplied in all rows), residual blocks (the rank is rows of activations).",
        *tabulate(list_part_products, options.devices),
        "",
        "## Activations of 8 bits, group 128, asymmetric, 1 row",
        "",
        "Four codes are unpacked into a register of an integer tensor core; sums of a group are integers, and become",
        "floats once a group. Rows of activations are rounded by a launch before, which is not counted. The codes of 8",
        "bits lie in two words and take three operations; written so that the compiler shuffles bytes instead,",
        "compute capability 9.0 took 1.82 instructions and 8.0 took 5.07.",
        "",
        *tabulate(list_integer_products, options.devices),
        "",
        "H100 SXM, 16 rows:",
        "",
        *list_integer_products(DEVICES["h100"], 16),
        "",
        "## Attention of one token over a packed cache",
        "",
        "Instructions of the main loop for each number of a key or a value: unpacking, scaling, the way through shared",
        "memory into the tensor core's order, both products, the softmax. 128 numbers a head, four query heads a key",
        "head, float16. Tokens that are not packed yet and the sum of the splits are not counted.",
        *tabulate(list_attention, ("a100", "h100")),
        "",
        "## Bytes of a product over the least possible, one row of activations",
        "",
        "Least: the weight as the checkpoint stores it, activations and result. Zero points are read in 1, 2, 4 or 8",
        "bits, the least that hold them (as bytes they were 4 % of all bytes at 2 bits in groups of 64). After the",
        "plus: partial sums of products split over k (launches of the H100), which are written and read again within",
        "microseconds and stay in the second-level cache.",
        "",
        *list_bytes(SHAPES, (GROUP_SIZE,)),
        "",
        "Other groups:",
        "",
        *list_bytes(SHAPES[:1], (16, 32, 64, 256)),
        "",
        "Shapes of SmolLM2-135M:",
        "",
        *list_bytes(SMALL_SHAPES, (64,)),
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
