"""The parts of a Llama-type decoder that a transform may touch, found and checked before anything changes.

Known are decoders of blocks x + attention(norm(x)), x + mlp(norm(x)) between an embedding and a last norm, with RMS
norms, full attention, and an MLP that is gated or a mixture of gated experts, with or without a shared one. Everything
else is refused with the part that is not known: latent attention (DeepSeek), norms that multiply by 1 + weight or come
after a layer (Gemma), norms with a bias or a mean (GPT-2), experts stored transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

_BLOCK_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_MODEL_PARTS = {"embed_tokens", "layers", "norm"}
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
# These act on queries and keys, whose values do not change.
_HARMLESS_ATTENTION_PARTS = {"q_norm", "k_norm", "rotary_emb"}
# An activation function has no channels of its own; it acts on the gate, which keeps its values.
_HARMLESS_MLP_PARTS = {"act_fn"}
_ONLY = "Transform Llama-type decoders only."
# Far above the rounding of a norm in bfloat16, far below what a subtracted mean does to the probe.
_PARALLEL_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """What of a block's MLP reads its norm and writes to the residual stream; H is the width of that.

    Args:
        gated: Name -> linear layers of each gated MLP of two dimensions: the block's own, or the shared expert.
        readers: Weights [..., out, H]; the router and the gate of a shared expert are among them.
        writers: Weights [..., H, in].
        biases: Biases [H] of the writers.
        first_reader: A module whose input is the norm's output.
    """

    gated: Mapping[str, Mapping[str, nn.Linear]]
    readers: tuple[Tensor, ...]
    writers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    first_reader: nn.Module


@dataclass(frozen=True, kw_only=True)
class DecoderBlock:
    """One block.

    Args:
        name: Its name in the model.
        attention_norm: The norm before the attention.
        mlp_norm: The norm before the MLP.
        attention: q_proj, k_proj, v_proj and o_proj.
        head_dim: Channels of a head.
        mlp: The MLP.
    """

    name: str
    attention_norm: nn.Module
    mlp_norm: nn.Module
    attention: Mapping[str, nn.Linear]
    head_dim: int
    mlp: Mlp

    @property
    def repeats(self) -> int:
        """Query heads of each key-value head."""
        return self.attention["o_proj"].in_features // self.attention["v_proj"].out_features


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder with what lies before and behind its blocks.

    Args:
        blocks: The blocks in order.
        embedding: The embedding [V, H].
        final_norm: What lies between the blocks and the head.
        head: The head, a linear layer [V, H].
    """

    blocks: tuple[DecoderBlock, ...]
    embedding: nn.Embedding
    final_norm: nn.Module
    head: nn.Linear

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one parameter."""
        return self.head.weight is self.embedding.weight


def find_decoder(model: nn.Module) -> Decoder:
    """Returns the decoder with its embedding and its head.

    Raises:
        ValueError: If the model is built otherwise than described above.
    """
    blocks = find_blocks(model)
    parts = dict(model.get_submodule("model").named_children())
    embedding, head = parts.get("embed_tokens"), dict(model.named_children()).get("lm_head")
    plain = isinstance(embedding, nn.Embedding) and type(embedding).forward is nn.Embedding.forward
    if not (plain and isinstance(head, nn.Linear) and _MODEL_PARTS <= set(parts) <= {*_MODEL_PARTS, "rotary_emb"}):
        found = {part: type(child).__name__ for part, child in parts.items()} | {"lm_head": type(head).__name__}
        msg = (
            f"the decoder must consist of {sorted(_MODEL_PARTS)}, an embedding that reads its rows as they are, and a "
            f"linear 'lm_head': got {found} in {type(model).__name__}. {_ONLY}"
        )
        raise ValueError(msg)
    assert isinstance(embedding, nn.Embedding)
    return Decoder(blocks=blocks, embedding=embedding, final_norm=parts["norm"], head=head)


def find_blocks(model: nn.Module) -> tuple[DecoderBlock, ...]:
    """Returns every block of a decoder.

    Raises:
        ValueError: If a block is built otherwise than described above.
    """
    try:
        layers = model.get_submodule("model.layers")
    except AttributeError as error:
        msg = f"the decoder must hold its blocks at 'model.layers': got a {type(model).__name__} without them. {_ONLY}"
        raise ValueError(msg) from error
    return tuple(_read_block(f"model.layers.{name}", layer) for name, layer in layers.named_children())


def check_root_mean_square_norm(name: str, norm: nn.Module) -> None:
    """Checks that a norm divides by the length of its input, and so does the same in any orthogonal basis.

    Raises:
        ValueError: If it moves the direction of its input otherwise than by its weight.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        probe = torch.arange(1, len(weight) + 1, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            ratio = functional_call(norm, {"weight": torch.ones_like(weight)}, (probe[None],))[0] / probe
        if bool((ratio > 0).all()) and float(ratio.max() / ratio.min()) <= 1 + _PARALLEL_TOLERANCE:
            return
    msg = (
        f"'{name}' must be an RMS norm to be the same in every basis: got a {type(norm).__name__}. "
        "Rotate decoders with RMS norms only."
    )
    raise ValueError(msg)


def _read_block(name: str, layer: nn.Module) -> DecoderBlock:
    children = dict(layer.named_children())
    if set(children) != _BLOCK_PARTS:
        msg = f"a block must consist of {sorted(_BLOCK_PARTS)}: got {sorted(children)} in '{name}'. {_ONLY}"
        raise ValueError(msg)
    attention = _read_linears(f"{name}.self_attn", children["self_attn"], _ATTENTION_LINEARS, _HARMLESS_ATTENTION_PARTS)
    _check_unclipped(f"{name}.self_attn", children["self_attn"])
    mlp = _read_mlp(f"{name}.mlp", children["mlp"])
    for norm in ("input_layernorm", "post_attention_layernorm"):
        _check_scaling_norm(f"{name}.{norm}", children[norm], attention["q_proj"])
    return DecoderBlock(
        name=name,
        attention_norm=children["input_layernorm"],
        mlp_norm=children["post_attention_layernorm"],
        attention=attention,
        head_dim=_read_head_dim(f"{name}.self_attn", children["self_attn"], attention),
        mlp=mlp,
    )


def _read_mlp(name: str, module: nn.Module) -> Mlp:
    children = dict(module.named_children())
    if "experts" in children:
        return _read_mixture(name, children)
    linears = _read_linears(name, module, _MLP_LINEARS, _HARMLESS_MLP_PARTS)
    bias = linears["down_proj"].bias
    return Mlp(
        gated={name: linears},
        readers=(linears["gate_proj"].weight, linears["up_proj"].weight),
        writers=(linears["down_proj"].weight,),
        biases=() if bias is None else (bias,),
        first_reader=linears["gate_proj"],
    )


def _read_mixture(name: str, children: Mapping[str, nn.Module]) -> Mlp:
    """Returns a mixture of experts that transformers keeps in one parameter a projection."""
    router, experts = children.get("gate"), children["experts"]
    matrix = getattr(router, "weight", None)
    stacks = dict(experts.named_parameters(recurse=False))
    known = {"gate", "experts", "shared_expert", "shared_expert_gate"}
    fused = set(stacks) == {"gate_up_proj", "down_proj"} and not getattr(experts, "is_transposed", True)
    if not (isinstance(router, nn.Module) and isinstance(matrix, Tensor) and fused and set(children) <= known):
        found = {part: type(child).__name__ for part, child in children.items()}
        msg = (
            f"a mixture must hold the router 'gate', 'experts' with gate_up_proj and down_proj [experts, out, in], and "
            f"at most a shared expert with its gate: got {found} with {sorted(stacks)} in '{name}'. {_ONLY}"
        )
        raise ValueError(msg)
    readers: list[Tensor] = [matrix, stacks["gate_up_proj"]]
    writers: list[Tensor] = [stacks["down_proj"]]
    biases: list[Tensor] = []
    gated: Mapping[str, Mapping[str, nn.Linear]] = {}
    if "shared_expert" in children:
        shared = _read_mlp(f"{name}.shared_expert", children["shared_expert"])
        gated = shared.gated
        readers += shared.readers
        writers += shared.writers
        biases += shared.biases
    if isinstance(share := children.get("shared_expert_gate"), nn.Linear):
        readers.append(share.weight)
    return Mlp(gated=gated, readers=tuple(readers), writers=tuple(writers), biases=tuple(biases), first_reader=router)


def _read_linears(name: str, module: nn.Module, required: tuple[str, ...], harmless: set[str]) -> dict[str, nn.Linear]:
    """Returns the linear layers `required` of `module`, whose other parts are all `harmless`."""
    parts = dict(module.named_children())
    linears = {part: child for part, child in parts.items() if part in required and isinstance(child, nn.Linear)}
    if set(linears) != set(required) or not set(parts) <= {*required, *harmless}:
        found = {part: type(child).__name__ for part, child in parts.items()}
        msg = (
            f"'{name}' must hold the linear layers {list(required)} and nothing else that sees "
            f"their channels: got {found}. {_ONLY}"
        )
        raise ValueError(msg)
    return linears


def _check_unclipped(name: str, attention: nn.Module) -> None:
    limit = getattr(getattr(attention, "config", None), "clip_qkv", None)
    if limit is not None:
        msg = f"attention must not clip its values: got clip_qkv={limit} in '{name}'. {_ONLY}"
        raise ValueError(msg)


def _check_scaling_norm(name: str, norm: nn.Module, reader: nn.Linear) -> None:
    """Checks that the output of `norm` is proportional to its weight: zero weights must give zeros.

    This refuses norms that multiply by 1 + weight (Gemma), have no weight (OLMo) or add a bias (LayerNorm).
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        probe = torch.ones(1, reader.in_features, dtype=weight.dtype, device=weight.device)
        probe[0, 0] = 2  # a norm that subtracts the mean would turn equal channels into zeros
        with torch.no_grad():
            if not functional_call(norm, {"weight": torch.zeros_like(weight)}, (probe,)).any():
                return
    msg = (
        f"'{name}' must be a norm whose output is proportional to its weight: got a {type(norm).__name__}. "
        "Transform decoders with RMS norms only."
    )
    raise ValueError(msg)


def _read_head_dim(name: str, attention: nn.Module, linears: Mapping[str, nn.Linear]) -> int:
    """Returns the channels of a head; they divide the outputs of v_proj, and these the inputs of o_proj."""
    value_features, output_features = linears["v_proj"].out_features, linears["o_proj"].in_features
    head_dim = getattr(attention, "head_dim", None)
    if isinstance(head_dim, int) and value_features % head_dim == 0 and output_features % value_features == 0:
        return head_dim
    msg = (
        f"head_dim must divide v_proj.out_features, and that o_proj.in_features: got head_dim={head_dim}, "
        f"v_proj.out_features={value_features}, o_proj.in_features={output_features} in '{name}'. {_ONLY}"
    )
    raise ValueError(msg)
