"""The tables of a mixture: communities, shares of pairs, the price of rules."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from reports import expert_tables
from reports.report import Report


def test_communities_list_each_expert_once(expert_report: Report) -> None:
    table = expert_tables.list_communities(expert_report.experts)
    for layer, groups in table.groupby("layer_index"):
        named = [int(name) for text in groups["experts"] for name in text.split(", ")]
        assert sorted(named) == list(range(16))
        assert groups["percent"].sum() == pytest.approx(100)
        first = expert_report.experts[expert_report.experts["layer_index"] == layer].head(4)
        bits = 8 * first["memory_bytes"].sum() / first["weights"].sum()
        assert groups["bits_per_weight"].iloc[0] == pytest.approx(bits)


def test_overlap_is_the_share_of_the_rarer_expert(expert_report: Report) -> None:
    matrix = expert_tables.overlap_matrix(expert_report, 2)
    assert list(matrix.index) == list(matrix.columns) == list(range(16))
    values = matrix.to_numpy()
    assert np.isnan(np.diagonal(values)).all()
    tokens = expert_report.experts.query("layer_index == 2")["tokens"].to_numpy()
    for a in range(16):
        for b in set(range(16)) - {a}:
            fewer = min(tokens[a], tokens[b])
            expected = (fewer // 2) / fewer if a // 4 == b // 4 and fewer else 0.0
            assert values[a, b] == pytest.approx(expected)


def test_overlap_stands_in_the_order_of_communities(expert_report: Report) -> None:
    reversed_groups = expert_report.experts.assign(community=3 - expert_report.experts["community"])
    matrix = expert_tables.overlap_matrix(replace(expert_report, experts=reversed_groups), 0)
    assert list(matrix.index) == [12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize(("experts", "layers", "drawn"), [(16, 4, 4), (128, 48, 3), (300, 5, 1)])
def test_affinity_is_drawn_of_as_many_layers_as_a_page_can_hold(experts: int, layers: int, drawn: int) -> None:
    table = pd.DataFrame([(layer, e) for layer in range(layers) for e in range(experts)])
    table.columns = pd.Index(["layer_index", "expert_index"])
    assert expert_tables.layers_to_draw(table) == list(range(drawn))


def test_rules_are_priced_against_none(expert_report: Report) -> None:
    prices = expert_tables.price_rules(expert_report.rule_prices)
    assert list(prices["added_loss"]) == pytest.approx([0, 0.02, 0.05, 0.08])
    assert list(prices["percent"]) == pytest.approx([0, 20, 50, 80])


def test_a_rule_that_nothing_keeps_has_no_price(expert_report: Report) -> None:
    table = expert_report.rule_prices.assign(predicted_loss=[0.0, math.nan, 0.1, 0.2])
    prices = expert_tables.price_rules(table)
    assert math.isnan(prices["added_loss"].iloc[1])
    assert prices["percent"].isna().all(), "no percentage of a loss of zero"
