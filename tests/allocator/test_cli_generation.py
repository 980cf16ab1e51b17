"""``bitplan generate`` from nested weights: at a lower width, and with drafts."""

from pathlib import Path

import pytest
import torch

import allocator
from allocator.cli import run
from allocator.generation import generate_by_drafts, generate_text
from runtime.loading import load_reference
from runtime.packed_model import save_packed_
from runtime.transforms.prefix_tokens import PREFIX_FILE, make_prefix, save_prefix
from runtime.units import list_weights

PROMPT, NEW = "The compiler reads", 16


@pytest.fixture
def packed(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """Returns a packed model with nested weights in its first layer's places and integers elsewhere."""
    reference = load_reference(str(tiny_llama_dir))
    formats = {
        name: "int6_g32" if "layers.1.mlp" in name else "nested4_8_g32" for name in list_weights(reference.model)
    }
    save_packed_(reference, formats, tmp_path / "packed", metadata={})
    return tmp_path / "packed"


def generate(packed: Path, *options: str) -> int:
    return run(["generate", str(packed), "--prompt", PROMPT, "--max-new-tokens", str(NEW), *options])


def test_drafts_do_not_change_the_text(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(packed) == 0
    expected = capsys.readouterr().out
    for count in ("1", "3", "6"):
        assert generate(packed, "--draft-tokens", count) == 0
        captured = capsys.readouterr()
        assert captured.out == expected
        assert "tokens kept, in" in captured.err


def test_width_is_that_of_the_loaded_model(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(packed, "--width", "4") == 0
    shown = capsys.readouterr().out
    model, tokenizer = allocator.load(packed, width=4)
    assert shown == generate_text(model, tokenizer, PROMPT, max_new_tokens=NEW) + "\n"
    whole, _ = allocator.load(packed)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert not torch.allclose(model(tokens).logits, whole(tokens).logits, atol=1e-2)
    allocator.set_width_(model, None)
    assert torch.equal(model(tokens).logits, whole(tokens).logits)


def test_drafts_behind_a_prefix(packed: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = allocator.load(packed)
    prefix = make_prefix(load_reference(str(tiny_llama_dir)).model, [5, 77], weights_fingerprint="")
    save_prefix(prefix, packed / PREFIX_FILE)
    expected = generate_text(model, tokenizer, PROMPT, max_new_tokens=NEW, prefix=prefix)
    assert expected != generate_text(model, tokenizer, PROMPT, max_new_tokens=NEW)
    assert generate(packed, "--draft-tokens", "3") == 0
    assert capsys.readouterr().out == expected + "\n"


def test_what_cannot_be_drafted(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(packed, "--draft-tokens", "3", "--temperature", "0.7") == 1
    assert "judged by the most likely token: got temperature=0.7" in capsys.readouterr().err
    assert generate(packed, "--width", "3") == 1
    assert "got width=3, the lowest is 4" in capsys.readouterr().err
    assert generate(packed, "--draft-tokens", "0") == 2
    model, tokenizer = allocator.load(packed)
    with pytest.raises(ValueError, match="a prompt must have at least one token: got ''"):
        generate_by_drafts(model, tokenizer, "", max_new_tokens=2, draft_tokens=1)
    model.config.bitplan["cache_formats"] = {
        f"model.layers.{i}.self_attn.{half}_cache": "int8_g16" for i in (0, 1) for half in ("key", "value")
    }
    with pytest.raises(ValueError, match="taken back from a plain cache: got a model with cache formats"):
        generate_by_drafts(model, tokenizer, PROMPT, max_new_tokens=2, draft_tokens=1)
