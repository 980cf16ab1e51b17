"""CPU kernels beside torch's own and llama.cpp's: time, share of the read bandwidth, error. Writes cpu_kernels.md.

    python benchmarks/bench_cpu_kernels.py [--llama-cpp LIBRARY]

Every method is timed in turns with all others, in one process on one thread, each product with another copy of its
weight, so that weights come from memory. In the table of one token a call is several products, as in a decoder: what
Python does around them, its memory no longer in the caches either, is not what is compared. The 10th percentile of
many calls is: the machine may have other work.
Weights lie in large pages, as those of whole models do, up to 3 bits in the layout for lookups; torch's and ggml's lie
there too (fbgemm's are packed where it likes), and so does the memory that the bandwidth is measured on. LIBRARY is a
libllama.so that was compiled for this machine; without it ggml is that of the wheel xllamacpp, which knows AVX2.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ggml_products import TYPES, GgmlProducts
from machine import describe_machine
from read_bandwidth import compile_reads
from torch import Tensor, nn

from runtime.apply import pack_weight
from runtime.formats import Format, find_format
from runtime.kernels.cpu import Product, load_kernels
from runtime.kernels.dispatch import kernel_path, selected_kernels
from runtime.kernels.weight_views import find_matrix
from runtime.packed import PackedWeight, QuantizedLinear
from runtime.weight_memory import gather_weights_, reserve_large_pages

sys.path.append(str(Path(__file__).parents[1]))
from tests.llama_cpp_client import wheel_library  # noqa: E402 (the directory above is not on a script's path)

SIZE = 4096
COLD_BYTES = 128 << 20
READ_BYTES = 8 << 20
ROUNDS = 12
CALLS_A_TURN = 5
PRODUCTS_A_CALL = 4
BITS = (1, 2, 3, 4, 5, 6, 7, 8)
PROPORTIONAL_BITS = (4, 5, 6, 7, 8)
Call = Callable[[], object]
_kept: list[nn.Module] = []
# Written down when the kernels were made, on an AMD EPYC (Zen 4), by a loop around the library without Python.
NOTES = (
    "How the AVX-512 kernels got there, ms on the machine they were made on, an EPYC of the Zen 4 kind that read 31 to "
    "34 GB/s in the same runs, one change after the other:",
    "",
    "| | 2 bits | 3 bits | 4 bits | 5 bits | 7 bits | 8 bits |",
    "|---|---|---|---|---|---|---|",
    "| one vpmultishiftqb for every 64 codes, four rows fetched side by side | 0.275 | 0.334 | 0.325 | 0.381 | 0.53 | "
    "0.75 |",
    "| fields of several codes, taken apart by shifts and masks | 0.227 | 0.325 | 0.397 | 0.385 | 0.58 | 0.76 |",
    "| lines fetched in the order of addresses | 0.227 | 0.316 | 0.306 | 0.375 | 0.58 | 0.76 |",
    "| loads without a mask, scales fetched ahead | 0.230 | 0.303 | 0.315 | 0.374 | | |",
    "| every line fetched 3 (4 to 6 bits), 4 (7) or 6 times (8) | 0.228 | 0.305 | 0.275 | 0.356 | 0.47 | 0.57 |",
    "",
    "At 2 and 3 bits instructions were the limit, about 1.6 of 512 bits a cycle, 20 of them for 256 codes of 2 bits "
    "and 12 for 128 of 3: 1.49 and 1.33 times the proportional time. Tried without a gain, ns for 64 codes of 2 and "
    "3 bits: two rows at a time, not four, 0.94 and 1.29 (from 0.91 and 1.23), three 0.92 and 1.26, six 0.95 and "
    "1.30; all unpacked codes kept and the sums of high bytes shifted in place 0.90 and 1.23; 3 bits spread by "
    "variable shifts of 16-bit words, which have units of their own, 1.36 (from 1.18).",
    "",
    "What helped was not to unpack: sums of four activations out of tables (`avx512_lookup.cpp`), in a layout of "
    "tiles of 16 rows, 11 instructions for 256 codes of 2 bits. Out of the caches 0.54 ns for 64 codes of 2 bits, "
    "in the same run as 1.12 for unpacking, and 0.78 as 1.40 at 3 bits. From memory it is a question of fetching, "
    "ms at 2 and 3 bits in one run: no fetches 0.211 and 0.283; every line once, 2, 4 or 8 KiB ahead, 0.339 and "
    "0.473, 0.227 and 0.332, 0.185 and 0.261; twice 0.165 and 0.239; three times, as now, 0.156 and 0.227. Several "
    "tokens, 2 bits: 2 tokens 0.27 where unpacking takes 0.41, 4 tokens 0.51 and 0.84; 3 bits 0.39 and 0.52, 0.73 "
    "and 1.02.",
    "",
    "Floats of 8 bits (`small_floats.h`), ms in one later run on the same machine: E4M3 by channel 0.70, in groups "
    "of 128 0.76, MXFP8 0.77, where bf16 took 1.09 and int8_g128 0.59; with AVX2 by channel 0.79. Instructions are "
    "the limit: 11 of 512 bits, shifts and masks, make floats of 64 codes, 5 multiply them. Each time over that of "
    "bf16 in its own run: one row at a time 0.79 and with AVX2 1.15, four rows, which share the activations they "
    "load, 0.63 and 0.69. Lines fetched two, four or six times came in alike. 64 tokens take 1.4 times as long as "
    "in bf16.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, help="a libllama.so for this machine, in place of the wheel's")
    library = parser.parse_args().llama_cpp
    torch.set_num_threads(1)
    kernels = selected_kernels()
    assert kernels is not None, "the CPU kernels must be there to be timed"
    ggml = "compiled for this machine" if library else "of the wheel xllamacpp (AVX2)"
    lines = [
        "# CPU kernels",
        "",
        f"Made by `python benchmarks/bench_cpu_kernels.py`. Machine: {describe_machine(('torch', 'xllamacpp'))}; "
        f"instruction set {kernels.level}; ggml {ggml}.",
        f"Weights {SIZE} x {SIZE}, group 128, asymmetric, one thread, large pages; 10th percentile of {ROUNDS} turns "
        f"of {CALLS_A_TURN} calls, the first of each not counted; for one token a call is {PRODUCTS_A_CALL} products.",
        "",
    ]
    with torch.no_grad():
        lines += [*_decode_table(GgmlProducts(library or wheel_library())), ""]
        lines += [*NOTES, "", *_token_table(), ""]
    text = "\n".join(lines)
    (Path(__file__).parent / "cpu_kernels.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _decode_table(ggml: GgmlProducts) -> list[str]:
    x = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(1))
    x[0, 100] *= 20
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)) / 64
    formats = [*(f"int{bits}_g128" for bits in BITS), "bf16", "fp16"]
    methods = {name: _products(weight, find_format(name), x) for name in formats}
    sizes = {name: find_format(name).storage_bytes((SIZE, SIZE)) for name in methods}
    errors = {name: _error(weight, find_format(name), x) for name in methods}
    for name in TYPES:
        size = sizes[f"ggml {name}"] = ggml.weight_bytes(name, (SIZE, SIZE))
        calls = COLD_BYTES // size // PRODUCTS_A_CALL + 1
        methods[f"ggml {name}"] = ggml.prepare(name, weight, x, (calls, PRODUCTS_A_CALL), reserve_large_pages)
    singles = {
        "torch float32": _copies(weight, lambda w: torch.nn.functional.linear(x, w)),
        "torch bfloat16": _copies(weight.bfloat16(), lambda w: torch.nn.functional.linear(x.bfloat16(), w)),
        "torch int4 (_weight_int4pack_mm_for_cpu)": _torch_int4(x),
        "torch dynamic int8 (fbgemm)": _fbgemm(weight, x),
    }
    with tempfile.TemporaryDirectory() as directory:
        reads = {name: _read_chunks(read) for name, read in compile_reads(Path(directory)).items()}
        methods["avx2, int4_g128"] = _products(weight, find_format("int4_g128"), x, level="avx2")
        methods |= {name: _in_groups(calls) for name, calls in (singles | reads).items()}
        times = {name: seconds / PRODUCTS_A_CALL for name, seconds in time_in_turns(methods).items()}
    bandwidth = READ_BYTES / min(times.pop(name) for name in reads)
    ours = [f"int{b}_g128" for b in PROPORTIONAL_BITS]
    proportional = sum(sizes[name] for name in ours) / sum(times[name] for name in ours)
    lines = [
        f"One token. Read bandwidth of one thread, in the same turns, by the fastest of {len(reads)} loops that only "
        f"read: {bandwidth / 1e9:.1f} GB/s. *Proportional*: time over that of its bytes at the mean rate of 4 to 8 "
        "bits. Error: relative, of the output, against float64, one activation twenty times larger.",
        "",
        "| method | ms | GB/s | share of read bandwidth | proportional | time of torch bfloat16 / its time | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds in times.items():
        ratio = times["torch bfloat16"] / seconds
        measured = "| | | "
        if name in sizes:
            rate = sizes[name] / seconds
            measured = f"| {rate / 1e9:.1f} | {rate / bandwidth:.2f} | {proportional / rate:.2f} "
        error = f"{errors[name]:.0e}" if name in errors else ""
        lines.append(f"| {name} | {seconds * 1e3:.3f} {measured}| {ratio:.2f} | {error} |")
    return lines


def _token_table() -> list[str]:
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)) / 64
    lines = ["Several tokens: time of torch float32 over that of the format.", ""]
    formats = ("int2_g128", "int4_g128", "int8_g128", "bf16")
    lines += [f"| tokens | torch float32, ms | {' | '.join(formats)} |", "|---|---|---|---|---|---|"]
    for tokens in (1, 4, 16, 64, 256):
        x = torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(tokens))
        methods = {name: _packed(weight, find_format(name), x) for name in formats}
        methods["dense"] = _copies(weight, lambda w, x=x: torch.nn.functional.linear(x, w))  # type: ignore[misc]
        times = time_in_turns(methods, rounds=4 if tokens < 64 else 1)
        ratios = " | ".join(f"{times['dense'] / times[name]:.2f}" for name in formats)
        lines.append(f"| {tokens} | {times['dense'] * 1e3:.2f} | {ratios} |")
    return lines


def time_in_turns(methods: dict[str, list[Call]], rounds: int = ROUNDS) -> dict[str, float]:
    """Returns the 10th percentile of the seconds of each method, a call after the other on its copies."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds):
        for name, calls in methods.items():
            for i in range(CALLS_A_TURN):
                call = calls[(turn * CALLS_A_TURN + i) % len(calls)]
                started = time.perf_counter()
                call()
                # The first call of a turn finds another method's code and activations in the caches.
                if i:
                    times[name].append(time.perf_counter() - started)
    return {name: float(np.percentile(measured, 10)) for name, measured in times.items()}


def _packed(weight: Tensor, format_: Format, x: Tensor) -> list[Call]:
    return [partial(linear, x) for linear in _list_copies(weight, format_)]


def _products(weight: Tensor, format_: Format, x: Tensor, level: str | None = None) -> list[Call]:
    """Returns calls of several products each, by the best instruction set or another."""
    kernels = load_kernels(level)
    assert kernels is not None
    products = []
    for linear in _list_copies(weight, format_):
        matrix = find_matrix(linear.weight, x.device)
        assert matrix is not None
        products.append(Product(x, matrix))
        # The library's view of a weight holds addresses alone.
        _kept.append(linear)
    starts = range(0, len(products) - PRODUCTS_A_CALL + 1, PRODUCTS_A_CALL)
    return [kernels.prepare(products[start : start + PRODUCTS_A_CALL])[1] for start in starts]


def _list_copies(weight: Tensor, format_: Format) -> list[QuantizedLinear]:
    first = pack_weight(weight, format_)
    count = COLD_BYTES // format_.storage_bytes(first.shape) + PRODUCTS_A_CALL
    linears = [QuantizedLinear(copy_packed(first)) for _ in range(count)]
    gather_weights_(nn.ModuleList(linears))
    return linears


def _in_groups(calls: list[Call]) -> list[Call]:
    """Returns as many calls that each make several of the given ones, other copies each time."""

    def run(start: int) -> None:
        for i in range(start, start + PRODUCTS_A_CALL):
            calls[i % len(calls)]()

    return [partial(run, PRODUCTS_A_CALL * i) for i in range(len(calls))]


def copy_packed(weight: PackedWeight) -> PackedWeight:
    """Returns the same weight in other memory."""
    copied = PackedWeight(weight.format, weight.shape)
    for name, tensor in weight.named_buffers():
        setattr(copied, name, tensor.clone())
    return copied


def _copies(weight: Tensor, product: Callable[[Tensor], object]) -> list[Call]:
    count = COLD_BYTES // (weight.numel() * weight.element_size()) + 1
    return [partial(product, _in_large_pages(weight)) for _ in range(count)]


def _in_large_pages(tensor: Tensor) -> Tensor:
    memory = reserve_large_pages(tensor.numel() * tensor.element_size())
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _torch_int4(x: Tensor) -> list[Call]:
    codes = torch.randint(0, 16, (SIZE, SIZE), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(SIZE // 128, SIZE, 2).bfloat16()
    activations = x.bfloat16()
    multiply: Any = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _copies(packed, lambda w: multiply(activations, w, 128, scales))


def _fbgemm(weight: Tensor, x: Tensor) -> list[Call]:
    torch.backends.quantized.engine = "fbgemm"
    count = COLD_BYTES // weight.numel() + 1
    quantized = torch.quantize_per_channel(
        weight, weight.abs().amax(1) / 127, torch.zeros(SIZE, dtype=torch.int64), 0, torch.qint8
    )
    packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(count)]
    return [lambda w=w: torch.ops.quantized.linear_dynamic(x, w, False) for w in packed]  # type: ignore[misc]


def _read_chunks(read: Callable[[Tensor], int]) -> list[Call]:
    memory = reserve_large_pages(COLD_BYTES).zero_().view(torch.int64)
    return [partial(read, chunk) for chunk in memory.split(READ_BYTES // 8)]


def _error(weight: Tensor, format_: Format, x: Tensor) -> float:
    linear = QuantizedLinear(pack_weight(weight, format_))
    with kernel_path("reference"):
        expected = x.double() @ linear.weight().double().T
    gather_weights_(nn.ModuleList([linear]))
    return float((linear(x).double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
