"""Measuring: text for every purpose, no document for two, and a finished profile is not measured again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from allocator.measuring import MeasureRequest, find_candidates, prepare_text, run_measurement
from allocator.store import Store
from runtime.loading import ReferenceModel, load_reference
from tests.tiny_measurements import CONFIG, make_request
from tests.tiny_models import sample_text


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> ReferenceModel:
    return load_reference(str(tiny_llama_dir))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def words_of(reference: ReferenceModel, request: MeasureRequest) -> dict[str, set[str]]:
    """Returns purpose -> the whole words of its sequences, which may cut their first and their last."""
    text = prepare_text(reference, request)
    parts = {name: getattr(text, name) for name in ("fisher", "logit", "selection", "evaluation", "fit")}
    shapes = {
        "fisher": (CONFIG.fisher_sequences, CONFIG.sequence_tokens),
        "logit": (CONFIG.logit_sequences, CONFIG.logit_sequence_tokens),
        "selection": (CONFIG.selection_sequences, CONFIG.evaluation_sequence_tokens),
        "evaluation": (CONFIG.evaluation_sequences, CONFIG.evaluation_sequence_tokens),
        "fit": (CONFIG.fit_sequences, CONFIG.sequence_tokens),
    }
    assert {name: tuple(part.tokens.shape) for name, part in parts.items()} == shapes
    rows = {name: [reference.tokenizer.decode(row) for row in part.tokens.tolist()] for name, part in parts.items()}
    return {name: {w for row in texts for w in row.replace("</s>", " ").split()[1:-1]} for name, texts in rows.items()}


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i} " * 40 for i in range(count)]


def test_parts_of_one_source_share_no_document(reference: ReferenceModel, tmp_path: Path) -> None:
    documents = numbered("word", 40)
    source = write(tmp_path / "text.jsonl", "".join(json.dumps({"text": d}) + "\n" for d in documents))
    found = words_of(reference, make_request(Path(source)))
    assert found["fisher"] and found["fit"] and found["selection"] and found["evaluation"]
    assert not found["selection"] & found["evaluation"]
    assert not (found["selection"] | found["evaluation"]) & (found["fisher"] | found["logit"] | found["fit"])


@pytest.mark.parametrize(("sketch", "fit"), [(6, 2), (5, 3), (2, 7), (9, 9)])
def test_sequences_of_the_fit_lie_evenly_between_those_of_the_sketch(
    sketch: int, fit: int, reference: ReferenceModel, tmp_path: Path
) -> None:
    config = replace(CONFIG, fisher_sequences=sketch, fit_sequences=fit)
    # Every number is in one place of the text only.
    source = write(tmp_path / "numbers.txt", " ".join(map(str, range(1000, 3000))))
    text = prepare_text(reference, make_request(Path(source), config=config))

    def first_number(row: list[int]) -> int:
        return int(reference.tokenizer.decode(row).split()[1])

    starts = {part: [first_number(row) for row in getattr(text, part).tokens.tolist()] for part in ("fisher", "fit")}
    assert [len(found) for found in starts.values()] == [sketch, fit]
    assert all(found == sorted(found) for found in starts.values())
    together = sorted(starts["fisher"] + starts["fit"])
    assert len(set(together)) == sketch + fit
    # Each within one place of the middle of its own of so many equal parts.
    for i, start in enumerate(starts["fit"]):
        assert abs(together.index(start) + 0.5 - (i + 0.5) * (sketch + fit) / fit) <= 1


def test_sampled_sequences_of_the_fit_are_others_than_those_of_the_sketch(reference: ReferenceModel) -> None:
    text = prepare_text(reference, replace(make_request(Path("none")), calibration=None))
    rows = [{tuple(row) for row in part.tokens.tolist()} for part in (text.fisher, text.fit)]
    assert [len(found) for found in rows] == [CONFIG.fisher_sequences, CONFIG.fit_sequences]
    assert not rows[0] & rows[1]


def test_every_purpose_from_its_own_source(reference: ReferenceModel, tmp_path: Path) -> None:
    sources = {name: Path(write(tmp_path / f"{name}.txt", f"{name} " * 900)) for name in ("one", "two", "three")}
    words = words_of(
        reference, make_request(sources["one"], selection=str(sources["two"]), evaluation=str(sources["three"]))
    )
    assert words == {
        "fisher": {"one"},
        "logit": {"one"},
        "selection": {"two"},
        "evaluation": {"three"},
        "fit": {"one"},
    }


def test_without_text_the_model_samples_its_own(reference: ReferenceModel, tmp_path: Path) -> None:
    request = replace(make_request(Path("none")), calibration=None)
    first, again = prepare_text(reference, request), prepare_text(reference, request)
    assert first.fisher.source.startswith("sampled from the model")
    torch.testing.assert_close(first.evaluation.tokens, again.evaluation.tokens)
    assert not torch.equal(first.selection.tokens, first.evaluation.tokens)
    own = write(tmp_path / "own.txt", "own " * 900)
    mixed = prepare_text(reference, replace(request, evaluation=own))
    assert set(reference.tokenizer.decode(mixed.evaluation.tokens.flatten().tolist()).split()) == {"own"}
    torch.testing.assert_close(mixed.selection.tokens, first.selection.tokens)


@pytest.mark.parametrize("calibration", ["same.txt", None])
def test_no_document_may_have_two_purposes(calibration: str | None, reference: ReferenceModel, tmp_path: Path) -> None:
    same = write(tmp_path / "same.txt", sample_text(5000))
    copy = write(tmp_path / "copy.txt", sample_text(5000))
    request = replace(
        make_request(tmp_path / "same.txt"),
        calibration=same if calibration else None,
        selection=None if calibration else same,
        evaluation=copy,
    )
    other = "calibration" if calibration else "selection"
    message = rf"must not share a document: got one of '.*copy.txt' \(evaluation\) in '.*same.txt' \({other}\) as well"
    with pytest.raises(ValueError, match=message):
        prepare_text(reference, request)


def test_text_that_is_too_short_for_a_part(reference: ReferenceModel, tmp_path: Path) -> None:
    short = write(tmp_path / "short.txt", "Too short to measure with.")
    with pytest.raises(ValueError, match=r"text must hold 8 sequences of 16 tokens: got .* tokens from '.*short.txt"):
        prepare_text(reference, make_request(Path(short)))


def test_request_shapes_the_candidates(reference: ReferenceModel) -> None:
    request = make_request(
        Path("none"),
        embedding_formats=("int8_g64", "bf16"),
        fuse=(r"^model\.layers\.0\..*$",),
        pins={r"layers\.1\.": "int3_g64"},
    )
    candidates = find_candidates(reference, request)
    allowed = {
        unit.name: {f.name for f, ok in zip(candidates.formats, row, strict=True) if ok}
        for unit, row in zip(candidates.units, candidates.allowed, strict=True)
    }
    for unit in candidates.units:
        if unit.kind in ("embedding", "head"):
            assert allowed[unit.name] == {"int8_g64", "bf16"}
    first_layer = [u for u in candidates.units if any("layers.0." in w.name for w in u.weights)]
    assert len(first_layer) == 1 and len(first_layer[0].weights) == 7
    pinned = [allowed[u.name] for u in candidates.units if any("layers.1." in w.name for w in u.weights)]
    assert pinned and all(names == {"int3_g64"} for names in pinned)


def test_finished_profile_is_not_measured_again(
    reference: ReferenceModel, tiny_text: Path, tiny_store: Store, tiny_profile: object
) -> None:
    stages: list[str] = []
    found = run_measurement(
        reference, make_request(tiny_text), tiny_store, lambda stage, done, total: stages.append(stage)
    )
    assert stages == []
    latest = tiny_store.find_latest_profile(reference.fingerprint)
    assert latest is not None and latest.fingerprint == found.fingerprint
