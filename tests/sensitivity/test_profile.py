"""What is asked of a profile itself."""

import dataclasses

import numpy as np
import pytest

from runtime.candidates import list_candidates
from runtime.units import find_units
from sensitivity.profile import NATS, LossTable, SensitivityProfile, fingerprint_of
from tests.tiny_models import build_tiny_llama


def test_table_is_found_by_its_metric() -> None:
    candidates = list_candidates(find_units(build_tiny_llama(), fuse=[]), ("int4_g64", "bf16"))
    none = np.zeros(candidates.allowed.shape)
    table = LossTable(loss=none, std_error=none, unit_of_measure=NATS)
    tokens = np.zeros((1, 2), np.int64)
    profile = SensitivityProfile(
        candidates=candidates,
        losses={"fisher": table, "single_unit_kl": dataclasses.replace(table)},
        fisher_sketch=None,
        logit_gram=None,
        prediction_fits={},
        calibration_tokens=tokens,
        selection_tokens=tokens,
        evaluation_tokens=tokens,
        fixed_bytes=0,
        rest_bytes=0,
        reference_bytes=1,
        expert_share=1.0,
        routing=None,
        provenance={"model": "tiny", "profile": "f" * 64},
    )
    assert profile.table("fisher") is table
    assert profile.fingerprint == "f" * 64
    with pytest.raises(ValueError, match="got 'combined', held are fisher, single_unit_kl. Measure again"):
        profile.table("combined")


def test_fingerprint_is_that_of_the_content() -> None:
    assert fingerprint_of({"a": 1, "b": [1, 2]}) == fingerprint_of({"b": [1, 2], "a": 1})
    assert len({fingerprint_of({"a": 1}), fingerprint_of({"a": 2}), fingerprint_of({"b": 1})}) == 3
    assert len(fingerprint_of({})) == 64
