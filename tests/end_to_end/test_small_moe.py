"""The trained mixture of experts of the repository: it predicts text, and its experts divide the work among domains."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from runtime.loading import ReferenceModel, load_reference
from runtime.units import find_units
from tests.data.byte_model import measure_entropy_bits
from tests.data.expert_usage import (
    measure_loss,
    measure_usage,
    mutual_information_bits,
    random_routers,
    shuffled_routing,
)
from tests.data.extracts import count_bytes, cut_sequences, encode, read_extracts

DIRECTORY = Path(__file__).parents[1] / "data" / "small_moe"
DOMAINS = ("jargon", "english", "french", "german", "python", "c")
LAYERS, EXPERTS = 4, 16
SEQUENCE_TOKENS = 256
ROUTED_SEQUENCES = 8  # of each domain: 4,096 choices of an expert by each layer


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The extracts of one domain."""

    text: str
    sequences: Tensor


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return load_reference(str(DIRECTORY))


@pytest.fixture(scope="module")
def model(reference: ReferenceModel) -> Any:
    return reference.model


@pytest.fixture(scope="module")
def held_out(reference: ReferenceModel) -> dict[str, HeldOut]:
    extracts = read_extracts(DIRECTORY / "evaluation.jsonl")
    assert tuple(extracts) == DOMAINS
    return {
        domain: HeldOut(
            text="".join(texts), sequences=cut_sequences(encode(reference.tokenizer, texts), SEQUENCE_TOKENS)
        )
        for domain, texts in extracts.items()
    }


@pytest.fixture(scope="module")
def losses(model: Any, held_out: dict[str, HeldOut]) -> dict[str, Tensor]:
    return {domain: measure_loss(model, part.sequences) for domain, part in held_out.items()}


@pytest.fixture(scope="module")
def routed(held_out: dict[str, HeldOut]) -> dict[str, Tensor]:
    return {domain: part.sequences[:ROUTED_SEQUENCES] for domain, part in held_out.items()}


@pytest.fixture(scope="module")
def usage(model: Any, routed: dict[str, Tensor]) -> Tensor:
    return measure_usage(model, routed)


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DIRECTORY / "figures.json").read_text(encoding="utf-8"))
    return found


def test_units_are_the_matrices_of_experts_and_attention(reference: ReferenceModel, figures: dict[str, Any]) -> None:
    units = find_units(reference.model)
    assert sum(unit.kind == "expert" for unit in units) == LAYERS * EXPERTS * 2
    assert sum(unit.kind == "linear" for unit in units) == LAYERS * 4
    assert sum(unit.kind == "embedding" for unit in units) == 1
    assert figures["parameters"] == sum(p.numel() for p in reference.model.parameters())


def test_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert sizes["model.safetensors"] < 9e6
    assert sum(sizes.values()) < 10e6


def test_no_extract_is_in_both_files() -> None:
    calibration, evaluation = (read_extracts(DIRECTORY / f"{part}.jsonl") for part in ("calibration", "evaluation"))
    for domain in DOMAINS:
        assert calibration[domain] and evaluation[domain] and not {*calibration[domain]} & {*evaluation[domain]}


@pytest.mark.parametrize("domain", DOMAINS)
def test_text_is_predicted_better_than_by_any_model_of_byte_pairs(
    reference: ReferenceModel, domain: str, held_out: dict[str, HeldOut], losses: dict[str, Tensor]
) -> None:
    """The bound is the entropy of the extract itself, which no table of 256 x 256 probabilities can beat on it."""
    length_bytes = count_bytes(reference.tokenizer, held_out[domain].sequences[:, 1:])
    bits_per_byte = losses[domain].sum().item() / math.log(2) / length_bytes
    assert bits_per_byte < measure_entropy_bits(held_out[domain].text, history=1)


def test_figures_are_those_of_these_weights(figures: dict[str, Any], losses: dict[str, Tensor]) -> None:
    # 1e-3: the order of summation differs between machines, and a near tie may be routed otherwise.
    found = {domain: loss.mean().item() for domain, loss in losses.items()}
    assert found == pytest.approx(figures["extract_nats_per_token"], rel=1e-3)


def test_no_expert_is_dead(usage: Tensor) -> None:
    assert usage.shape == (len(DOMAINS), LAYERS, EXPERTS)
    # An expert gets 1/16 of the tokens if all get the same; none gets less than a tenth of that.
    assert usage.mean(dim=0).min().item() > 0.1 / EXPERTS


def test_experts_specialise_more_than_under_random_routers(
    model: Any, routed: dict[str, Tensor], usage: Tensor
) -> None:
    by_chance = []
    for seed in range(3):
        with random_routers(model, seed=seed):
            by_chance.append(mutual_information_bits(measure_usage(model, routed)).sum().item())
    trained = mutual_information_bits(usage)
    assert trained.max().item() < math.log2(len(DOMAINS))
    assert trained.sum().item() > max(by_chance)


@pytest.mark.parametrize("domain", DOMAINS)
def test_loss_depends_on_the_choice_of_experts(
    model: Any, domain: str, routed: dict[str, Tensor], losses: dict[str, Tensor]
) -> None:
    with shuffled_routing(model, seed=0):
        shuffled = measure_loss(model, routed[domain])
    # The mean over a sequence is one sample; the gain is many standard errors, far more than chance gives.
    gain = (shuffled - losses[domain][:ROUTED_SEQUENCES]).mean(dim=1)
    assert gain.mean().item() > 5 * gain.std().item() / math.sqrt(len(gain))
