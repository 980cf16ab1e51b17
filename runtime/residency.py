"""Which weights of a model are in memory: all of them, or those of one block at a time.

A block is a decoder layer, by its index, or all that is outside of the layers, None.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Residency(Protocol):
    """Brings weights into memory for as long as they are used."""

    @property
    def blocks(self) -> Sequence[int | None]:
        """The blocks that hold all weights together, in the order of the model."""

    def block_of(self, parameter: str) -> int | None:
        """Returns the block that brings a parameter into memory."""

    def resident(self, block: int | None) -> AbstractContextManager[None]:
        """Gives a context in which the weights of a block are in memory; within another of the same it does nothing."""

    def load_(self, block: int | None) -> None:
        """Brings the weights of a block into memory for good."""


class InMemory:
    """All weights are in memory all the time: one block."""

    blocks: Sequence[int | None] = (None,)

    def block_of(self, parameter: str) -> int | None:
        """Returns None: that of all parameters."""
        return None

    def resident(self, block: int | None) -> AbstractContextManager[None]:
        """Gives a context that does nothing."""
        return nullcontext()

    def load_(self, block: int | None) -> None:
        """Does nothing."""
