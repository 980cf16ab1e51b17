"""Models in: what is loaded, what is refused and how it is said, and the fingerprint."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from runtime.loading import find_model, fingerprint_model, load_reference
from runtime.packed_model import save_packed_
from tests.runtime.format_mixes import compute_logits, draw_formats
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tokenizer, save_model, save_tiny_llama


@pytest.fixture
def llama_dir(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A dense model that a test may damage."""
    return shutil.copytree(tiny_llama_dir, tmp_path / "llama")


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model as a GGUF file."""
    pytest.importorskip("gguf")
    from tests.runtime.tiny_gguf import write_gguf

    return write_gguf(build_tiny_llama(), build_tokenizer(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def assert_same_weights(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    state, expected_state = model.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    assert all(torch.equal(state[n], tensor) for n, tensor in expected_state.items())


def test_directory(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_reference(str(tiny_llama_dir))
    assert_same_weights(reference.model, build_tiny_llama())
    assert torch.equal(compute_logits(reference.model), compute_logits(build_tiny_llama()))
    assert {p.dtype for p in reference.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert not reference.model.training
    text = "Memory is cheap."
    assert reference.tokenizer(text).input_ids == build_tokenizer()(text).input_ids
    assert (reference.name, reference.fingerprint) == (tiny_llama_dir.name, fingerprint_model(tiny_llama_dir))
    monkeypatch.chdir(tiny_llama_dir)
    assert load_reference(".").name == tiny_llama_dir.name


def test_experts_are_loaded_into_fused_parameters(tiny_mixtral_dir: Path) -> None:
    assert_same_weights(load_reference(str(tiny_mixtral_dir)).model, build_tiny_mixtral())


def test_16_bit_files_are_widened(tmp_path: Path) -> None:
    directory = save_model(build_tiny_llama().to(torch.bfloat16), tmp_path / "half")
    model = load_reference(str(directory)).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, build_tiny_llama().lm_head.weight.to(torch.bfloat16).float())


def test_gguf_file(gguf_path: Path) -> None:
    reference = load_reference(str(gguf_path))
    assert_same_weights(reference.model, build_tiny_llama())
    assert torch.equal(compute_logits(reference.model), compute_logits(build_tiny_llama()))
    text = "Memory is cheap."
    assert reference.tokenizer(text).input_ids == build_tokenizer()(text).input_ids
    assert (reference.name, reference.fingerprint) == ("tiny", fingerprint_model(gguf_path))


def test_gguf_file_without_a_head(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from tests.runtime.tiny_gguf import write_gguf

    tied = build_tiny_llama(tied=True)
    model = load_reference(str(write_gguf(tied, build_tokenizer(), tmp_path / "tied.gguf"))).model
    assert_same_weights(model, tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hub_id_that_was_fetched_before(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    entry = tmp_path / "models--tiny--llama"
    shutil.copytree(tiny_llama_dir, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reference = load_reference("tiny/llama")
    assert (reference.name, reference.fingerprint) == ("tiny/llama", fingerprint_model(tiny_llama_dir))


@pytest.mark.parametrize("source", ["nobody/no-such-model", "/no/such/directory", "not a name!"])
def test_model_that_is_nowhere_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=rf"got '{source}', which is no local path and could not be fetched \(\w+\)"):
        find_model(source)


def test_file_of_another_kind_is_refused(llama_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a GGUF file: got '.*model.safetensors'. Name the directory"):
        find_model(str(llama_dir / "model.safetensors"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_directory_that_lacks_a_part_is_refused(name: str, llama_dir: Path) -> None:
    (llama_dir / name).rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must hold config.json and \*.safetensors: got .*pytorch_model.bin"):
        find_model(str(llama_dir))


@pytest.mark.parametrize("left", [0, 4, 1000, 5000, -1])
def test_truncated_safetensors_is_refused(left: int, llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"must be readable by transformers: got '.*llama', SafetensorError: "):
        load_reference(str(llama_dir))


# Inside the magic number, the header, the metadata, the list of tensors, and the data.
@pytest.mark.parametrize("left", [0, 2, 10, 1000, 7000, 9000, 100_000, -1])
def test_truncated_gguf_is_refused(left: int, gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(gguf_path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"must be readable by transformers: got '.*half.gguf', \w+: .*'gguf' is inst"):
        load_reference(str(path))


def test_gguf_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_text("This is no GGUF file, but it is long enough to be one. " * 20)
    with pytest.raises(ValueError, match=r"got '.*text.gguf', ValueError: .*magic"):
        load_reference(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "OSError: .*config"), ('{"model_type": "no_such_type"}', "ValueError: .*no_such_type")],
    ids=["broken", "unknown"],
)
def test_config_that_cannot_be_read_is_refused(content: str, message: str, llama_dir: Path) -> None:
    (llama_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)must be readable by transformers: got '.*llama', {message}"):
        load_reference(str(llama_dir))


def test_missing_tokenizer_is_refused(llama_dir: Path) -> None:
    for path in llama_dir.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"must be readable by transformers: got '.*llama'"):
        load_reference(str(llama_dir))


def change_tensor(directory: Path, name: str, index: tuple[int, ...], value: float) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name][index] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_weight_is_named(value: float, llama_dir: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensor(llama_dir, name, (3, 4), value)
    change_tensor(llama_dir, name, (0, 0), value)
    with pytest.raises(ValueError, match=f"must be finite: got 2 non-finite values in '{name}' of '.*llama'"):
        load_reference(str(llama_dir))


def test_missing_weight_is_named(llama_dir: Path) -> None:
    path = llama_dir / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"all of its weights: got 1 missing, first 'model.layers.1.mlp.up_proj.weight'"
    ):
        load_reference(str(llama_dir))


def test_packed_model_is_no_reference(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    save_packed_(reference, draw_formats(reference.model, 0), tmp_path / "packed", metadata={})
    with pytest.raises(ValueError, match=r"must not be packed already: got '.*packed'"):
        load_reference(str(tmp_path / "packed"))


def test_fingerprint_is_that_of_the_content(llama_dir: Path, tmp_path: Path) -> None:
    before = fingerprint_model(llama_dir)
    assert len(bytes.fromhex(before)) == 32
    assert fingerprint_model(shutil.copytree(llama_dir, tmp_path / "another name")) == before
    (llama_dir / "README.md").write_text("Words change no weight.")
    assert fingerprint_model(llama_dir) == before
    assert fingerprint_model(save_tiny_llama(tmp_path / "built again")) == before


def test_fingerprint_changes_with_one_weight(llama_dir: Path) -> None:
    before = fingerprint_model(llama_dir)
    change_tensor(llama_dir, "lm_head.weight", (7, 7), 0.125)
    assert fingerprint_model(llama_dir) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_fingerprint_changes_with_configuration_and_tokenizer(name: str, llama_dir: Path) -> None:
    before = fingerprint_model(llama_dir)
    document = json.loads((llama_dir / name).read_text())
    (llama_dir / name).write_text(json.dumps({**document, "added": 1}))
    assert fingerprint_model(llama_dir) != before


def test_fingerprint_of_a_file_is_that_of_its_content(gguf_path: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.gguf"
    shutil.copy(gguf_path, renamed)
    assert fingerprint_model(renamed) == fingerprint_model(gguf_path)
    data = bytearray(renamed.read_bytes())
    data[-1] ^= 1
    renamed.write_bytes(data)
    assert fingerprint_model(renamed) != fingerprint_model(gguf_path)
