"""A GGUF file of a tiny Llama, written as llama.cpp's converter writes it."""

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    """Writes a Llama in float32 with its byte-level tokenizer and returns the path."""
    config = model.config
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.named_parameters():
        values = tensor.detach().numpy()
        if "q_proj" in name:
            values = _interleave_halves(values, config.num_attention_heads)
        if "k_proj" in name:
            values = _interleave_halves(values, config.num_key_value_heads)
        writer.add_tensor(_gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])  # control, normal
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _gguf_name(name: str) -> str:
    part = name.removesuffix(".weight")
    if part in _NAMES:
        return f"{_NAMES[part]}.weight"
    layer, _, rest = part.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _interleave_halves(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Returns query or key rows in llama.cpp's order: rotated pairs side by side."""
    rows, in_features = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, in_features).swapaxes(1, 2).reshape(rows, in_features)
