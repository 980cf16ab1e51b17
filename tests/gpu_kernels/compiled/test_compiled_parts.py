"""What the compiler makes of products with sums of parts, mixed groups and residual blocks, for GPUs not at hand.

As ``test_compiled_products`` demands of weights of one part; the counts are in ``golden_parted_instructions.json``. To
write it anew:

    python -m tests.gpu_kernels.compiled.test_compiled_parts
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime.formats import find_format
from runtime.kernels.triton.aot import CompiledProduct, compile_row_scaling
from runtime.kernels.triton.aot_parts import (
    compile_group_mixture,
    compile_group_mixture_amd,
    compile_outliers,
    compile_parted_dequantization,
    compile_parted_product,
    compile_parted_product_amd,
    compile_residual_product,
    compile_residual_product_amd,
)
from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.group_mixture_linear import plan_mixture
from runtime.kernels.triton.launch_table import Launch, LaunchKey
from runtime.kernels.triton.packed_parts import list_parts
from runtime.kernels.triton.parted_layout import CodePart
from runtime.kernels.triton.parted_linear import plan_parts
from runtime.kernels.triton.residual_linear import find_residual_launch
from runtime.kernels.triton.sass import count_copies

GOLDEN = Path(__file__).with_name("golden_parted_instructions.json")
# Of every program that a processor of the smallest of these GPUs takes.
MOST_SHARED_BYTES = 99 * 1024


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A product with a sum of parts to compile."""

    name: str
    architecture: int = 90
    rows: int = 8
    dtype: str = "fp16"
    in_features: int = 4096

    @property
    def parts(self) -> tuple[CodePart, ...]:
        """The parts at the full width."""
        format_ = find_format(self.name)
        return tuple(list_parts(format_)[format_.bits])

    @property
    def each_scaled(self) -> bool:
        """Each part has scales of its own."""
        return find_format(self.name).kind == "planes"

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}-sm{self.architecture}-m{self.rows}-k{self.in_features}"

    def find_launch(self) -> tuple[LaunchKey, Launch]:
        """Returns the key and the launch that the prior chooses."""
        format_ = find_format(self.name)
        key = LaunchKey(
            architecture=self.architecture,
            bits=format_.bits,
            rows=self.rows,
            out_features=4096,
            in_features=self.in_features,
            group_size=format_.group_size,
        )
        return key, plan_parts(key, replace(DEVICES["h100"], architecture=self.architecture))


VARIANTS = [
    Variant(name="bcq2_g128_pow2"),
    Variant(name="bcq3_g128"),
    Variant(name="bcq4_g64", architecture=80, rows=64, dtype="bf16", in_features=576),
    Variant(name="nested8_g128", architecture=120, dtype="bf16"),
    Variant(name="nested4_8_g64", rows=16),
    Variant(name="nested4_8_g32", architecture=100),
]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A product with residual blocks to compile."""

    rank: int = 16
    x_parts: int = 1
    architecture: int = 90

    def __str__(self) -> str:
        return f"bitstack_r{self.rank}-{'fp32' if self.x_parts == 2 else 'fp16'}-sm{self.architecture}"

    def find_launch(self) -> Launch:
        """Returns the launch that the prior chooses for four blocks."""
        device = replace(DEVICES["h100"], architecture=self.architecture)
        return find_residual_launch(device, rows=self.rank * self.x_parts, out_features=4 * 4096, in_features=4096)


BLOCKS = [Blocks(), Blocks(x_parts=2, architecture=80), Blocks(rank=4, architecture=100)]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A product with groups of 2 and of 4 bits to compile."""

    group_size: int
    architecture: int = 90
    rows: int = 8
    dtype: str = "fp16"

    def __str__(self) -> str:
        return f"int2_mix25int4-{self.dtype}-sm{self.architecture}-m{self.rows}-g{self.group_size}"

    def find_launch(self) -> tuple[LaunchKey, Launch]:
        """Returns the key and the launch that the prior chooses."""
        key = LaunchKey(
            architecture=self.architecture,
            bits=2,
            rows=self.rows,
            out_features=4096,
            in_features=4096,
            group_size=self.group_size,
        )
        return key, plan_mixture(key, replace(DEVICES["h100"], architecture=self.architecture))


MIXTURES = [Mixture(group_size=32), Mixture(group_size=64, architecture=80, rows=64, dtype="bf16")]


def compile_mixture(mixture: Mixture) -> CompiledProduct:
    return compile_group_mixture(*mixture.find_launch(), dtype=mixture.dtype)


def compile_variant(variant: Variant) -> CompiledProduct:
    key, launch = variant.find_launch()
    scale = "e8m0" if find_format(variant.name).scale_type == "pow2" else "fp16"
    return compile_parted_product(
        key, launch, variant.parts, each_scaled=variant.each_scaled, dtype=variant.dtype, scale=scale
    )


def compile_blocks(blocks: Blocks) -> CompiledProduct:
    return compile_residual_product(
        blocks.find_launch(), architecture=blocks.architecture, rank=blocks.rank, x_parts=blocks.x_parts
    )


def check_code(product: CompiledProduct, name: str, *, words: int, scales: int) -> None:
    """Checks what holds for every product.

    Args:
        product: What was compiled.
        name: Its golden count.
        words: Of a thread in one step, each 16 bytes.
        scales: Copies of one word in a step.
    """
    code = product.code
    assert code.spill_bytes == 0
    assert code.count("LDL", "STL") == 0
    assert code.count("HMMA", "HGMMA") > 0
    assert count_copies(code.loop, 128) >= words
    assert count_copies(code.loop, 32) <= scales
    assert code.count("LDG") == 0
    assert code.count("STS", "STSM") == 0
    assert code.count("I2F", "I2FP", "F2F", "F2FP") == 0
    assert product.shared_bytes <= MOST_SHARED_BYTES
    assert product.instructions_per_weight <= 1.01 * json.loads(GOLDEN.read_text(encoding="utf-8"))[name]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_sums_of_parts_compile_to_what_they_should(variant: Variant) -> None:
    key, launch = variant.find_launch()
    groups = 2 if key.group_size == 32 else 1
    scales = groups * (len(variant.parts) if variant.each_scaled else 1)
    check_code(compile_variant(variant), str(variant), words=key.bits * launch.tiles, scales=scales)


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_residual_blocks_compile_to_what_they_should(blocks: Blocks) -> None:
    check_code(compile_blocks(blocks), str(blocks), words=blocks.find_launch().tiles, scales=0)


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_mixed_groups_compile_to_what_they_should(mixture: Mixture) -> None:
    # The low parts are copied ahead like all words, though what is read of them depends on the flags that are read
    # before. Of single words there are scales, both zero points, flags and starts, some of which threads share.
    check_code(compile_mixture(mixture), str(mixture), words=4, scales=11 if mixture.group_size == 32 else 8)


def test_outliers_compile_without_spills() -> None:
    code = compile_outliers(architecture=90, dtype="bf16")
    assert code.spill_bytes == 0
    assert not any(name.startswith(("RED", "ATOM", "LDL", "STL")) for name in code.whole)


def test_golden_counts_are_those_of_the_parts() -> None:
    """A plane costs no more than a weight of one bit; the target of these is 2.6 instructions a weight."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(golden) == {str(variant) for variant in [*VARIANTS, *BLOCKS, *MIXTURES]}
    for planes, name in ((2, "bcq2_g128_pow2"), (3, "bcq3_g128")):
        assert golden[str(Variant(name=name))] <= 2.6 * planes
    # Four bits and twice two.
    assert golden[str(Variant(name="nested8_g128", architecture=120, dtype="bf16"))] <= 2.6 * 3
    assert golden[str(Blocks())] <= 2.6


def check_amd_code(text: str, loads: int) -> None:
    assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text) == ["0", "0"]
    assert "v_mfma_f32_16x16x16_f16" in text
    assert text.count("global_load_dwordx4") >= loads
    assert "v_cvt_f32_u32" not in text
    assert "v_cvt_f16_u16" not in text


def test_sums_of_parts_compile_for_amd() -> None:
    variant = Variant(name="bcq3_g128", rows=16)
    launch = replace(variant.find_launch()[1], stages=3)
    text = compile_parted_product_amd(launch, variant.parts, 128, each_scaled=True, architecture="gfx942")
    check_amd_code(text, 3 * launch.tiles)


def test_mixed_groups_compile_for_amd() -> None:
    launch = replace(Mixture(group_size=64, rows=16).find_launch()[1], stages=3)
    check_amd_code(compile_group_mixture_amd(launch, 64, architecture="gfx942"), 4)


def test_residual_blocks_compile_for_amd() -> None:
    launch = replace(Blocks().find_launch(), stages=3)
    text = compile_residual_product_amd(launch, architecture="gfx942", rank=16)
    # An index is divided by the number of splits, by way of floats, once a program.
    assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text) == ["0", "0"]
    assert "v_mfma_f32_16x16x16_f16" in text
    assert text.count("global_load_dwordx4") >= launch.tiles


@pytest.mark.parametrize("name", ["bcq3_g64", "nested4_8_g64"])
def test_dequantization_compiles_without_spills(name: str) -> None:
    variant = Variant(name=name)
    code = compile_parted_dequantization(
        variant.parts, 64, each_scaled=variant.each_scaled, architecture=90, dtype="bf16"
    )
    assert code.spill_bytes == 0
    assert not any(name.startswith(("I2F", "LDL", "STL")) for name in code.whole)


def test_rows_times_factors_compile_without_spills() -> None:
    code = compile_row_scaling(architecture=90, dtype="fp32", has_factors=True)
    assert code.spill_bytes == 0
    assert not any(name.startswith(("I2F", "MUFU", "LDL", "STL")) for name in code.whole)


def write_golden() -> None:
    """Records the instructions of a weight for every variant."""
    compiled = {str(variant): compile_variant(variant) for variant in VARIANTS}
    compiled.update({str(mixture): compile_mixture(mixture) for mixture in MIXTURES})
    compiled.update({str(blocks): compile_blocks(blocks) for blocks in BLOCKS})
    counts = {name: round(product.instructions_per_weight, 3) for name, product in compiled.items()}
    GOLDEN.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
