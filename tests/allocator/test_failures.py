"""Which exceptions become one message, and which stay defects."""

import errno

import pytest

from allocator.artefact_match import ArtefactMismatch
from allocator.failures import describe_failure
from solvers import SolverFailure


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(number: int) -> None:
    message = describe_failure(OSError(number, "reason", "/there/file"))
    assert message is not None
    assert message.startswith("the disk must have room: writing '/there/file' failed (reason)")
    assert message.endswith("finished measurements are kept.")
    assert "'a file'" in (describe_failure(OSError(number, "reason")) or "")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/there"), "got '/there' (Permission denied)"),
        (OSError("no number"), "no number"),
        (ValueError("value"), "value"),
        (ArtefactMismatch("mismatch"), "mismatch"),
        (SolverFailure("failure"), "failure"),
        (ModuleNotFoundError("module"), "module"),
    ],
)
def test_expected_failures(error: Exception, message: str) -> None:
    assert message in (describe_failure(error) or "")


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), RuntimeError("x"), AssertionError()])
def test_defects(error: Exception) -> None:
    assert describe_failure(error) is None
