"""Two-layer models with random weights and a real tokenizer, built here without network.

Weights are drawn with a standard deviation of 0.1, which spreads the logits of a token by 0.8 nats; norm
weights scatter around 1 and biases around 0, so that none of them can be forgotten unnoticed.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

VOCABULARY_SIZE = 320  # 256 bytes, two special tokens and 62 merges

_SENTENCES = (
    "The compiler reads a source file and writes an object file.",
    "A cache keeps what was read last, because what was read last is often read again.",
    "When two programs share one machine, each of them waits for the other.",
    "Numbers in a computer have a fixed width; whoever forgets that will be reminded of it.",
    "The editor was written in one weekend and maintained for thirty years.",
    "A network drops packets, and everything above it pretends that it does not.",
    "Memory is cheap until the program needs one byte more than there is.",
    "She closed the window, saved the file, and went home before the build had finished.",
)

# hidden 64 and feed-forward 128: groups of 32 and 64 divide both, a group of 128 only the latter.
SIZES = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def sample_text(length_characters: int) -> str:
    """Returns English sentences in a fixed, never periodic order, `length_characters` long."""
    words: list[str] = []
    state = 1
    while sum(map(len, words)) + len(words) < length_characters:
        state = (state * 1103515245 + 12345) % 2**31
        words.append(_SENTENCES[(state >> 16) % len(_SENTENCES)])
    return " ".join(words)[:length_characters]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer: every text has an encoding, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build_model(model_class: Callable[..., PreTrainedModel], config: object, seed: int) -> PreTrainedModel:
    """Returns the model of `config` with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("norm.weight", ".bias")):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build_one_layer_llama(vocabulary: int) -> LlamaForCausalLM:
    """Returns a frozen layer of a width of 32: small enough to differentiate along every single weight."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def build_wide_llama(hidden_size: int, intermediate_size: int, *, layers: int) -> LlamaForCausalLM:
    """Returns a dense decoder with rows of these widths, embedding and lm_head one parameter."""
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return build_model(LlamaForCausalLM, config, 0)


def build_tiny_llama(
    *, tied: bool = False, key_value_heads: int = 2, head_dim: int = 16, attention_bias: bool = False, seed: int = 0
) -> LlamaForCausalLM:
    """Returns a dense decoder; with `tied`, embedding and lm_head are one parameter."""
    config = LlamaConfig(
        **{**SIZES, "num_key_value_heads": key_value_heads},
        head_dim=head_dim,
        intermediate_size=128,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        mlp_bias=attention_bias,
    )
    return build_model(LlamaForCausalLM, config, seed)


def build_tiny_mixtral(*, seed: int = 0) -> MixtralForCausalLM:
    """Returns a mixture of four experts, two per token, their weights fused into 3-D parameters."""
    config = MixtralConfig(
        **SIZES, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    )
    return build_model(MixtralForCausalLM, config, seed)


def build_tiny_qwen_moe(*, seed: int = 0) -> Qwen2MoeForCausalLM:
    """Returns a mixture of four experts with a shared expert and biases in the attention."""
    config = Qwen2MoeConfig(
        **SIZES,
        intermediate_size=128,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    return build_model(Qwen2MoeForCausalLM, config, seed)


def save_model(model: PreTrainedModel, directory: Path) -> Path:
    """Writes model and tokenizer as a Hugging Face directory and returns it."""
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_llama(directory: Path) -> Path:
    """Writes the untied dense model and returns its directory."""
    return save_model(build_tiny_llama(), directory)
