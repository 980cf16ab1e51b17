"""Build hook: the CPU kernels are compiled when a compiler is there; without one the wheel is pure Python."""

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledKernels(BuildHookInterface):  # type: ignore[type-arg]  # its parameter is hatchling's own
    """Adds the compiled library to the wheel, which then is one for this platform and any Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = _load_build(Path(self.root))
        library = build.library_path()
        try:
            if not library.exists():
                build.compile_library(library)
        except build.CompilationFailed as error:
            self.app.display_warning(f"CPU kernels are not compiled; packed models will run slowly. {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["artifacts"].append(f"/{library.relative_to(self.root).as_posix()}")


def _load_build(root: Path) -> ModuleType:
    # By its path: the package itself is not importable in an isolated build.
    spec = importlib.util.spec_from_file_location("kernel_build", root / "runtime" / "kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
