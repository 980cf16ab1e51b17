"""Who imports whom, what stays light, and that docstrings speak of arguments that exist."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parent.parent
# Package -> the other packages of the project that it may import.
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "solvers": set(),
    "reports": set(),
    "runtime": set(),
    "sensitivity": {"runtime"},
    "allocator": {"runtime", "sensitivity", "solvers", "reports"},
}
WITHOUT_TORCH = ("solvers", "reports")
HEAVY_MODULES = ("torch", "transformers", "pandas", "cvxpy", "fastapi", "sqlalchemy", "httpx2")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in ALLOWED_IMPORTS for path in sorted((ROOT / package).rglob("*.py"))}


def list_imports(name: str) -> Iterator[str]:
    """Yields the modules that a module names in any import statement, also one inside a function."""
    path = MODULES[name]
    package_parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package_parts[: len(package_parts) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` names the module, not the package.
            submodules = [f"{source}.{alias.name}" for alias in node.names]
            yield from (module for module in submodules if module in MODULES)
            if not all(module in MODULES for module in submodules):
                yield source


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_packages_import_only_what_they_may(package: str) -> None:
    forbidden = (set(ALLOWED_IMPORTS) - {package} - ALLOWED_IMPORTS[package]) | {"tests", "benchmarks"}
    if package in WITHOUT_TORCH:
        forbidden |= {"torch", "transformers"}
    found = {
        f"{name} imports {imported}"
        for name in MODULES
        if name.split(".")[0] == package
        for imported in list_imports(name)
        if imported.split(".")[0] in forbidden
    }
    assert not found


@pytest.mark.parametrize("package", ALLOWED_IMPORTS)
def test_no_cycles_inside_a_package(package: str) -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name in MODULES:
        if name.split(".")[0] == package:
            graph.add_edges_from((name, imported) for imported in list_imports(name) if imported in MODULES)
    assert list(nx.simple_cycles(graph)) == []


def run_python(*arguments: str) -> str:
    """Returns the standard output of a new interpreter started in the repository."""
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.parametrize("package", ["solvers", "reports", "allocator"])
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY_MODULES} if name in sys.modules])"
    assert run_python("-c", code).strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([name for name in {HEAVY_MODULES} if name in sys.modules]))\n"
        f"sys.argv = ['bitplan', *{arguments}]\n"
        "from allocator.cli import main\n"
        "sys.exit(main())\n"
    )
    printed = run_python("-c", code)
    assert "Usage: bitplan" in printed
    assert printed.splitlines()[-1] == "[]"


def list_documented_names(docstring: str, section: str) -> Iterator[str]:
    """Yields the names that a section of a Google-style docstring explains: its least indented lines."""
    lines = iter(docstring.splitlines())
    if not any(line.strip() == f"{section}:" for line in lines):
        return
    indentation = None
    for line in lines:
        if not line.strip():
            return
        depth = len(line) - len(line.lstrip())
        indentation = depth if indentation is None else indentation
        if depth < indentation:
            return
        if depth == indentation:
            names = re.match(r"[\w*, /]+?(?= \(|:)", line.strip())
            assert names, f"a line under '{section}:' must read 'name: meaning': got {line.strip()!r}"
            yield from (name.strip(" *") for name in re.split(r"[,/]", names.group()))


def list_defined_names(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> set[str]:
    """Returns the arguments of a function, or the fields and constructor arguments of a class."""
    if isinstance(node, ast.ClassDef):
        fields = {
            target.target.id
            for target in node.body
            if isinstance(target, ast.AnnAssign) and isinstance(target.target, ast.Name)
        }
        constructors = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
        return fields.union(*map(list_defined_names, constructors))
    arguments = node.args
    optional = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return {argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *optional]}


@pytest.mark.parametrize("name", MODULES)
def test_documented_names_exist(name: str) -> None:
    unknown = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node) or ""
            for section in ("Args", "Attributes"):
                documented = set(list_documented_names(docstring, section))
                unknown |= {f"{node.name}: {word}" for word in documented - list_defined_names(node)}
    assert not unknown
