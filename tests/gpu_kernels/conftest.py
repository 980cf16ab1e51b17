"""Triton fixes at import whether kernels are interpreted or compiled, so each folder has a process of its own.

The Makefile runs the interpreted one with TRITON_INTERPRET=1. Neither needs a GPU.
"""

import importlib.util
import os
from typing import Any

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

    import triton.language as tl
    from triton.runtime import interpreter

    # Every integer operation is checked for overflow otherwise, which takes five times as long.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # A launch puts the interpreter's functions where the language's were. So does every call of a device function once
    # more, which finds nothing left to replace in the modules that it names, and takes half of the time.
    patch_language = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        named = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        fresh = any(tl.core.is_builtin(module.full) for module in named)
        return patch_language(function) if fresh else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
