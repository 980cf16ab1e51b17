"""Plans against llama.cpp's own mixes of the same file size, on SmolLM2-135M. Writes llama_cpp.md.

    python benchmarks/bench_llama_cpp.py [--tools DIRECTORY] [--refine ROUNDS] [--chunks CHUNKS] [--with-matrix RULE]

The rivals are made by llama-quantize from the unquantized file that bitplan exports, once without an importance matrix
and once with one, which is bitplan's own. The size of each rival's file is the budget of a plan, so that a plan is
never a byte larger. Plans are made on the model equalized without a text. Without the matrix their codes read none
either; with it they come of the same text by GPTQ, or by ``--with-matrix weighted_clipping``, which reads no more of it
than the matrix holds. Each of the two has a profile of its own, measured on what will be written. llama-quantize gets
the equalized file too, also with a matrix of the drawn tokens that weight the codes without a text. All KL is
llama-perplexity's, to the model as it was trained; ``llama_cpp_tools.py`` says how to build the two programs.

All of it is kept in the store and found again: the profile, measured plans, files, their KL.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from llama_cpp_page import Comparison, Kl, Row, render
from llama_cpp_tools import CONTEXT_TOKENS, Tools

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
from runtime.drawn_tokens import DRAWN, draw_tokens
from runtime.engines import find_engine
from runtime.exporters import export
from runtime.exporters.gguf_imatrix import write_importance_matrix
from runtime.loading import ReferenceModel
from runtime.units import list_weights
from sensitivity.measure_config import FISHER, MeasureConfig
from sensitivity.profile import SensitivityProfile
from sensitivity.weight_inputs import find_statistics

ENGINE = find_engine("llama.cpp")
MIXES = ("Q3_K_S", "Q4_0", "Q3_K_M", "Q4_K_M", "Q5_K_M")
# The rules that render a plan's codes with a matrix, of which the first is the table's.
WITH_MATRIX = ("gptq", "weighted_clipping")


@dataclass(frozen=True, kw_only=True)
class Side:
    """What a plan's scales and codes are made by.

    Args:
        quantizer: Renders the codes.
        transforms: Rewrite the model first.
    """

    quantizer: str
    transforms: tuple[str, ...]

    @property
    def name(self) -> str:
        """Part of the names of its files."""
        return "-".join([*self.transforms, self.quantizer])


TEXTLESS_SIDE = Side(transforms=("equalize",), quantizer="drawn_clipping")


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
    textual = Side(transforms=TEXTLESS_SIDE.transforms, quantizer=options.with_matrix)
    with shown_progress() as progress:
        bench = Bench(tools, Store(), textual, options.refine, options.chunks, progress)
        rows = [bench.compare(mix) for mix in MIXES]
    arguments = f"--refine {options.refine} --chunks {options.chunks} --with-matrix {options.with_matrix}"
    text = render(rows, arguments, options.chunks, options.with_matrix, bench.measure_rewritten())
    (Path(__file__).parent / "llama_cpp.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measure(model: Model, side: Side, store: Store, progress: Progress) -> SensitivityProfile:
    """Returns the profile of the formats that llama.cpp runs, of the rewritten model, rendered by a side's rule."""
    config = MeasureConfig(metrics=(FISHER,), fisher_sequences=48, fit_plans=None, quantizer=side.quantizer)
    formats = {"formats": ENGINE.menu, "embedding_formats": ENGINE.menu}
    request = replace(demo_request(store), **formats, config=config, transforms=side.transforms)
    return allocator.measure(model, request=request, store=store, progress=progress)


def write_matrix(reference: ReferenceModel, tokens: torch.Tensor, path: Path, *, source: str) -> None:
    """Writes an importance matrix of tokens [S, T]."""
    statistics, shape = find_statistics(reference.model, tokens, directory=None), (tokens.shape[0], tokens.shape[1])
    write_importance_matrix(reference, statistics, path, source=source, tokens_shape=shape)


class Bench:
    """Makes and measures the files; what is there already is not made again.

    Args:
        tools: llama.cpp's programs.
        store: Where everything is kept.
        textual: What the plans with a matrix are made by.
        refine: Rounds of refinement.
        chunks: Pieces of text that a KL is measured on.
        progress: Called with (stage, done, total).
    """

    def __init__(self, tools: Tools, store: Store, textual: Side, refine: int, chunks: int, progress: Progress) -> None:
        self._tools, self._store, self._textual, self._refine = tools, store, textual, refine
        self._progress = progress
        self._model = Model(str(prepare_demo_model(store.root)))
        self._place = store.root / "llama.cpp"
        self._place.mkdir(parents=True, exist_ok=True)
        self._base = self._write_base(chunks)
        self._profiles = {side: measure(self._model, side, store, progress) for side in (TEXTLESS_SIDE, textual)}

    def compare(self, mix: str) -> Row:
        """Returns the rivals of a mix beside the plans of their size."""
        reference, equalized = self._find_reference(None), self._find_reference(TEXTLESS_SIDE)
        plain, weighted = self._make_rival(mix, reference), self._make_rival(mix, reference, self._find_matrix())
        # The matrix's name is in the file's metadata: some hundred bytes that a plan's file does not have.
        size = min(plain.stat().st_size, weighted.stat().st_size)
        return Row(
            mix=mix,
            rival_bytes=size,
            textless=self._compare_side(mix, TEXTLESS_SIDE, plain, size),
            textual=self._compare_side(mix, self._textual, weighted, size),
            equalized=self._measure_kl(self._make_rival(mix, equalized)),
            weighted=self._measure_kl(self._make_rival(mix, equalized, self._find_drawn_matrix())),
        )

    def measure_rewritten(self) -> Kl:
        """Returns the KL of the unquantized file of the equalized model."""
        return self._measure_kl(self._find_reference(TEXTLESS_SIDE))

    def _compare_side(self, mix: str, side: Side, rival: Path, size: int) -> Comparison:
        plan = self._make_plan(self._profiles[side], size)
        allocator.save_plan(plan, self._place / f"{mix}-plan-{side.name}.json")
        return Comparison(
            rival=self._measure_kl(rival),
            plan_bytes=plan.memory_bytes,
            predicted=plan.predicted_kl,
            plan=self._measure_plan(plan, mix, side),
        )

    def _make_plan(self, profile: SensitivityProfile, size: int) -> allocator.Plan:
        """Returns the plan of least predicted KL, refined where that is asked for; it meets no rivals but llama.cpp."""
        reference = self._model.reference_of(profile, self._store)
        fixed = engine_fixed_bytes(ENGINE, reference, routers=False)
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
                progress=self._progress,
                load_model=lambda: reference.model,
                rounds=self._refine,
            )
            found = refinement.run(found)
        return make_plan(legal, found, budget, tables, provenance())

    def _write_base(self, chunks: int) -> Path:
        """Returns the file of the unquantized model's logits on the text that nothing else saw."""
        text, base = self._place / "python-reference.txt", self._place / f"base-{chunks}.dat"
        if not base.exists():
            text.write_text("\n\n".join(python_reference_text()), encoding="utf-8")
            self._tools.write_base(self._find_reference(None), text, base, chunks)
        return base

    def _find_reference(self, side: Side | None) -> Path:
        """Returns the unquantized file of the model as it was trained, or as a side's transform rewrote it."""
        directory = self._place / ("F16" if side is None else f"F16-{side.name}")
        if not (directory / "model.gguf").exists():
            reference = self._model.reference if side is None else self._rewrite(side)
            formats = dict.fromkeys(list_weights(reference.model), "fp16")
            export(reference, formats, directory, exporter=ENGINE.exporter)
        return directory / "model.gguf"

    def _rewrite(self, side: Side) -> ReferenceModel:
        return self._model.reference_of(self._profiles[side], self._store)

    def _find_matrix(self) -> Path:
        """Returns the importance matrix of the calibration text, written if it is not there."""
        path, profile = self._place / "imatrix.gguf", self._profiles[self._textual]
        if not path.exists():
            tokens = torch.from_numpy(profile.calibration_tokens)
            write_matrix(self._model.reference, tokens, path, source=profile.provenance["calibration"])
        return path

    def _find_drawn_matrix(self) -> Path:
        """Returns the importance matrix of drawn tokens and the equalized model, written if it is not there."""
        path = self._place / f"imatrix-{TEXTLESS_SIDE.name}.gguf"
        if not path.exists():
            reference = self._rewrite(TEXTLESS_SIDE)
            write_matrix(reference, draw_tokens(reference.model), path, source=DRAWN)
        return path

    def _make_rival(self, mix: str, reference: Path, imatrix: Path | None = None) -> Path:
        """Returns llama.cpp's mix of an unquantized file, made if it is not there."""
        name = mix + reference.parent.name.removeprefix("F16")
        path = self._place / f"{name}{'' if imatrix is None else '-weighted'}.gguf"
        if not path.exists():
            self._tools.make_mix(reference, path, mix, imatrix)
        return path

    def _measure_plan(self, plan: allocator.Plan, mix: str, side: Side) -> Kl:
        """Returns the KL of a plan's file; it is as long as predicted."""
        out = self._place / f"{mix}-plan-{side.name}"
        manifest = out / "bitplan-export.json"
        if not manifest.exists() or json.loads(manifest.read_text())["formats"] != dict(plan.weights):
            reference = self._rewrite(side)
            rule = rendering_of_plan(plan, reference.model, self._store)
            export(reference, plan.weights, out, exporter=ENGINE.exporter, quantizer=rule)
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


if __name__ == "__main__":
    main()
