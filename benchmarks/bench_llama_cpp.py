"""Plans against llama.cpp's own mixes of the same file size, on SmolLM2-135M. Writes llama_cpp.md.

    python benchmarks/bench_llama_cpp.py [--tools DIRECTORY] [--refine ROUNDS] [--chunks CHUNKS] [--with-matrix RULE]

The rivals are made by llama-quantize from the unquantized file that bitplan exports, once without an importance matrix
and once with one, which is bitplan's own. The size of each rival's file is the budget of a plan, so that a plan is
never a byte larger. Without the matrix a plan's codes are rounded to nearest; with it they come of the same text by
GPTQ, or by ``--with-matrix weighted_clipping``, which reads no more of it than the matrix holds. Each of the two has a
profile of its own, measured on what will be written. All KL is llama-perplexity's; ``llama_cpp_tools.py`` says how to
build the two programs.

All of it is kept in the store and found again: the profile, measured plans, files, their KL.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from llama_cpp_tools import CONTEXT_TOKENS, Tools
from machine import describe_machine

import allocator
from allocator.artefacts import Model, provenance
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.demo_text import python_reference_text
from allocator.engine_rules import engine_fixed_bytes, restrict_profile
from allocator.planning import default_metric, find_assignment, make_plan
from allocator.problems import build_cost_tables
from allocator.progress import Progress, shown_progress
from allocator.refinement import Refinement
from allocator.renderings import rendering_of_plan
from allocator.store import Store
from runtime.engines import find_engine
from runtime.exporters import export
from runtime.exporters.gguf_imatrix import write_importance_matrix
from runtime.units import list_weights
from sensitivity.measure_config import FISHER, MeasureConfig
from sensitivity.profile import SensitivityProfile
from sensitivity.weight_inputs import find_statistics

ENGINE = find_engine("llama.cpp")
MIXES = ("Q3_K_S", "Q4_0", "Q3_K_M", "Q4_K_M", "Q5_K_M")
# The rules that render a plan's codes: without a matrix; with one, of which the first is the table's.
WITHOUT_MATRIX = "rtn"
WITH_MATRIX = ("gptq", "weighted_clipping")
Kl = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The rivals of one mix and the plan of their size.

    Args:
        mix: llama.cpp's name of the mix.
        rival_bytes: Bytes of its file.
        rivals: Whether an importance matrix was used -> mean KL, nats per token, and its standard error.
        plan_bytes: Whether it was used -> bytes of the plan's file.
        predicted: The same -> KL that the plan predicted.
        plans: The same -> KL of the plan, as of the rivals.
    """

    mix: str
    rival_bytes: int
    rivals: dict[bool, Kl]
    plan_bytes: dict[bool, int]
    predicted: dict[bool, float]
    plans: dict[bool, Kl]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", type=Path, help="directory of llama-quantize and llama-perplexity")
    parser.add_argument("--refine", type=int, default=0, help="rounds of refinement; none: one solve")
    parser.add_argument("--chunks", type=int, default=12, help=f"pieces of {CONTEXT_TOKENS} tokens of the text")
    parser.add_argument("--with-matrix", choices=WITH_MATRIX, default=WITH_MATRIX[0], help="rule of a plan's codes")
    options = parser.parse_args()
    try:
        tools = Tools.find(options.tools)
    except FileNotFoundError as error:
        # `make bench` goes on with the other tables.
        parser.exit(message=f"left out: {error}\n")
    rules = {False: WITHOUT_MATRIX, True: options.with_matrix}
    bench = Bench(tools, Store(), rules, options.refine, options.chunks)
    with shown_progress() as progress:
        rows = [bench.compare(mix, progress) for mix in MIXES]
    text = render(rows, options)
    (Path(__file__).parent / "llama_cpp.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measure(model: Model, quantizer: str, store: Store, progress: Progress) -> SensitivityProfile:
    """Returns the profile of the formats that llama.cpp runs, rendered by a rule."""
    config = MeasureConfig(metrics=(FISHER,), fisher_sequences=48, fit_plans=None, quantizer=quantizer)
    request = replace(demo_request(store), formats=ENGINE.menu, embedding_formats=ENGINE.menu, config=config)
    return allocator.measure(model, request=request, store=store, progress=progress)


class Bench:
    """Makes and measures the files; what is there already is not made again.

    Args:
        tools: llama.cpp's programs.
        store: Where everything is kept.
        rules: Whether an importance matrix is used -> the rule that renders a plan's codes.
        refine: Rounds of refinement.
        chunks: Pieces of text that a KL is measured on.
    """

    def __init__(self, tools: Tools, store: Store, rules: dict[bool, str], refine: int, chunks: int) -> None:
        self._tools, self._store, self._rules, self._refine = tools, store, rules, refine
        self._model = Model(str(prepare_demo_model(store.root)))
        self._place = store.root / "llama.cpp"
        self._place.mkdir(parents=True, exist_ok=True)
        self._base = self._write_base(chunks)

    def compare(self, mix: str, progress: Progress) -> Row:
        """Returns the rivals of a mix beside the plans of their size."""
        profiles = {
            weighted: measure(self._model, quantizer, self._store, progress)
            for weighted, quantizer in self._rules.items()
        }
        imatrix = self._find_matrix(profiles[True])
        rivals = {weighted: self._make_rival(mix, imatrix if weighted else None) for weighted in profiles}
        # The matrix's name is in the file's metadata: some hundred bytes that a plan's file does not have.
        size = min(path.stat().st_size for path in rivals.values())
        plans = {weighted: self._make_plan(profile, size, progress) for weighted, profile in profiles.items()}
        for weighted, plan in plans.items():
            allocator.save_plan(plan, self._place / f"{mix}-plan-{self._rules[weighted]}.json")
        return Row(
            mix=mix,
            rival_bytes=size,
            rivals={weighted: self._measure_kl(path) for weighted, path in rivals.items()},
            plan_bytes={weighted: plan.memory_bytes for weighted, plan in plans.items()},
            predicted={weighted: plan.predicted_kl for weighted, plan in plans.items()},
            plans={weighted: self._measure_plan(plan, mix) for weighted, plan in plans.items()},
        )

    def _find_matrix(self, profile: SensitivityProfile) -> Path:
        """Returns the importance matrix of a profile's calibration text, written if it is not there."""
        path = self._place / "imatrix.gguf"
        if not path.exists():
            tokens = torch.from_numpy(profile.calibration_tokens)
            directory = self._store.rendering(profile.fingerprint)
            statistics = find_statistics(self._model.reference.model, tokens, directory=directory)
            shape = (tokens.shape[0], tokens.shape[1])
            source = profile.provenance["calibration"]
            write_importance_matrix(self._model.reference, statistics, path, source=source, tokens_shape=shape)
        return path

    def _make_plan(self, profile: SensitivityProfile, size: int, progress: Progress) -> allocator.Plan:
        """Returns the plan of least predicted KL, refined where that is asked for; it meets no rivals but llama.cpp."""
        fixed = engine_fixed_bytes(ENGINE, self._model.reference, routers=False)
        assert fixed is not None
        legal = restrict_profile(replace(profile, fixed_bytes=fixed), ENGINE)
        tables, budget = build_cost_tables(legal), allocator.Budget(memory_bytes=size)
        found = find_assignment(legal, budget, tables, metric=default_metric(legal))
        if self._refine:
            refinement = Refinement(
                profile=legal,
                budget=budget,
                tables=tables,
                store=self._store,
                progress=progress,
                load_model=lambda: self._model.reference.model,
                rounds=self._refine,
            )
            found = refinement.run(found)
        return make_plan(legal, found, budget, tables, provenance())

    def _write_base(self, chunks: int) -> Path:
        """Returns the file of the unquantized model's logits on the text that nothing else saw."""
        text, base = self._place / "python-reference.txt", self._place / f"base-{chunks}.dat"
        if not base.exists():
            formats = dict.fromkeys(list_weights(self._model.reference.model), "fp16")
            export(self._model.reference, formats, self._place / "F16", exporter=ENGINE.exporter)
            text.write_text("\n\n".join(python_reference_text()), encoding="utf-8")
            self._tools.write_base(self._place / "F16" / "model.gguf", text, base, chunks)
        return base

    def _make_rival(self, mix: str, imatrix: Path | None) -> Path:
        path = self._place / f"{mix}{'' if imatrix is None else '-weighted'}.gguf"
        if not path.exists():
            self._tools.make_mix(self._place / "F16" / "model.gguf", path, mix, imatrix)
        return path

    def _measure_plan(self, plan: allocator.Plan, mix: str) -> Kl:
        """Returns the KL of a plan's file; it is as long as predicted."""
        out = self._place / f"{mix}-plan-{plan.provenance['quantizer']}"
        manifest = out / "bitplan-export.json"
        if not manifest.exists() or json.loads(manifest.read_text())["formats"] != dict(plan.weights):
            rule = rendering_of_plan(plan, self._model.reference.model, self._store)
            export(self._model.reference, plan.weights, out, exporter=ENGINE.exporter, quantizer=rule)
        assert (out / "model.gguf").stat().st_size == plan.memory_bytes
        return self._measure_kl(out / "model.gguf")

    def _measure_kl(self, path: Path) -> Kl:
        """Returns the mean KL of a file and its standard error, measured once for each content of the file."""
        kept, stamp = path.with_suffix(f".{self._base.stem}.json"), path.stat().st_mtime_ns
        if not kept.exists() or json.loads(kept.read_text())["stamp"] != stamp:
            kl, std_error = self._tools.measure_kl(path, self._base)
            kept.write_text(json.dumps({"stamp": stamp, "kl": kl, "std_error": std_error}), encoding="utf-8")
        document = json.loads(kept.read_text())
        return document["kl"], document["std_error"]


def render(rows: list[Row], options: argparse.Namespace) -> str:
    """Returns the page."""
    lines = [
        "# Plans for llama.cpp beside its own mixes, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_llama_cpp.py --refine {options.refine} --chunks {options.chunks} "
        f"--with-matrix {options.with_matrix}`. Machine: {describe_machine()}.",
        "",
        "Mean KL to the unquantized model, nats per token ± its standard error, measured by llama-perplexity on "
        f"{options.chunks} pieces of {CONTEXT_TOKENS} tokens of the Python reference, which nothing else saw. "
        "The files of llama.cpp are llama-quantize's. No plan is larger than its rival, and each file is as long as "
        "its plan predicted, to the byte.",
        "",
        "## Without an importance matrix",
        "",
        *_table(rows, weighted=False),
        "",
        "## With an importance matrix",
        "",
        "Both sides have seen the same calibration text: llama.cpp by the importance matrix that bitplan wrote from "
        f"it, the plan by what the rule '{options.with_matrix}' reads of it.",
        "",
        *_table(rows, weighted=True),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row], *, weighted: bool) -> list[str]:
    lines = ["| size of | bytes | llama.cpp | plan's bytes | predicted | plan | × llama.cpp |", "|---" * 7 + "|"]
    for row in sorted(rows, key=lambda row: row.rival_bytes):
        theirs, ours = row.rivals[weighted], row.plans[weighted]
        made = [f"{row.plan_bytes[weighted]:,}", f"{row.predicted[weighted]:.4f}"]
        sizes = [f"{row.rival_bytes:,}", _cell(theirs), *made]
        lines.append(f"| {' | '.join([row.mix, *sizes, _cell(ours)])} | **{ours[0] / theirs[0]:.2f}** |")
    return lines


def _cell(kl: Kl) -> str:
    return f"{kl[0]:.4f} ± {kl[1]:.4f}"


if __name__ == "__main__":
    main()
