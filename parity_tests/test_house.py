"""The project's own rules: allowed imports, no circular or private imports, sizes of files and functions.

`make lint` runs these.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ipa_bridge", "ipa_jax", "ipa_torch", "ipa_parity")
FOLDERS = (*PACKAGES, "benchmarks", "examples", "parity_tests", "docs")

FORBIDDEN = {
    "ipa_bridge": {"ipa_jax", "ipa_torch", "ipa_parity", "jax", "haiku", "triton"},
    "ipa_jax": {"ipa_torch", "ipa_parity", "torch"},
    "ipa_torch": {"ipa_jax", "ipa_parity", "jax", "haiku"},
}
"""Packages that each package must never import."""

LAZY = {"ipa_bridge": {"torch", "safetensors", "gemmi", "ml_dtypes"}, "ipa_parity": {"jax", "haiku", "torch"}}
"""Packages that may be imported only inside functions."""

MAX_LINES = 450
"""Maximum lines of a file."""

LONGER = {"docs/tutorial.py": "it is read from top to bottom"}

MAX_FUNCTION_LINES = 60
"""Maximum lines of a function, not counting its docstring."""


def files(folder: str) -> dict[str, Path]:
    """Files of a folder by module name."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


TREES = {name: ast.parse(path.read_text()) for folder in FOLDERS for name, path in files(folder).items()}


def at_import(tree: ast.Module) -> ast.Module:
    """The statements that importing the module runs."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, [])


def imports(tree: ast.AST) -> set[str]:
    """All imported modules, and names imported from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages(tree: ast.AST) -> set[str]:
    return {name.partition(".")[0] for name in imports(tree)}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_downwards(package):
    for module in files(package):
        assert not packages(TREES[module]) & FORBIDDEN.get(package, set()), module
        assert not packages(at_import(TREES[module])) & LAZY.get(package, set()), module


def test_no_circular_imports():
    """Imports inside functions and for types count too; a package may import its own modules."""
    needs = {
        name: {x for x in imports(tree) if x in TREES and x != name and not name.startswith(f"{x}.")}
        for name, tree in TREES.items()
    }
    circle, ends = needs, {""}
    while ends:  # drop modules that import none of the others, and modules that none of them imports
        needed = set().union(*circle.values())
        ends = {name for name, x in circle.items() if not x & circle.keys() or name not in needed}
        circle = {name: x for name, x in circle.items() if name not in ends}
    assert not circle, [f"{name} needs {', '.join(sorted(x & circle.keys()))}" for name, x in circle.items()]


@pytest.mark.parametrize("folder", [x for x in FOLDERS if x != "parity_tests"])
def test_no_private_name_is_imported(folder):
    """No private name of our modules is imported by another module."""
    for module in files(folder):
        tree = TREES[module]
        private = {x for x in imports(tree) if x.startswith("ipa_") and x.rpartition(".")[2].startswith("_")}
        private -= {x for x in private if x.rpartition(".")[2].startswith("__")}
        assert not private, f"{module} imports {', '.join(sorted(private))}"


def test_files_are_not_too_long():
    long = {}
    for folder in FOLDERS:
        for path in files(folder).values():
            lines, name = len(path.read_text().splitlines()), path.relative_to(ROOT).as_posix()
            if lines > MAX_LINES and name not in LONGER:
                long[name] = lines
    assert not long, long


def test_functions_are_not_too_long():
    long = {}
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first, lines = node.body[0], node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= first.end_lineno - first.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{module}.{node.name}"] = lines
    assert not long, long
