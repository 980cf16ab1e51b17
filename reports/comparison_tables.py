"""The tables behind the comparison of two plans. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

SAME, FIRST, SECOND, EITHER = "same", "first", "second", "either"
_AMOUNTS = ("first_bytes", "second_bytes", "first_loss", "second_loss")


def differing_parts(parts: pd.DataFrame) -> pd.DataFrame:
    """The units whose formats differ, those whose losses differ most first.

    Returns:
        The columns of the parts, bytes_change and loss_change (second minus first).
    """
    table = parts[parts["first_format"] != parts["second_format"]]
    changes = {what: table[f"second_{what}"] - table[f"first_{what}"] for what in ("bytes", "loss")}
    table = table.assign(bytes_change=changes["bytes"], loss_change=changes["loss"])
    order = table["loss_change"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def role_comparison(parts: pd.DataFrame) -> pd.DataFrame:
    """One row per role: bytes and losses of both plans, units that differ, and which plan is better there.

    Returns:
        Columns role, units, differing, first_bytes, second_bytes, first_loss, second_loss, better: 'first' or 'second'
        where one plan is no larger and loses no more, 'same' where nothing differs, 'either' where one is smaller and
        the other loses less.
    """
    table = parts.assign(differing=parts["first_format"] != parts["second_format"])
    grouped = table.groupby("role", sort=False, as_index=False)
    by_role = grouped[["differing", *_AMOUNTS]].sum()
    by_role.insert(1, "units", grouped.size()["size"])
    better = [_better(row) for row in by_role.to_dict("records")]
    return by_role.assign(better=better)


def _better(row: Mapping[Any, Any]) -> str:
    if not row["differing"]:
        return SAME
    bytes_change = row["second_bytes"] - row["first_bytes"]
    loss_change = row["second_loss"] - row["first_loss"]
    if bytes_change <= 0 and loss_change <= 0:
        return SECOND
    return FIRST if bytes_change >= 0 and loss_change >= 0 else EITHER


def change_grid(parts: pd.DataFrame) -> pd.DataFrame:
    """One row per (role, layer): change of the mean bits per weight, second minus first, and the formats of both."""
    layered = parts[parts["layer_index"].notna()]
    rows = []
    for key, cell in layered.groupby(["role", "layer_index"], sort=False):
        changed = cell[cell["first_format"] != cell["second_format"]]
        rows.append(
            {
                "role": key[0],
                "layer_index": key[1],
                "bits_change": float((cell["second_bits"] - cell["first_bits"]).mean()),
                "units": len(cell),
                "differing": len(changed),
                "first_formats": ", ".join(dict.fromkeys(cell["first_format"])),
                "second_formats": ", ".join(dict.fromkeys(cell["second_format"])),
            }
        )
    columns = ["role", "layer_index", "bits_change", "units", "differing", "first_formats", "second_formats"]
    return pd.DataFrame(rows, columns=columns)
