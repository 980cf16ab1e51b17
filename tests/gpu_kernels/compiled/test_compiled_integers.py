"""What the compiler makes of the product with integer activations, for GPUs that are not at hand.

As ``test_compiled_products``, with the tensor core's instruction for integers; and integers become floats once a group,
none where a whole row is one. To write ``golden_integer_instructions.json`` anew:

    python -m tests.gpu_kernels.compiled.test_compiled_integers
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime.kernels.triton.aot import (
    CompiledProduct,
    compile_integer_product,
    compile_integer_product_amd,
    compile_row_rounding,
)
from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.launch_table import Launch, LaunchKey, find_launch
from runtime.kernels.triton.sass import count_copies

GOLDEN = Path(__file__).with_name("golden_integer_instructions.json")
# As much as the weight-only product may take.
MOST_INSTRUCTIONS = {3: 3.4, 4: 2.6, 8: 2.6}
MOST_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A product to compile."""

    bits: int
    architecture: int = 90
    rows: int = 8
    group_size: int | None = 128
    symmetric: bool = False
    in_features: int = 4096

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        sign = "-sym" if self.symmetric else ""
        return f"W{self.bits}A8-sm{self.architecture}-m{self.rows}-k{self.in_features}-{group}{sign}"

    def find_launch(self) -> tuple[LaunchKey, Launch]:
        """Returns the key and the launch that the prior chooses."""
        key = LaunchKey(
            architecture=self.architecture,
            bits=self.bits,
            rows=self.rows,
            out_features=4096,
            in_features=self.in_features,
            group_size=self.group_size,
            activation_bits=8,
        )
        return key, find_launch(key, replace(DEVICES["h100"], architecture=self.architecture))


VARIANTS = [
    Variant(bits=3),
    Variant(bits=4),
    Variant(bits=8),
    Variant(bits=4, group_size=32),
    Variant(bits=4, architecture=80, rows=64),
    Variant(bits=8, architecture=80, group_size=None, symmetric=True),
    Variant(bits=4, architecture=100, group_size=64, in_features=576),
    Variant(bits=8, architecture=120, rows=16),
]


def compile_variant(variant: Variant) -> CompiledProduct:
    key, launch = variant.find_launch()
    return compile_integer_product(key, launch, symmetric=variant.symmetric)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_product_compiles_to_what_it_should(variant: Variant) -> None:
    product = compile_variant(variant)
    code, (_, launch) = product.code, variant.find_launch()
    assert code.spill_bytes == 0
    assert code.count("LDL", "STL", "LDG", "STS", "STSM") == 0
    # Two for 16 rows of the weight, 64 codes and 8 rows of x, and a quarter more for the sums of x.
    main = 8 * launch.tiles * launch.block_m // 8
    assert code.count("IMMA") == (main if variant.symmetric and variant.bits == 8 else main * 5 // 4)
    assert count_copies(code.loop, 128) >= variant.bits * launch.tiles
    groups = 2 if variant.group_size == 32 else 1
    # Scales and zero points; of activations a thread has 4 bytes where a group is 32.
    of_x = groups if variant.group_size == 32 else 0
    assert count_copies(code.loop, 32) <= groups * (1 if variant.symmetric else 2) + of_x
    # Each thread has 16 sums of a group for 8 rows of x.
    converted = 0 if variant.group_size is None else groups * 2 * launch.block_m
    assert code.count("I2F", "I2FP") == converted
    assert code.count("F2F", "F2FP", "F2I") == 0
    assert product.shared_bytes <= MOST_SHARED_BYTES
    assert product.instructions_per_weight <= 1.01 * json.loads(GOLDEN.read_text(encoding="utf-8"))[str(variant)]


def test_golden_counts_reach_the_target() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(golden) == {str(variant) for variant in VARIANTS}
    for bits, most in MOST_INSTRUCTIONS.items():
        assert golden[str(Variant(bits=bits))] <= most


def test_product_compiles_for_amd() -> None:
    key, launch = Variant(bits=4, rows=16).find_launch()
    text = compile_integer_product_amd(key, replace(launch, stages=3), architecture="gfx942")
    assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text) == ["0", "0"]
    assert "v_mfma_i32_16x16x32_i8" in text
    assert text.count("global_load_dwordx4") >= 4 * launch.tiles


def test_rounding_of_rows_compiles_without_spills() -> None:
    code = compile_row_rounding(architecture=90, dtype="bf16")
    assert code.spill_bytes == 0
    # The nearest integer is in the bits of a float.
    assert not any(name.startswith(("I2F", "F2I", "LDL", "STL")) for name in code.whole)


def write_golden() -> None:
    """Records the instructions of a weight for every variant."""
    counts = {str(variant): round(compile_variant(variant).instructions_per_weight, 3) for variant in VARIANTS}
    GOLDEN.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
