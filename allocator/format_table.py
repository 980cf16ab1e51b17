"""The table of formats: kinds of bits, and who can run them; with a model, what each does to one of its weights."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from allocator.artefacts import Model, open_model
from allocator.progress import Progress, silent
from runtime.engines import engines_of
from runtime.format_bits import describe_format
from runtime.formats import FORMATS, Format, find_formats
from runtime.units import list_weights, read_weight

# Without a model: rows long enough for every group size, so that padding and what is stored once hardly count.
NOMINAL_SHAPE = (4096, 4096)


def list_formats(
    model: str | Model | None = None,
    *,
    formats: Sequence[str] | None = None,
    weight: str | None = None,
    quantizer: str = "rtn",
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Returns one row for each format.

    Columns: ``format``, ``kind``, ``group_size``; in bits per weight ``nominal_bits``, ``entropy_bits``,
    ``packed_bits`` and ``stored_bits``; ``relative_error``; ``runs_on``; ``refusal``. Entropy and error need a model. A
    format that the weight does not fit has a reason as its refusal, and no numbers.

    Args:
        model: Whose weight the columns are of; None for a shape of 4096 x 4096.
        formats: Names of formats; None for all.
        weight: Name of the weight; None for a linear layer in the middle of the model, the one with the longest rows.
        quantizer: Name of a quantizer that reads the weight alone, for integer formats.
        progress: Called with (stage, done, total).

    Raises:
        ValueError: If a format, the weight or the quantizer is unknown, or the quantizer needs statistics.
    """
    chosen = find_formats(FORMATS if formats is None else formats)
    values = None if model is None else _read_weight(open_model(model), weight)
    shape = NOMINAL_SHAPE if values is None else (values.shape[0], values.shape[1])
    rows = []
    for done, format_ in enumerate(chosen, 1):
        rows.append(_row(format_, shape, values, quantizer))
        progress("formats", done, len(chosen))
    return rows


def _read_weight(model: Model, name: str | None) -> Tensor:
    weights = list_weights(model.reference.model)
    if name is None:
        linear = [w for w in weights.values() if w.kind == "linear"] or list(weights.values())
        middle = linear[len(linear) // 3 : -(len(linear) // 3) or None]
        name = max(middle, key=lambda w: w.shape[1]).name
    if name not in weights:
        msg = f"weight must be one of the model's: got '{name}', e.g. '{next(iter(weights))}' is one. Correct the name."
        raise ValueError(msg)
    return read_weight(model.reference.model, weights[name])


def _row(format_: Format, shape: tuple[int, int], values: Tensor | None, quantizer: str) -> dict[str, Any]:
    row: dict[str, Any] = {"format": format_.name, "kind": format_.kind, "group_size": format_.group_size}
    refusal = format_.refusal(shape[1])
    found = None if refusal else describe_format(format_, shape, values, quantizer=quantizer)
    return {
        **row,
        "nominal_bits": format_.bits,
        "entropy_bits": found and found.entropy,
        "packed_bits": found and found.packed,
        "stored_bits": found and found.stored,
        "relative_error": found and found.relative_error,
        "runs_on": list(engines_of(format_)),
        "refusal": refusal,
    }
