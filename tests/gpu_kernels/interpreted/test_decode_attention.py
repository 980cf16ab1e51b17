"""Attention over packed caches in Triton's interpreter against float64 over what the cache gives back."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from runtime.cache_formats import find_cache_formats
from runtime.cache_units import find_cache_units
from runtime.cached_attention import read_packed_caches_
from runtime.kernels.dispatch import kernel_path
from runtime.kernels.reference import attention_reference
from runtime.kernels.triton.decode_attention import decode_attention, fits_attention
from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.launch_table import find_attention_launch
from runtime.packed_attention import PackedPast, attend_packed, find_packed_past
from runtime.packed_states import PackedStates, make_packed_states
from runtime.quantized_cache import QuantizedCache
from tests.tiny_models import build_tiny_llama


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of decoding."""

    keys: str
    values: str
    tokens: int = 70
    batch: int = 1
    heads: int = 3
    key_heads: int = 1
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    masked: int = 0

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.heads}x{self.key_heads}x{self.tokens}x{self.head_dim}"
        masked = f"-masked{self.masked}" if self.masked else ""
        return f"{self.keys}-{self.values}-{shape}-{str(self.dtype).removeprefix('torch.')}{masked}"


CASES = [
    *(Case(keys=f"int{bits}_g32", values=f"int{bits}_channel_sym") for bits in range(2, 9)),
    *(Case(keys=f"int{bits}_t32", values=f"int{bits}_t64") for bits in (2, 3, 4, 5, 8)),
    Case(keys="int4_t128", values="int4_g64", head_dim=64, tokens=200, heads=4, key_heads=2),
    Case(keys="int4_g32", values="int3_t32", head_dim=128, tokens=33),
    Case(keys="bf16", values="int4_g32", tokens=1),
    Case(keys="fp16", values="bf16", tokens=97, batch=2, heads=2, key_heads=2),
    Case(keys="int8_g32", values="int8_g32", tokens=131, batch=2, heads=9, key_heads=3, masked=17),
    Case(keys="int4_t32", values="int4_g32", tokens=41, batch=2, masked=40),
    Case(keys="int4_g32", values="int2_g32", tokens=67, heads=20, dtype=torch.float16),
    Case(keys="int2_t32", values="int8_t32", tokens=67, dtype=torch.float16),
    Case(keys="int8_channel_sym", values="int5_g32", tokens=33, dtype=torch.float16),
    Case(keys="int4_t32", values="int4_g32", tokens=67, dtype=torch.bfloat16),
]


def keep(case: Case) -> tuple[PackedStates, PackedStates, Tensor, Tensor, Tensor]:
    """Returns packed keys and values of past tokens, and query, key and value of the next one."""
    generator = torch.Generator().manual_seed(case.tokens)
    shape = (case.batch, case.key_heads, case.tokens + 1, case.head_dim)
    # Channels of keys differ, as those of language models do.
    key = (torch.randn(shape, generator=generator) * torch.logspace(-1, 0.5, case.head_dim)).to(case.dtype)
    value = torch.randn(shape, generator=generator).to(case.dtype)
    query = torch.randn((case.batch, case.heads, 1, case.head_dim), generator=generator).to(case.dtype)
    halves = tuple(make_packed_states(find_cache_formats([name])[0]) for name in (case.keys, case.values))
    # In two steps: blocks are completed by later tokens.
    for half, states in zip(halves, (key, value), strict=True):
        half.append(states[:, :, : -(-case.tokens // 2)])
        if case.tokens > 1:
            half.append(states[:, :, -(-case.tokens // 2) : -1])
    return *halves, query, key[:, :, -1:], value[:, :, -1:]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_over_what_is_packed(case: Case) -> None:
    keys, values, query, key, value = keep(case)
    past = find_packed_past(keys, values, key, value)
    assert past is not None
    mask, scaling = None, case.head_dim**-0.5
    if case.masked:
        # The second sequence is padded on the left.
        mask = torch.ones(case.batch, 1, 1, case.tokens + 1, dtype=torch.bool)
        mask[1, ..., : case.masked] = False
    y = attend_packed(query, past, mask, scaling)
    assert y.dtype == case.dtype
    k, v = (
        torch.cat([half.read(case.dtype), new], dim=2).double()
        for half, new in zip((keys, values), (key, value), strict=True)
    )
    expected = attention_reference(query.double(), k, v, mask, scaling)
    assert y.shape == expected.shape
    # Scores are off by d, so weights by a factor within e^(2 d); weights are rounded to the type of the values (the
    # interpreter truncates to bfloat16, keys and values too), and so is the result.
    truncated = 2.0**-7 if case.dtype == torch.bfloat16 else 0.0
    weight_error = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[case.dtype]
    magnitude = query.double().abs() @ k.abs().repeat_interleave(case.heads // case.key_heads, 1).transpose(-1, -2)
    off = float(scaling * magnitude.max()) * (truncated + (case.head_dim + 16) * 2.0**-24)
    relative = math.expm1(2 * off) + weight_error + truncated + (case.tokens + 64) * 2.0**-23
    assert bool(((y.double() - expected).abs() <= (relative + weight_error) * v.abs().max()).all())


def test_splits_are_added_in_their_order() -> None:
    case = Case(keys="int4_g32", values="int8_g32", tokens=300)
    keys, values, query, key, value = keep(case)
    past = find_packed_past(keys, values, key, value)
    assert past is not None
    whole = attend_packed(query, past, None, 0.2)
    launch = find_attention_launch(DEVICES["a100"], 1, case.tokens, 128)
    arguments = (query, past.keys, past.values, past.packed_count, past.tail, None, 0.2)
    launch = replace(launch, split_tokens=launch.block_tokens)
    first = decode_attention(*arguments, launch)
    assert torch.equal(decode_attention(*arguments, launch), first)
    assert not torch.equal(first, whole)
    # Weights of shares are rounded once more for each split.
    assert float((first - whole).abs().max()) <= 2.0**-18


def test_what_is_read_does_not_change_when_the_cache_grows() -> None:
    """The next step packs a whole block, of which this step's token is the last."""
    case = Case(keys="int2_t32", values="int2_g32", tokens=63)
    keys, values, query, key, value = keep(case)
    past = find_packed_past(keys, values, key, value)
    assert past is not None and past.packed_count == 32
    before = attend_packed(query, past, None, 1.0)
    keys.append(key)
    values.append(value)
    assert torch.equal(attend_packed(query, past, None, 1.0), before)
    grown = find_packed_past(keys, values, key, value)
    assert grown is not None and grown.packed_count == 64


def test_a_wrong_code_is_seen() -> None:
    keys, values, query, key, value = keep(Case(keys="int4_g32", values="int4_g32"))
    past = find_packed_past(keys, values, key, value)
    assert past is not None
    y = attend_packed(query, past, None, 0.2)
    for rows in (past.keys, past.values):
        rows.buffers["codes"][5, 0, 0, 7] ^= 1
        assert not torch.equal(attend_packed(query, past, None, 0.2), y)
        rows.buffers["codes"][5, 0, 0, 7] ^= 1


def find(case: Case) -> PackedPast | None:
    keys, values, _, key, value = keep(case)
    return find_packed_past(keys, values, key, value)


def test_what_the_kernel_does_not_read_is_dequantized() -> None:
    fitting = Case(keys="int4_g32", values="int4_g32")
    assert find(fitting) is not None
    with kernel_path("reference"):
        assert find(fitting) is None
    for other in ("int1_g32", "int4_g16", "int4_g32_pow2", "fp8_e4m3_channel", "mxfp4"):
        assert find(replace(fitting, keys=other)) is None
        assert find(replace(fitting, values=other)) is None
    assert find(replace(fitting, head_dim=96)) is None
    assert find(replace(fitting, keys="int4_t128")) is None, "no block is complete"
    assert find(replace(fitting, dtype=torch.float64)) is None
    keys, values, _, key, value = keep(fitting)
    assert find_packed_past(keys, values, key.repeat(1, 1, 2, 1), value.repeat(1, 1, 2, 1)) is None
    assert find_packed_past(keys, values, key.requires_grad_(), value) is None
    assert not fits_attention(keys.packed_rows(), torch.float64)


@torch.no_grad()
def test_an_attention_that_loses_the_past_is_seen() -> None:
    model = build_tiny_llama(head_dim=32).requires_grad_(False)
    read_packed_caches_(model)
    cache = QuantizedCache(model, {unit.name: "int4_g32" for unit in find_cache_units(model)})
    key = torch.randn(1, 2, 5, 32)
    cache.update(key, key, 0)
    cache.update(key[:, :, :1], key[:, :, :1], 0)
    with pytest.raises(RuntimeError, match="past was not read"):
        cache.update(key[:, :, :1], key[:, :, :1], 0)


@torch.no_grad()
def test_a_model_generates_the_same_text() -> None:
    model = build_tiny_llama(head_dim=32).requires_grad_(False)
    names = ("int8_t32", "int4_g32", "bf16", "int8_channel")
    formats = {unit.name: names[i % len(names)] for i, unit in enumerate(find_cache_units(model))}
    tokens = torch.arange(2 * 40).mul(7).remainder(300).view(2, 40)
    padded = torch.ones(2, 40, dtype=torch.int64)
    padded[1, :5] = 0
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": padded}

    def generate() -> tuple[Tensor, Tensor]:
        found = model.generate(
            tokens,
            past_key_values=QuantizedCache(model, formats),
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        return found.sequences, torch.stack(found.logits)

    text, logits = generate()
    read_packed_caches_(model)
    packed_text, packed_logits = generate()
    assert torch.equal(packed_text, text)
    # The first token's are of the prompt, which no kernel reads.
    assert torch.equal(packed_logits[0], logits[0])
    assert not any(torch.equal(packed_logits[i], logits[i]) for i in (1, 2, 3)), "it was the kernel"
    assert float((packed_logits - logits).abs().max()) <= 1e-4 * float(logits.abs().max())
