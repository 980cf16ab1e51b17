"""From a request to a profile: the units, the text for each purpose, and the store around the measurement."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from allocator.beside_weights import (
    add_activations,
    add_cache,
    find_activation_candidates,
    find_cache_candidates,
)
from allocator.progress import Progress
from allocator.shortlist import MENU, find_shortlist
from allocator.stability import PlanStability
from allocator.store import Store
from allocator.transformed import transform_
from runtime.candidates import Candidates, list_candidates
from runtime.formats import DEFAULT_FORMATS, FORMATS
from runtime.loading import ReferenceModel
from runtime.units import find_units
from sensitivity.calibration import (
    TokenSequences,
    read_documents,
    sample_sequences,
    split_documents,
    tokenize_documents,
)
from sensitivity.experts.self_sampling import sample_balanced_sequences
from sensitivity.measure import measure_profile
from sensitivity.measure_config import MeasureConfig, MeasurementText, make_blockwise
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import SensitivityProfile, fingerprint_of
from sensitivity.provenance import measurement_fingerprint

SELF_BALANCED = "self-balanced"
# Raised whenever the same model would sample other text.
SAMPLING_VERSION = 1
CALIBRATION, SELECTION, EVALUATION = "calibration", "selection", "evaluation"


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """What to measure, on which text.

    Args:
        calibration: Text source (file, JSONL, directory, dataset name); None for text sampled from the model,
            ``SELF_BALANCED`` for text sampled so that it uses the experts of a mixture evenly.
        selection: Text source that chooses between plans; None to keep part of the calibration text apart for it.
        evaluation: Text source of the final evaluation; None to keep another part apart.
        formats: Names of formats; ``menu`` alone for a shortlist of all that there are (``allocator.shortlist``).
        embedding_formats: Formats of embeddings and heads; None for those of 4 bits or more.
        fuse: Regular expressions of weights that must share a format.
        experts: What of a mixture of experts is one unit, a name in ``EXPERT_GRANULARITIES``.
        routers: Whether routers take formats too.
        pins: Regular expression on unit names -> format.
        transforms: Transforms of the reference model with their options, in order, such as ``smoothquant:alpha=0.7``.
        cache_formats: Names of formats that the keys and values of each layer's cache may take; none to leave caches
            out of the profile.
        activation_formats: Names of formats that the inputs of linear layers may take; none to leave activations out.
        config: Amounts and seed.
    """

    calibration: str | None = None
    selection: str | None = None
    evaluation: str | None = None
    formats: tuple[str, ...] = DEFAULT_FORMATS
    embedding_formats: tuple[str, ...] | None = None
    fuse: tuple[str, ...] = ()
    experts: str = "projection"
    routers: bool = False
    pins: Mapping[str, str] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()
    cache_formats: tuple[str, ...] = ()
    activation_formats: tuple[str, ...] = ()
    config: MeasureConfig = field(default_factory=MeasureConfig)


def run_measurement(
    reference: ReferenceModel, request: MeasureRequest, store: Store, progress: Progress
) -> SensitivityProfile:
    """Returns the profile of a request: from the store, or measured (and resumed) piece by piece.

    Of a model that is read block by block only what needs no more of it is measured; the profile has the fingerprint
    and the numbers of one of the model in memory with these metrics.

    Args:
        reference: The model as it was trained; rewritten in place where the request names transforms.
        request: The request.
        store: Where profiles and their pieces are kept.
        progress: Called with (stage, done, total).

    Raises:
        ValueError: If the request is wrong, or asks for what such a model cannot give, or for caches or
            activations that the model or the metrics have nothing to say of.
    """
    if reference.stored_weights is not None:
        request = _make_blockwise(request)
    text = prepare_text(reference, request, kept=store.root / "texts")
    if request.transforms:
        reference = transform_(reference, request.transforms, text.fisher.tokens, store)
    candidates, metrics = find_candidates(reference, request), request.config.metrics
    cache = find_cache_candidates(reference, request.cache_formats, metrics)
    activations = find_activation_candidates(reference, candidates.units, request.activation_formats, metrics)
    notes = {}
    if request.formats == (MENU,):
        shortlist = find_shortlist(
            reference,
            candidates,
            quantizer=request.config.quantizer,
            kept=store.root / "shortlists",
            progress=partial(progress, "shortlist"),
        )
        candidates, notes = shortlist.candidates, {"menu": shortlist.describe()}
    profile = _measure_weights(reference, candidates, text, request.config, store, progress, notes=notes)
    if cache is not None:
        profile = add_cache(reference, profile, cache, text, store, progress)
    if activations is not None:
        profile = add_activations(reference, profile, activations, request.config.seed, text, store, progress)
    store.make_latest(profile)
    return profile


def _measure_weights(
    reference: ReferenceModel,
    candidates: Candidates,
    text: MeasurementText,
    config: MeasureConfig,
    store: Store,
    progress: Progress,
    *,
    notes: Mapping[str, str],
) -> SensitivityProfile:
    fingerprint = measurement_fingerprint(reference.weights_fingerprint, candidates, text, config)
    profile = store.find_profile(fingerprint)
    if profile is None:
        profile = measure_profile(
            reference,
            candidates,
            text,
            config,
            pieces=store.pieces(fingerprint),
            progress=progress,
            rendering=store.rendering(fingerprint),
            is_stable=PlanStability(candidates).is_stable,
        )
        profile = replace(profile, provenance={**profile.provenance, **notes})
        store.save_profile(profile)
    return profile


def _make_blockwise(request: MeasureRequest) -> MeasureRequest:
    if request.calibration in (None, SELF_BALANCED):
        msg = (
            "calibration text of a model that is read block by block must be named: the model would be read once for "
            "every token that it samples. Name a text (--calibration)."
        )
        raise ValueError(msg)
    return replace(request, config=make_blockwise(request.config))


def find_candidates(reference: ReferenceModel, request: MeasureRequest) -> Candidates:
    """Returns the units and allowed formats of a request; all formats where it asks for the menu."""
    units = find_units(reference.model, fuse=request.fuse, experts=request.experts, routers=request.routers)
    formats = tuple(FORMATS) if request.formats == (MENU,) else request.formats
    return list_candidates(units, formats, embedding_formats=request.embedding_formats, pins=request.pins)


def prepare_text(reference: ReferenceModel, request: MeasureRequest, *, kept: Path | None = None) -> MeasurementText:
    """Returns the token sequences of every purpose; no document serves two of them.

    Args:
        reference: The model.
        request: The request.
        kept: Directory where sampled text is kept and found again; None to sample it anew.
    """
    config = request.config
    sources = _read_sources(request)
    wanted = {
        # Those of the fit lie evenly between those of the sketch, which it must not see.
        CALIBRATION: (config.fisher_sequences + config.fit_sequences, config.sequence_tokens),
        "logit": (config.logit_sequences, config.logit_sequence_tokens),
        SELECTION: (config.selection_sequences, config.evaluation_sequence_tokens),
        EVALUATION: (config.evaluation_sequences, config.evaluation_sequence_tokens),
    }
    sampled = request.calibration in (None, SELF_BALANCED)
    if sampled:
        # What judges plans is text as the model writes it.
        balanced = (CALIBRATION, "logit") if request.calibration == SELF_BALANCED else ()
        parts = {
            name: _sample(reference, config.seed + i, *size, balanced=name in balanced, kept=kept)
            for i, (name, size) in enumerate(wanted.items())
        }
    else:
        documents = _documents_by_purpose(request, sources)
        parts = {
            name: tokenize_documents(
                documents[CALIBRATION if name == "logit" else name][1],
                reference.tokenizer,
                sequences=sequences,
                sequence_tokens=tokens,
                source=documents[CALIBRATION if name == "logit" else name][0],
            )
            for name, (sequences, tokens) in wanted.items()
        }
    for name, source in ((SELECTION, request.selection), (EVALUATION, request.evaluation)):
        if source is not None and sampled:
            sequences, tokens = wanted[name]
            parts[name] = tokenize_documents(
                sources[source], reference.tokenizer, sequences=sequences, sequence_tokens=tokens, source=source
            )
    fisher, fit = _set_apart(parts[CALIBRATION], config.fit_sequences)
    return MeasurementText(
        fisher=fisher, logit=parts["logit"], selection=parts[SELECTION], evaluation=parts[EVALUATION], fit=fit
    )


def _set_apart(text: TokenSequences, count: int) -> tuple[TokenSequences, TokenSequences]:
    """Returns a text without ``count`` of its sequences, spread evenly over it, and these."""
    total = len(text.tokens)
    apart = (torch.arange(count) * total + total // 2) // count
    rest = torch.ones(total, dtype=torch.bool)
    rest[apart] = False
    return replace(text, tokens=text.tokens[rest]), replace(text, tokens=text.tokens[apart])


def _read_sources(request: MeasureRequest) -> dict[str, list[str]]:
    """Returns source -> documents; no document may be in two sources, or of two purposes."""
    named = {CALIBRATION: request.calibration, SELECTION: request.selection, EVALUATION: request.evaluation}
    sources: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for purpose, source in named.items():
        if source in (None, SELF_BALANCED):
            continue
        sources[source] = read_documents(source)
        shared = next(
            (owner[document] for document in sources[source] if owner.get(document, purpose) != purpose), None
        )
        if shared is not None:
            msg = (
                f"texts of different purposes must not share a document: got one of '{source}' ({purpose}) in "
                f"'{named[shared]}' ({shared}) as well. Give another text, or leave out --{purpose}."
            )
            raise ValueError(msg)
        owner |= dict.fromkeys(sources[source], purpose)
    return sources


def _documents_by_purpose(
    request: MeasureRequest, sources: Mapping[str, list[str]]
) -> dict[str, tuple[str, list[str]]]:
    assert request.calibration is not None
    given = {SELECTION: request.selection, EVALUATION: request.evaluation}
    kept_apart = [name for name, source in given.items() if source is None]
    shares = {CALIBRATION: 1.0 - 0.15 * len(kept_apart), **dict.fromkeys(kept_apart, 0.15)}
    split = split_documents(sources[request.calibration], shares)
    documents = {name: (f"{request.calibration} ({name} part)", part) for name, part in split.items()}
    for name, source in given.items():
        if source is not None:
            documents[name] = (source, sources[source])
    return documents


def _sample(
    reference: ReferenceModel, seed: int, sequences: int, tokens: int, *, balanced: bool, kept: Path | None
) -> TokenSequences:
    def sample() -> Piece:
        draw = sample_balanced_sequences if balanced else sample_sequences
        drawn = draw(reference.model, reference.tokenizer, sequences=sequences, sequence_tokens=tokens, seed=seed)
        return {"tokens": drawn.tokens.numpy()}

    asked = {
        "version": SAMPLING_VERSION,
        "model": reference.fingerprint,
        "seed": seed,
        "shape": [sequences, tokens],
        "balanced": balanced,
    }
    path = None if kept is None else kept / f"sampled-{fingerprint_of(asked)}.safetensors"
    source = f"sampled from the model{' to use its experts evenly' if balanced else ''}, seed {seed}"
    return TokenSequences(tokens=torch.from_numpy(read_or_measure(path, sample)["tokens"]), source=source)
