"""The sections about mixtures of experts, and about what rules that join units cost."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from reports import expert_charts, expert_tables, wording
from reports.page_parts import Menu, Section, make_chart, make_download, make_listing
from reports.palettes import NAMED
from reports.report import Report
from reports.wording import number, percent


def rule_section(report: Report) -> Section:
    """What it costs that parts must share a format."""
    prices = expert_tables.price_rules(report.rule_prices)
    headers = {
        "rule": "Rule",
        "units": "Units",
        "predicted_loss": "Least predicted loss",
        "added_loss": "Added by the rule",
        "percent": "Added (%)",
        "memory_mib": "Size (MiB)",
    }
    shown = prices.assign(memory_mib=prices["memory_bytes"].astype("float64") / 2**20)
    return Section(
        key="rules",
        title="What it costs to share formats",
        paragraphs=(
            "Every bar is the least predicted loss at this plan's bytes when parts must agree on a format; the first "
            "is without any rule. All come from the same measurement. Coarser rules can only lose more: the difference "
            "is what an engine that demands them, or a simpler file, costs.",
            *_rule_sentences(prices.to_dict("records")),
        ),
        charts=(
            make_chart(
                "rules",
                f"Least predicted loss under {wording.count(len(prices), 'rule')}; the table below has the numbers.",
                lambda narrow: expert_charts.rule_price_figure(prices, NAMED, narrow=narrow),
            ),
        ),
        listing=make_listing("The price of each rule", shown, headers),
        open_listing=True,
        download=make_download("rule_prices.csv", report.rule_prices),
    )


def _rule_sentences(prices: list[dict[Hashable, Any]]) -> tuple[str, ...]:
    """The price of the strictest rule, beside what it adds one demand to and beside no rule at all."""
    losses = {row["rule"]: row["predicted_loss"] for row in prices}
    strictest = prices[-1]
    sentences = []
    for other in dict.fromkeys([strictest["against"], prices[0]["rule"]]):
        if pd.isna(losses[other]) or pd.isna(losses[strictest["rule"]]):
            continue
        added = losses[strictest["rule"]] - losses[other]
        share = f" ({percent(added / losses[other])})" if losses[other] > 0 else ""
        sentences.append(
            f"“{strictest['rule']}” is predicted to lose {number(added)} nats per token{share} more than “{other}”."
        )
    return tuple(sentences)


def expert_section(report: Report) -> Section:
    """How often each expert is taken, and what it is stored in."""
    experts = report.experts
    layers = experts["layer_index"].nunique()
    headers = {
        "layer_index": "Layer",
        "expert_index": "Expert",
        "tokens": "Tokens",
        "frequency": "Frequency",
        "community": "Group",
        "formats": "Formats",
        "bits_per_weight": "Bits per weight",
    }
    sentence = f"{wording.count(len(experts), 'expert')} in {wording.count(layers, 'layer')}"
    return Section(
        key="experts",
        title="What each expert gets",
        paragraphs=(
            "A mixture of experts sends each token through a few of its experts. The first chart shows how large a "
            "share of the calibration tokens takes each expert, the second what it is stored in. Experts that are "
            "rarely taken can be stored in fewer bits, unless the few tokens that need them suffer.",
        ),
        charts=(
            make_chart(
                "expert-frequency",
                f"Share of tokens that take each of {sentence}; the table below has all.",
                lambda narrow: expert_charts.experts_figure(experts, "frequency", NAMED, narrow=narrow),
            ),
            make_chart(
                "expert-bits",
                f"Bits per weight of {sentence}; the table below has all.",
                lambda narrow: expert_charts.experts_figure(experts, "bits_per_weight", NAMED, narrow=narrow),
            ),
        ),
        listing=make_listing("Every expert", experts, headers),
        download=make_download("experts.csv", experts),
    )


def affinity_section(report: Report) -> Section:
    """Which experts work together."""
    layers = expert_tables.layers_to_draw(report.experts)
    matrices = {layer: expert_tables.overlap_matrix(report, layer) for layer in layers}
    communities = expert_tables.list_communities(report.experts)
    left_out = report.experts["layer_index"].nunique() - len(layers)
    headers = {
        "layer_index": "Layer",
        "community": "Group",
        "experts": "Experts",
        "percent": "Share of the layer's choices (%)",
        "bits_per_weight": "Bits per weight",
    }
    paragraphs = [
        "Experts that the same tokens take form groups (communities of greatest modularity in the graph of pairs). "
        "In the chart the experts of a layer stand in the order of their groups, their numbers on the diagonal; the "
        "stronger the colour of a cell, the more of the tokens of the rarer expert take the other one too."
    ]
    if left_out:
        paragraphs.append(f"Drawn are the first {len(layers)} layers; affinity.csv has the other {left_out} too.")
    options = tuple((str(layer), f"layer {layer}") for layer in layers)
    return Section(
        key="affinity",
        title="Which experts work together",
        paragraphs=tuple(paragraphs),
        charts=(
            make_chart(
                "affinity",
                f"Pairs of experts that tokens take together; {wording.count(len(communities), 'group')} in the table.",
                lambda narrow: expert_charts.affinity_figure(matrices, layers[0], NAMED, narrow=narrow),
            ),
        ),
        menus=(Menu(axis="layer", label="Layer", options=options, selected=str(layers[0])),),
        listing=make_listing("Groups of experts that are taken together", communities, headers),
        download=make_download("affinity.csv", report.affinity),
    )
