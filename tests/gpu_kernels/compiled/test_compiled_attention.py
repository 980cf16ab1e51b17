"""What the compiler makes of attention over a packed cache, for GPUs that are not at hand.

No spills, tensor-core instructions, codes copied 16 bytes at a time where a chunk of 32 of them has as many, no
conversion from integers, few barriers (codes that change hands one by one would have hundreds), and no more
instructions for a number of a head than ``golden_attention_instructions.json`` records. To write it anew:

    python -m tests.gpu_kernels.compiled.test_compiled_attention
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from runtime.cache_formats import TokenBlockFormat, find_cache_formats
from runtime.kernels.triton.aot import CompiledProduct
from runtime.kernels.triton.aot_attention import (
    compile_attention_sum,
    compile_decode_attention,
    compile_decode_attention_amd,
)
from runtime.kernels.triton.decode_attention import States, describe_states
from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.launch_table import AttentionLaunch, find_attention_launch
from runtime.kernels.triton.sass import count_copies

GOLDEN = Path(__file__).with_name("golden_attention_instructions.json")
MOST_SHARED_BYTES = 99 * 1024
MOST_BARRIERS = 8
TYPE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Attention to compile."""

    keys: str
    values: str
    architecture: int = 90
    dtype: str = "fp16"
    head_dim: int = 128
    shared: int = 4

    def __str__(self) -> str:
        return f"{self.keys}-{self.values}-{self.dtype}-sm{self.architecture}-d{self.head_dim}-h{self.shared}"

    def describe(self) -> tuple[States, States]:
        """Returns the descriptions of keys and values."""
        return _describe(self.keys), _describe(self.values)

    def find_launch(self) -> AttentionLaunch:
        """Returns the launch that the prior chooses."""
        device = replace(DEVICES["h100"], architecture=self.architecture)
        return find_attention_launch(device, 8, 8192, self.head_dim * TYPE_BYTES[self.dtype])


def _describe(name: str) -> States:
    [format_] = find_cache_formats([name])
    if isinstance(format_, TokenBlockFormat):
        return describe_states(format_.row_format, format_.token_block)
    return describe_states(format_, 0)


VARIANTS = [
    Variant(keys="int4_g32", values="int4_g32"),
    Variant(keys="int4_t32", values="int4_g32", architecture=80, dtype="bf16", head_dim=64, shared=3),
    Variant(keys="int3_g32", values="int8_channel_sym", architecture=100),
    Variant(keys="bf16", values="int4_t64", architecture=120, dtype="bf16"),
    Variant(keys="int8_t128", values="int8_g32", architecture=80, dtype="fp32"),
]


def compile_variant(variant: Variant) -> CompiledProduct:
    keys, values = variant.describe()
    return compile_decode_attention(
        keys,
        values,
        architecture=variant.architecture,
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        shared=variant.shared,
        launch=variant.find_launch(),
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_attention_compiles_to_what_it_should(variant: Variant) -> None:
    product, launch = compile_variant(variant), variant.find_launch()
    code = product.code
    assert code.spill_bytes == 0
    assert code.count("LDL", "STL") == 0
    assert code.count("HMMA", "HGMMA") > 0
    assert code.count("BAR") <= MOST_BARRIERS
    assert not any(name.startswith(("I2F", "F2I")) for name in code.loop)
    # A chunk of 32 codes has 4 bytes for each of their bits, 64 for 16 bits; threads have as many chunks each.
    chunks = launch.block_tokens * variant.head_dim // 32 // (32 * launch.warps)
    wide = sum(states[0] // 4 * chunks for states in variant.describe() if states[0] % 4 == 0)
    assert count_copies(code.loop, 128) >= wide
    assert product.shared_bytes <= MOST_SHARED_BYTES
    assert product.instructions_per_weight <= 1.01 * json.loads(GOLDEN.read_text(encoding="utf-8"))[str(variant)]


def test_every_variant_is_recorded() -> None:
    assert set(json.loads(GOLDEN.read_text(encoding="utf-8"))) == {str(variant) for variant in VARIANTS}


def test_attention_compiles_for_amd() -> None:
    variant = VARIANTS[0]
    text = compile_decode_attention_amd(
        *variant.describe(),
        architecture="gfx942",
        dtype=variant.dtype,
        head_dim=variant.head_dim,
        shared=variant.shared,
        launch=variant.find_launch(),
    )
    assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text) == ["0", "0"]
    assert "v_mfma_f32_16x16x16_f16" in text
    assert "global_load_dwordx4" in text


def test_sum_of_splits_compiles_without_spills() -> None:
    code = compile_attention_sum(architecture=90, dtype="bf16", head_dim=128)
    assert code.spill_bytes == 0
    # Added in their order, without atomics: the result does not depend on which program was first.
    assert not any(name.startswith(("RED", "ATOM")) for name in code.whole)


def write_golden() -> None:
    """Records the instructions of a number for every variant."""
    counts = {str(variant): round(compile_variant(variant).instructions_per_weight, 3) for variant in VARIANTS}
    GOLDEN.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
