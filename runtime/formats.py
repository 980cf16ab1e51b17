"""The menu of storage formats, by name. What a format is, and the bytes it takes, are in ``runtime/storage.py``.

Four different numbers are called "bits": ``Format.bits`` is the nominal code width; entropy plays no
part here; packed bits are the codes alone; budgets use ``storage_bytes``, which counts codes, scales,
zero points and the padding of every row.
"""

import difflib
from collections.abc import Iterable

from runtime.elements import ELEMENTS
from runtime.ggml_blocks import GGML_BLOCKS
from runtime.storage import NESTED_WIDTHS, Format, Mixture
from runtime.stored_tensor import packed_row_bytes

__all__ = ["DEFAULT_FORMATS", "FORMATS", "Format", "find_format", "find_formats", "packed_row_bytes"]

INTEGER_BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, None)
FLOAT_GROUP_SIZES = (32, 64, 128, None)


def _group_name(group_size: int | None) -> str:
    return "channel" if group_size is None else f"g{group_size}"


def _integer_format(bits: int, group_size: int | None, symmetric: bool, scale_type: str) -> Format:
    suffix = ("_sym" if symmetric else "") + ("" if scale_type == "fp16" else f"_{scale_type}")
    return Format(
        name=f"int{bits}_{_group_name(group_size)}{suffix}",
        # One bit has no grid with a zero: two values a group.
        kind="int" if bits > 1 else "binary",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_type=scale_type,
    )


def _element_format(family: str, element: str, group_size: int | None, scale_type: str) -> Format:
    return Format(
        name=family,
        kind="element",
        bits=ELEMENTS[element].bits,
        group_size=group_size,
        scale_type=scale_type,
        element=element,
    )


def _column_mixture(narrow_bits: int, wide_bits: int, percent: int, share: float, group_size: int | None) -> Format:
    """Returns the format that stores a share of the columns, that of the largest errors, at more bits."""
    return Format(
        name=f"int{narrow_bits}_top{percent}int{wide_bits}_{_group_name(group_size)}",
        kind="column_mixture",
        bits=narrow_bits,
        group_size=group_size,
        symmetric=False,
        mixture=Mixture(
            wide=_integer_format(wide_bits, group_size, False, "fp16"),
            narrow=_integer_format(narrow_bits, group_size, narrow_bits == 1, "fp16"),
            wide_share=share,
        ),
    )


def _group_mixture(group_size: int, outlier_share: float) -> Format:
    """Returns the format of a quarter of the groups at 4 bits and the rest at 2, with a share of the weights apart."""
    return Format(
        name=f"int2_mix25int4_g{group_size}" + ("_outliers" if outlier_share else ""),
        kind="group_mixture",
        bits=2,
        group_size=group_size,
        symmetric=False,
        mixture=Mixture(
            wide=_integer_format(4, group_size, False, "fp16"),
            narrow=_integer_format(2, group_size, False, "fp16"),
            wide_share=0.25,
            outlier_share=outlier_share,
        ),
    )


_FAMILIES: tuple[Iterable[Format], ...] = (
    (
        _integer_format(bits, group_size, symmetric, scale_type)
        for scale_type in ("fp16", "pow2")
        for bits in INTEGER_BITS
        for group_size in GROUP_SIZES
        for symmetric in (False, True)
    ),
    (
        _integer_format(1, group_size, symmetric, scale_type)
        for symmetric, scale_type in ((False, "fp16"), (True, "fp16"), (True, "pow2"))
        for group_size in GROUP_SIZES
    ),
    (
        _element_format(f"fp{ELEMENTS[element].bits}_{element}_{_group_name(group_size)}", element, group_size, "fp16")
        for element in ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2")
        for group_size in FLOAT_GROUP_SIZES
    ),
    (
        Format(name=f"fp{bits}_{_group_name(group_size)}", kind="searched_float", bits=bits, group_size=group_size)
        for bits in (3, 4, 5, 6, 8)
        for group_size in FLOAT_GROUP_SIZES
    ),
    (
        _element_format("mxfp4", "e2m1", 32, "e8m0"),
        _element_format("mxfp6_e2m3", "e2m3", 32, "e8m0"),
        _element_format("mxfp6_e3m2", "e3m2", 32, "e8m0"),
        _element_format("mxfp8_e4m3", "e4m3", 32, "e8m0"),
        _element_format("mxfp8_e5m2", "e5m2", 32, "e8m0"),
        _element_format("mxint8", "int8", 32, "e8m0"),
        _element_format("nvfp4", "e2m1", 16, "e4m3"),
        _element_format("nvint4", "int4", 16, "e4m3"),
    ),
    (
        Format(
            name=name,
            kind="ggml",
            bits=int(name.removeprefix("i")[1]),
            group_size=weights,
            symmetric=name in ("q4_0", "q5_0", "q8_0", "q3_k", "q6_k", "iq4_nl", "iq4_xs"),
            element=name,
        )
        for name, (weights, _) in GGML_BLOCKS.items()
    ),
    (
        *(Format(name=f"ternary_{_group_name(g)}", kind="ternary", bits=2, group_size=g) for g in (32, 64, 128, None)),
        Format(name="ternary_channel_median", kind="ternary", bits=2, element="median"),
    ),
    (
        Format(name=f"bitmod{bits}_g{g}", kind="chosen_type", bits=bits, group_size=g, element="bitmod")
        for bits in (3, 4)
        for g in (32, 64, 128)
    ),
    (
        Format(name=f"intfp{bits}_g{g}", kind="chosen_type", bits=bits, group_size=g, element="int_or_float")
        for bits in (4, 6, 8)
        for g in (16, 32, 64)
    ),
    (
        Format(
            name=f"bcq{bits}_{_group_name(g)}" + ("" if scale_type == "fp16" else f"_{scale_type}"),
            kind="planes",
            bits=bits,
            group_size=g,
            scale_type=scale_type,
        )
        for scale_type, group_sizes in (("fp16", (64, 128, None)), ("pow2", (64, 128)))
        for bits in (2, 3, 4)
        for g in group_sizes
    ),
    (
        Format(name=f"dual_binary_g{g}", kind="planes", bits=2, group_size=g, symmetric=False, element="zero_one")
        for g in (64, 128)
    ),
    (
        Format(name=f"nested8_{_group_name(g)}", kind="nested", bits=NESTED_WIDTHS[-1], group_size=g)
        for g in (64, 128, None)
    ),
    (
        Format(
            name=f"nested{prefix}_{bits}_{_group_name(g)}",
            kind="double_rounding",
            bits=bits,
            group_size=g,
            prefix_bits=prefix,
        )
        for prefix, bits in ((4, 6), (4, 8))
        for g in (32, 64, 128, None)
    ),
    (
        Format(name=f"bitstack{blocks}_r{rank}", kind="residual_blocks", bits=blocks, rank=rank)
        for blocks in (1, 2, 3, 4)
        for rank in (4, 16)
    ),
    (
        *(_column_mixture(1, 4, 20, 0.2, group_size) for group_size in (64, 128, None)),
        *(_column_mixture(4, 8, 12, 0.125, group_size) for group_size in (64, 128, None)),
    ),
    (_group_mixture(group_size, outlier_share) for outlier_share in (0.0, 0.005) for group_size in (32, 64)),
    (
        Format(name="bf16", kind="float", bits=16, element="bfloat16"),
        Format(name="fp16", kind="float", bits=16, element="float16"),
    ),
)
FORMATS: dict[str, Format] = {format_.name: format_ for family in _FAMILIES for format_ in family}

DEFAULT_FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64", "bf16")


def find_format(name: str) -> Format:
    """Returns the format called ``name``.

    Raises:
        ValueError: If there is none; the message names those that are spelled alike.
    """
    if name not in FORMATS:
        alike = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.0)
        msg = (
            f"format must be a known name: got '{name}'. Spelled alike: {', '.join(alike)}. "
            f"'bitplan formats' lists all {len(FORMATS)}."
        )
        raise ValueError(msg)
    return FORMATS[name]


def find_formats(names: Iterable[str]) -> tuple[Format, ...]:
    """Returns the formats of ``names``, in order.

    Raises:
        ValueError: If a name is unknown or named twice, or there is no name at all.
    """
    formats = tuple(find_format(name) for name in names)
    if not formats or len({f.name for f in formats}) != len(formats):
        msg = f"formats must name at least one format, each once: got {[f.name for f in formats]}. Remove the repeats."
        raise ValueError(msg)
    return formats
