"""Keys or values of a text as later tokens see them: from their format, or from float16 where they wait for a block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.cache_formats import TokenBlockFormat
from runtime.formats import Format
from runtime.rendering import render


@dataclass(frozen=True, kw_only=True, eq=False)
class PastStates:
    """Keys or values of all tokens as later tokens see them.

    Args:
        past: [batch, heads, tokens, head_dim] of tokens that are packed.
        recent: Likewise of tokens that wait for their block to be complete; ``past`` itself where none wait.
        complete: [tokens, tokens] bool, True where a token sees another packed; None where none wait.
    """

    past: Tensor
    recent: Tensor
    complete: Tensor | None

    def repeated(self, repeats: int) -> "PastStates":
        """Returns the states with every head several times, once for each head of queries that reads it."""
        past = self.past.repeat_interleave(repeats, dim=1)
        recent = past if self.complete is None else self.recent.repeat_interleave(repeats, dim=1)
        return PastStates(past=past, recent=recent, complete=self.complete)

    def scores(self, query: Tensor) -> Tensor:
        """Returns the products [batch, heads, tokens, tokens] of queries with these keys."""
        scores = query @ self.past.transpose(-1, -2)
        if self.complete is None:
            return scores
        return torch.where(self.complete, scores, query @ self.recent.transpose(-1, -2))

    def mix(self, shares: Tensor) -> Tensor:
        """Returns the sums [batch, heads, tokens, head_dim] of these values by shares [batch, heads, tokens, T]."""
        if self.complete is None:
            return shares @ self.past
        return (shares * self.complete) @ self.past + (shares * ~self.complete) @ self.recent


def render_past(states: Tensor, format_: Format | None) -> PastStates:
    """Returns keys or values [batch, heads, tokens, head_dim] as later tokens see them.

    Args:
        states: As they are.
        format_: Their format; None to leave them so.
    """
    if not isinstance(format_, TokenBlockFormat):
        past = states if format_ is None else render_rows(states, format_)
        return PastStates(past=past, recent=past, complete=None)
    tokens, length = states.shape[2], format_.token_block
    recent = states.to(torch.float16).to(states.dtype)
    whole = tokens // length * length
    batch, heads, _, head_dim = states.shape
    blocks = recent[:, :, :whole].reshape(batch, heads, -1, length, head_dim).transpose(-1, -2)
    past = recent.clone()
    if whole:
        past[:, :, :whole] = render_rows(blocks, format_.row_format).transpose(-1, -2).flatten(2, 3)
    block = torch.arange(tokens, device=states.device) // length
    return PastStates(past=past, recent=recent, complete=block[None, :] < block[:, None])


def render_rows(states: Tensor, format_: Format) -> Tensor:
    """Returns states [..., n] as they come back from a format, each row of n numbers on its own."""
    return render(states.to(torch.float32).reshape(-1, states.shape[-1]), format_).to(states.dtype).view(states.shape)
