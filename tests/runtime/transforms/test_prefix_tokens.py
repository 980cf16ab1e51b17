"""A prefix from its cache is the prefix itself, and the search takes what helps."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from runtime.transforms.prefix_tokens import (
    compute_prefixed_logits,
    list_prefix_candidates,
    load_prefix,
    make_prefix,
    save_prefix,
    search_prefix,
)
from tests.runtime.transforms.decoders import DECODERS, FLOAT32_TOLERANCE, TOKENS, compute_logits
from tests.tiny_models import build_tiny_llama


@pytest.mark.parametrize("name", ["llama", "llama, tied", "qwen2, odd widths", "mixtral"])
@pytest.mark.parametrize("tokens", [[0], [5, 9, 200]], ids=["one", "three"])
def test_logits_are_those_behind_the_tokens(name: str, tokens: list[int]) -> None:
    model = DECODERS[name]()
    prefix = make_prefix(model, tokens, weights_fingerprint="")
    whole = torch.cat([torch.tensor([tokens] * len(TOKENS)), TOKENS], dim=1)
    expected = compute_logits(model, whole)[:, len(tokens) :]
    for _ in range(2):  # the model writes to the cache, not to the prefix
        found = compute_prefixed_logits(model, TOKENS, prefix)
        assert (found - expected).abs().max() <= FLOAT32_TOLERANCE
    assert torch.equal(compute_prefixed_logits(model, TOKENS, None), compute_logits(model))


def test_bytes_are_those_of_keys_and_values() -> None:
    prefix = make_prefix(build_tiny_llama(), [3, 4, 5], weights_fingerprint="")
    # Two layers, two value heads, three tokens, sixteen channels, keys and values, four bytes.
    assert prefix.stored_bytes == 2 * 2 * 3 * 16 * 2 * 4


def test_a_prefix_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a prefix must have at least one token: got none"):
        make_prefix(build_tiny_llama(), [], weights_fingerprint="")


def test_candidates_are_the_largest_outliers() -> None:
    model, tokens = build_tiny_llama(), TOKENS * 7 % 320
    peaks: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: peaks.append(args[0].abs().amax(dim=-1)))
        for layer in model.model.layers
    ]
    compute_logits(model, tokens)
    for hook in hooks:
        hook.remove()
    ratios = torch.stack([peak / peak.median(dim=1, keepdim=True).values for peak in peaks]).amax(dim=0)  # [S, T]
    ranked = sorted(set(tokens.flatten().tolist()), key=lambda token: -float(ratios[tokens == token].max()))
    assert list_prefix_candidates(model, tokens, first=None, count=4) == ranked[:4]
    first = ranked[2]
    others = [token for token in ranked if token != first]
    assert list_prefix_candidates(model, tokens, first=first, count=4) == [first, *others[:3]]


def test_mixtures_are_searched_by_what_their_router_reads() -> None:
    assert len(list_prefix_candidates(DECODERS["mixtral"](), TOKENS, first=None, count=3)) == 3


def test_search_is_greedy_and_ends_where_nothing_helps() -> None:
    """The distance of the sum to 10: 7 leaves 3, then 2 leaves 1, then nothing leaves less."""

    def measure(prefixes: Sequence[Sequence[int]]) -> list[float]:
        return [abs(10.0 - sum(prefix)) for prefix in prefixes]

    assert search_prefix([7, 2, 20], length=5, measure=measure) == ([7, 2], [10.0, 3.0, 1.0])
    assert search_prefix([7, 2, 20], length=1, measure=measure) == ([7], [10.0, 3.0])
    assert search_prefix([20, 30], length=5, measure=measure) == ([], [10.0])


def test_files_give_the_prefix_back(tmp_path: Path) -> None:
    prefix = make_prefix(build_tiny_llama(), [1, 2], weights_fingerprint="abc")
    save_prefix(prefix, tmp_path / "prefix.safetensors")
    loaded = load_prefix(tmp_path / "prefix.safetensors")
    assert loaded.weights_fingerprint == "abc"
    assert all(torch.equal(getattr(loaded, name), getattr(prefix, name)) for name in ("tokens", "keys", "values"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    for name in ("other", "text", "absent"):
        with pytest.raises(ValueError, match=f"a prefix must be a file that 'bitplan prefix' wrote: got '.*{name}'"):
            load_prefix(tmp_path / name)
