"""Experts that a token skips while the model runs: those whose weight is small beside that of its first expert.

    expert i of token t in layer l is skipped where  w[t, i] < ratio[l] max_j w[t, j]  and  |x[t]|_1 < magnitude[l],
    the weights of the others grow by  sum_j w[t, j] / sum of those kept,  so that their sum stays.

``ratio`` is a quantile over calibration text of the second weight over the first (the paper's median), ``magnitude``
one of the norms of what reaches the experts: the tokens of the largest few per cent keep all of their experts. The cost
is a comparison a token; every skipped expert is a matrix that is not read.

Left out of the paper's rule: the importance of a token is there this norm times the mean attention that later tokens
pay to it. In a decode step there are no later tokens yet, and in a prompt fused attention does not give its weights.

Papers: Huang et al. 2025 (MC-MoE, arXiv:2410.06270), online dynamic pruning; Lu et al. 2024 (arXiv:2402.14800), the
ratio of weights.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from runtime.expert_modules import bind_expert_call, find_expert_modules, layer_index_of
from runtime.experts_forward import EXPERTS_IMPLEMENTATION
from runtime.files import write_text

SCHEMA_VERSION = 1
# Those of transformers that pass over numbers that are no expert's; the batched ones do not.
_PASSING_OVER = ("eager", EXPERTS_IMPLEMENTATION)


@dataclass(frozen=True, kw_only=True)
class ExpertSkipping:
    """Which experts are skipped, by layer.

    Args:
        layers: Indices of the layers with experts, L of them.
        ratio: [L], weights below this part of the token's largest are skipped; from 0, none, to 1, all but the largest.
        magnitude: [L], sum of absolute values from which a token keeps all of its experts; None where none is so kept.
        weights_fingerprint: Of the model whose text gave the numbers; empty where a user did.

    Raises:
        ValueError: If the numbers do not fit each other or their ranges.
    """

    layers: tuple[int, ...]
    ratio: tuple[float, ...]
    magnitude: tuple[float | None, ...]
    weights_fingerprint: str = ""

    def __post_init__(self) -> None:
        if not len(self.layers) == len(self.ratio) == len(self.magnitude) > 0:
            msg = (
                f"every layer with experts must have a ratio and a magnitude: got {len(self.layers)} layers, "
                f"{len(self.ratio)} ratios, {len(self.magnitude)} magnitudes. Find them again."
            )
            raise ValueError(msg)
        wrong = [ratio for ratio in self.ratio if not 0.0 <= ratio <= 1.0]
        if wrong:
            msg = f"a ratio of expert weights must be from 0 to 1: got ratio={wrong[0]}. Use 0 to skip none."
            raise ValueError(msg)
        wrong = [m for m in self.magnitude if m is not None and not (math.isfinite(m) and m >= 0.0)]
        if wrong:
            msg = f"a magnitude must be a number from 0: got magnitude={wrong[0]}. Use None to protect no token."
            raise ValueError(msg)


@dataclass(kw_only=True)
class VisitCount:
    """Visits of experts while tokens were run.

    Args:
        routed: What the routers chose.
        made: Those that were not skipped.
    """

    routed: int = 0
    made: int = 0

    @property
    def skipped_share(self) -> float:
        """Share of the chosen experts that were skipped; 0 before any token was run."""
        return 1.0 - self.made / self.routed if self.routed else 0.0


def skip_everywhere(model: nn.Module, ratio: float) -> ExpertSkipping:
    """Returns one ratio for all layers of a mixture, and no protected tokens.

    Raises:
        ValueError: If the ratio is not from 0 to 1, or the model has no experts.
    """
    layers = tuple(map(layer_index_of, find_expert_modules(model)))
    return ExpertSkipping(layers=layers, ratio=(ratio,) * len(layers), magnitude=(None,) * len(layers))


def install_skipping_(model: nn.Module, skipping: ExpertSkipping) -> VisitCount:
    """Lets a mixture, packed or not, skip experts from now on; returns what counts the visits.

    Raises:
        ValueError: If the layers are not those of the model that have experts.
    """
    count, _ = _install(model, skipping)
    return count


@contextmanager
def skipped_experts(model: nn.Module, skipping: ExpertSkipping) -> Iterator[VisitCount]:
    """Lets a mixture skip experts inside the context; yields what counts the visits.

    Raises:
        ValueError: If the layers are not those of the model that have experts.
    """
    count, undo = _install(model, skipping)
    try:
        yield count
    finally:
        undo()


def keep_weights(
    hidden: Tensor, chosen: Tensor, gate_weight: Tensor, *, ratio: float, magnitude: float | None, absent: int
) -> tuple[Tensor, Tensor]:
    """Returns the experts of each token, ``absent`` in place of those it skips, and their weights [N, k].

    Args:
        hidden: [N, hidden_size], what reaches the experts.
        chosen: [N, k] int64.
        gate_weight: [N, k].
        ratio: Part of the token's largest weight below which an expert is skipped.
        magnitude: Sum of absolute values from which a token skips none, or None.
        absent: A number that is no expert's.
    """
    kept = gate_weight >= ratio * gate_weight.amax(-1, keepdim=True)
    if magnitude is not None:
        kept |= (hidden.abs().sum(-1) >= magnitude).unsqueeze(-1)
    left = gate_weight * kept
    # What a token keeps holds its largest weight.
    grown = left * (gate_weight.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp(min=1e-30))
    return chosen.where(kept, absent), grown.to(gate_weight.dtype)


def save_skipping(skipping: ExpertSkipping, path: Path) -> None:
    """Writes the numbers to a JSON file, whole or not at all."""
    document = {"schema_version": SCHEMA_VERSION, **asdict(skipping)}
    write_text(path, json.dumps(document, indent=1) + "\n")


def load_skipping(path: Path) -> ExpertSkipping:
    """Returns the numbers in a file.

    Raises:
        ValueError: If it is missing, damaged, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("schema_version") != SCHEMA_VERSION:
            msg = "another schema_version"
            raise ValueError(msg)
        layers, ratio, magnitude = (tuple(document.pop(name)) for name in ("layers", "ratio", "magnitude"))
        return ExpertSkipping(layers=layers, ratio=ratio, magnitude=magnitude, **document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        msg = (
            f"which experts are skipped must be in a file that 'bitplan skip-experts' wrote: got '{path}' ({error}). "
            "Make it again, or name a ratio from 0 to 1."
        )
        raise ValueError(msg) from error


def _install(model: nn.Module, skipping: ExpertSkipping) -> tuple[VisitCount, Callable[[], None]]:
    modules = find_expert_modules(model)
    found = tuple(map(layer_index_of, modules))
    if found != skipping.layers:
        msg = (
            f"experts must be skipped in the layers that have some: got numbers for layers {list(skipping.layers)}, "
            f"the model has experts in {list(found)}. Find them for this model."
        )
        raise ValueError(msg)
    configs: list[Any] = list({id(m.config): m.config for m in modules.values()}.values())
    before = [(config, config._experts_implementation) for config in configs]
    for config in configs:
        if config._experts_implementation not in _PASSING_OVER:
            config._experts_implementation = "eager"
    count = VisitCount()
    numbers = zip(modules.values(), skipping.ratio, skipping.magnitude, strict=True)
    hooks = [
        module.register_forward_pre_hook(_make_hook(ratio, magnitude, count), with_kwargs=True)
        for module, ratio, magnitude in numbers
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for config, implementation in before:
            config._experts_implementation = implementation

    return count, undo


def _make_hook(ratio: float, magnitude: float | None, count: VisitCount) -> Callable[..., Any]:
    def skip(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        hidden, chosen, gate_weight = bind_expert_call(args, kwargs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        absent = module.num_experts
        chosen, gate_weight = keep_weights(flat, chosen, gate_weight, ratio=ratio, magnitude=magnitude, absent=absent)
        count.routed += chosen.numel()
        count.made += int((chosen != absent).sum())
        return (hidden, chosen, gate_weight), {}

    return skip
