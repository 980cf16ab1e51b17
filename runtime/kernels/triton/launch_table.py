"""Which blocks a product is cut into: a table of launches, and a prior where the table has no row.

The prior is a roofline with two terms, bytes and programs. A product reads B bytes of weights, and S splits of k write
and read 8 S M N more. Bytes arrive at the bandwidth only if enough of them are on their way, which takes programs on
every processor; so

    time(S) = (B + 8 S M N [S > 1]) / bandwidth / min(1, bytes on their way / bytes needed) + [S > 1] launch

and S is the least of it. Splitting over k is what fills a GPU when few rows of a small matrix would not.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.kernels.triton.devices import LATENCY_S, Device
from runtime.kernels.triton.fragment_layout import TILE_CODES

# Most registers of a thread: without this the compiler aims at more programs a processor, and spills.
_MOST_REGISTERS = 255
_PROGRAMS_PER_PROCESSOR = 8
# What a program should have on its way: with a few programs a processor this covers latency times bandwidth.
_BYTES_AHEAD = 16384
_MOST_STAGES = 6
_LAUNCH_S = 2e-6
_M_BUCKETS = (8, 16, 32, 64)
_ATTENTION_PROGRAMS = 4
_ATTENTION_TOKENS = 32
_LEAST_ATTENTION_BLOCKS = 8
_TWO_WARPS_HEAD_BYTES = 256
MOST_ROWS = _M_BUCKETS[-1]


@dataclass(frozen=True, kw_only=True)
class LaunchKey:
    """What a launch depends on.

    Args:
        architecture: Compute capability times ten.
        bits: Code width.
        rows: Bucket of the rows of x: 8, 16, 32 or 64.
        out_features: Rows of the weight.
        in_features: Length of a row.
        group_size: Codes that share a scale; None for the whole row.
        activation_bits: 16, or 8 for activations that are integers.
    """

    architecture: int
    bits: int
    rows: int
    out_features: int
    in_features: int
    group_size: int | None
    activation_bits: int = 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a product is launched.

    Args:
        block_m: Rows of x in a program.
        warps: Warps of a program, which takes 64 rows of the weight for each.
        tiles: Tiles of 64 codes in a step.
        stages: Steps that are loaded ahead.
        splits: Ranges of k, each of its own programs.
        max_registers: Most registers of a thread.
    """

    block_m: int
    warps: int
    tiles: int
    stages: int
    splits: int
    max_registers: int = _MOST_REGISTERS


_NO_LAUNCHES: Mapping[LaunchKey, Launch] = {}
_launches: ContextVar[Mapping[LaunchKey, Launch]] = ContextVar("launches", default=_NO_LAUNCHES)


@contextmanager
def use_launches(table: Mapping[LaunchKey, Launch]) -> Iterator[None]:
    """Launches products inside the context by a table, where it has their key.

    Args:
        table: Launches that are known to be good, such as those of ``load_launches``.
    """
    token = _launches.set(table)
    try:
        yield
    finally:
        _launches.reset(token)


def find_bucket(rows: int) -> int:
    """Returns the least bucket that holds ``rows`` rows of x.

    Raises:
        ValueError: If no bucket does.
    """
    for bucket in _M_BUCKETS:
        if rows <= bucket:
            return bucket
    msg = (
        f"rows must be at most {MOST_ROWS} for one launch: got rows={rows}. Dequantize the weight for larger products."
    )
    raise ValueError(msg)


def find_launch(key: LaunchKey, device: Device) -> Launch:
    """Returns the launch of the table in use (``use_launches``), or of the prior.

    Args:
        key: The product.
        device: What the prior reckons with.
    """
    known = _launches.get().get(key)
    if known is not None:
        return known
    # Four warps or more would make compute capability 9.0 and 10.0 use instructions that take no operand from registers
    # without copies.
    # 32 rows of x take all registers: enough below compute capability 9.0, where codes fill their words evenly and
    # nothing but one sum is kept. It is not where a tile has several groups and hence scales, nor where a row is one
    # group, whose scales are kept all the way.
    one_sum = key.group_size is not None and key.group_size >= TILE_CODES and key.activation_bits == 16
    even = key.bits in (1, 2, 4) and one_sum
    most_rows = 32 if device.architecture < 90 and even else 16
    block_m = min(key.rows, most_rows)
    warps = 2 if key.out_features > TILE_CODES else 1
    tiles = _count_step_tiles(key)
    steps = -(-key.in_features // (TILE_CODES * tiles))
    candidates = [splits for splits in range(1, steps + 1) if splits == 1 or steps // splits >= 4]
    step_bytes = 64 * warps * TILE_CODES * tiles * key.bits // 8
    stages = min(_MOST_STAGES, max(3, 2 + _BYTES_AHEAD // step_bytes))
    splits = min(candidates, key=lambda s: _predict_s(key, device, block_m, warps, tiles, stages, s))
    return Launch(block_m=block_m, warps=warps, tiles=tiles, stages=stages, splits=splits)


@dataclass(frozen=True, kw_only=True)
class AttentionLaunch:
    """How the attention of one token is launched.

    Args:
        block_tokens: Past tokens that a program takes at once.
        split_tokens: Past tokens of a program.
        warps: Warps of a program.
        stages: Steps that are loaded ahead.
        max_registers: Most registers of a thread.
    """

    block_tokens: int
    split_tokens: int
    warps: int
    stages: int
    max_registers: int = _MOST_REGISTERS


def find_attention_launch(device: Device, heads: int, tokens: int, head_bytes: int) -> AttentionLaunch:
    """Returns the launch of attention over a packed cache: splits so many that every processor has its programs.

    Args:
        device: What the prior reckons with.
        heads: Heads of keys, of all sequences.
        tokens: Past tokens that are packed.
        head_bytes: Of a head's numbers in the type of the query: what a token takes in shared memory.
    """
    # Four warps with 64 tokens would make compute capability 9.0 keep keys and values twice in shared memory.
    warps = 2 if head_bytes <= _TWO_WARPS_HEAD_BYTES else 4
    wanted = -(-_ATTENTION_PROGRAMS * device.processors // heads)
    # A split of fewer blocks would be mostly its beginning and its end.
    blocks = max(_LEAST_ATTENTION_BLOCKS, -(-tokens // (_ATTENTION_TOKENS * wanted)))
    return AttentionLaunch(
        block_tokens=_ATTENTION_TOKENS, split_tokens=blocks * _ATTENTION_TOKENS, warps=warps, stages=2
    )


def load_launches(path: Path) -> dict[LaunchKey, Launch]:
    """Returns the launches of a JSON file that ``save_launches`` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {LaunchKey(**row["key"]): Launch(**row["launch"]) for row in rows}


def save_launches(table: Mapping[LaunchKey, Launch], path: Path) -> None:
    """Writes launches to a JSON file."""
    rows = [{"key": asdict(key), "launch": asdict(launch)} for key, launch in table.items()]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _count_step_tiles(key: LaunchKey) -> int:
    """Returns 2 where two tiles lie in one group and the row has an even number of them."""
    tiles = -(-key.in_features // TILE_CODES)
    in_one_group = key.group_size is None or key.group_size % (2 * TILE_CODES) == 0
    return 2 if in_one_group and tiles % 2 == 0 else 1


def _predict_s(key: LaunchKey, device: Device, block_m: int, warps: int, tiles: int, stages: int, splits: int) -> float:
    code_bytes = key.bits / 8
    weight_bytes = key.out_features * key.in_features * code_bytes
    partial_bytes = 8 * splits * key.rows * key.out_features if splits > 1 else 0
    blocks = -(-key.out_features // (64 * warps)) * -(-key.rows // block_m)
    resident = min(blocks * splits, _PROGRAMS_PER_PROCESSOR * device.processors)
    on_their_way = resident * (stages - 1) * 64 * warps * TILE_CODES * tiles * code_bytes
    needed = device.read_bytes_per_s * LATENCY_S
    seconds = (weight_bytes + partial_bytes) / device.read_bytes_per_s / min(1.0, on_their_way / needed)
    return seconds + (_LAUNCH_S if splits > 1 else 0.0)
