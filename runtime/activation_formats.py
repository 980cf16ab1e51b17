"""Formats of activations: the inputs of linear layers, rounded before they are multiplied.

    x^ = s * round_to_element(x / s)

Elements are integers of 4 or 8 bits, symmetric, or FP8 E4M3. A scale s belongs to

    token      one token's input: computed when it is there (dynamic)
    tensor     all tokens of a sequence: computed when they are there (dynamic), or set beforehand (static)
    channel    one input channel: set beforehand (static), as it may then be folded into the weights

A dynamic scale maps the largest magnitude to the end of the range, 127.5 steps of 8 bits, as compressed-tensors does:

    |x - x^| <= s / 2                       integers,
    |x - x^| <= max(|x| / 16, s / 1024)     E4M3, which has 3 bits of mantissa and steps of 2^-9 at the least.

A static one is the factor of the largest magnitude on calibration text that leaves the least squared error there
(``STATIC_FACTORS``); what exceeds it is clipped.

Limits: zero is always a value; asymmetric activations are not here. A sequence's dynamic scale sees all of its tokens,
later ones too, as in a prefill; token by token it is that of the token.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.formats import FORMATS, Format

SCOPES = ("token", "tensor", "channel")
STATIC_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
UNQUANTIZED = "bf16"
_E4M3_LARGEST = 448.0
# No smaller scale: zeros stay zeros.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class ActivationFormat(Format):
    """A format of activations; never one of weights.

    Args:
        scope: What shares a scale, one of ``SCOPES``.
        static: Whether the scale is set beforehand, on calibration text.
    """

    scope: str
    static: bool

    @property
    def reach(self) -> float:
        """The magnitude, in scales, that a scale is set by: half of the range of the codes, or the largest float."""
        return _E4M3_LARGEST if self.element else ((1 << self.bits) - 1) / 2

    @property
    def limit(self) -> int:
        """Integers are from -limit to limit - 1."""
        return 1 << (self.bits - 1)


def _make_format(name: str, bits: int, element: str, scope: str, static: bool) -> ActivationFormat:
    return ActivationFormat(
        name=f"{name}_{scope}" + ("_static" if static else ""),
        kind="activation",
        bits=bits,
        element=element,
        scope=scope,
        static=static,
    )


ACTIVATION_FORMATS: dict[str, Format] = {
    UNQUANTIZED: FORMATS[UNQUANTIZED],
    **{
        format_.name: format_
        for name, bits, element in (("int8", 8, ""), ("int4", 4, ""), ("fp8", 8, "e4m3"))
        for scope, static in (("token", False), ("tensor", False), ("tensor", True), ("channel", True))
        if (format_ := _make_format(name, bits, element, scope, static))
    },
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationRounding:
    """How a layer rounds what it reads.

    Args:
        format: An activation format.
        scale: Of a static format, [1] or [channels]; None for a dynamic one.
    """

    format: Format
    scale: Tensor | None = None

    def render(self, x: Tensor) -> Tensor:
        """Returns activations [..., tokens, channels] as the layer reads them."""
        return render_activations(x, self.format, self.scale)

    def list_row_scales(self, x: Tensor) -> Tensor | None:
        """Returns the scale of each row of activations, [rows] float32; None where it is that of the row alone.

        Args:
            x: [..., tokens, channels]; the format has a scale for a token or a tensor.
        """
        assert isinstance(self.format, ActivationFormat) and self.format.scope != "channel"
        if self.format.scope == "token":
            return None
        rows = x.shape[:-1]
        if self.scale is not None:
            return torch.full((rows.numel(),), float(self.scale), dtype=torch.float32, device=x.device)
        return _dynamic_scale(x.to(torch.float32), self.format).expand(*rows, 1).reshape(-1)


def find_activation_formats(names: Iterable[str]) -> tuple[Format, ...]:
    """Returns the activation formats of ``names``, in order.

    Raises:
        ValueError: If a name is unknown or named twice, or there is no name at all.
    """
    named = list(names)
    unknown = [name for name in named if name not in ACTIVATION_FORMATS]
    if unknown:
        alike = difflib.get_close_matches(unknown[0], ACTIVATION_FORMATS, n=3, cutoff=0.0)
        msg = (
            f"an activation format must be a known name: got '{unknown[0]}'. Spelled alike: {', '.join(alike)}. Known: "
            f"{', '.join(ACTIVATION_FORMATS)}."
        )
        raise ValueError(msg)
    if not named or len(set(named)) != len(named):
        msg = f"activation formats must name at least one format, each once: got {named}. Remove the repeats."
        raise ValueError(msg)
    return tuple(ACTIVATION_FORMATS[name] for name in named)


def render_activations(x: Tensor, format_: Format, scale: Tensor | None = None) -> Tensor:
    """Returns activations [..., tokens, channels] as a product reads them in a format.

    Args:
        x: As they are; axes before the last two are sequences.
        format_: An activation format.
        scale: Of a static format, [1] or [channels]; None for a dynamic one.
    """
    if not isinstance(format_, ActivationFormat):
        return x.to(torch.bfloat16).to(x.dtype)
    wide = x.to(torch.float32)
    s = _dynamic_scale(wide, format_) if scale is None else scale.to(wide.device)
    return round_to_scale(wide, format_, s).to(x.dtype)


def round_to_scale(x: Tensor, format_: ActivationFormat, scale: Tensor) -> Tensor:
    """Returns float32 activations rounded to elements times a scale that broadcasts over them."""
    s = scale.clamp(min=_LEAST_SCALE)
    if format_.element:
        return (x / s).clamp_(-_E4M3_LARGEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).to(torch.float32).mul_(s)
    return round_to_integers(x, format_, s).mul_(s)


def round_to_integers(x: Tensor, format_: ActivationFormat, scale: Tensor) -> Tensor:
    """Returns the integers, in float32, of float32 activations in an integer format; the scale is not zero."""
    return (x / scale).round_().clamp_(-format_.limit, format_.limit - 1)


def spanning_scale(x: Tensor, format_: ActivationFormat, dims: tuple[int, ...]) -> Tensor:
    """Returns the scale that maps the largest magnitude over some axes, which are kept, to the end of the range."""
    return x.abs().amax(dim=dims, keepdim=True) / format_.reach


def _dynamic_scale(x: Tensor, format_: ActivationFormat) -> Tensor:
    if format_.static:
        msg = f"a static activation format needs a scale: got none for '{format_.name}'. Use that of its profile."
        raise ValueError(msg)
    return spanning_scale(x, format_, (-1,) if format_.scope == "token" else (-2, -1))
