"""Scales between neighbours of a decoder: channel by channel, what writes is multiplied and what reads is divided.

With a factor f_c > 0 per channel c, D = diag(f), a site keeps its function in real arithmetic:

    norm weight * f  and  W D^-1        for each weight W that reads the norm (q, k, v; gate, up; router, experts)
    D W_up           and  W_down D^-1   (the gate multiplies channel by channel, so f passes through it)
    D W_v            and  W_o E(D)^-1   (E repeats a key-value head for each of its query heads)

Every transform that scales is a rule for f; folding it is the same for all. Complexity: one pass over the weights, one
of them in float64 at a time. Limits: weights are rounded from float64 to their own dtype, those of v_proj and up_proj
twice; factors that are powers of two are exact. Between up and down of routed experts there is no site: what each of
them reads is not observed here.

Paper: Xiao et al., SmoothQuant, 2022, arXiv:2211.10438, equation 3.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.transforms.decoder_blocks import DecoderBlock, find_blocks


@dataclass(frozen=True, kw_only=True)
class ScaleSite:
    """Channels that one tensor or module writes and others read.

    Args:
        name: Name of the module that writes them.
        writers: Tensors [C, ...], one row a channel: a norm's weight, or a linear layer's weight and bias.
        readers: Weights [..., out, in]; in = C * repeats.
        observed: A module whose input [..., in] these channels are.
        head_dim: Channels that are repeated together.
        repeats: How often readers see each key-value head.
    """

    name: str
    writers: tuple[Tensor, ...]
    readers: tuple[Tensor, ...]
    observed: nn.Module
    head_dim: int = 1
    repeats: int = 1

    @property
    def channels(self) -> int:
        """Number of channels written."""
        return self.writers[0].shape[0]

    def widen(self, values: Tensor) -> Tensor:
        """Returns values [C] as readers see them, [in]."""
        if self.repeats == 1:
            return values
        return values.view(-1, 1, self.head_dim).expand(-1, self.repeats, -1).reshape(-1)

    def narrow_to_largest(self, values: Tensor) -> Tensor:
        """Returns the largest of the values [in] of each channel, [C]."""
        return values.view(-1, self.repeats, self.head_dim).amax(dim=1).reshape(-1)

    def narrow_to_mean(self, values: Tensor) -> Tensor:
        """Returns the mean of the values [in] of each channel, [C]."""
        return values.view(-1, self.repeats, self.head_dim).mean(dim=1).reshape(-1)


def list_scale_sites(model: nn.Module) -> tuple[ScaleSite, ...]:
    """Returns the sites of a decoder, block by block: both norms, up projections, value projection.

    Raises:
        ValueError: If the model is no decoder of the kind that ``decoder_blocks`` describes.
    """
    return tuple(site for block in find_blocks(model) for site in _list_sites(block))


def fold_scales_(model: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Multiplies what the named sites write by their factors, and divides what reads it, in place.

    Args:
        model: The decoder, on any device, in any floating-point dtype.
        factors: Site name -> [C] float64, positive.
    """
    with torch.no_grad():
        # In the model's order, whatever that of the factors is: what is rounded twice depends on it.
        for site in list_scale_sites(model):
            if site.name not in factors:
                continue
            factor = factors[site.name]
            for writer in site.writers:
                _multiply_(writer, factor.view(-1, *[1] * (writer.ndim - 1)))
            for reader in site.readers:
                _multiply_(reader, 1 / site.widen(factor))


def largest_columns(weights: Iterable[Tensor]) -> Tensor:
    """Returns max |W| [in], float64, of every column over all weights [..., out, in]."""
    return torch.stack([w.detach().abs().reshape(-1, w.shape[-1]).amax(dim=0).double() for w in weights]).amax(dim=0)


def _list_sites(block: DecoderBlock) -> list[ScaleSite]:
    attention, mlp = block.attention, block.mlp
    sites = [
        ScaleSite(
            name=f"{block.name}.input_layernorm",
            writers=(_weight(block.attention_norm),),
            readers=tuple(attention[part].weight for part in ("q_proj", "k_proj", "v_proj")),
            observed=attention["q_proj"],
        ),
        ScaleSite(
            name=f"{block.name}.post_attention_layernorm",
            writers=(_weight(block.mlp_norm),),
            readers=mlp.readers,
            observed=mlp.first_reader,
        ),
    ]
    for name, linears in mlp.gated.items():
        down = linears["down_proj"]
        sites.append(
            ScaleSite(name=f"{name}.up_proj", writers=_rows(linears["up_proj"]), readers=(down.weight,), observed=down)
        )
    output = attention["o_proj"]
    sites.append(
        ScaleSite(
            name=f"{block.name}.self_attn.v_proj",
            writers=_rows(attention["v_proj"]),
            readers=(output.weight,),
            observed=output,
            head_dim=block.head_dim,
            repeats=block.repeats,
        )
    )
    return sites


def _weight(norm: nn.Module) -> Tensor:
    assert isinstance(norm.weight, Tensor)
    return norm.weight


def _rows(linear: nn.Linear) -> tuple[Tensor, ...]:
    return (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)


def _multiply_(tensor: Tensor, factor: Tensor) -> None:
    tensor.copy_(tensor.double() * factor.to(tensor.device))
