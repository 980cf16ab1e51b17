"""Self-speculative decoding: nested weights draft at few bits, the same weights verify at all of them.

    draft    d_1 .. d_K one by one, each pass reading the low width alone
    verify   the last token and d_1 .. d_K in one pass at the full width, over the keys and values that drafting left
    keep     the drafts that the full width would have taken itself, and its own token behind them

There is one set of weights and one cache; the keys and values of drafts are overwritten by those of the verification.
The result is that of greedy decoding at the full width: a token is kept where it is the most likely one there. Logits
of a pass over several tokens differ from those of single tokens by the kernels' rounding, which decides ties only.

Drafting pays where a pass over K + 1 tokens costs little more than over one; ``benchmarks/draft.md`` has it for a CPU.

Paper: Zhao et al. 2025 (QSpec, arXiv:2410.11305), there with two precisions of activations over one set of weights.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from runtime.compiled_decoder import begin_sequence
from runtime.decoder_cache import DecoderCache
from runtime.decoder_run import run_tokens
from runtime.decoder_tensors import compile_decoder
from runtime.greedy_generation import check_plainly_greedy, list_ends
from runtime.read_widths import read_at_width


@dataclass(frozen=True, kw_only=True)
class DraftCount:
    """How drafting went.

    Args:
        passes: Passes at the full width behind the prompt.
        drafted: Tokens drafted.
        accepted: Those that were kept.
    """

    passes: int
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were kept; 0 where none was drafted."""
        return self.accepted / max(1, self.drafted)

    def describe(self) -> str:
        """Returns one line for people."""
        return f"{self.accepted} of {self.drafted} tokens kept, in {self.passes} passes at the full width"


@torch.inference_mode()
def continue_with_drafts(
    model: Any, input_ids: Tensor, *, max_new_tokens: int, draft_tokens: int, width: int, past: Any = None
) -> tuple[Tensor, DraftCount]:
    """Returns [1, tokens] of a text and its greedy continuation, up to a token that ends texts, and how it was drafted.

    Args:
        model: A packed model with nested weights.
        input_ids: [1, tokens], at least one.
        max_new_tokens: Most tokens of the continuation, at least 1.
        draft_tokens: Most tokens drafted at a time, at least 1.
        width: Bits at which drafts are made.
        past: A cache of transformers' plain kind with what comes before the text, or None.

    Raises:
        ValueError: If the model has no nested weights or none so narrow, no token is to be drafted, or its generation
            config asks for more than the most likely token.
    """
    if draft_tokens < 1:
        msg = f"draft_tokens must be at least 1: got draft_tokens={draft_tokens}. Generate without drafts instead."
        raise ValueError(msg)
    check_plainly_greedy(model)
    passes = _begin_passes(model, width, DynamicCache() if past is None else past)
    ends = list_ends(model.generation_config.eos_token_id)
    found = [passes.choose(input_ids[0].tolist(), wanted=1)[0]]
    verified = drafted = accepted = 0
    while len(found) < max_new_tokens and found[-1] not in ends:
        drafts = _draft(passes, found[-1], min(draft_tokens, max_new_tokens - len(found) - 1), ends)
        chosen = passes.choose([found[-1], *drafts], wanted=len(drafts) + 1)
        agreed = next((i for i, draft in enumerate(drafts) if draft != chosen[i]), len(drafts))
        passes.forget(len(drafts) - agreed)
        found += _cut_behind_end(chosen[: agreed + 1], ends)
        verified, drafted, accepted = verified + 1, drafted + len(drafts), accepted + agreed
    tokens = torch.cat([input_ids, torch.tensor([found])], dim=1)
    return tokens, DraftCount(passes=verified, drafted=drafted, accepted=accepted)


def _cut_behind_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]


def _draft(passes: "_CompiledPasses | _ModulePasses", last: int, count: int, ends: Collection[int]) -> list[int]:
    """Returns up to ``count`` tokens behind the last one, up to a token that ends texts; the cache is as before."""
    drafts: list[int] = []
    while len(drafts) < count and not (drafts and drafts[-1] in ends):
        drafts += passes.choose([drafts[-1] if drafts else last], wanted=1, drafts=True)
    passes.forget(len(drafts))
    return drafts


def _begin_passes(model: Any, width: int, past: Any) -> "_CompiledPasses | _ModulePasses":
    cache = begin_sequence(model, past)
    return _ModulePasses(model, width, past) if cache is None else _CompiledPasses(model, width, cache)


class _CompiledPasses:
    """Passes of the compiled decoder at both widths over one cache."""

    def __init__(self, model: Any, width: int, cache: DecoderCache) -> None:
        self._model, self._cache = model, cache
        self._full = cache.decoder
        with read_at_width(model, width):
            self._low = compile_decoder(model)

    def choose(self, tokens: list[int], *, wanted: int, drafts: bool = False) -> list[int]:
        """Returns the most likely token behind each of the last tokens, all of which join the cache."""
        self._cache.decoder = self._low if drafts else self._full
        logits = run_tokens(self._model, self._cache, torch.tensor([tokens]), wanted=wanted)
        # NumPy's search uses the vector instructions of the processor, torch's does not.
        chosen: list[int] = logits.numpy().argmax(-1).tolist()
        return chosen

    def forget(self, count: int) -> None:
        """Takes the last tokens out of the cache."""
        if count:
            self._cache.crop(-count)


class _ModulePasses:
    """The same passes module by module, for models that the compiled decoder does not know."""

    def __init__(self, model: Any, width: int, cache: DynamicCache) -> None:
        self._model, self._cache, self._width = model, cache, width
        with read_at_width(model, width):
            pass  # Refuses a width that is not there before anything is run.

    def choose(self, tokens: list[int], *, wanted: int, drafts: bool = False) -> list[int]:
        """Returns the most likely token behind each of the last tokens, all of which join the cache."""
        if drafts:
            with read_at_width(self._model, self._width):
                return self._choose(tokens, wanted)
        return self._choose(tokens, wanted)

    def _choose(self, tokens: list[int], wanted: int) -> list[int]:
        logits = self._model(torch.tensor([tokens]), past_key_values=self._cache, logits_to_keep=wanted).logits
        chosen: list[int] = logits[0].argmax(-1).tolist()
        return chosen

    def forget(self, count: int) -> None:
        """Takes the last tokens out of the cache."""
        if count:
            self._cache.crop(-count)
