"""The tables behind the charts of a mixture of experts and of the rules that join units. Pure."""

from __future__ import annotations

import pandas as pd

from reports.report import Report

# An affinity of more cells than this is drawn of the first layers alone.
MOST_CELLS = 60_000


def list_communities(experts: pd.DataFrame) -> pd.DataFrame:
    """One row per community of experts: layer_index, community, experts (text), share of its layer's choices, bits.

    `bits_per_weight` is the mean over the community's weights.
    """
    rows = []
    for (layer, community), group in experts.groupby(["layer_index", "community"], sort=True):
        choices = experts.loc[experts["layer_index"] == layer, "tokens"].sum()
        weights = group["weights"].sum()
        rows.append(
            {
                "layer_index": layer,
                "community": community,
                "experts": ", ".join(str(index) for index in sorted(group["expert_index"])),
                "percent": 100 * float(group["tokens"].sum()) / float(choices) if choices else float("nan"),
                "bits_per_weight": 8 * float(group["memory_bytes"].sum()) / float(weights) if weights else float("nan"),
            }
        )
    return pd.DataFrame(rows, columns=["layer_index", "community", "experts", "percent", "bits_per_weight"])


def overlap_matrix(report: Report, layer_index: int) -> pd.DataFrame:
    """[E, E] share of the tokens of the rarer of two experts that take the other too, ordered by community.

    The diagonal is missing, for it would outshine the rest.
    """
    experts = report.experts[report.experts["layer_index"] == layer_index].sort_values(["community", "expert_index"])
    order = [int(index) for index in experts["expert_index"]]
    tokens = dict(zip(order, experts["tokens"], strict=True))
    matrix = pd.DataFrame(0.0, index=order, columns=order)
    for index in order:
        matrix.loc[index, index] = float("nan")
    pairs = report.affinity[report.affinity["layer_index"] == layer_index]
    for a, b, both in zip(pairs["expert_index"], pairs["other_index"], pairs["tokens"], strict=True):
        fewer = min(tokens[a], tokens[b])
        matrix.loc[a, b] = matrix.loc[b, a] = float(both) / fewer if fewer else 0.0
    return matrix


def layers_to_draw(experts: pd.DataFrame) -> list[int]:
    """The layers whose affinity is drawn: the first ones, as many as `MOST_CELLS` allow, but one at least."""
    layers = sorted({int(layer) for layer in experts["layer_index"]})
    widest = int(experts.groupby("layer_index").size().max()) if layers else 1
    return layers[: max(1, MOST_CELLS // widest**2)]


def price_rules(rule_prices: pd.DataFrame) -> pd.DataFrame:
    """The rules with what each adds to the loss of the first row: `added_loss`, and `percent` of that loss."""
    free = float(rule_prices["predicted_loss"].iloc[0])
    added = rule_prices["predicted_loss"].astype("float64") - free
    percent = 100 * added / free if free > 0 else added * float("nan")
    return rule_prices.assign(added_loss=added, percent=percent)
