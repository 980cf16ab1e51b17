"""The pass over weights in two parts, against float64 and against the modules."""

from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache

from runtime.apply import apply_formats_
from runtime.compiled_decoder import compile_decoder, install_compiled_decoder_
from runtime.kernels.cpu import load_kernels
from runtime.kernels.decoder_step import CompiledDecoder
from runtime.kernels.dispatch import kernel_path
from runtime.kernels.plane_step import PlaneDecoder
from runtime.read_widths import set_width_
from runtime.units import list_weights
from tests.nan_outputs import nan_filled_outputs
from tests.runtime.test_compiled_decoder import LEVELS, MODELS, draw_tokens, run_by_parts, run_in_float64

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
FORMATS = ("nested4_8_g32", "nested4_6_g64", "int5_channel", "nested4_8_channel")


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nan_filled_outputs(monkeypatch):
        yield


def pack(name: str) -> torch.nn.Module:
    model = MODELS[name]()
    apply_formats_(model, {name: FORMATS[i % len(FORMATS)] for i, name in enumerate(list_weights(model))})
    assert install_compiled_decoder_(model.requires_grad_(False)) is None
    return model


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_to_float64_as_those_of_the_modules(name: str, level: str) -> None:
    model = pack(name)
    assert isinstance(compile_decoder(model), PlaneDecoder)
    tokens = draw_tokens(24)
    expected = run_in_float64(model, tokens)
    with kernel_path(level):
        modules = model(tokens, use_cache=False).logits[0]
        # Steps that keep their buffers, and are made twice, and steps that do not.
        planes = run_by_parts(model, tokens, [9, 1, 1, 3, 1, 5, 3, 1])
    allowed = (modules.double() - expected).norm()
    # Roundings of another order are another draw of the same error, and float32 itself adds some.
    assert (planes.double() - expected).norm() <= 2 * allowed + 1e-5 * expected.norm()
    assert allowed <= 2e-3 * expected.norm()


def test_the_low_width_runs_in_one_compiled_pass() -> None:
    model = pack("llama")
    set_width_(model, 4)
    assert isinstance(compile_decoder(model), CompiledDecoder)


def test_threads_and_buffers_do_not_change_the_logits() -> None:
    model, tokens, threads = pack("llama, tied"), draw_tokens(14), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [run_by_parts(model, tokens, [9, 1, 1, 3]) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_logits_of_a_step_stay_when_the_next_is_made() -> None:
    model = pack("llama, tied")
    first = model(draw_tokens(1), past_key_values=DynamicCache())
    kept = first.logits.clone()
    model(draw_tokens(1, seed=1), past_key_values=first.past_key_values)
    assert torch.equal(first.logits, kept)
