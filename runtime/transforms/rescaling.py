"""Random rescaling of channels inside a Llama-type decoder, which leaves its function as it is.

Problem: weights that were once stored on a low-bit grid (a model read from a 4-bit GGUF file) lie on it
still, and a format of the same grid seems to cost nothing. Off the grid, losses mean something again.

Formula: with scales s_c = exp(sigma * N(0, 1)) per channel c, neighbours absorb S = diag(s) and its inverse:

    norm weight * s  and  W S^-1        for each linear layer W that reads the norm (q, k, v; gate, up)
    S W_up           and  W_down S^-1   (the gate multiplies channel by channel, so s passes through it)
    S W_v            and  W_o E(S)^-1   (E repeats a key-value head for each of its query heads)

Complexity: one pass over the weights, one of them in float64 at a time. Limits: exact in real arithmetic;
weights are rounded from float64 to their own dtype, those of v_proj and up_proj twice. Only blocks
x + attention(norm(x)), x + mlp(norm(x)) with a gated MLP are known; others are refused unchanged.

Paper: Xiao et al., SmoothQuant, 2022, arXiv:2211.10438, equation 3. There the scales come from activations
and go into norms alone; here they are random and go through the value and up projections as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
# These act on queries and keys, whose values do not change.
_HARMLESS_ATTENTION_PARTS = {"q_norm", "k_norm", "rotary_emb"}
# An activation function has no channels of its own; it acts on the gate, which keeps its values.
_HARMLESS_MLP_PARTS = {"act_fn"}


@dataclass(frozen=True, kw_only=True)
class _Block:
    """The weights of one decoder block that take part."""

    attention_norm: nn.Module
    mlp_norm: nn.Module
    linears: dict[str, nn.Linear]
    head_dim: int


def apply_random_rescaling_(model: nn.Module, *, sigma: float = 0.25, seed: int = 0) -> None:
    """Folds random channel scales into the norms and linear layers of `model`, in place.

    Args:
        model: decoder with its blocks at `model.layers`, on any device, in any floating-point dtype.
        sigma: standard deviation of the logarithm of the scales, >= 0.
        seed: decides the scales, together with the shapes of the model.

    Raises:
        ValueError: sigma is negative or not finite, or the model is built otherwise than described above.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        msg = f"sigma must be a finite number >= 0: got sigma={sigma}. Use a value such as 0.25."
        raise ValueError(msg)
    blocks = _find_blocks(model)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        return torch.exp(sigma * torch.randn(count, generator=generator, dtype=torch.float64))

    with torch.no_grad():
        for block in blocks:
            _rescale_block_(block, draw)


def _rescale_block_(block: _Block, draw: Callable[[int], Tensor]) -> None:
    linears = block.linears
    for norm, readers in (
        (block.attention_norm, ("q_proj", "k_proj", "v_proj")),
        (block.mlp_norm, ("gate_proj", "up_proj")),
    ):
        scale = draw(linears[readers[0]].in_features)
        _multiply_(norm.weight, scale)
        for reader in readers:
            _multiply_(linears[reader].weight, 1 / scale)
    scale = draw(linears["up_proj"].out_features)
    _multiply_rows_(linears["up_proj"], scale)
    _multiply_(linears["down_proj"].weight, 1 / scale)
    scale = draw(linears["v_proj"].out_features)
    _multiply_rows_(linears["v_proj"], scale)
    repeats = linears["o_proj"].in_features // linears["v_proj"].out_features
    by_head = scale.view(-1, 1, block.head_dim)  # [key-value heads, 1, head_dim]
    _multiply_(linears["o_proj"].weight, 1 / by_head.expand(-1, repeats, -1).reshape(-1))


def _multiply_rows_(linear: nn.Linear, scale: Tensor) -> None:
    """Multiplies the output channels of `linear` by `scale` [out_features]."""
    _multiply_(linear.weight, scale[:, None])
    if linear.bias is not None:
        _multiply_(linear.bias, scale)


def _multiply_(parameter: Tensor | nn.Module, scale: Tensor) -> None:
    assert isinstance(parameter, Tensor)
    parameter.copy_(parameter.double() * scale.to(parameter.device))


def _find_blocks(model: nn.Module) -> list[_Block]:
    """Returns every block of the decoder, each of them one that can be rescaled."""
    try:
        layers = model.get_submodule("model.layers")
    except AttributeError as error:
        msg = (
            f"the decoder must hold its blocks at 'model.layers': got a {type(model).__name__} without them. "
            "Rescale Llama-type decoders only."
        )
        raise ValueError(msg) from error
    return [_read_block(f"model.layers.{name}", layer) for name, layer in layers.named_children()]


def _read_block(name: str, layer: nn.Module) -> _Block:
    children = dict(layer.named_children())
    if set(children) != _PARTS:
        msg = (
            f"a block must consist of {sorted(_PARTS)}: got {sorted(children)} in '{name}'. "
            "Rescale Llama-type decoders only."
        )
        raise ValueError(msg)
    linears = _read_linears(f"{name}.self_attn", children["self_attn"], _ATTENTION_LINEARS, _HARMLESS_ATTENTION_PARTS)
    linears |= _read_linears(f"{name}.mlp", children["mlp"], _MLP_LINEARS, _HARMLESS_MLP_PARTS)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        _check_norm(f"{name}.{norm}", children[norm], linears["q_proj"])
    return _Block(
        attention_norm=children["input_layernorm"],
        mlp_norm=children["post_attention_layernorm"],
        linears=linears,
        head_dim=_read_head_dim(f"{name}.self_attn", children["self_attn"], linears),
    )


def _read_linears(name: str, module: nn.Module, required: tuple[str, ...], harmless: set[str]) -> dict[str, nn.Linear]:
    """Returns the linear layers `required` of `module`, whose other parts are all `harmless`."""
    parts = dict(module.named_children())
    linears = {part: child for part, child in parts.items() if part in required and isinstance(child, nn.Linear)}
    if set(linears) != set(required) or not set(parts) <= {*required, *harmless}:
        found = {part: type(child).__name__ for part, child in parts.items()}
        msg = (
            f"'{name}' must hold the linear layers {list(required)} and nothing else that sees "
            f"their channels: got {found}. Rescale Llama-type decoders only."
        )
        raise ValueError(msg)
    return linears


def _check_norm(name: str, norm: nn.Module, reader: nn.Linear) -> None:
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
        "Rescale decoders with RMS norms only."
    )
    raise ValueError(msg)


def _read_head_dim(name: str, attention: nn.Module, linears: dict[str, nn.Linear]) -> int:
    """Returns the channels of a head; they divide the outputs of v_proj, and these the inputs of o_proj."""
    value_features, output_features = linears["v_proj"].out_features, linears["o_proj"].in_features
    head_dim = getattr(attention, "head_dim", None)
    if isinstance(head_dim, int) and value_features % head_dim == 0 and output_features % value_features == 0:
        return head_dim
    msg = (
        f"head_dim must divide v_proj.out_features, and that o_proj.in_features: got head_dim={head_dim}, "
        f"v_proj.out_features={value_features}, o_proj.in_features={output_features} in '{name}'. "
        "Rescale Llama-type decoders only."
    )
    raise ValueError(msg)
