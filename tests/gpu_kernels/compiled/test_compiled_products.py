"""What the compiler makes of the weight-only product, for GPUs that are not at hand.

No spills, tensor-core instructions, weights copied 16 bytes at a time, nothing of them through shared memory again, no
conversion from integers, and no more instructions a weight than ``golden_instructions.json`` records: after a change or
an upgrade of Triton the difference is there to be judged. To write it anew:

    python -m tests.gpu_kernels.compiled.test_compiled_products
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime.elements import ELEMENTS
from runtime.kernels.triton.aot import (
    CompiledProduct,
    compile_dequantization,
    compile_row_scaling,
    compile_split_sum,
    compile_weight_only,
    compile_weight_only_amd,
)
from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.fragment_layout import TWO_VALUES
from runtime.kernels.triton.launch_table import Launch, LaunchKey, find_launch
from runtime.kernels.triton.sass import count_copies

GOLDEN = Path(__file__).with_name("golden_instructions.json")
# 2.6, 3.4 and 5.1 instructions a weight are what the project set itself for groups of 128 on compute capability 9.0.
MOST_INSTRUCTIONS = {1: 2.6, 2: 2.6, 3: 3.4, 4: 2.6, 5: 3.4, 6: 3.4, 7: 5.1, 8: 2.6}
# Of every program that a processor of the smallest of these GPUs takes.
MOST_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A product to compile."""

    bits: int
    architecture: int = 90
    rows: int = 8
    group_size: int | None = 128
    dtype: str = "fp16"
    symmetric: bool = False
    in_features: int = 4096
    element: str = ""
    scale: str = "fp16"

    @property
    def mantissa_bits(self) -> int:
        """Mantissa bits of the codes, -1 for integers."""
        return ELEMENTS[self.element].mantissa_bits if self.element else -1

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        sign = ("-sym" if self.symmetric else "") + ("" if self.scale == "fp16" else f"-{self.scale}")
        codes = f"W{self.element or self.bits}-{self.dtype}"
        return f"{codes}-sm{self.architecture}-m{self.rows}-k{self.in_features}-{group}{sign}"

    def find_launch(self) -> tuple[LaunchKey, Launch]:
        """Returns the key and the launch that the prior chooses."""
        key = LaunchKey(
            architecture=self.architecture,
            bits=self.bits,
            rows=self.rows,
            out_features=4096,
            in_features=self.in_features,
            group_size=self.group_size,
        )
        return key, find_launch(key, replace(DEVICES["h100"], architecture=self.architecture))


VARIANTS = [
    *(Variant(bits=bits) for bits in range(1, 9)),
    Variant(bits=4, dtype="bf16"),
    Variant(bits=8, dtype="bf16"),
    Variant(bits=4, rows=16),
    Variant(bits=4, group_size=64, in_features=576),
    Variant(bits=4, group_size=32),
    Variant(bits=2, group_size=64, scale="e8m0"),
    Variant(bits=1, group_size=64, scale=TWO_VALUES),
    Variant(bits=4, group_size=None, symmetric=True),
    Variant(bits=3, architecture=80),
    Variant(bits=4, architecture=80, rows=64),
    Variant(bits=4, architecture=80, rows=64, dtype="bf16"),
    # MXFP4, NVFP4, FP8 and MXFP6.
    Variant(bits=4, group_size=32, symmetric=True, element="e2m1", scale="e8m0"),
    Variant(bits=4, group_size=16, symmetric=True, element="e2m1", scale="e4m3"),
    Variant(bits=8, group_size=None, symmetric=True, element="e4m3"),
    Variant(bits=8, group_size=None, symmetric=True, element="e5m2", dtype="bf16"),
    Variant(bits=6, group_size=32, symmetric=True, element="e2m3", scale="e8m0", architecture=80),
    Variant(bits=4, architecture=100),
    Variant(bits=6, architecture=100, rows=16),
    Variant(bits=4, architecture=120),
    Variant(bits=8, architecture=120),
]


def compile_variant(variant: Variant) -> CompiledProduct:
    key, launch = variant.find_launch()
    return compile_weight_only(
        key,
        launch,
        dtype=variant.dtype,
        symmetric=variant.symmetric,
        element=variant.mantissa_bits,
        scale=variant.scale,
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_product_compiles_to_what_it_should(variant: Variant) -> None:
    product = compile_variant(variant)
    code, (_, launch) = product.code, variant.find_launch()
    assert code.spill_bytes == 0
    assert code.count("LDL", "STL") == 0
    assert code.count("HMMA", "HGMMA") > 0
    # A thread copies the words of a step in 16-byte pieces, and nothing narrower than 8 but scales and zero points.
    assert count_copies(code.loop, 128) >= variant.bits * launch.tiles
    groups = 64 // variant.group_size if variant.group_size in (16, 32) else 1
    # Of activations a thread has 4 bytes where a group is 16.
    of_x = groups if variant.group_size == 16 else 0
    assert count_copies(code.loop, 32) <= groups * (1 if variant.symmetric else 2) + of_x
    assert code.count("LDG") == 0
    # Through shared memory there would be stores to it.
    assert code.count("STS", "STSM") == 0
    assert code.count("I2F", "I2FP", "F2F", "F2FP") == 0
    assert product.shared_bytes <= MOST_SHARED_BYTES
    assert product.instructions_per_weight <= 1.01 * json.loads(GOLDEN.read_text(encoding="utf-8"))[str(variant)]


def test_golden_counts_reach_the_target() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(golden) == {str(variant) for variant in VARIANTS}
    for bits, most in MOST_INSTRUCTIONS.items():
        assert golden[str(Variant(bits=bits))] <= most
    assert golden[str(Variant(bits=8, dtype="bf16"))] <= MOST_INSTRUCTIONS[8]


@pytest.mark.parametrize("bits", [3, 4])
def test_product_compiles_for_amd(bits: int) -> None:
    # Its matrix instructions want at least 16 rows of x, and hold the weight in another order than the words.
    key, launch = Variant(bits=bits, rows=16).find_launch()
    text = compile_weight_only_amd(key, replace(launch, stages=3), dtype="fp16", architecture="gfx942")
    assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text) == ["0", "0"]
    assert "v_mfma_f32_16x16x16_f16" in text
    assert text.count("global_load_dwordx4") >= bits * launch.tiles
    assert "v_cvt_f32_u32" not in text
    assert "v_cvt_f16_u16" not in text


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_scaling_of_rows_compiles_without_spills(dtype: str) -> None:
    code = compile_row_scaling(architecture=90, dtype=dtype)
    assert code.spill_bytes == 0
    # Neither the exponent nor the powers of two take a function: they are bits of floats.
    assert not any(name.startswith(("I2F", "F2I", "MUFU", "LDL", "STL")) for name in code.whole)


@pytest.mark.parametrize(
    ("bits", "scale", "dtype"), [(3, "fp16", "fp16"), (3, "fp16", "bf16"), (1, TWO_VALUES, "bf16")]
)
def test_dequantization_compiles_without_spills(bits: int, scale: str, dtype: str) -> None:
    code = compile_dequantization(bits, 64, architecture=90, dtype=dtype, symmetric=False, scale=scale)
    assert code.spill_bytes == 0
    assert not any(name.startswith(("I2F", "LDL", "STL")) for name in code.whole)
    # The words of a tile: eight bytes a thread for each bit.
    assert sum(n for name, n in code.whole.items() if name.startswith("LDG") and name.endswith("64")) >= bits


def test_sum_of_splits_compiles_without_spills() -> None:
    code = compile_split_sum(4, architecture=90, dtype="bf16")
    assert code.spill_bytes == 0
    # Added in their order, without atomics: the result does not depend on which program was first.
    assert not any(name.startswith(("RED", "ATOM")) for name in code.whole)


def write_golden() -> None:
    """Records the instructions of a weight for every variant."""
    counts = {str(variant): round(compile_variant(variant).instructions_per_weight, 3) for variant in VARIANTS}
    GOLDEN.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
