"""Past states: what every token sees of the others, against a cache that has been filled up to that token."""

import pytest
import torch

from runtime.cache_formats import CACHE_FORMATS
from runtime.packed_states import make_packed_states
from runtime.past_states import render_past


@pytest.mark.parametrize("name", ["int3_channel", "int4_g32_sym", "bf16", "int2_t32", "int5_t64"])
@pytest.mark.parametrize("tokens", [1, 32, 70])
def test_a_token_sees_what_a_cache_holds_by_then(tokens: int, name: str) -> None:
    states = torch.randn(2, tokens, 3, 32, generator=torch.Generator().manual_seed(tokens)).transpose(1, 2)
    seen = render_past(states, CACHE_FORMATS[name])
    cache = make_packed_states(CACHE_FORMATS[name])
    for t in range(tokens):
        if t:
            complete = torch.ones(t, dtype=torch.bool) if seen.complete is None else seen.complete[t, :t]
            others = torch.where(complete[:, None], seen.past[:, :, :t], seen.recent[:, :, :t])
            assert torch.equal(others, cache.read(torch.float32))
        assert seen.complete is None or not seen.complete[t, t:].any()
        cache.append(states[:, :, t : t + 1])


@pytest.mark.parametrize("name", ["int3_channel", "int2_t32"])
def test_scores_and_sums_are_those_of_the_states_that_each_token_sees(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    states, query = torch.randn(2, 1, 2, 40, 32, generator=generator).double().unbind(0)
    seen = render_past(states, CACHE_FORMATS[name]).repeated(1)
    shares = torch.rand(1, 2, 40, 40, generator=generator).double()
    scores, sums = seen.scores(query), seen.mix(shares)
    for t in (0, 5, 31, 32, 39):
        own = seen.past if seen.complete is None else torch.where(seen.complete[t, :, None], seen.past, seen.recent)
        torch.testing.assert_close(scores[0, :, t], (own @ query[:, :, t, :, None])[0, ..., 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(sums[0, :, t], (shares[0, :, t, None] @ own[0])[:, 0], rtol=0, atol=1e-12)


def test_states_without_a_format_are_themselves() -> None:
    states = torch.randn(1, 2, 5, 16)
    seen = render_past(states, None)
    assert seen.past is states and seen.recent is states and seen.complete is None
