"""The pages of docs/systems/ are true: sections, links, names, code, and what they say is assumed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from dialect_cases import NATIVE

from ipa_bridge.config import IPAConfig, PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.weights import Weights
from ipa_bridge.weights.assumptions import fields
from ipa_bridge.weights.dialects import DIALECTS, find_dialect
from ipa_bridge.weights.files import write_arrays
from ipa_bridge.weights.paths import double_slash
from ipa_bridge.weights.translation import in_dialect

DOCS = Path(__file__).resolve().parents[2] / "docs"
INDEX = DOCS / "models.md"
PAGES = {path.stem: path.read_text("utf-8") for path in sorted((DOCS / "systems").glob("*.md"))}
SECTIONS = ["Weights", "Licence", "Load", "Swap", "Assumed", "Frames", "Limits"]
MAX_LINES = 60
"""Largest number of lines of a page that are not blank."""

OURS = {"ipa_jax", "ipa_torch"}
"""Dialects of this project, which have no page."""

FULL_SIZE = {
    ("alphafold", "structure module"): StructureModuleConfig.alphafold2(),
    ("alphafold", "multimer structure module"): replace(
        StructureModuleConfig.alphafold2(), ipa=IPAConfig.alphafold_multimer()
    ),
    ("alphafold", "confidence head"): PredictedLDDTConfig(),
}
"""Configs of the modules that a page reads with a published model's `config=`; others are small."""


class Claim(NamedTuple):
    """One row of a page's table of assumed fields."""

    page: str
    dialect: str
    module: str
    path: str
    named: dict[str, object]
    left_out: dict[str, object]

    def __str__(self) -> str:
        return f"{self.page}: {self.dialect} {self.module} at {self.path or 'no path'}"


def section(page: str, title: str) -> str:
    """A page's section, without its heading."""
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
    return found


def assumed(cell: str) -> dict[str, object]:
    """Values by field that a cell lists as `field = value`."""
    if cell == "nothing":
        return {}
    pairs = [re.fullmatch(r"`([\w.]+) = (.+)`", each) for each in cell.split(", ")]
    assert all(pairs), f"`field = value`, …, or the word nothing was expected; got {cell}"
    return {pair[1]: ast.literal_eval(pair[2]) for pair in pairs if pair}


def claims_of(page: str) -> list[Claim]:
    found = []
    for line in section(page, "Assumed").splitlines():
        if line.startswith("| `"):
            dialect, module, path, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            path = "" if path == "none" else path.strip("`")
            found.append(Claim(page, dialect.strip("`"), module, path, *map(assumed, cells)))
    return found


CLAIMS = [claim for page in PAGES for claim in claims_of(page)]


@cache
def random_weights(dialect: str, module: str) -> Weights:
    name = dialect if module == "attention" else f"{dialect} {module}"
    return Weights.random(FULL_SIZE.get((dialect, module)) or NATIVE[name][1])


def arrays_of(claim: Claim, path: str) -> dict[str, np.ndarray]:
    """Random arrays of a module under its system's names at a path, with those that lie beside it."""
    dialect, weights = find_dialect(claim.dialect), random_weights(claim.dialect, claim.module)
    arrays = in_dialect(weights.arrays, weights.config, dialect, path)
    beside = {f"{path}.{module}.0.weight": np.ones(3, np.float32) for module in dialect.beside}
    return {double_slash(name) if dialect.separator == "/" else name: x for name, x in (arrays | beside).items()}


def write(file: Path, claims: list[Claim]) -> None:
    """Writes modules to a file without metadata; `{}` in a path stands for the numbers 0 and 1."""
    arrays: dict[str, np.ndarray] = {}
    for claim in claims:
        for path in dict.fromkeys(claim.path.format(number) for number in range(2)):
            arrays |= arrays_of(claim, path)
    write_arrays(file, arrays, {}, replace=True)


def suffix_of(dialect: str) -> str:
    return ".npz" if find_dialect(dialect).separator == "/" else ".safetensors"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_what_a_page_says_is_assumed_is_assumed(claim, tmp_path):
    file, path = tmp_path / f"file{suffix_of(claim.dialect)}", claim.path.format(0)
    write_arrays(file, arrays_of(claim, path), {}, replace=True)
    for dialect, expected in ((claim.dialect, claim.named), (None, claim.left_out)):
        weights = Weights.load(file, dialect=dialect, root=path)
        known = fields(weights.config)
        assert {field: known[field] for field in weights.assumed} == expected, f"{claim}, dialect={dialect!r}"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def constants(block: ast.Module) -> dict[str, object]:
    """Names that a block assigns constants to."""
    return {
        target.id: node.value.value
        for node in block.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def files_read(page: str, code: str) -> dict[str, str]:
    """Dialects by name of the file, of all calls of `Weights.load` in a block; the page's only one if none is named."""
    tree, found = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Weights.load":
            given = {each.arg: each.value for each in node.keywords}
            named = ast.literal_eval(given["dialect"]) if "dialect" in given else None
            (path,) = (ast.literal_eval(each) for each in node.args)
            found[path] = named or found.get(path)
    (*only,) = {claim.dialect for claim in claims_of(page)}
    assert all(found.values()) or len(only) == 1, f"{page}: name the dialect in {found}"
    return {path: dialect or only[0] for path, dialect in found.items()}


def in_file(page: str, dialect: str, name: str) -> list[Claim]:
    """Modules of a page's dialect that a file holds together: outermost ones, and of two layouts the one it names."""
    claims = [each for each in claims_of(page) if each.dialect == dialect]
    multimer = "multimer" in name and any("multimer" in each.module for each in claims)
    claims = [
        each for each in claims if each.module != ("structure module" if multimer else "multimer structure module")
    ]
    return [x for x in claims if not any(x.path.startswith(f"{y.path}.") for y in claims if y.path)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_lines_that_load_run(page, tmp_path, monkeypatch):
    """Files of random weights in the system's names take the place of the published ones."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    codes = blocks(section(page, "Load"))
    assert codes
    loaded = []
    for number, code in enumerate(codes):
        for name, dialect in files_read(page, code).items():
            write(tmp_path / name, in_file(page, dialect, name))
        for name in re.findall(r'np\.load\("([^"]+)", allow_pickle=True\)', code):
            tree = random_weights("alphafold", "structure module").to_haiku(root="model/structure_module")
            (tmp_path / name).write_bytes(pickle.dumps(tree))
        known: dict = {}
        exec(compile(code, f"{page}.md: Load {number}", "exec"), known)
        loaded += [x for x in known.values() if isinstance(x, Weights)]
    assert loaded
    assert all(np.isfinite(x).all() for weights in loaded for x in weights.arrays.values())


OUR_PACKAGES = ("ipa_jax", "ipa_torch", "ipa_bridge")


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_that_swap_name_what_exists(page):
    """Other packages are not here to run them, so names and arguments of ours are checked."""
    codes = blocks(section(page, "Swap"))
    assert any("replace_ipa(" in code or "replace_alphafold_ipa(" in code for code in codes)
    for node in (node for code in codes for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner in OUR_PACKAGES:
                pytest.importorskip(owner)
                function = getattr(importlib.import_module(owner), node.func.attr)
                given = {each.arg: None for each in node.keywords}
                inspect.signature(function).bind(*node.args, **given)


def test_every_dialect_and_every_swap_has_a_page():
    described = {claim.dialect for claim in CLAIMS}
    assert described == set(DIALECTS) - OURS, "every dialect needs a row under Assumed on some page"
    pytest.importorskip("torch")
    from ipa_torch.replace.systems import SYSTEMS

    assert set(SYSTEMS) <= described


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_every_section_in_order(page):
    lines = PAGES[page].splitlines()
    assert re.findall(r"^## (.+)$", PAGES[page], re.MULTILINE) == SECTIONS
    assert all(section(page, title).strip() for title in SECTIONS)
    assert claims_of(page), "a table of assumed fields is missing"
    assert re.search(r"\b(Run|Not run\b.*?):", PAGES[page].split("\n## ")[0]), "say what was run and what was not"
    assert sum(1 for line in lines if line) <= MAX_LINES
    assert all(len(line) <= 120 for line in lines if not line.startswith("|"))


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [INDEX, *(DOCS / "systems").glob("*.md")], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if "://" in link:
            assert link.startswith("https://")
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_file(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_the_index_lists_every_page():
    linked = re.findall(r"^\| \[[^\]]+\]\(systems/(\w+)\.md\)", INDEX.read_text("utf-8"), re.MULTILINE)
    assert sorted(linked) == sorted(PAGES)
