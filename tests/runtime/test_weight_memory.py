"""Weights that were moved into large pages are the same weights."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime import weight_memory
from runtime.apply import apply_formats_
from runtime.kernels.dispatch import selected_kernels
from runtime.kernels.weight_views import execution_bytes, find_matrix
from runtime.packed import PackedWeight
from runtime.units import list_weights
from runtime.weight_memory import gather_weights_, has_large_pages
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

needs_large_pages = pytest.mark.skipif(not has_large_pages(), reason="the system gives no large pages")


@needs_large_pages
@pytest.mark.parametrize("build", [lambda: build_tiny_llama(tied=True), build_tiny_mixtral], ids=["tied", "experts"])
def test_weights_and_logits_stay_the_same(build) -> None:  # type: ignore[no-untyped-def]  # a lambda
    model = build()
    formats = ("int4_g32", "int3_g64_sym", "mxfp4", "bf16")
    names = [name for name, weight in list_weights(model).items() if weight.kind != "router"]
    apply_formats_(model, {name: formats[i % 4] for i, name in enumerate(names)})
    tokens = torch.arange(9)[None]
    before, logits = copy.deepcopy(model.state_dict()), model(tokens).logits
    ties = len({t.data_ptr() for t in model.state_dict().values()})
    assert gather_weights_(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len({t.data_ptr() for t in after.values()}) == ties
    assert torch.equal(model(tokens).logits, logits)


@needs_large_pages
@pytest.mark.parametrize("build", [lambda: build_tiny_llama(tied=True), build_tiny_mixtral], ids=["tied", "experts"])
def test_weights_in_an_execution_layout_stay_where_they_are(build) -> None:  # type: ignore[no-untyped-def]  # a lambda
    model = build()
    names = [name for name, weight in list_weights(model).items() if weight.kind != "router"]
    apply_formats_(model, {name: ("int2_g32", "int3_g32", "int4_g32")[i % 3] for i, name in enumerate(names)})
    tokens = torch.arange(3)[None]
    logits = model(tokens).logits
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    weights, kernels = dict(find_products(model)), selected_kernels()
    laid_out = {name for name, weight in weights.items() if kernels is not None and execution_bytes(weight, kernels)}
    assert bool(laid_out) == (kernels is not None and kernels.level == "avx512")
    assert gather_weights_(model)
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, weight in weights.items():
        matrix = find_matrix(weight, torch.device("cpu"))
        assert matrix is not None
        assert (matrix.lookup != 0) == (name in laid_out)
        assert (before[f"{name}.codes"] == after[f"{name}.codes"]) == (name in laid_out)
    # Activations of 15 bits in some layers: a few parts in ten thousand.
    assert (model(tokens).logits - logits).norm() <= 2e-3 * logits.norm()


def find_products(model: torch.nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and "embed" not in name:
            yield name, module


@needs_large_pages
def test_codes_lie_in_one_piece_in_the_order_of_the_layers() -> None:
    model = build_tiny_llama()
    apply_formats_(model, dict.fromkeys(list_weights(model), "int4_g32"))
    assert gather_weights_(model)
    packed = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedWeight)]
    layers = [m.codes for name, m in packed if ".layers." in name]
    addresses = [codes.data_ptr() for codes in layers]
    assert addresses == sorted(addresses)
    assert addresses[0] % (2 << 20) == 0
    assert all(a + c.numel() <= b for a, c, b in zip(addresses, layers, addresses[1:], strict=False))
    assert all(t.data_ptr() % 64 == 0 for _, m in packed for t in m.buffers())


def test_weights_stay_where_there_are_no_large_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build_tiny_llama()
    assert not gather_weights_(model)
    apply_formats_(model, dict.fromkeys(list_weights(model), "int4_g32"))
    for text in ("always madvise [never]", None):
        switch = tmp_path / str(text)
        if text is not None:
            switch.write_text(text)
        monkeypatch.setattr(weight_memory, "_SWITCH", switch)
        before = model.lm_head.weight.codes.data_ptr()
        assert not gather_weights_(model)
        assert model.lm_head.weight.codes.data_ptr() == before
