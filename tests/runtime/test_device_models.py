"""The table of devices: consistent with itself and with what is printed of it."""

import pytest

from runtime.device_models import DEVICE_MODELS, describe_devices, find_device_model
from runtime.precision_laws import LAWS


def test_every_law_has_a_device_and_every_device_a_source() -> None:
    assert {device.law for device in DEVICE_MODELS.values()} == set(LAWS)
    assert all(device.source for device in DEVICE_MODELS.values())
    # Between a product a byte and a thousand: a figure in another unit would be far outside.
    for name, device in DEVICE_MODELS.items():
        assert 0.1 <= device.products_per_s / device.read_bytes_per_s <= 1000, name


def test_rows_that_are_printed() -> None:
    rows = {row["name"]: row for row in describe_devices()}
    assert list(rows) == list(DEVICE_MODELS)
    assert rows["h100-sxm"]["gigabytes_per_s"] == 3350
    assert rows["loom"]["law"] == "bit-serial"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a known name: got 'h100'. Known devices: t4, .*h100-sxm"):
        find_device_model("h100")
