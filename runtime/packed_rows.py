"""What of a cache's states is packed at a moment, as the kernels read it."""

from dataclasses import dataclass

from torch import Tensor

from runtime.formats import Format


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """The packed keys or values of past tokens, as they are held now: appending later leaves these as they are.

    Args:
        format: The format of a row.
        rooms: Tensors by name that begin with ``buffers``; what lies behind these in them is no part of this.
        head_dim: Numbers of a head.
        token_block: Tokens of a block; 0 where a row is a token's.
        token_count: Tokens that are packed.
        recent: Those behind them that wait for their block, [batch, heads, tokens, head_dim] float16; None without
            blocks.
    """

    format: Format
    rooms: dict[str, Tensor]
    head_dim: int
    token_block: int
    token_count: int
    recent: Tensor | None = None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Tensors of ``PackedWeight``: [tokens, batch, heads, ...], or [blocks, batch, heads * head_dim, ...]."""
        held = self.token_count // self.token_block if self.token_block else self.token_count
        return {name: room[:held] for name, room in self.rooms.items()}
