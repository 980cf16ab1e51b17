"""What a GGUF file says about a model besides its tensors: architecture, sizes, tokenizer.

llama.cpp reads no tokenizer.json: it has the tokens, merges and the name of one of the ways it can cut a text into
words. That name is found here from the cutting rules themselves; a tokenizer whose rules are none of those known here
is refused, because llama.cpp would then tokenize otherwise than the model was trained.
"""

import json
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

# model_type of transformers -> architecture of llama.cpp.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# How a tokenizer cuts a text into words -> what llama.cpp calls it.
PRE_TOKENIZERS = {
    ("ByteLevel with its own pattern",): "gpt-2",
    ("Digits", "ByteLevel with its own pattern"): "smollm",
    (_LLAMA_3, "ByteLevel"): "llama-bpe",
    (_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"), "ByteLevel"): "qwen2",
}

# Rotations by position: as they come, or with a factor for each frequency, which is a tensor of the file.
ROPE_TYPES = ("default", "llama3")


def find_rope_factors(model: nn.Module) -> Tensor | None:
    """Returns what a model divides the frequencies of its rotations by, [head_dim / 2] float32; None where by nothing.

    Taken from the frequencies that transformers has computed, f_i = theta^(-2 i / head_dim) / factor_i.
    """
    config: Any = model.config
    rope = _rope(config)
    if rope.get("rope_type", "default") == "default":
        return None
    scaled = model.get_buffer("model.rotary_emb.inv_freq").to(torch.float64)
    exponents = torch.arange(len(scaled), dtype=torch.float64) / len(scaled)
    return (float(rope["rope_theta"]) ** -exponents / scaled).to(torch.float32)


def find_architecture(config: PretrainedConfig) -> str:
    """Returns llama.cpp's name of a model's architecture.

    Raises:
        ValueError: If this exporter does not know it, or its positions are scaled in a way it does not write.
    """
    if config.model_type not in ARCHITECTURES:
        msg = (
            f"a model must be one of {', '.join(ARCHITECTURES)} to be written as GGUF: got '{config.model_type}'. "
            "Convert it with llama.cpp's own script and quantize it there with the tensor types of the plan."
        )
        raise ValueError(msg)
    kind = _rope(config).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        msg = (
            f"rotations must be of a type among {', '.join(ROPE_TYPES)} to be written as GGUF: got rope_type='{kind}'. "
            "Convert the model with llama.cpp's own script."
        )
        raise ValueError(msg)
    return ARCHITECTURES[config.model_type]


def add_model(writer: GGUFWriter, config: PretrainedConfig, name: str) -> None:
    """Adds the sizes of a model."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_experts(writer, config)
    # The mix of types has no name of its own: it says "mostly F16", as files before quantization do.
    writer.add_file_type(1)
    writer.add_quantization_version(2)


def _add_experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    width = getattr(config, "moe_intermediate_size", None)
    if width:
        writer.add_expert_feed_forward_length(width)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    if shared:
        writer.add_expert_shared_feed_forward_length(shared)


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Adds tokens, merges and special tokens.

    Raises:
        ValueError: If llama.cpp would cut texts otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    document: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    pre = find_pre_tokenizer(document)
    model = document["model"]
    added = {token["id"]: token for token in document["added_tokens"]}
    words = {i: word for word, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    # Rows of the embedding beyond the vocabulary have no text.
    tokens = [words.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([_token_type(i, words, added) for i in range(vocab_size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def find_pre_tokenizer(document: dict[str, Any]) -> str:
    """Returns llama.cpp's name for how a tokenizer cuts texts, from its tokenizer.json.

    Raises:
        ValueError: If it is none of those known here.
    """
    rule = document.get("pre_tokenizer") or {}
    steps = tuple(_describe(step) for step in rule.get("pretokenizers", [rule]))
    kind = document.get("model", {}).get("type")
    if kind != "BPE" or document["model"].get("byte_fallback") or steps not in PRE_TOKENIZERS:
        msg = (
            f"a tokenizer must be a byte-level BPE that llama.cpp cuts texts for alike ({', '.join(_known())}): got "
            f"{kind} with {list(steps)}. Convert the model with llama.cpp's own script and quantize it there with the "
            "tensor types of the plan."
        )
        raise ValueError(msg)
    return PRE_TOKENIZERS[steps]


def _known() -> list[str]:
    return sorted(PRE_TOKENIZERS.values())


def _describe(step: dict[str, Any]) -> str:
    kind = str(step.get("type"))
    if kind == "ByteLevel":
        return "ByteLevel with its own pattern" if step.get("use_regex", True) else "ByteLevel"
    if kind == "Digits":
        return "Digits" if step.get("individual_digits") else "Digits in groups"
    return str(step["pattern"].get("Regex")) if kind == "Split" else kind


def _token_type(index: int, words: dict[int, str], added: dict[int, dict[str, Any]]) -> TokenType:
    if index not in words:
        return TokenType.UNUSED
    if index in added:
        return TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
    return TokenType.NORMAL


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}
