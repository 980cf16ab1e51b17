"""Measure a profile, one small finished piece at a time, so that an interrupt loses at most one piece.

Each layer of the Fisher sketch and each unit of the logit sketch is written to its own file as soon as it is
measured; a second run takes up what is there. The pieces of one directory belong to one fingerprint (weights, text,
formats, settings, code version), so a piece can never be of another measurement. A profile taken up equals one made
in one go in everything but ``measured_in_s`` of its provenance, the seconds of the last run.

Every stage costs a number of passes of the model that is set beforehand and does not grow with units times formats:
the sequences of the Fisher sketch, and ``logit_passes`` of the single-unit KL, whose other pairs are completed.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.candidates import Candidates
from runtime.checkpoint import fixed_bytes, rest_bytes
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule
from sensitivity.criteria.estimator import Estimator
from sensitivity.criteria.estimator_input import EstimatorInput
from sensitivity.criteria.output_error import measure_output_error
from sensitivity.criteria.weight_error import measure_weight_error
from sensitivity.estimators import find_estimator
from sensitivity.experts.expert_tables import FISHER_SHRUNK, find_routing, shrink_table
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.measure_config import (
    FISHER,
    OUTPUT_ERROR,
    SINGLE_UNIT_KL,
    WEIGHT_ERROR,
    MeasureConfig,
    MeasurementText,
)
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.prediction.fitted_plans import fit_profile
from sensitivity.profile import NATS, LossTable, SensitivityProfile
from sensitivity.provenance import make_provenance
from sensitivity.sketches.combination import COMBINED, combine
from sensitivity.sketches.completion import complete
from sensitivity.sketches.fisher_pieces import IsStable, measure_growing_sketch, measure_sketch
from sensitivity.sketches.fisher_sketch import fisher_loss
from sensitivity.sketches.logit_pieces import measure_single_unit_kl
from sensitivity.sketches.pair_design import choose_pairs
from sensitivity.weight_inputs import find_rendering

_OUTPUT_SEQUENCES = 16  # of those of the Fisher sketch; the output error is an average, not a sample

Progress = Callable[[str, int, int], None]


def measure_profile(
    reference: ReferenceModel,
    candidates: Candidates,
    text: MeasurementText,
    config: MeasureConfig,
    *,
    pieces: Path,
    progress: Progress,
    rendering: Path | None = None,
    is_stable: IsStable | None = None,
) -> SensitivityProfile:
    """Returns the profile of a model.

    Args:
        reference: The model.
        candidates: Units and formats.
        text: Sequences for each purpose.
        config: Settings.
        pieces: Directory for the finished pieces; those already there are used.
        progress: Called with (stage, pieces done, pieces of the stage).
        rendering: Directory for what a quantizer that reads input statistics keeps; None to keep it with the pieces.
        is_stable: Whether the Fisher sketch is of enough sequences; asked after every doubling of them, where the
            settings say so.
    """
    started = time.monotonic()
    rule = find_rendering(
        reference.model, config.quantizer, text.fisher.tokens, directory=rendering or pieces / "rendering"
    )
    routing = find_routing(
        reference.model,
        candidates,
        text.fisher.tokens,
        path=pieces / "routing.safetensors",
        progress=progress,
        residency=reference.stored_weights,
    )
    losses, sketch, gram = _measure_losses(
        reference, candidates, text, config, rule, pieces, progress, routing, is_stable
    )
    fits = {}
    if config.fit_plans is not None:
        fits = fit_profile(
            reference.model,
            candidates,
            losses,
            text.fit.tokens,
            count=config.fit_plans,
            quantizer=rule,
            seed=config.seed,
            pieces=pieces / "fit",
            progress=partial(progress, "prediction_fit"),
        )
    routers = any(unit.kind == "router" for unit in candidates.units)
    return SensitivityProfile(
        candidates=candidates,
        losses=losses,
        prediction_fits=fits,
        calibration_tokens=text.fisher.tokens.numpy(),
        fisher_sketch=sketch,
        logit_gram=gram,
        selection_tokens=text.selection.tokens.numpy(),
        evaluation_tokens=text.evaluation.tokens.numpy(),
        fixed_bytes=fixed_bytes(reference.model, routers=routers, residency=reference.residency),
        rest_bytes=rest_bytes(reference.model, routers=routers, residency=reference.residency),
        reference_bytes=reference.reference_bytes,
        expert_share=_expert_share(reference.model.config),
        routing=routing,
        provenance=make_provenance(
            reference,
            candidates,
            text,
            config,
            sketched=0 if sketch is None else len(sketch),
            seconds=time.monotonic() - started,
        ),
    )


def _measure_losses(
    reference: ReferenceModel,
    candidates: Candidates,
    text: MeasurementText,
    config: MeasureConfig,
    rule: RenderingRule,
    pieces: Path,
    progress: Progress,
    routing: RoutingStatistics | None,
    is_stable: IsStable | None,
) -> tuple[dict[str, LossTable], NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Returns metric -> table, the Fisher sketch and the Gram matrix of the logit sketch, where they are measured."""
    losses: dict[str, LossTable] = {}
    for metric in (WEIGHT_ERROR, OUTPUT_ERROR):
        if metric in config.metrics:
            losses[metric] = _measure_error(metric, reference, candidates, text.fisher.tokens, rule, pieces, progress)
    sketch = gram = None
    if FISHER in config.metrics:
        sketch = _measure_sketch(reference, candidates, text.fisher.tokens, config, rule, pieces, progress, is_stable)
        loss, std_error = fisher_loss(sketch)
        losses[FISHER] = LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS)
        if routing is not None:
            losses[FISHER_SHRUNK] = shrink_table(losses[FISHER], routing, candidates)
    if SINGLE_UNIT_KL in config.metrics:
        losses[SINGLE_UNIT_KL], gram = _measure_logit(
            reference, candidates, text.logit.tokens, config, rule, pieces, progress, losses=losses
        )
    if FISHER in losses and SINGLE_UNIT_KL in losses:
        losses[COMBINED] = combine(losses[FISHER], losses[SINGLE_UNIT_KL], candidates.allowed)
    losses |= _measure_others(reference, candidates, text.fisher.tokens, config, rule, pieces, progress, known=losses)
    return losses, sketch, gram


def _measure_sketch(
    reference: ReferenceModel,
    candidates: Candidates,
    tokens: Tensor,
    config: MeasureConfig,
    rule: RenderingRule,
    pieces: Path,
    progress: Progress,
    is_stable: IsStable | None,
) -> NDArray[np.float32]:
    measure = partial(
        measure_sketch,
        reference.model,
        candidates,
        tokens,
        seed=config.seed,
        quantizer=rule,
        progress=partial(progress, FISHER),
        residency=reference.stored_weights,
        dtype=getattr(torch, config.gradient_dtype),
    )
    if not config.until_stable:
        return measure(pieces=pieces / FISHER)
    assert is_stable is not None, "who asks for plans that are stable says when they are"
    return measure_growing_sketch(measure, len(tokens), is_stable=is_stable, pieces=pieces / FISHER)


def _measure_error(
    metric: str,
    reference: ReferenceModel,
    candidates: Candidates,
    tokens: Tensor,
    rule: RenderingRule,
    pieces: Path,
    progress: Progress,
) -> LossTable:
    def measure() -> Piece:
        if metric == WEIGHT_ERROR:
            residency = reference.residency
            return {"error": measure_weight_error(reference.model, candidates, quantizer=rule, residency=residency)}
        few = tokens[:_OUTPUT_SEQUENCES]
        return {"error": measure_output_error(reference.model, candidates, few, quantizer=rule)}

    progress(metric, 0, 1)
    error = read_or_measure(pieces / f"{metric}.safetensors", measure)["error"]
    progress(metric, 1, 1)
    return LossTable(loss=error, std_error=np.zeros_like(error), unit_of_measure="squared error")


def _measure_others(
    reference: ReferenceModel,
    candidates: Candidates,
    tokens: Tensor,
    config: MeasureConfig,
    rule: RenderingRule,
    pieces: Path,
    progress: Progress,
    *,
    known: Mapping[str, LossTable],
) -> dict[str, LossTable]:
    """Returns the tables of the further estimators that were asked for."""
    given = EstimatorInput(
        model=reference.model,
        candidates=candidates,
        tokens=tokens[:_OUTPUT_SEQUENCES],
        quantizer=rule,
        seed=config.seed,
    )
    tables = {}
    for metric in config.metrics:
        if metric in known:
            continue
        estimator = find_estimator(metric)

        def measure(estimator: Estimator = estimator) -> Piece:
            table = estimator.estimate(given)
            return {"loss": table.loss, "std_error": table.std_error}

        progress(metric, 0, 1)
        piece = read_or_measure(pieces / f"{metric}.safetensors", measure)
        progress(metric, 1, 1)
        tables[metric] = LossTable(
            loss=piece["loss"], std_error=piece["std_error"], unit_of_measure=estimator.unit_of_measure
        )
    return tables


def _measure_logit(
    reference: ReferenceModel,
    candidates: Candidates,
    tokens: Tensor,
    config: MeasureConfig,
    rule: RenderingRule,
    pieces: Path,
    progress: Progress,
    *,
    losses: Mapping[str, LossTable],
) -> tuple[LossTable, NDArray[np.float32] | None]:
    pairs = lossy = candidates.allowed
    if config.logit_passes is not None and int(pairs.sum()) > config.logit_passes:
        if WEIGHT_ERROR not in losses:
            error = _measure_error(WEIGHT_ERROR, reference, candidates, tokens, rule, pieces, progress)
            losses = {**losses, WEIGHT_ERROR: error}
        # Not above zero: what is no number must not pass for lossless.
        lossy = candidates.allowed & (losses[WEIGHT_ERROR].loss != 0.0)
        pairs = choose_pairs(candidates.units, lossy, config.logit_passes, seed=config.seed)
    table, gram = measure_single_unit_kl(
        reference.model,
        candidates,
        tokens,
        pairs=pairs,
        cross_terms=pairs.sum() == lossy.sum(),
        top_tokens=config.top_tokens,
        quantizer=rule,
        pieces=pieces / "logit",
        progress=partial(progress, SINGLE_UNIT_KL),
    )
    if gram is None:
        # The nearest to the loss first.
        references = [losses[m].loss for m in (FISHER, OUTPUT_ERROR, WEIGHT_ERROR) if m in losses]
        table = complete(table, pairs, references=references, candidates=candidates, lossy=lossy)
    return table, gram


def _expert_share(config: Any) -> float:
    used = getattr(config, "num_experts_per_tok", None)
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return used / count if used and count else 1.0
