"""Triton fixes at import whether kernels are interpreted or compiled, so each folder has a process of its own.

The Makefile runs the interpreted one with TRITON_INTERPRET=1. Neither needs a GPU.
"""

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["compiled"] if INTERPRETED else ["interpreted"]
if importlib.util.find_spec("triton") is None:
    # There is none outside Linux.
    collect_ignore = ["compiled", "interpreted"]

# torch.empty then returns NaN: an element that a kernel forgets is seen.
torch.use_deterministic_algorithms(INTERPRETED)
torch.utils.deterministic.fill_uninitialized_memory = INTERPRETED

if INTERPRETED:
    import dataclasses

    from triton.runtime import interpreter

    # Every integer operation is checked for overflow otherwise, which takes five times as long.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
