"""Packed models on disk: predicted to the byte, reloaded to the bit, whole or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from runtime.candidates import list_candidates
from runtime.checkpoint import fixed_bytes
from runtime.costs import memory_cost
from runtime.formats import FORMATS
from runtime.loading import ReferenceModel, load_reference
from runtime.packed_model import FORMATS_KEY, load_packed, save_packed_
from runtime.units import find_units
from tests.runtime.format_mixes import MODELS, compute_logits, draw_formats, round_parameters_
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every tiny model."""
    return build_tokenizer()


def make_reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> ReferenceModel:
    return ReferenceModel(model=model, tokenizer=tokenizer, name="tiny", fingerprint="0" * 64)


def predict_bytes(model: PreTrainedModel, formats: dict[str, str]) -> float:
    """Returns what the cost table that a solver sees says about a choice of formats."""
    candidates = list_candidates(find_units(model), list(FORMATS), embedding_formats=list(FORMATS))
    table = memory_cost(candidates, fixed_bytes(model))
    choice = [candidates.format_index(formats[unit.weights[0].name]) for unit in candidates.units]
    return table.fixed + sum(float(table.cost[u, f]) for u, f in enumerate(choice))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_file_is_predicted_to_the_byte_and_reloads_to_the_bit(
    name: str, seed: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = MODELS[name]()
    if seed == 2:
        round_parameters_(model, torch.bfloat16)  # norms and biases are stored in 16 bits then
    formats = draw_formats(model, 10 + seed)
    predicted_bytes = predict_bytes(model, formats)
    directory = tmp_path / "packed"
    file_bytes = save_packed_(make_reference(model, tokenizer), formats, directory, metadata={"plan": "{}"})
    assert file_bytes == (directory / "model.safetensors").stat().st_size == predicted_bytes
    reloaded, reloaded_tokenizer, metadata = load_packed(directory)
    assert torch.equal(compute_logits(reloaded), compute_logits(model))
    assert not any(p.requires_grad for p in reloaded.parameters())
    assert not reloaded.training
    state, packed_state = reloaded.state_dict(), model.state_dict()
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {n: (t.dtype, t.shape) for n, t in packed_state.items()}
    assert all(torch.equal(state[n], packed_state[n]) for n in packed_state)
    text = "A cache keeps what was read last."
    assert reloaded_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert metadata["plan"] == "{}"
    assert json.loads(metadata[FORMATS_KEY]) == formats


def test_directory_from_a_loaded_model(tiny_tied_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_tied_llama_dir))
    save_packed_(reference, draw_formats(reference.model, 0), tmp_path / "packed", metadata={})
    model, tokenizer, _ = load_packed(tmp_path / "packed")
    assert torch.equal(compute_logits(model), compute_logits(reference.model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.name for p in (tmp_path / "packed").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert tokenizer.decode(tokenizer("two programs").input_ids) == "two programs"


def test_same_plan_gives_the_same_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = build_tiny_mixtral()
        save_packed_(make_reference(model, tokenizer), draw_formats(model, 0), tmp_path / name, metadata={})
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_existing_directory_is_replaced_as_a_whole(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = tmp_path / "packed"
    for seed in (0, 1):
        model = build_tiny_llama()
        save_packed_(make_reference(model, tokenizer), draw_formats(model, seed), directory, metadata={"n": str(seed)})
        assert not (directory / "left over.txt").exists()
        (directory / "left over.txt").write_text("from the first time")
    reloaded, _, metadata = load_packed(directory)
    assert metadata["n"] == "1"
    assert torch.equal(compute_logits(reloaded), compute_logits(model))
    assert list(tmp_path.iterdir()) == [directory]


def test_failure_leaves_what_was_there(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory = tmp_path / "packed"
    for before in (False, True):
        if before:
            model = build_tiny_llama()
            save_packed_(make_reference(model, tokenizer), draw_formats(model, 0), directory, metadata={})
        model = build_tiny_llama()
        with pytest.raises(ValueError, match="header must fit its reserve"):
            save_packed_(
                make_reference(model, tokenizer), draw_formats(model, 1), directory, metadata={"x": "x" * 100_000}
            )
        assert list(tmp_path.iterdir()) == [directory] * before
    load_packed(directory)


def test_weight_without_a_format_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build_tiny_llama()
    formats = draw_formats(model, 0)
    del formats["lm_head.weight"]
    logits = compute_logits(model)
    with pytest.raises(ValueError, match="got none for 1 weights, first 'lm_head.weight', in 'tiny'"):
        save_packed_(make_reference(model, tokenizer), formats, tmp_path / "packed", metadata={})
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(compute_logits(model), logits)


@pytest.fixture
def packed_dir(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A packed dense model that a test may damage."""
    model = build_tiny_llama()
    formats = {**draw_formats(model, 0), "lm_head.weight": "int4_g64"}
    save_packed_(make_reference(model, tokenizer), formats, tmp_path / "packed", metadata={})
    return tmp_path / "packed"


def test_missing_file_is_refused(packed_dir: Path) -> None:
    (packed_dir / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"got '.*packed/model.safetensors', which is not there"):
        load_packed(packed_dir)
    shutil.rmtree(packed_dir)
    with pytest.raises(ValueError, match="which is not there"):
        load_packed(packed_dir)


@pytest.mark.parametrize("left", [0, 7, 100, 20_000, -1])
def test_truncated_file_is_refused(left: int, packed_dir: Path) -> None:
    path = packed_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load_packed(packed_dir)


def test_model_that_is_not_packed_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"must name its formats in the header: got none in .*'bitplan apply'"):
        load_packed(tiny_llama_dir)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_directory_that_lacks_a_part_is_refused(name: str, packed_dir: Path) -> None:
    (packed_dir / name).unlink()
    with pytest.raises(ValueError, match=r"must be readable by transformers: got '.*packed'"):
        load_packed(packed_dir)


def rewrite(packed_dir: Path, *, drop: str = "", rename: tuple[str, str] = ("", ""), formats: str = "") -> None:
    """Writes the packed file again with a tensor or its formats changed."""
    path = packed_dir / "model.safetensors"
    tensors = {n.replace(*rename) if rename[0] else n: t for n, t in load_file(path).items() if n != drop}
    _, _, metadata = load_packed(packed_dir)
    save_file(tensors, path, {**metadata, **({FORMATS_KEY: formats} if formats else {})})


def test_file_of_other_tensors_is_refused(packed_dir: Path) -> None:
    rewrite(packed_dir)
    _, _, metadata = load_packed(packed_dir)
    whole = (packed_dir / "model.safetensors").read_bytes()
    other_formats = json.dumps({**json.loads(metadata[FORMATS_KEY]), "lm_head.weight": "int5_g64"})
    damages = [
        ({"drop": "lm_head.weight.scale"}, "1 missing, unknown or of another shape.*first 'lm_head.weight.scale'"),
        ({"drop": "model.norm.weight"}, "1 missing.*first 'model.norm.weight'"),
        ({"rename": ("norm.weight", "norm.weights")}, "10 missing"),
        ({"formats": other_formats}, "1 missing, unknown or of another shape.*first 'lm_head.weight.codes'"),
        (
            {"formats": other_formats.replace('"lm_head.weight": "int5_g64"', '"lm_head.weight": "int9_g64"')},
            "known name: got 'int9_g64'",
        ),
        ({"formats": other_formats.replace("lm_head", "head")}, "first 'head.weight'"),
    ]
    for change, message in damages:
        rewrite(packed_dir, **change)
        with pytest.raises(ValueError, match=message):
            load_packed(packed_dir)
        (packed_dir / "model.safetensors").write_bytes(whole)
