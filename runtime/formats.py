"""The menu of storage formats, by name. What a format is, and the bytes it takes, are in ``runtime/storage.py``.

Four different numbers are called "bits": ``Format.bits`` is the nominal code width; entropy plays no
part here; packed bits are the codes alone; budgets use ``storage_bytes``, which counts codes, scales,
zero points and the padding of every row.
"""

from collections.abc import Iterable

from runtime.storage import Format, packed_row_bytes

__all__ = ["DEFAULT_FORMATS", "FORMATS", "Format", "find_format", "find_formats", "packed_row_bytes"]

INTEGER_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128, None)


def _integer_format(bits: int, group_size: int | None, symmetric: bool) -> Format:
    name = f"int{bits}_{_group_name(group_size)}" + ("_sym" if symmetric else "")
    return Format(name=name, kind="int", bits=bits, group_size=group_size, symmetric=symmetric)


def _group_name(group_size: int | None) -> str:
    return "channel" if group_size is None else f"g{group_size}"


_FAMILIES: tuple[Iterable[Format], ...] = (
    (
        _integer_format(bits, group_size, symmetric)
        for bits in INTEGER_BITS
        for group_size in GROUP_SIZES
        for symmetric in (False, True)
    ),
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
        ValueError: If there is none; the message lists the known names.
    """
    if name not in FORMATS:
        msg = f"format must be a known name: got '{name}'. Known formats: {', '.join(sorted(FORMATS))}."
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
