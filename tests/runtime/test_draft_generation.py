"""Drafting at few bits and verifying at all of them gives the tokens of greedy decoding at all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.apply import apply_formats_
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.draft_generation import DraftCount, continue_with_drafts
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path
from runtime.read_widths import list_nested, read_at_width
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

PROMPT = torch.tensor([[7, 90, 31, 200, 5]])
NEW = 24
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}


def make_packed(model: Any = None, *formats: str) -> Any:
    model = (model or build_tiny_llama(tied=True)).requires_grad_(False)
    formats = formats or ("nested4_8_g32",)
    apply_formats_(model, {name: formats[i % len(formats)] for i, name in enumerate(list_weights(model))})
    model.generation_config.eos_token_id = None
    install_compiled_decoder_(model)
    return model


def draft(model: Any, draft_tokens: int, **options: Any) -> tuple[Tensor, DraftCount]:
    settings = {"max_new_tokens": NEW, "width": 4, **options}
    return continue_with_drafts(model, PROMPT, draft_tokens=draft_tokens, **settings)


@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 4, 6, 13, 40])
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_tokens_are_those_of_greedy_decoding_at_full_width(draft_tokens: int, path: str) -> None:
    if path == "auto" and load_kernels() is None:
        pytest.skip("no C++ compiler is here")
    model = make_packed()
    with kernel_path("reference"):
        # In float64 rounding is out of the question: the logits of this text lie further apart than any of it.
        exact = make_packed().double().generate(PROMPT, **SETTINGS)
    with kernel_path(path):
        expected = model.generate(PROMPT, **SETTINGS)
        found, count = draft(model, draft_tokens)
    assert torch.equal(found, expected)
    assert torch.equal(found, exact)
    assert count.accepted <= count.drafted
    # Every pass gives a token besides the accepted ones; the first token is the prompt's.
    assert count.passes + count.accepted == NEW - 1
    assert all(weight.width == 8 for weight in list_nested(model).values())


def test_counts_are_those_of_drafts_made_one_by_one() -> None:
    """Each draft is judged by hand: the low width's choice behind the true text, as long as it has agreed."""
    model = make_packed()
    with kernel_path("reference"):
        truth = model.generate(PROMPT, **SETTINGS)
        found, count = draft(model, 1)
        accepted, position = 0, PROMPT.shape[1] + 1
        while position < truth.shape[1] - 1:
            cache = model(truth[:, : position - 1]).past_key_values
            with read_at_width(model, 4):
                choice = int(model(truth[:, position - 1 : position], past_key_values=cache).logits[0, -1].argmax())
            agreed = choice == int(truth[0, position])
            accepted += agreed
            position += 1 + agreed
    assert torch.equal(found, truth)
    assert count.accepted == accepted
    assert 0 < count.acceptance < 1
    assert f"{accepted} of {count.drafted} tokens kept, in {count.passes} passes" in count.describe()


@pytest.mark.parametrize(
    ("build", "formats"),
    [
        (build_tiny_mixtral, ("nested4_8_g32",)),
        (build_tiny_qwen_moe, ("nested4_6_g32", "int5_g32")),
        (build_tiny_llama, ("nested8_g64",)),
    ],
    ids=["mixtral", "qwen-moe with plain integers", "prefix codes of three widths"],
)
def test_models_that_run_module_by_module(build: Any, formats: tuple[str, ...]) -> None:
    model = make_packed(build(), *formats)
    assert torch.equal(draft(model, 3)[0], model.generate(PROMPT, **SETTINGS))


def test_it_ends_behind_a_token_that_ends_texts() -> None:
    model = make_packed()
    tokens = model.generate(PROMPT, **SETTINGS)
    for end in {int(tokens[0, 8]), int(tokens[0, 15])}:
        model.generation_config.eos_token_id = [end]
        expected = model.generate(PROMPT, **SETTINGS)
        for draft_tokens in (1, 3, 6):
            assert torch.equal(draft(model, draft_tokens)[0], expected)


def test_texts_of_one_new_token() -> None:
    found, count = draft(make_packed(), 3, max_new_tokens=1)
    assert found.shape == (1, 6)
    assert count == DraftCount(passes=0, drafted=0, accepted=0)
    assert count.acceptance == 0.0


def test_what_cannot_be_drafted_is_refused() -> None:
    model = make_packed()
    with pytest.raises(ValueError, match="draft_tokens must be at least 1: got draft_tokens=0"):
        draft(model, 0)
    with pytest.raises(ValueError, match="got width=3, the lowest is 4"):
        draft(model, 2, width=3)
    with kernel_path("reference"), pytest.raises(ValueError, match="got width=2, the lowest is 4"):
        draft(model, 2, width=2)
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="judged by the most likely token alone: got repetition_penalty"):
        draft(model, 2)
    with pytest.raises(ValueError, match="must find nested weights"):
        draft(make_packed(None, "int4_g32"), 2)
