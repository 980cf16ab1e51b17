"""What a reference model was rewritten by, as far as later steps must know."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TransformRecord:
    """Transforms of a reference model, and what it was before them.

    Args:
        names: The transforms with all options, in order.
        recipe: Key under which the tensors that they were folded by are kept.
        content: Hash of these tensors and the names.
        added_weights: Weights that the rewritten model has more.
        reference_bytes: Bytes of the model before.
        reference_bits_per_weight: Its stored bits per weight.
    """

    names: tuple[str, ...]
    recipe: str
    content: str
    added_weights: int
    reference_bytes: int
    reference_bits_per_weight: float
