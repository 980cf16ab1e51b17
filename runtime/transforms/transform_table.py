"""The table of transforms, their names with options, and their application to a model.

A transform has two halves. ``find(model, tokens, *, options) -> tensors`` reads the model, and calibration text where
it needs any; it alone depends on how a machine rounds. ``fold_(model, tensors)`` rewrites the weights in place. So what
was found can be kept, and folded again later into the same weights.

In text a transform is its name with options: ``smoothquant``, ``smoothquant:alpha=0.7``, ``hadamard:seed=3``.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.transforms.aware_scaling import find_aware_scales
from runtime.transforms.equalization import find_equalization
from runtime.transforms.exponent_bias import find_exponent_biases
from runtime.transforms.head_rotation import find_head_rotations, rotate_heads_
from runtime.transforms.principal_axes import find_principal_rotation
from runtime.transforms.rescaling import draw_scales
from runtime.transforms.residual_rotation import find_hadamard_rotation, find_random_rotation, rotate_residual_
from runtime.transforms.scale_folding import fold_scales_
from runtime.transforms.smoothing import find_smoothing
from runtime.transforms.tied_head import untie_head_

# A difference of logits that is far above rounding in float32 and far below what a wrong rewrite does.
_LOGIT_TOLERANCE = 1e-3
_PROBE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A function-preserving rewrite.

    Args:
        find: (model, tokens [S, T] or None, options) -> name -> tensor.
        fold_: Rewrites the model by these tensors, in place.
    """

    find: Callable[..., dict[str, Tensor]]
    fold_: Callable[[Any, Mapping[str, Tensor]], None]


def _find_nothing(model: nn.Module, tokens: Tensor | None) -> dict[str, Tensor]:
    return {}


TRANSFORMS: dict[str, Transform] = {
    "smoothquant": Transform(find=find_smoothing, fold_=fold_scales_),
    "outliertune": Transform(find=partial(find_smoothing, alpha=1.0), fold_=fold_scales_),
    "mergequant": Transform(find=partial(find_smoothing, alpha=1.0, sites="norms"), fold_=fold_scales_),
    "equalize": Transform(find=find_equalization, fold_=fold_scales_),
    "awq": Transform(find=find_aware_scales, fold_=fold_scales_),
    "exponent_bias": Transform(find=find_exponent_biases, fold_=fold_scales_),
    "random_rescaling": Transform(find=draw_scales, fold_=fold_scales_),
    "untie": Transform(find=_find_nothing, fold_=lambda model, _: untie_head_(model)),
    "hadamard": Transform(find=find_hadamard_rotation, fold_=rotate_residual_),
    "random_rotation": Transform(find=find_random_rotation, fold_=rotate_residual_),
    "pca": Transform(find=find_principal_rotation, fold_=rotate_residual_),
    "head_hadamard": Transform(find=find_head_rotations, fold_=rotate_heads_),
}


@dataclass(frozen=True, kw_only=True)
class NamedTransform:
    """A transform of the table with its options.

    Args:
        name: Name in ``TRANSFORMS``.
        options: Option -> value, all of them.
    """

    name: str
    options: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The name with all options, which ``parse_transform`` reads back."""
        return ":".join([self.name, *(f"{option}={value}" for option, value in self.options.items())])


def parse_transform(text: str) -> NamedTransform:
    """Returns the transform that a text names.

    Raises:
        ValueError: If the name or an option is unknown, or a value is not of the option's type.
    """
    name, *assignments = text.split(":")
    if name not in TRANSFORMS:
        msg = f"transform must be a known name: got '{name}'. Known transforms: {', '.join(TRANSFORMS)}."
        raise ValueError(msg)
    parameters = inspect.signature(TRANSFORMS[name].find).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for assignment in assignments:
        option, _, value = assignment.partition("=")
        if option not in options:
            known = ", ".join(options) or "none"
            msg = f"options of '{name}' must be known: got '{assignment}'. Known options: {known}."
            raise ValueError(msg)
        kind = type(options[option])
        try:
            options[option] = kind(value)
        except ValueError as error:
            msg = f"option '{option}' of '{name}' must be of type {kind.__name__}: got '{value}'. Correct the value."
            raise ValueError(msg) from error
    return NamedTransform(name=name, options=options)


def apply_transforms_(
    model: Any,
    transforms: Sequence[NamedTransform],
    tokens: Tensor | None = None,
    *,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Applies transforms one after the other, in place, and returns the tensors that they were folded by.

    Args:
        model: A decoder in evaluation mode.
        transforms: In this order; each reads the model that the one before left.
        tokens: [S, T] int64 of calibration text; may be None where none of them reads any.
        known: Tensors that an earlier call returned, to be folded again; None to find them.

    Raises:
        ValueError: If the model is not of the kind that a transform knows, there is no text for one that reads it,
            or the logits of what was found are others than before.
    """
    probe = None if known is not None or tokens is None else tokens[:1, :_PROBE_TOKENS]
    logits = None if probe is None else _compute_logits(model, probe)
    used: dict[str, Tensor] = {}
    for i, transform in enumerate(transforms):
        entry, prefix = TRANSFORMS[transform.name], f"{i} "
        if known is None:
            tensors = entry.find(model, tokens, **transform.options)
        else:
            tensors = {name.removeprefix(prefix): t for name, t in known.items() if name.startswith(prefix)}
        # In memory of its own, row after row: products with numbers laid out otherwise may round differently.
        tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        entry.fold_(model, tensors)
        used |= {prefix + name: tensor for name, tensor in tensors.items()}
    if probe is not None and logits is not None:
        _check_logits(model, transforms, logits, _compute_logits(model, probe))
    return used


def fingerprint_transforms(transforms: Sequence[NamedTransform], tensors: Mapping[str, Tensor]) -> str:
    """Returns a hash of transforms and all that they were folded by, as 64 hexadecimal digits."""
    digest = hashlib.sha256(repr([transform.text for transform in transforms]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _compute_logits(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits.double()


def _check_logits(model: nn.Module, transforms: Sequence[NamedTransform], before: Tensor, after: Tensor) -> None:
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= _LOGIT_TOLERANCE * largest:
        msg = (
            f"transforms must leave the logits as they are: got a difference of {difference:g} where the largest is "
            f"{largest:g}, after {', '.join(t.text for t in transforms)} on {type(model).__name__}. Its layers do more "
            "than their parts say; measure this model without transforms."
        )
        raise ValueError(msg)
