"""Which exceptions are a user's to hear about in one message, and which are defects that deserve a traceback."""

import errno

from allocator.artefact_match import ArtefactMismatch
from reports.browser import PrintingFailed
from solvers import SolverFailure


def describe_failure(error: Exception) -> str | None:
    """Returns one clear message for an expected failure, or None for a defect of the program."""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"the disk must have room: writing '{error.filename or 'a file'}' failed ({error.strerror}). "
                "Free some space and run the same command again; finished measurements are kept."
            )
        if error.filename is None:
            return str(error)
        return f"files must be readable and their places writable: got '{error.filename}' ({error.strerror or error})."
    if isinstance(error, (ValueError, ArtefactMismatch, SolverFailure, PrintingFailed, ModuleNotFoundError)):
        return str(error)
    return None
