"""Every estimator against the measured single-unit KL, on SmolLM2-135M. Writes estimators.md.

Each estimator is timed alone, with its own pass over the text and its own rendering of the candidates. The tables
[U, F] are kept in the store (``estimators/<profile>.npz``), so that plans can be made from them without measuring
again: ``load_tables``. ``render`` takes further columns by estimator.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from bench_allocation import pin_embedding, width_budget
from machine import describe_machine
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from allocator.artefacts import Model
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import prepare_text
from allocator.pipeline import measure
from allocator.planning import find_assignment
from allocator.problems import build_cost_tables
from allocator.progress import Progress, shown_progress
from allocator.store import Store
from allocator.verification import score_cached
from runtime.files import atomic_path
from sensitivity.criteria.estimator_input import EstimatorInput
from sensitivity.estimators import ESTIMATORS
from sensitivity.measure_config import FISHER, SINGLE_UNIT_KL, MeasureConfig
from sensitivity.prediction.conversion import fit_conversion
from sensitivity.prediction.cross_validation import judge
from sensitivity.prediction.predictor import Features, build_features, fit_predictor, predict_loss
from sensitivity.profile import NATS, LossTable, SensitivityProfile
from sensitivity.sketches.combination import COMBINED
from sensitivity.sketches.fisher_sketch import measure_streamed_fisher_sketch
from sensitivity.sketches.logit_pieces import measure_single_unit_kl

SEQUENCES = 16
GRADIENT_SEQUENCES = 8  # of these, for estimators that take a backward pass of each
OF_EXPERTS = ("affinity_error",)  # the model has none
PLAN_WIDTHS = (3.0, 3.5, 4.0, 4.5)
TIMED_UNITS = 9  # one in so many, prime to the seven projections of a layer: every role at every depth
FEW_UNITS = (20, 40, 80)
DRAWS = 5
DATA_FREE, ONE_PASS = "predictor_data_free", "predictor_one_pass"
PREDICTOR_TABLES = {
    DATA_FREE: ("noise_to_signal", "weight_error", "crest_factor"),
    ONE_PASS: ("noise_to_signal", "weight_error", "crest_factor", "output_error", "column_loss"),
}
PREDICTOR_SCORES = {
    DATA_FREE: ("kurtosis", "z_distribution"),
    ONE_PASS: ("kurtosis", "z_distribution", "layer_influence", "outlier_ratio", "mean_variance"),
}
NEEDS = {
    **{name: estimator.inputs for name, estimator in ESTIMATORS.items()},
    FISHER: "gradients",
    SINGLE_UNIT_KL: "measured",
    COMBINED: "gradients + measured",
    DATA_FREE: "measured units + weights",
    ONE_PASS: "measured units + forward",
}


def main() -> None:
    store = Store()
    model = Model(str(prepare_demo_model(store.root)))
    request = demo_request(store)
    # A completed loss says nothing of what estimators find.
    request = replace(request, config=replace(request.config, logit_passes=None))
    with shown_progress() as progress:
        profile = measure(model, request=request, store=store, progress=progress)
    tokens = prepare_text(model.reference, request).fisher.tokens[:SEQUENCES]

    def given(sequences: int = SEQUENCES) -> EstimatorInput:
        return EstimatorInput(model=model.reference.model, candidates=profile.candidates, tokens=tokens[:sequences])

    tables, seconds = {}, {}
    for name, estimator in ESTIMATORS.items():
        if name in OF_EXPERTS:
            continue
        started = time.process_time()
        tables[name] = estimator.estimate(given(GRADIENT_SEQUENCES if estimator.inputs == "gradients" else SEQUENCES))
        seconds[name] = time.process_time() - started
        sys.stderr.write(f"{name}: {seconds[name]:.1f} s\n")
    seconds |= measured_seconds(model, profile, tokens)
    features = {name: make_features(profile, tables, given(), name) for name in PREDICTOR_TABLES}
    tables |= {name: predict_table(profile, features[name]) for name in features}
    tables |= {metric: profile.table(metric) for metric in (FISHER, SINGLE_UNIT_KL, COMBINED)}
    save_tables(tables_path(store, profile), tables)
    with shown_progress() as progress:
        held_out = plan_columns(profile, tables, model, store, progress)
    text = render(profile, tables, seconds, tokens.shape, held_out) + render_few_units(profile, features)
    (Path(__file__).parent / "estimators.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measured_seconds(model: Model, profile: SensitivityProfile, tokens: Tensor) -> dict[str, float]:
    """Returns the processor seconds of the metrics that the profile holds; single-unit KL from a part of the units."""
    config = MeasureConfig()
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as directory:
        started = time.process_time()
        measure_streamed_fisher_sketch(
            model.reference.model,
            profile.candidates,
            tokens[:GRADIENT_SEQUENCES],
            seed=0,
            directory=Path(directory) / "fisher",
            progress=lambda *_: None,
        )
        seconds[FISHER] = time.process_time() - started
        pairs = profile.candidates.allowed.copy()
        # Not from the first on, the embedding, which would count for as many of its size.
        pairs[np.arange(len(pairs)) % TIMED_UNITS != TIMED_UNITS // 2] = False
        started = time.process_time()
        measure_single_unit_kl(
            model.reference.model,
            profile.candidates,
            tokens[: config.logit_sequences, : config.logit_sequence_tokens],
            pairs=pairs,
            cross_terms=False,
            top_tokens=config.top_tokens,
            quantizer=profile.provenance["quantizer"],
            pieces=Path(directory) / "single_unit_kl",
            progress=lambda *_: None,
        )
        share = pairs.sum() / profile.candidates.allowed.sum()
        seconds[SINGLE_UNIT_KL] = (time.process_time() - started) / float(share)
    return {**seconds, COMBINED: seconds[FISHER] + seconds[SINGLE_UNIT_KL]}


def plan_columns(
    profile: SensitivityProfile, tables: Mapping[str, LossTable], model: Model, store: Store, progress: Progress
) -> dict[str, dict[str, str]]:
    """Returns the held-out KL of each estimator's plans at the bytes of uniform formats, the embedding at 8 bits."""
    pinned = pin_embedding(profile)
    costs = build_cost_tables(pinned)
    formats: dict[str, dict[str, str]] = {}
    for width in PLAN_WIDTHS:
        budget = width_budget(pinned, costs, width)
        for name, table in tables.items():
            with_table = replace(pinned, losses={**pinned.losses, name: table})
            found = find_assignment(with_table, budget, costs, metric=name)
            formats[f"{width:g} {name}"] = found.formats_by_weight(pinned.candidates)
    scores = score_cached(
        pinned,
        formats,
        pinned.evaluation_tokens,
        load_model=lambda: model.reference.model,
        store=store,
        progress=progress,
    )
    return {
        f"KL at {width:g} bits": {name: f"{scores[f'{width:g} {name}'].kl.mean():.3f}" for name in tables}
        for width in PLAN_WIDTHS
    }


def make_features(
    profile: SensitivityProfile, tables: Mapping[str, LossTable], given: EstimatorInput, name: str
) -> Features:
    """Returns the features of a predictor."""
    scores = {}
    for criterion in PREDICTOR_SCORES[name]:
        score = ESTIMATORS[criterion].score
        assert score is not None
        scores[criterion] = score(given)
    return build_features(profile.candidates, {c: tables[c].loss for c in PREDICTOR_TABLES[name]}, scores)


def predict_table(profile: SensitivityProfile, features: Features) -> LossTable:
    """Returns the losses that predictors fitted to the other units give each unit."""
    predictor = fit_predictor(features, profile.table(SINGLE_UNIT_KL))
    std_error = predictor.predicted * predictor.error.log_deviation
    return LossTable(loss=predictor.predicted, std_error=std_error, unit_of_measure=NATS)


def render_few_units(profile: SensitivityProfile, features: Mapping[str, Features]) -> str:
    """Returns the table of predictors that were fitted to a few measured units, judged on all others."""
    lines = [
        "",
        "## A few units measured, the others predicted",
        "",
        "ρ, R² and the factor that half of the pairs are within, on the units that were not measured; medians over "
        f"{DRAWS} draws of the measured ones.",
        "",
        "| predictor | " + " | ".join(f"{n} of {len(profile.candidates.units)} units" for n in FEW_UNITS) + " |",
        "|---|" + "---|" * len(FEW_UNITS),
    ]
    for name, known in features.items():
        cells = []
        for count in FEW_UNITS:
            draws = [judge_few_units(profile, known, count, seed) for seed in range(DRAWS)]
            rank, r2, factor = np.median(draws, axis=0)
            cells.append(f"{rank:.3f}, {r2:.3f}, {factor:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def judge_few_units(profile: SensitivityProfile, features: Features, count: int, seed: int) -> tuple[float, ...]:
    """Returns rank correlation, R2 and median factor on the units that the predictor was not fitted to."""
    measured = profile.table(SINGLE_UNIT_KL)
    seen = np.zeros((len(measured.loss), 1), dtype=bool)
    seen[np.random.default_rng(seed).permutation(len(seen))[:count]] = True
    predictor = fit_predictor(features, replace(measured, loss=np.where(seen, measured.loss, 0.0)))
    rest = ~seen & features.lossy & (measured.loss > 0.0)
    log_loss, log_predicted = (np.log(t.loss[rest]) for t in (measured, predict_loss(predictor, features)))
    error = judge(log_loss, log_predicted, folds=1)
    return float(spearmanr(log_loss, log_predicted).statistic), error.r2, error.median_factor


def describe_halves(profile: SensitivityProfile) -> str:
    """Returns how well the measured KL of two halves of the text agree: what is left to be found."""
    assert profile.logit_gram is not None
    first, second = (np.diagonal(gram).reshape(profile.candidates.allowed.shape) for gram in profile.logit_gram)
    lossy = (first > 0.0) & (second > 0.0)
    by_format = [
        f"{f.name.partition('_')[0]} {spearmanr(first[rows, i], second[rows, i]).statistic:.3f}"
        for i, f in enumerate(profile.candidates.formats)
        if (rows := lossy[:, i]).any()
    ]
    overall = spearmanr(first[lossy], second[lossy]).statistic
    return (
        "For comparison, the measured KL of one half of its sequences against that of the other half, to second order: "
        f"ρ {overall:.3f} over all pairs; within a format {', '.join(by_format)}."
    )


def tables_path(store: Store, profile: SensitivityProfile) -> Path:
    """Returns where the tables of a profile are kept."""
    return store.root / "estimators" / f"{profile.fingerprint}.npz"


def save_tables(path: Path, tables: Mapping[str, LossTable]) -> None:
    """Writes the tables to one file."""
    arrays = {}
    for name, table in tables.items():
        arrays[f"loss.{name}"], arrays[f"std_error.{name}"] = table.loss, table.std_error
        arrays[f"unit_of_measure.{name}"] = np.array(table.unit_of_measure)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_tables(path: Path) -> dict[str, LossTable]:
    """Returns the tables that ``save_tables`` wrote."""
    with np.load(path) as arrays:
        names = [key.removeprefix("loss.") for key in arrays if key.startswith("loss.")]
        return {
            name: LossTable(
                loss=arrays[f"loss.{name}"],
                std_error=arrays[f"std_error.{name}"],
                unit_of_measure=str(arrays[f"unit_of_measure.{name}"]),
            )
            for name in names
        }


def render(
    profile: SensitivityProfile,
    tables: Mapping[str, LossTable],
    seconds: Mapping[str, float],
    text_shape: tuple[int, ...],
    further: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Returns the page.

    Args:
        profile: Holds the measured single-unit KL.
        tables: By estimator.
        seconds: By estimator.
        text_shape: Sequences and tokens of the text.
        further: Title of a further column -> estimator -> cell.
    """
    measured, config = profile.table(SINGLE_UNIT_KL), MeasureConfig()
    columns: dict[str, Mapping[str, str]] = {
        "needs": NEEDS,
        "CPU s": {name: f"{value:.1f}" for name, value in seconds.items()},
        **correlation_columns(profile, tables),
        **conversion_columns(tables, measured),
        **(further or {}),
    }
    lines = [
        "# Estimators against the measured single-unit KL, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_estimators.py`. Machine: {describe_machine()}.",
        "",
        f"{len(profile.candidates.units)} units, round-to-nearest, group 64; estimators on {text_shape[0]} sequences "
        f"of {text_shape[1]} tokens, each timed alone in processor time. The measured KL is of other windows of the "
        f"same documents; its median standard error is {median_relative_error(profile):.0%}. ρ: Spearman's rank "
        "correlation with it; r: Pearson's, of logarithms; over all pairs with an error, and within one format. Slope, "
        "R² and factor: log-log fit to the measured KL (`sensitivity/prediction/conversion.py`), its slope, its R² and "
        "the factor that half of the pairs are within, in five-fold cross-validation by unit. KL at a width: held-out "
        "KL of the plan by that estimator at the bytes of the uniform format, embedding at 8 bits as in allocation.md. "
        f"Estimators that need gradients saw {GRADIENT_SEQUENCES} of the sequences, those of the profile "
        f"{config.fisher_sequences} (the Fisher sketch, timed on {GRADIENT_SEQUENCES}) and {config.logit_sequences} of "
        f"{config.logit_sequence_tokens} tokens (single-unit KL of all pairs, timed on one unit in {TIMED_UNITS}).",
        "",
        "| estimator | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    lines += [f"| {name} | " + " | ".join(c.get(name, "–") for c in columns.values()) + " |" for name in tables]
    lines += [
        "",
        f"{DATA_FREE}, {ONE_PASS}: ridge regression (`sensitivity/prediction/predictor.py`) on "
        + "; ".join(f"{', '.join((*PREDICTOR_TABLES[n], *PREDICTOR_SCORES[n]))}" for n in PREDICTOR_TABLES)
        + "; each unit predicted from the other folds' units.",
        "",
        describe_halves(profile),
    ]
    return "\n".join(lines) + "\n"


def correlation_columns(profile: SensitivityProfile, tables: Mapping[str, LossTable]) -> dict[str, Mapping[str, str]]:
    """Returns correlations over all pairs and within each format, by column and estimator."""
    measured = profile.table(SINGLE_UNIT_KL).loss
    lossy = profile.candidates.allowed & (measured > 0.0)
    places: dict[str, tuple[slice, slice | int]] = {"all": (slice(None), slice(None))}
    places |= {
        f.name.partition("_")[0]: (slice(None), i)
        for i, f in enumerate(profile.candidates.formats)
        if lossy[:, i].any()
    }
    columns: dict[str, Mapping[str, str]] = {}
    for title, place in places.items():
        pairs = {
            name: (np.log(table.loss[place][rows]), np.log(measured[place][rows]))
            for name, table in tables.items()
            for rows in [lossy[place] & (table.loss[place] > 0.0)]
        }
        columns[f"ρ {title}"] = {name: f"{spearmanr(*pair).statistic:.3f}" for name, pair in pairs.items()}
        columns[f"r {title}"] = {name: f"{pearsonr(*pair).statistic:.3f}" for name, pair in pairs.items()}
    return columns


def conversion_columns(tables: Mapping[str, LossTable], measured: LossTable) -> dict[str, Mapping[str, str]]:
    """Returns slope and cross-validated error of the conversion to nats, by column and estimator."""
    fitted = {name: fit_conversion(table.loss, measured) for name, table in tables.items()}
    return {
        "slope": {name: f"{c.slope:.2f}" for name, c in fitted.items()},
        "R²": {name: f"{c.error.r2:.3f}" for name, c in fitted.items()},
        "× within": {name: f"{c.error.median_factor:.2f}" for name, c in fitted.items()},
    }


def median_relative_error(profile: SensitivityProfile) -> float:
    """Returns the median of standard error over measured KL."""
    table = profile.table(SINGLE_UNIT_KL)
    lossy = table.loss > 0.0
    return float(np.median(table.std_error[lossy] / table.loss[lossy]))


if __name__ == "__main__":
    main()
