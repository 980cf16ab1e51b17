"""The tables behind the charts, against values worked out by hand."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports import tables
from reports.report import Report

MIB = 1024 * 1024


def make_plan(rows: list[tuple[str, str, int | None, int | None, str, float, int]]) -> pd.DataFrame:
    """Rows of (unit, role, layer, expert, format, bits, weights); stored without overhead."""
    columns = ["unit", "role", "layer_index", "expert_index", "format", "bits", "weights"]
    plan = pd.DataFrame(rows, columns=columns).astype({"layer_index": "Int64", "expert_index": "Int64"})
    return plan.assign(
        bits_per_weight=plan["bits"] + 0.25,
        memory_bytes=plan["weights"] * plan["bits"] / 8,
        predicted_loss=0.1 * plan["bits"],
        std_error=0.01,
    )


EXPERTS = make_plan(
    [
        ("embed", "embedding", None, None, "bf16", 16, 1000),
        ("a0", "up", 0, 0, "int4", 4, 100),
        ("a1", "up", 0, 1, "int4", 4, 100),
        ("a2", "up", 0, 2, "int8", 8, 200),
        ("b", "down", 0, None, "int8", 8, 400),
        ("c", "up", 1, 0, "int2", 2, 100),
    ]
)


def test_plan_grid_summarises_the_experts_of_a_cell() -> None:
    grid = tables.plan_grid(EXPERTS)
    assert list(zip(grid["role"], grid["layer_index"], strict=True)) == [("up", 0), ("down", 0), ("up", 1)]
    cell = grid.iloc[0]
    assert cell["units"] == 3
    # (100 x 4 + 100 x 4 + 200 x 8) / 400
    assert cell["bits"] == 6.0
    assert cell["bits_per_weight"] == 6.25
    assert (cell["bits_min"], cell["bits_max"]) == (4.0, 8.0)
    assert cell["formats"] == "int4 × 2, int8 × 1"
    assert cell["memory_bytes"] == 300.0
    assert cell["predicted_loss"] == pytest.approx(1.6)
    assert grid.iloc[1]["formats"] == "int8"


def test_units_without_a_layer_stand_alone() -> None:
    outside = tables.units_without_layer(EXPERTS)
    assert list(outside["unit"]) == ["embed"]
    assert outside.loc[0, "formats"] == "bf16"
    assert outside.loc[0, "memory_bytes"] == 2000.0


def test_cell_without_weights_has_the_plain_mean() -> None:
    caches = make_plan([("k", "kv_cache", 0, None, "int8", 8, 0), ("v", "kv_cache", 0, None, "int4", 4, 0)])
    assert tables.plan_grid(caches).loc[0, "bits"] == 6.0


def test_bytes_by_role_come_largest_role_first_and_fewest_bits_first() -> None:
    table = tables.bytes_by_role(EXPERTS)
    assert list(zip(table["role"], table["format"], table["memory_bytes"], strict=True)) == [
        ("embedding", "bf16", 2000.0),
        ("down", "int8", 400.0),
        ("up", "int2", 25.0),
        ("up", "int4", 100.0),
        ("up", "int8", 200.0),
    ]
    assert table["share"].sum() == pytest.approx(1.0)
    assert table.loc[0, "share"] == pytest.approx(2000 / 2725)
    assert list(table["units"]) == [1, 1, 1, 2, 1]


FRONTIER = pd.DataFrame(
    {
        "memory_bytes": [3 * MIB, 1 * MIB, 2 * MIB],
        "bits_per_weight": [6.0, 2.0, 4.0],
        "predicted_loss": [0.1, 4.0, 1.0],
        "lower_bound": [0.1, 3.9, 0.9],
        "shadow_price_per_mib": [None, 3.0, 0.9],
    }
)


def test_frontier_curve_runs_by_size() -> None:
    curve = tables.frontier_curve(FRONTIER)
    assert list(curve["memory_mib"]) == [1.0, 2.0, 3.0]
    assert list(curve["predicted_loss"]) == [4.0, 1.0, 0.1]


@pytest.mark.parametrize(("memory_mib", "price"), [(0.5, None), (1.0, 3.0), (2.5, 0.9), (9.0, 0.9)])
def test_shadow_price_is_that_of_the_size_below(memory_mib: float, price: float | None) -> None:
    assert tables.shadow_price_at(FRONTIER, memory_mib * MIB) == price


EVALUATIONS = pd.DataFrame(
    {
        "name": ["ref", "big", "small", "even"],
        "kind": ["reference", "plan", "plan", "uniform"],
        "memory_bytes": [8.0 * MIB, 4.0 * MIB, 2.0 * MIB, 3.0 * MIB],
        "bits_per_weight": [16.0, 8.0, 4.0, 6.0],
        "predicted_kl": [None, 0.1, 0.0, None],
        "measured_kl": [0.0, 0.2, 0.3, 0.4],
        "kl_low": [0.0, 0.19, 0.29, 0.39],
        "kl_high": [0.0, 0.21, 0.31, 0.41],
        "perplexity": [10.0, 11.0, 12.0, 13.0],
        "perplexity_low": [9.0, 10.0, 11.0, 12.0],
        "perplexity_high": [11.0, 12.0, 13.0, 14.0],
        "shipped": [False, True, False, False],
    }
)


def test_measured_points_leave_the_reference_out_and_set_the_shipped_plan_apart() -> None:
    points = tables.measured_points(EVALUATIONS)
    assert list(points["name"]) == ["small", "even", "big"]
    assert list(points["group"]) == ["plan", "uniform", "shipped"]
    assert list(points["memory_mib"]) == [2.0, 3.0, 4.0]


def test_prediction_check_divides_measured_by_predicted() -> None:
    check = tables.prediction_check(EVALUATIONS)
    assert list(check["name"]) == ["small", "big"]
    assert pd.isna(check.loc[0, "ratio"])
    assert check.loc[1, "ratio"] == pytest.approx(2.0)


def make_sensitivities(rows: list[tuple[str, int | None, int | None, str, float, float]]) -> pd.DataFrame:
    """Rows of (unit, layer, expert, format, loss, std_error)."""
    columns = ["unit", "layer_index", "expert_index", "format", "loss", "std_error"]
    table = pd.DataFrame(rows, columns=columns).astype({"layer_index": "Int64", "expert_index": "Int64"})
    bits = table["format"].map({"int4": 4, "int8": 8, "bf16": 16})
    return table.assign(role="up", bits=bits, metric="fisher")


SENSITIVITIES = make_sensitivities(
    [
        ("embed", None, None, "int8", 0.5, 0.1),
        ("embed", None, None, "int4", 5.0, 1.0),
        ("u0", 0, None, "int8", 0.2, 0.05),
        ("u0", 0, None, "int4", 2.0, 0.5),
        ("u1.0", 1, 0, "int8", 0.1, 0.05),
        ("u1.0", 1, 0, "int4", 1.0, 0.5),
        ("u1.1", 1, 1, "int8", 0.3, 0.05),
        ("u1.1", 1, 1, "int4", -0.2, 0.5),
        ("u0", 0, None, "bf16", 0.0, 0.0),
    ]
)


def test_loss_by_layer_has_standard_errors_for_one_unit_and_the_range_for_several() -> None:
    table = tables.loss_by_layer(SENSITIVITIES).set_index(["series", "layer_index"])
    alone, several = table.loc[("int4", 0)], table.loc[("int4", 1)]
    assert (alone["loss"], alone["low"], alone["high"]) == (2.0, 1.0, 3.0)
    assert (several["units"], several["loss"]) == (2, pytest.approx(0.4))
    assert (several["low"], several["high"]) == (-0.2, 1.0)


def test_most_sensitive_units_come_worst_first_in_each_series() -> None:
    worst = tables.most_sensitive_units(SENSITIVITIES, 2)
    int8 = worst[worst["series"] == "int8"]
    assert list(int8["unit"]) == ["embed", "u1.1"]
    assert list(int8["label"]) == ["embed", "layer 1 up e1"]
    assert list(int8["low"]) == pytest.approx([0.3, 0.2])


def test_loss_table_has_units_down_and_formats_across() -> None:
    table = tables.loss_table(SENSITIVITIES)
    assert list(table.columns) == ["unit", "int4", "int8", "bf16"]
    assert list(table["unit"]) == ["embed", "u0", "u1.0", "u1.1"]
    assert table.loc[1, "int4"] == 2.0
    assert pd.isna(table.loc[0, "bf16"])


def test_series_without_any_loss_above_zero_are_not_offered() -> None:
    assert tables.series_names(SENSITIVITIES) == ["int4", "int8"]


def test_usual_series_is_the_format_of_most_weights_that_was_measured() -> None:
    assert tables.usual_series(EXPERTS, SENSITIVITIES) == "int8"
    assert tables.usual_series(EXPERTS.assign(format="int3"), SENSITIVITIES) == "int4"
    assert tables.usual_series(EXPERTS, SENSITIVITIES.assign(loss=0.0)) is None


def test_series_name_the_metric_where_there_are_several() -> None:
    both = pd.concat([SENSITIVITIES, SENSITIVITIES.assign(metric="logit")], ignore_index=True)
    assert tables.series_names(both) == ["int4 · fisher", "int4 · logit", "int8 · fisher", "int8 · logit"]
    assert tables.usual_series(EXPERTS, both) == "int8 · fisher"


@settings(max_examples=30, deadline=None)
@given(
    bits=st.lists(st.sampled_from([2, 3, 4, 5, 6, 8, 16]), min_size=1, max_size=40),
    layers=st.integers(min_value=1, max_value=5),
)
def test_grid_keeps_every_unit_byte_and_bit_of_a_mixture_of_experts(bits: list[int], layers: int) -> None:
    plan = make_plan([(f"u{i}", "up", i % layers, i, f"int{b}", b, 64) for i, b in enumerate(bits)])
    grid = tables.plan_grid(plan)
    assert grid["units"].sum() == len(bits)
    assert grid["memory_bytes"].sum() == sum(bits) * 8
    assert (grid["bits"] * grid["units"]).sum() == pytest.approx(sum(bits))
    assert ((grid["bits_min"] <= grid["bits"]) & (grid["bits"] <= grid["bits_max"])).all()


def test_real_sized_plan_fills_the_whole_grid(dense_report: Report) -> None:
    grid = tables.plan_grid(dense_report.plan)
    assert len(grid) == 210
    outside = tables.units_without_layer(dense_report.plan)
    total = grid["memory_bytes"].sum() + outside["memory_bytes"].sum()
    assert total == pytest.approx(dense_report.headline.memory_bytes)
