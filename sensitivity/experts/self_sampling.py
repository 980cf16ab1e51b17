"""Expert-balanced self-sampling: calibration text that a mixture writes itself, using its experts evenly.

From a random first token a beam search over continuations c keeps those of the lowest

    score(c) = -(sum of log P(token | before)) / |c| + sigma(c) / tau,

|c| tokens long, where sigma(c) is the usage spread of the experts over c (the standard deviation of the frequencies of
a layer's experts, averaged over the layers) and tau the temperature: text that the model finds likely, and that no
expert is left out of. Low is good in both terms; the published figure takes the TopK of this score, a slip of sign.
Every step extends each of w beams by its m most likely tokens, runs these w m continuations, so that sigma counts the
token just added, and keeps w. Deterministic but for the first token, the search repeats itself on small models;
``drawn`` takes the m tokens as a sample without replacement (Gumbel top-k) instead of the most likely ones.

``carried`` counts the experts of the sequences finished before into sigma, so that the whole text is balanced and not
each sequence by itself; the published sampler is not known to do so.

On a trained mixture of 16 experts the published settings took the spread over the whole text from 0.075 (plain samples)
to 0.055, but the same search without balance to 0.056: at tau 1.2 likelihood decides. Drawn tokens, finished sequences
carried, and tau 0.1 gave 0.045, with half as many different tokens again.

Complexity: T steps of w m rows a sequence, with a cache. Limits: the text is far likelier than what people write, and
repeats itself; what it is good for has to be measured on text that it did not make.
Source: Chen et al. 2025, "MoEQuant", arXiv:2505.03804, algorithm 1 (tau 1.2, w 4, 128 sequences of 512 tokens).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.expert_modules import find_expert_modules
from sensitivity.calibration import TokenSequences
from sensitivity.experts.expert_calls import ExpertCall, watched_experts


@dataclass(frozen=True, kw_only=True)
class BalancedSampling:
    """Settings of the search.

    Args:
        beams: Continuations kept, w.
        branches: Tokens that each of them is extended by, m.
        temperature: tau; the larger, the less the balance counts.
        drawn: Whether these tokens are drawn from the model's distribution; otherwise they are the most likely ones.
        carried: Whether the experts of the sequences finished before count.
        batch: Sequences searched together.

    Raises:
        ValueError: If a number is not positive.
    """

    beams: int = 4
    branches: int = 4
    temperature: float = 1.2
    drawn: bool = False
    carried: bool = False
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("beams", "branches", "temperature", "batch"):
            if getattr(self, name) <= 0:
                msg = f"{name} must be above 0: got {name}={getattr(self, name)} in BalancedSampling. Raise it."
                raise ValueError(msg)


def sample_balanced_sequences(
    model: Any,
    tokenizer: Any,
    *,
    sequences: int,
    sequence_tokens: int,
    seed: int,
    sampling: BalancedSampling | None = None,
) -> TokenSequences:
    """Returns sequences that a mixture samples from itself with its experts in balance.

    Args:
        model: A mixture of experts.
        tokenizer: Its tokenizer; its special tokens are no first tokens, its begin-of-text token goes before them.
        sequences: S.
        sequence_tokens: T, without the begin-of-text token.
        seed: Seed of the first tokens and of what is drawn.
        sampling: Settings; None for the published ones.

    Raises:
        ValueError: If the model has no experts.
    """
    sampling = sampling or BalancedSampling()
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(min(len(tokenizer), model.config.vocab_size)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    first = ordinary[torch.randint(len(ordinary), (sequences,), generator=generator)]
    found = []
    usage: Tensor | None = None
    for start in range(0, sequences, sampling.batch):
        part = first[start : start + sampling.batch]
        search = _Search(model, part, sampling, generator, usage=usage if sampling.carried else None)
        found.append(search.run(tokenizer.bos_token_id, sequence_tokens))
        usage = search.usage_of_best() if usage is None else usage + search.usage_of_best()
    return TokenSequences(tokens=torch.cat(found), source=f"sampled from the model with balanced experts, seed {seed}")


class _Search:
    """The beams of a few sequences. Rows are ordered by sequence, then by beam.

    Args:
        model: The model.
        first: [G] first tokens.
        sampling: Settings.
        generator: Source of what is drawn.
        usage: [L, E] tokens of each expert in earlier sequences, or None.
    """

    def __init__(
        self, model: Any, first: Tensor, sampling: BalancedSampling, generator: torch.Generator, usage: Tensor | None
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._generator = generator
        self._layer_of = {name: row for row, name in enumerate(find_expert_modules(model))}
        experts = max(int(module.num_experts) for module in find_expert_modules(model).values())
        self._earlier = torch.zeros((len(self._layer_of), experts)) if usage is None else usage
        self._tokens = first[:, None]
        self._usage = torch.zeros((len(first), *self._earlier.shape))
        self._log_p = torch.zeros(len(first))
        self._cache: Any = None
        self._taken = 1  # experts a token takes; known after the first run

    @torch.no_grad()
    def run(self, begin: int | None, length: int) -> Tensor:
        """Returns the best continuation [G, length] of every first token."""
        groups = len(self._tokens)
        if begin is not None:
            self._feed(torch.full((groups, 1), begin))
            # The text is what is balanced, not its begin-of-text token.
            self._usage.zero_()
        log_p = self._feed(self._tokens)
        while self._tokens.shape[1] < length:
            log_p = self._step(groups, log_p)
        # The beams are in the order of their scores.
        self._select(torch.arange(groups) * (len(self._tokens) // groups))
        return self._tokens

    def usage_of_best(self) -> Tensor:
        """Returns the tokens of each expert [L, E] in the sequences that ``run`` returned."""
        return self._usage.sum(dim=0)

    def _step(self, groups: int, log_p: Tensor) -> Tensor:
        """Extends and prunes the beams; returns the log probabilities [rows, V] of what follows the kept ones."""
        branches = min(self._sampling.branches, log_p.shape[1])
        preferred = log_p
        if self._sampling.drawn:
            uniform = torch.rand(log_p.shape, generator=self._generator)
            preferred = log_p - torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float32).tiny)))
        added = preferred.topk(branches, dim=-1).indices
        self._select(torch.arange(len(log_p)).repeat_interleave(branches))
        self._log_p += log_p.gather(1, added).flatten()
        self._tokens = torch.cat([self._tokens, added.reshape(-1, 1)], dim=1)
        following = self._feed(self._tokens[:, -1:])
        score = self._score().view(groups, -1)
        kept = score.argsort(dim=-1, stable=True)[:, : self._sampling.beams]
        rows = (kept + torch.arange(groups)[:, None] * score.shape[1]).flatten()
        self._select(rows)
        return following[rows]

    def _score(self) -> Tensor:
        usage = self._usage + self._earlier
        # Every token takes k experts, so their counts tell the number of tokens, earlier sequences included.
        tokens = usage.sum(dim=-1, keepdim=True) / self._taken
        spread = (usage / tokens).std(dim=-1).mean(dim=-1)
        return -self._log_p / self._tokens.shape[1] + spread / self._sampling.temperature

    def _feed(self, tokens: Tensor) -> Tensor:
        """Runs one more token [rows, 1] and returns the log probabilities [rows, V] of the next."""
        with watched_experts(self._model, self._count):
            output = self._model(tokens, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return torch.log_softmax(output.logits[:, -1].float(), dim=-1)

    def _count(self, call: ExpertCall) -> None:
        self._taken = call.chosen.shape[1]
        row = self._usage[:, self._layer_of[call.module_name]]
        row.scatter_add_(1, call.chosen, torch.ones(call.chosen.shape))

    def _select(self, rows: Tensor) -> None:
        self._tokens, self._usage, self._log_p = self._tokens[rows], self._usage[rows], self._log_p[rows]
        self._cache.reorder_cache(rows)
