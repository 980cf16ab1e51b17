"""How the experts of a mixture divide their work among domains of text.

The share of a domain's tokens that each expert of a layer gets is a distribution p(e | d) over the E experts. With
domains weighted equally, p(e) is its mean over the D domains, and the measure of specialisation is the mutual
information between the domain of a token and the expert it is sent to, in bits per layer:

    I = 1/D sum_d sum_e p(e | d) log2( p(e | d) / p(e) )

which is 0 if all domains use the experts alike and log2 D if the expert tells the domain. It is the Jensen-Shannon
divergence of the D distributions. Counts of N tokens raise it by about (D-1)(E-1) / (2 N ln 2), 1e-3 bits for 50,000.

Even random routers get some of it, since the hidden states of domains differ: compare with `random_routers`. Whether
the loss depends on the choice of experts shows in `shuffled_routing`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def measure_usage(model: Any, tokens: Mapping[str, Tensor], *, batch: int = 8) -> Tensor:
    """Returns the share of routed tokens [D, L, E] that each expert gets of each domain; rows sum to one.

    Args:
        model: A mixture of experts of transformers.
        tokens: Domain -> sequences [S, T].
        batch: Sequences at once.
    """
    counts = []
    for sequences in tokens.values():
        batches = [_count_routed(model, part) for part in torch.split(sequences, batch)]
        counts.append(torch.stack(batches).sum(dim=0).double())
    stacked = torch.stack(counts)
    return stacked / stacked.sum(dim=-1, keepdim=True)


def mutual_information_bits(usage: Tensor) -> Tensor:
    """Returns the mutual information [L] between domain and expert, in bits, from shares [D, L, E]."""
    ratio = usage / usage.mean(dim=0, keepdim=True)
    nats: Tensor = torch.special.xlogy(usage, ratio).nansum(dim=-1).mean(dim=0)
    return nats / math.log(2)


@torch.no_grad()
def measure_loss(model: Any, sequences: Tensor, *, batch: int = 8) -> Tensor:
    """Returns the negative log likelihood [S, T-1] in nats of every token but the first of each sequence."""
    losses = []
    for part in torch.split(sequences, batch):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(losses)


@contextmanager
def random_routers(model: Any, *, seed: int) -> Iterator[None]:
    """Gives every router normal weights of the same shape and norm for the length of a block."""
    generator = torch.Generator().manual_seed(seed)
    saved = []
    for router in find_routers(model):
        weight = router.get_parameter("weight")
        saved.append((weight, weight.data))
        drawn = torch.randn(weight.shape, generator=generator)
        weight.data = drawn * (weight.data.norm() / drawn.norm())
    try:
        yield
    finally:
        for weight, data in saved:
            weight.data = data


@contextmanager
def shuffled_routing(model: Any, *, seed: int) -> Iterator[None]:
    """Sends every token to the experts chosen for another, drawn at random, for the length of a block.

    The load of each expert stays what it was.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffle(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, scores, chosen = output
        order = torch.randperm(len(chosen), generator=generator)
        return logits, scores[order], chosen[order]

    with ExitStack() as stack:
        for router in find_routers(model):
            stack.callback(router.register_forward_hook(shuffle).remove)
        yield


@contextmanager
def equal_routing(model: Any) -> Iterator[None]:
    """Sends every token to all experts of a layer with equal weights for the length of a block."""

    def spread(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        logits, scores, _ = output
        everyone = torch.arange(logits.shape[-1]).expand(len(logits), -1)
        return logits, torch.full_like(logits, 1 / logits.shape[-1], dtype=scores.dtype), everyone

    with ExitStack() as stack:
        for router in find_routers(model):
            stack.callback(router.register_forward_hook(spread).remove)
        yield


def find_routers(model: Any) -> list[nn.Module]:
    """Returns the router of each layer."""
    return [layer.mlp.gate for layer in model.model.layers]


def _count_routed(model: Any, sequences: Tensor) -> Tensor:
    logits = model(sequences, use_cache=False, output_router_logits=True).router_logits
    chosen = [layer.topk(model.config.num_experts_per_tok, dim=-1).indices for layer in logits]
    return torch.stack([layer.flatten().bincount(minlength=model.config.num_experts) for layer in chosen])
