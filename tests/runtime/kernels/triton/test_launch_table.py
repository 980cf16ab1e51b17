"""Launches: the table wins over the prior, and the prior does what its formula says."""

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.launch_table import (
    Launch,
    LaunchKey,
    find_attention_launch,
    find_bucket,
    find_launch,
    load_launches,
    save_launches,
    use_launches,
)

KEY = LaunchKey(architecture=90, bits=4, rows=8, out_features=4096, in_features=4096, group_size=128)
H100 = DEVICES["h100"]


def test_a_row_of_the_table_wins(tmp_path: Path) -> None:
    measured = Launch(block_m=8, warps=1, tiles=1, stages=5, splits=7)
    save_launches({KEY: measured}, tmp_path / "launches.json")
    table = load_launches(tmp_path / "launches.json")
    assert table == {KEY: measured}
    other = replace(KEY, bits=3)
    prior = find_launch(KEY, H100), find_launch(other, H100)
    with use_launches(table):
        assert find_launch(KEY, H100) == measured
        assert find_launch(other, H100) == prior[1]
    assert find_launch(KEY, H100) == prior[0]


def test_a_step_stays_in_one_group_and_ends_with_the_row() -> None:
    for group_size, in_features, tiles in [
        (128, 4096, 2),
        (256, 4096, 2),
        (None, 4096, 2),
        (64, 4096, 1),
        (32, 4096, 1),
        (None, 576, 1),
        (None, 97, 2),
    ]:
        key = replace(KEY, group_size=group_size, in_features=in_features)
        assert find_launch(key, H100).tiles == tiles, key


def test_small_products_are_split_and_large_ones_are_not() -> None:
    assert find_launch(replace(KEY, out_features=1024), H100).splits > 1
    # A program for each 128 rows of a quarter of a million fills every processor by itself.
    assert find_launch(replace(KEY, out_features=262_144), H100).splits == 1
    # Every split has at least four steps, so that loads can be ahead of their use.
    few = find_launch(replace(KEY, out_features=64, in_features=1024), H100)
    assert 1024 // 128 // few.splits >= 4


def test_partial_sums_are_few_bytes_beside_the_weights_of_a_decoded_token() -> None:
    # One row of x: each split writes and reads a float32 for each row of the weight. At one bit that is an eighth.
    for bits, most in [(1, 0.125), *((bits, 0.035) for bits in range(2, 9))]:
        key = replace(KEY, bits=bits)
        splits = find_launch(key, H100).splits
        assert splits > 1
        assert 8 * splits * key.out_features <= most * key.out_features * key.in_features * bits / 8


def test_buckets() -> None:
    assert [find_bucket(rows) for rows in (1, 8, 9, 16, 17, 33, 64)] == [8, 8, 16, 16, 32, 64, 64]
    with pytest.raises(ValueError, match="at most 64 for one launch: got rows=65"):
        find_bucket(65)


def test_attention_is_split_until_every_processor_has_its_programs() -> None:
    for heads, tokens in ((1, 8192), (8, 8192), (8, 131_072), (256, 1024)):
        launch = find_attention_launch(H100, heads, tokens, 256)
        assert launch.split_tokens % launch.block_tokens == 0
        programs = heads * -(-tokens // launch.split_tokens)
        # Four times as many as processors, rounded, where splits do not become too short.
        assert programs <= max(4 * H100.processors, heads) + heads
        assert programs >= 2 * H100.processors or launch.split_tokens == 8 * launch.block_tokens


def test_integer_activations_have_launches_of_their_own() -> None:
    integers = replace(KEY, activation_bits=8)
    table = {KEY: Launch(block_m=8, warps=1, tiles=1, stages=5, splits=7)}
    with use_launches(table):
        assert find_launch(integers, H100) != table[KEY]
    # Their sums take registers: 16 rows at most, where 16 bits allow 32.
    old = replace(KEY, architecture=80, rows=64)
    assert find_launch(old, DEVICES["a100"]).block_m == 32
    assert find_launch(replace(old, activation_bits=8), DEVICES["a100"]).block_m == 16
