"""The verbs: measure, evaluate, apply, load, report. Composition only; the work is in the rooms."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from allocator.artefact_match import check_same_model
from allocator.artefacts import (
    Model,
    assignment_of_plan,
    model_to_measure,
    open_model,
    plans_routers,
    profile_of_plan,
)
from allocator.assignments import keep_best_activations, keep_widest_caches, list_uniform, use_of
from allocator.budget import BIT_OPERATIONS, MEMORY
from allocator.engine_rules import price_file
from allocator.frontiers import frontier
from allocator.measuring import MeasureRequest, run_measurement
from allocator.plans import Evaluation, Plan
from allocator.prefixes import check_prefix
from allocator.problems import build_cost_tables
from allocator.progress import Progress, silent
from allocator.renderings import needs_statistics, rendering_of_plan
from allocator.skipping import open_skipping
from allocator.store import Store
from allocator.transformed import transform_again_
from allocator.verification import REFERENCE, make_evaluation, score_cached
from runtime.expert_skipping import ExpertSkipping, install_skipping_
from runtime.packed_model import check_packed_place, load_packed, packed_bytes, save_packed_
from runtime.read_widths import set_width_
from runtime.transforms.prefix_tokens import PREFIX_FILE, save_prefix
from sensitivity.calibration import read_sequences
from sensitivity.profile import SensitivityProfile


def measure(
    model: str | Model,
    *,
    request: MeasureRequest | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> SensitivityProfile:
    """Returns the sensitivity profile of a model, measured now or found in the store.

    Args:
        model: A Hugging Face directory or id, a GGUF file, or a ``Model``.
        request: What to measure, on which text; None for the defaults.
        store: Where profiles are kept; None for the default.
        progress: Called with (stage, done, total).

    Raises:
        ValueError: If the model, the text or the request is wrong.
    """
    model, request = open_model(model), request or MeasureRequest()
    # Transforms rewrite the weights that they are given.
    reference = model.load_again() if request.transforms else model.reference
    return run_measurement(reference, request, store or Store(), progress)


def evaluate(
    model: str | Model,
    plan: Plan,
    *,
    text: str | None = None,
    sequences: int | None = None,
    sequence_tokens: int = 256,
    store: Store | None = None,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Returns the measured quality of the reference, the plan, and every uniform format of no more bytes.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        text: A text source nothing else saw; None for the profile's own evaluation text.
        sequences: Sequences taken from the text, at least 2; None for as many as it holds, up to 32.
        sequence_tokens: Tokens of each.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If the plan was made for another model.
        ValueError: If the text is missing or too short, or no text is named and the plan's profile is not stored.
    """
    store = store or Store()
    model = open_model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    # Another profile may have been rendered with other statistics.
    profile = profile_of_plan(plan, model, store, progress, own=text is None or needs_statistics(plan))
    profile = price_file(profile, plan)
    tokens = profile.evaluation_tokens
    if text is not None:
        tokenizer = model.reference_of(plan, store).tokenizer
        taken = read_sequences(text, tokenizer, sequences=sequences, sequence_tokens=sequence_tokens)
        tokens = taken.tokens.numpy()
    tables = build_cost_tables(profile)
    planned = assignment_of_plan(profile, plan)
    fitting = [
        a
        for a in list_uniform(profile.candidates, planned.metric)
        if use_of(a.choice, tables)[MEMORY] <= plan.memory_bytes and a.choice.tobytes() != planned.choice.tobytes()
    ]
    fitting = keep_widest_caches(fitting, profile.candidates, tables[MEMORY])
    if plan.activations is not None:
        operations = plan.activations.bit_operations
        fitting = [a for a in fitting if tables[BIT_OPERATIONS].use(a.choice) <= operations]
        fitting = keep_best_activations(fitting, profile, planned.metric)
    assignments = [planned, *fitting]
    formats: dict[str, Mapping[str, str]] = {REFERENCE: {}}
    formats |= {a.name: a.formats_by_name(profile.candidates) for a in assignments}
    load_model = partial(model_to_measure, model, plan, store)
    scores = score_cached(profile, formats, tokens, load_model=load_model, store=store, progress=progress)
    memory = tables[MEMORY]
    return [make_evaluation(profile, None, scores[REFERENCE], tokens, memory)] + [
        make_evaluation(profile, a, scores[a.name], tokens, memory, shipped=a is planned) for a in assignments
    ]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A packed model on disk.

    Args:
        directory: Where it is.
        file_bytes: Size of its weight file.
        predicted_bytes: Size of this file that the plan predicted.
    """

    directory: Path
    file_bytes: int
    predicted_bytes: int


def apply(
    model: str | Model, plan: Plan, out: Path, *, prefix: Path | None = None, store: Store | None = None
) -> Applied:
    """Packs a model by a plan and writes it to a directory, which is replaced as a whole.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        out: Directory of the packed model.
        prefix: File of prefix tokens that ships with it; None for none.
        store: Where the plan's profile is kept, which only transforms and some quantizers need; None for the default.

    Raises:
        ArtefactMismatch: If the plan was made for another model, or under other transforms than those stored.
        ValueError: If something else than a packed model is at ``out``, the model cannot be read, or the quantizer
            or a transform needs what the store can no longer give.
    """
    model, store = open_model(model), store or Store()
    check_same_model(plan, model.fingerprint, str(model.path))
    check_packed_place(out)
    reference = transform_again_(model.load_again(), plan, store)
    ships = None if prefix is None else check_prefix(prefix, reference, plan)
    predicted_bytes = plan.file_bytes
    if plan.rules is not None:
        # The plan may count the engine's file.
        predicted_bytes = packed_bytes(reference, plan.weights, routers=plans_routers(reference.model, plan))
    file_bytes = save_packed_(
        reference,
        plan.weights,
        out,
        metadata=plan.header_metadata(),
        quantizer=rendering_of_plan(plan, reference.model, store),
        formats_by_cache={} if plan.cache is None else plan.cache.formats,
        activations={} if plan.activations is None else plan.activations.scheme,
    )
    if ships is not None:
        save_prefix(ships, out / PREFIX_FILE)
    return Applied(directory=out, file_bytes=file_bytes, predicted_bytes=predicted_bytes)


def load(
    directory: str | Path, *, width: int | None = None, skip_experts: ExpertSkipping | float | str | None = None
) -> tuple[Any, Any]:
    """Returns a packed model and its tokenizer.

    Args:
        directory: Where it lies.
        width: Bits at which its nested weights are read, until ``set_width_`` says otherwise; None for all.
        skip_experts: Which experts its tokens skip: as found, its file, or one ratio for all layers; None for none.

    Raises:
        ValueError: If the directory holds no packed model, its file is incomplete, no weight has such a
            width, or experts are to be skipped that it does not have.
    """
    model, tokenizer, _ = load_packed(Path(directory))
    if width is not None:
        set_width_(model, width)
    if skip_experts is not None:
        found = skip_experts if isinstance(skip_experts, ExpertSkipping) else open_skipping(model, str(skip_experts))
        install_skipping_(model, found)
    return model, tokenizer


def report(
    model: str | Model,
    plan: Plan,
    out: Path,
    *,
    text: str | None = None,
    parquet: bool = False,
    pdf: bool = False,
    store: Store | None = None,
    progress: Progress = silent,
) -> Path:
    """Writes the report of a plan, ``report.html``, CSV files and a summary, and returns the page's path.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        out: Directory of the files.
        text: Evaluation text; None for the profile's own.
        parquet: Whether to write the tables as Parquet files too.
        pdf: Whether to write ``report.pdf`` too, one page that an installed Chromium prints.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        ModuleNotFoundError: If pyarrow or a Chromium is needed and not installed.
        PrintingFailed: If the Chromium does not print.
    """
    from allocator.tables import make_report
    from reports import write_csv, write_html, write_parquet, write_pdf, write_summary
    from reports.browser import find_browser
    from reports.parquet_files import import_pyarrow

    # Before minutes of work, not after.
    if parquet:
        import_pyarrow()
    if pdf:
        find_browser()
    store = store or Store()
    model = open_model(model)
    evaluations = evaluate(model, plan, text=text, store=store, progress=progress)
    # Its charts are of what takes bytes.
    stored = replace(plan, activations=None)
    profile = price_file(profile_of_plan(stored, model, store, progress, own=False), plan)
    content = make_report(profile, plan, evaluations, frontier(profile, store=store))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(content, out)
    if parquet:
        write_parquet(content, out)
    if pdf:
        write_pdf(content, out / "report.pdf")
    write_summary(content, out)
    write_html(content, out / "report.html")
    return out / "report.html"
