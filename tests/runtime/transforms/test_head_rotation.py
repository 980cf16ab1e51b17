"""Values in another basis, head by head."""

import pytest
import torch
from torch import Tensor

from runtime.transforms.head_rotation import find_head_rotations, rotate_heads_
from tests.runtime.transforms.decoders import FLOAT64_TOLERANCE, build_float64, compute_logits


def record_values(model: torch.nn.Module, layer: int) -> tuple[Tensor, Tensor]:
    """Returns what v_proj writes and what o_proj reads, [S, T, channels]."""
    seen: dict[str, Tensor] = {}
    attention = model.model.layers[layer].self_attn  # type: ignore[union-attr,index]
    hooks = [
        attention.v_proj.register_forward_hook(lambda _, args, output: seen.update(written=output)),
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(read=args[0])),
    ]
    compute_logits(model)
    for hook in hooks:
        hook.remove()
    return seen["written"], seen["read"]


@pytest.mark.parametrize("name", ["llama", "llama, biases and one value head", "qwen2, odd widths"])
def test_values_are_rotated_in_each_head(name: str) -> None:
    model = build_float64(name)
    written, read = record_values(model, 1)
    bases = find_head_rotations(model, None, seed=2)
    rotate_heads_(model, bases)
    rotated_written, rotated_read = record_values(model, 1)
    R = bases["model.layers.1"]
    heads, width = R.shape[:2]
    repeats = read.shape[-1] // written.shape[-1]
    for h in range(heads):
        columns = slice(h * width, (h + 1) * width)
        assert (written[..., columns] @ R[h] - rotated_written[..., columns]).abs().max() <= FLOAT64_TOLERANCE
        for q in range(h * repeats, (h + 1) * repeats):
            columns = slice(q * width, (q + 1) * width)
            assert (read[..., columns] @ R[h] - rotated_read[..., columns]).abs().max() <= FLOAT64_TOLERANCE


def test_heads_and_blocks_have_bases_of_their_own() -> None:
    bases = find_head_rotations(build_float64("llama"), None)
    assert {tuple(R.shape) for R in bases.values()} == {(2, 16, 16)}
    assert not torch.equal(bases["model.layers.0"][0], bases["model.layers.0"][1])
    assert not torch.equal(bases["model.layers.0"], bases["model.layers.1"])
    # A Hadamard basis: one channel spreads evenly over the head.
    assert torch.allclose(bases["model.layers.0"].abs(), torch.full((), 0.25, dtype=torch.float64))


def test_only_values_and_what_reads_them_change() -> None:
    model = build_float64("mixtral")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rotate_heads_(model, find_head_rotations(model, None))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "vo"}
