"""Bytes of rows of codes, and of tensors as torch counts them."""

import pytest
import torch

from runtime.stored_tensor import ITEM_BYTES, StoredTensor, packed_row_bytes, trit_row_bytes


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_bytes_are_those_of_torch(dtype: str) -> None:
    for shape in ((7,), (3, 5), (2, 3, 5), (0, 4)):
        assert StoredTensor("scale", shape, dtype).nbytes == torch.empty(shape, dtype=getattr(torch, dtype)).nbytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_row_bytes_round_up(bits: int) -> None:
    assert [packed_row_bytes(count, bits) for count in (0, 1, 8)] == [0, 1, bits]
    assert packed_row_bytes(9, bits) == bits + 1 if bits < 8 else 9


def test_five_digits_of_three_values_share_a_byte() -> None:
    assert [trit_row_bytes(count) for count in (0, 1, 5, 6, 97)] == [0, 1, 1, 2, 20]
