"""Synthetic reports with the shape and the size of real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from reports.report import COLUMNS, Calibration, Headline, Report

MIB = 1024 * 1024
ROLES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
FORMATS = {
    "int2_g64": 2,
    "int3_g64": 3,
    "int4_g64": 4,
    "int5_g64": 5,
    "int6_g64": 6,
    "int8_g64": 8,
    "bf16": 16,
}
# Mean loss of a uniform model at each code width, nats per token.
UNIFORM_KL = {2: 11.3, 3: 1.43, 4: 0.50, 5: 0.103, 6: 0.028, 8: 0.0016, 16: 0.0}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many layers and experts the synthetic model has."""

    layers: int = 30
    experts: int = 0


def list_units(shape: Shape) -> pd.DataFrame:
    rows = [("embed_tokens", "embedding", pd.NA, pd.NA, 49152 * 576)]
    for layer in range(shape.layers):
        for role, (out_features, in_features) in ROLES.items():
            is_expert = shape.experts > 0 and role in ("gate_proj", "up_proj", "down_proj")
            for expert in range(shape.experts) if is_expert else [pd.NA]:
                name = f"layers.{layer}.{role}" + ("" if expert is pd.NA else f".{expert}")
                rows.append((name, role, layer, expert, out_features * in_features))
    units = pd.DataFrame(rows, columns=["unit", "role", "layer_index", "expert_index", "weights"])
    return units.astype({"layer_index": "Int64", "expert_index": "Int64"})


def list_sensitivities(units: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """Losses that add up to UNIFORM_KL, larger in the first and last layers and in v_proj, down_proj."""
    depth = units["layer_index"].fillna(0).to_numpy(dtype=float) / max(1, units["layer_index"].max())
    weight = (1 + 6 * (2 * depth - 1) ** 4) * random.lognormal(0, 0.5, len(units))
    weight *= units["role"].map({"v_proj": 2.0, "down_proj": 3.0, "embedding": 8.0}).fillna(1.0)
    weight /= weight.sum()
    tables = []
    for name, bits in FORMATS.items():
        loss = weight * UNIFORM_KL[bits] * random.lognormal(0, 0.1, len(units))
        table = units[["unit", "role", "layer_index", "expert_index"]]
        tables.append(table.assign(format=name, bits=bits, loss=loss, std_error=0.15 * loss, metric="fisher"))
    return pd.concat(tables, ignore_index=True)


def stored_bits(bits: int) -> float:
    """A 16-bit scale and a zero point of the code's width for each group of 64."""
    return 16.0 if bits == 16 else bits + (16 + bits) / 64


def choose_formats(loss: np.ndarray, memory: np.ndarray, price: float) -> np.ndarray:
    """The format of each unit that minimises loss + price x bytes, both [units, formats]."""
    return np.argmin(loss + price * memory, axis=1)


def sweep_prices(loss: np.ndarray, memory: np.ndarray, weights: float) -> pd.DataFrame:
    """The frontier: one row per price of a byte."""
    rows, every = [], np.arange(len(loss))
    for price in np.geomspace(1e-5, 1e-12, 40):
        choice = choose_formats(loss, memory, price)
        used, lost = memory[every, choice].sum(), loss[every, choice].sum()
        rows.append((used, 8 * used / weights, lost, 0.985 * lost, price * MIB))
    columns = ["memory_bytes", "bits_per_weight", "predicted_loss", "lower_bound", "shadow_price_per_mib"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates("memory_bytes", ignore_index=True)


def build_report(shape: Shape, seed: int = 0) -> Report:
    random = np.random.default_rng(seed)
    units = list_units(shape)
    sensitivities = list_sensitivities(units, random)
    names, widths = list(FORMATS), np.array(list(FORMATS.values()))
    loss = sensitivities.pivot(index="unit", columns="format", values="loss").loc[units["unit"], names].to_numpy()
    bits = np.array([stored_bits(int(width)) for width in widths])
    memory = units["weights"].to_numpy(dtype=float)[:, None] * bits / 8
    frontier = sweep_prices(loss, memory, float(units["weights"].sum()))
    every = np.arange(len(units))
    choice = choose_formats(loss, memory, 1.2e-8 * 30 / shape.layers / max(1, shape.experts))
    plan = units.assign(
        format=[names[i] for i in choice],
        bits=widths[choice],
        bits_per_weight=bits[choice],
        memory_bytes=memory[every, choice],
        predicted_loss=loss[every, choice],
        std_error=0.15 * loss[every, choice],
    )
    evaluations = list_evaluations(plan, memory, loss)
    return Report(
        title="Mixed-precision plan for SmolLM2-135M",
        model_name="SmolLM2-135M-Instruct",
        headline=build_headline(plan, evaluations),
        plan=plan,
        frontier=frontier,
        evaluations=evaluations,
        sensitivities=sensitivities,
        provenance={
            "Model fingerprint": "sha256:4f1c0d8e5b7a92c3d6e1f0a4b8c7d2e9f3a1b5c6d7e8f9a0b1c2d3e4f5a6b7c8",
            "Calibration": "debian-handbook, 96 sequences of 128 tokens",
            "Evaluation": "dict-jargon, 12,288 tokens",
            "Versions": "bitplan 0.1.0, torch 2.13.0",
            "Date": "2026-03-14 15:09 UTC",
        },
        notes=("The measured loss is 1.31 times the sum of the single-unit losses.",),
    )


def list_evaluations(plan: pd.DataFrame, memory: np.ndarray, loss: np.ndarray) -> pd.DataFrame:
    weights = plan["weights"].sum()
    measured = [("reference", "reference", memory[:, -1].sum(), np.nan, 0.0)]
    shipped = plan["predicted_loss"].sum()
    measured += [
        ("fisher_diagonal", "plan", plan["memory_bytes"].sum(), shipped, 1.31 * shipped),
        ("weight_error", "plan", plan["memory_bytes"].sum() * 0.99, 1.4 * shipped, 2.4 * shipped),
    ]
    for i, name in enumerate(list(FORMATS)[:-1]):
        predicted = loss[:, i].sum()
        measured.append((name, "uniform", memory[:, i].sum(), predicted, predicted * (1 + 0.3 * predicted**0.3)))
    table = pd.DataFrame(measured, columns=["name", "kind", "memory_bytes", "predicted_kl", "measured_kl"])
    perplexity = 13.2 * np.exp(0.9 * table["measured_kl"])
    return table.assign(
        bits_per_weight=8 * table["memory_bytes"] / weights,
        kl_low=0.94 * table["measured_kl"],
        kl_high=1.07 * table["measured_kl"],
        perplexity=perplexity,
        perplexity_low=0.97 * perplexity,
        perplexity_high=1.03 * perplexity,
        shipped=table["name"] == "fisher_diagonal",
    )


def build_headline(plan: pd.DataFrame, evaluations: pd.DataFrame) -> Headline:
    row = evaluations[evaluations["shipped"]].iloc[0]
    uniforms = evaluations[evaluations["kind"] == "uniform"]
    uniform = uniforms[uniforms["memory_bytes"] <= row["memory_bytes"]].sort_values("measured_kl").iloc[0]
    objective = float(plan["predicted_loss"].sum())
    return Headline(
        shipped_plan_name=str(row["name"]),
        memory_bytes=float(row["memory_bytes"]),
        reference_memory_bytes=float(evaluations["memory_bytes"].iloc[0]),
        bits_per_weight=float(row["bits_per_weight"]),
        budget_text=f"memory <= {row['memory_bytes'] / MIB + 0.1:.1f} MiB",
        predicted_kl=float(row["predicted_kl"]),
        measured_kl=float(row["measured_kl"]),
        measured_kl_low=float(row["kl_low"]),
        measured_kl_high=float(row["kl_high"]),
        best_uniform_name=str(uniform["name"]),
        best_uniform_kl=float(uniform["measured_kl"]),
        perplexity=float(row["perplexity"]),
        reference_perplexity=13.2,
        objective=objective,
        lower_bound=0.9958 * objective,
        relative_gap=0.0042,
        verdict="Better than every uniform baseline that fits the budget, by more than the measuring error.",
    )


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """Builds a synthetic report: make_report(layers=30, experts=0, seed=0)."""

    def make(*, layers: int = 30, experts: int = 0, seed: int = 0) -> Report:
        return build_report(Shape(layers=layers, experts=experts), seed)

    return make


@pytest.fixture(scope="session")
def dense_report() -> Report:
    """30 layers x 7 roles and an embedding, 7 formats."""
    return build_report(Shape())


@pytest.fixture(scope="session")
def moe_report() -> Report:
    """4 layers of 16 experts."""
    return build_report(Shape(layers=4, experts=16))


def list_experts(plan: pd.DataFrame, random: np.random.Generator) -> pd.DataFrame:
    """A mixture's experts, in communities of four, the last expert of each layer taken by no token."""
    experts = plan[plan["expert_index"].notna()]
    rows = []
    for (layer, expert), group in experts.groupby(["layer_index", "expert_index"]):
        tokens = 0 if expert == experts["expert_index"].max() else int(random.integers(50, 400))
        bits = float((group["bits"] * group["weights"]).sum() / group["weights"].sum())
        memory_bytes = float(group["memory_bytes"].sum())
        weights = int(group["weights"].sum())
        rows.append((layer, expert, tokens, tokens / 2000, expert // 4, bits, 8 * memory_bytes / weights, weights))
        rows[-1] += (memory_bytes, ", ".join(group["format"]))
    table = pd.DataFrame(rows, columns=list(COLUMNS["experts"]))
    return table.astype({"layer_index": "int64", "expert_index": "int64", "community": "int64"})


def list_affinity(experts: pd.DataFrame) -> pd.DataFrame:
    """Half of the rarer expert's tokens inside a community, none outside."""
    pairs = experts.merge(experts, on=["layer_index", "community"], suffixes=("", "_other"))
    pairs = pairs[(pairs["expert_index"] < pairs["expert_index_other"]) & (pairs["tokens"] * pairs["tokens_other"] > 0)]
    both = pairs[["tokens", "tokens_other"]].min(axis=1) // 2
    return pd.DataFrame(
        {
            "layer_index": pairs["layer_index"],
            "expert_index": pairs["expert_index"],
            "other_index": pairs["expert_index_other"],
            "tokens": both,
        }
    ).reset_index(drop=True)


RULE_PRICES = pd.DataFrame(
    [
        ("Every unit by itself", None, 209, 0.10, 50.0 * MIB),
        ("One format for each expert", "Every unit by itself", 81, 0.12, 49.9 * MIB),
        ("Formats of an engine, every expert free", "Every unit by itself", 209, 0.15, 50.0 * MIB),
        ("All rules of an engine", "Formats of an engine, every expert free", 17, 0.18, 50.0 * MIB),
    ],
    columns=list(COLUMNS["rule_prices"]),
)


@pytest.fixture(scope="session")
def expert_report(moe_report: Report) -> Report:
    """`moe_report` with its routing, the prices of rules, and predictions that measured plans corrected."""
    experts = list_experts(moe_report.plan, np.random.default_rng(1))
    return replace(
        moe_report,
        experts=experts,
        affinity=list_affinity(experts),
        rule_prices=RULE_PRICES,
        calibration=Calibration(factor=1.3, exponent=1.05, error_factor=1.2, plans=12),
    )
