"""Which decoders are known, and that the others are refused with the part that is not known."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from runtime.transforms.decoder_blocks import check_root_mean_square_norm, find_blocks, find_decoder
from tests.mixtures import build_tiny_olmoe
from tests.runtime.transforms.decoders import DECODERS
from tests.tiny_models import build_tiny_llama, build_tiny_qwen_moe


@pytest.mark.parametrize("name", DECODERS)
def test_every_weight_is_a_part(name: str) -> None:
    """Matrices that read or write the residual stream; what is left are the inner ones and the norms of heads."""
    model = DECODERS[name]()
    decoder = find_decoder(model)
    assert decoder.tied == ("tied" in name)
    parts = {id(decoder.embedding.weight), id(decoder.head.weight), id(decoder.final_norm.weight)}
    for block in decoder.blocks:
        parts |= {id(block.attention_norm.weight), id(block.mlp_norm.weight)}
        parts |= {id(linear.weight) for linear in block.attention.values()}
        parts |= {id(weight) for weight in (*block.mlp.readers, *block.mlp.writers)}
    left = {key for key, weight in model.named_parameters() if id(weight) not in parts and weight.ndim > 1}
    assert not left


def test_shared_experts_are_read_with_their_gate() -> None:
    mlp = find_blocks(build_tiny_qwen_moe())[0].mlp
    assert list(mlp.gated) == ["model.layers.0.mlp.shared_expert"]
    assert sorted(tuple(weight.shape) for weight in mlp.readers) == [
        (1, 64),
        (4, 64),
        (4, 256, 64),
        (128, 64),
        (128, 64),
    ]


def test_other_layouts_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    with pytest.raises(ValueError, match="blocks at 'model.layers': got a GPT2LMHeadModel"):
        find_blocks(model)


def test_further_parts_of_the_decoder_are_refused() -> None:
    model = build_tiny_llama()
    model.model.add_module("position_embeddings", nn.Embedding(8, 64))
    with pytest.raises(ValueError, match=r"the decoder must consist of .*: got .*position_embeddings"):
        find_decoder(model)


def test_scaled_embeddings_are_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 8 * super().forward(tokens)

    model = build_tiny_llama()
    model.model.embed_tokens = Scaled(320, 64)
    with pytest.raises(ValueError, match=r"an embedding that reads its rows as they are.*Scaled"):
        find_decoder(model)


def test_experts_stored_transposed_are_refused() -> None:
    model = build_tiny_olmoe()
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(ValueError, match=r"a mixture must hold the router 'gate'.*in 'model.layers.1.mlp'"):
        find_blocks(model)


def test_clipped_values_are_refused() -> None:
    model = build_tiny_olmoe()
    model.config.clip_qkv = 4.0
    with pytest.raises(ValueError, match=r"attention must not clip its values: got clip_qkv=4.0 in 'model.layers.0"):
        find_blocks(model)


def test_dense_layers_with_other_parts_are_refused() -> None:
    model = build_tiny_llama()
    model.model.layers[1].mlp.dropout = nn.Dropout(0.1)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp' must hold the linear layers .*Dropout"):
        find_blocks(model)


def test_blocks_with_more_norms_are_refused() -> None:
    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    with pytest.raises(ValueError, match="a block must consist of .*pre_feedforward_layernorm.*'model.layers.0'"):
        find_blocks(Gemma2ForCausalLM(config))


class OneBasedNorm(nn.Module):
    """Multiplies by 1 + weight, as Gemma does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + self.weight)


@pytest.mark.parametrize(
    "norm",
    [OneBasedNorm(64), nn.LayerNorm(64, elementwise_affine=False), nn.LayerNorm(64)],
    ids=["one_based", "no_weight", "bias"],
)
def test_norms_that_do_not_scale_are_refused_before_anything_changes(norm: nn.Module) -> None:
    model = build_tiny_llama()
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        nn.init.constant_(norm.bias, 0.5)
    model.model.layers[1].post_attention_layernorm = norm
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    with pytest.raises(ValueError, match="'model.layers.1.post_attention_layernorm' must be a norm whose output"):
        find_blocks(model)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_heads_must_fit() -> None:
    model = build_tiny_llama()
    model.model.layers[0].self_attn.head_dim = 48
    with pytest.raises(ValueError, match="head_dim must divide v_proj.out_features.*got head_dim=48"):
        find_blocks(model)


@pytest.mark.parametrize("norm", [nn.LayerNorm(64, bias=False), nn.Identity()], ids=["mean", "no_weight"])
def test_norms_that_know_their_basis_are_refused(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"'model.norm' must be an RMS norm to be the same in every basis: got a"):
        check_root_mean_square_norm("model.norm", norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_root_mean_square_norms_pass(dtype: torch.dtype) -> None:
    check_root_mean_square_norm("model.norm", build_tiny_llama().to(dtype).model.norm)
