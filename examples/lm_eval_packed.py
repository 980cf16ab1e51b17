"""A packed model under lm-eval, on a task that needs no download: the Python language reference, bits per byte.

    pip install lm-eval
    python examples/lm_eval_packed.py packed/ [--documents 4]

The text is that of the interpreter's own help. A reference model is compared by naming its directory as well: what is
printed is one row a directory.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import runtime.transformers_quantizer  # noqa: F401 (with it, transformers loads packed models)
from allocator.demo_text import write_reference_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, help="packed models, or others that transformers loads")
    parser.add_argument("--documents", type=int, default=4, help="topics of the reference")
    options = parser.parse_args()
    for directory in options.directories:
        scores = evaluate(directory, options.documents)
        print(directory, {name: round(value, 4) for name, value in scores.items()})


def evaluate(directory: Path, documents: int) -> dict[str, float]:
    """Returns metric -> value of a model on the task."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    with tempfile.TemporaryDirectory() as scratch:
        found: Any = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512),
            tasks=[make_task(write_reference_text(Path(scratch)))],
            limit=documents,
            bootstrap_iters=0,
        )
    results = found["results"]["python_reference"]
    return {name.partition(",")[0]: value for name, value in results.items() if isinstance(value, float)}


def make_task(text: Path) -> dict[str, Any]:
    """Returns lm-eval's description of the task."""
    return {
        "task": "python_reference",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(text)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    }


if __name__ == "__main__":
    main()
