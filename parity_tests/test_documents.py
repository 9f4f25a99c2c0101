"""The pages for contributors are true: files, names, commands and workflows that they mention exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "RELEASE.md")
TWINS = ("ipa_jax", "ipa_torch")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PATH = re.compile(r"[\w.*-]+(/[\w.*-]+)*/?")
DOTTED = re.compile(r"ipa_(bridge|jax|torch|parity|\*)(\.\w+)+")


def section(title: str, page: str = ARCHITECTURE) -> str:
    """A page's section, from its heading to the next of its rank."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found


def rows(text: str) -> list[list[str]]:
    """Cells of a table, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("| `") or re.match(r"\| [\d.]+[,| ]", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


FOLDERS = ("weights/dialects/", "weights/semantics/", "replace/systems/")
"""Folders with a file for each system, which one row describes."""

ONLY_IN_TORCH = {"replace/systems/", *(f"replace/{x}.py" for x in ("arguments", "copies", "pair_masks", "rigids"))}


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names that a module defines or imports at its top, and the methods of its classes."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {x.id for x in targets if isinstance(x, ast.Name)}
        elif isinstance(node, ast.ClassDef):
            methods = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
            methods |= {"forward"} if "__call__" in methods else set()  # Haiku's name of it
            found |= {node.name, *(f"{node.name}.{x}" for x in methods)}
    return frozenset(found)


def exists(dotted: str) -> bool:
    """A module, or a name in one; `ipa_*` stands for both twins."""
    if dotted.startswith("ipa_*"):
        return all(exists(dotted.replace("ipa_*", twin)) for twin in TWINS)
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        folder = ROOT.joinpath(*parts[:end])
        for path in (folder / "__init__.py", folder.with_suffix(".py")):
            if path.is_file():
                return end == len(parts) or ".".join(parts[end:]) in names_in(path)
    return False


@pytest.mark.parametrize("packages", [["ipa_bridge"], [*TWINS], ["ipa_parity"]], ids="-".join)
def test_every_file_is_listed(packages):
    listed = [quoted(file)[0] for file, _ in rows(section(f"Files of {' and '.join(f'`{x}`' for x in packages)}"))]
    assert len(listed) == len(set(listed))
    for package in packages:
        paths = (x for x in (ROOT / package).rglob("*") if x.is_file() and "__pycache__" not in x.parts)
        names = {x.relative_to(ROOT / package).as_posix() for x in paths}
        names = {next((folder for folder in FOLDERS if x.startswith(folder)), x) for x in names}
        only_in_torch = ONLY_IN_TORCH if package == "ipa_jax" else set()
        unlisted, gone = names - set(listed), set(listed) - names - only_in_torch
        assert not unlisted, f"add a row for {sorted(unlisted)} of {package} to a table of files in ARCHITECTURE.md"
        assert not gone, f"{package} has no {sorted(gone)}: remove their rows from ARCHITECTURE.md or add the files"


def test_every_line_of_the_algorithms_is_where_the_table_says():
    table = rows(section("Algorithms 20–29, line by line"))
    assert {line.partition(",")[0] for line, *_ in table} >= {str(number) for number in range(20, 30)}
    for line, _, files, functions in table:
        for twin in TWINS:
            known = {name for file in quoted(files) for name in names_in(ROOT / twin / file)}
            assert set(quoted(functions)) <= known, (line, twin)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    outside = re.sub(r"(?ms)^## (Files of|Algorithms).*?(?=^## |\Z)", "", text)  # which the tests above read
    missing = []
    for name in quoted(outside):
        test, _, function = name.partition("::")
        if DOTTED.fullmatch(name):
            missing += [] if exists(name) else [name]
        elif PATH.fullmatch(test) and ("/" in test or re.search(r"\.(py|md|toml|txt|yml|yaml|cff|in)$", test)):
            if "NAME" in test or test.startswith(
                ("dist/", ".venv/", ".venv-trained/", ".nox/")
            ):  # a reader's own, or built
                continue
            paths = [ROOT / test.replace("ipa_*", twin) for twin in TWINS]
            missing += [] if all(x.exists() and (not function or function in names_in(x)) for x in paths) else [name]
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    missing += [link for link in links if not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_make_has_every_command(page):
    text, makefile = (ROOT / page).read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def checked_out(name: str) -> str:
    """A file that a checkout has and a source distribution lacks."""
    if not (ROOT / ".git").exists():
        pytest.skip(f"{name} is in a checkout only, and this is none")
    return (ROOT / name).read_text()


def parsed(name: str):
    return pytest.importorskip("yaml").safe_load(checked_out(name))


def recipe(target: str) -> list[str]:
    """The commands of one of make's targets."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_pre_commit_runs_what_make_lint_runs():
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == recipe("lint")
    assert all(hook["always_run"] and not hook["pass_filenames"] for hook in repository["hooks"])


def test_the_workflow_runs_what_is_here():
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands == {"suite": [".ci/run"], "versions": ["make compat"]}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert recipe("compat") == [".venv/bin/nox"]
    sessions = ast.parse((ROOT / "noxfile.py").read_text()).body
    (pairs,) = (
        ast.literal_eval(x.value)
        for x in sessions
        if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "PAIRS"
    )
    matrix = jobs["versions"]["strategy"]["matrix"]["include"]
    assert {x["session"]: x["python"] for x in matrix} == {name: python for name, (python, *_) in pairs.items()}
    assert jobs["versions"]["env"]["NOXSESSION"] == "${{ matrix.session }}"


@pytest.mark.parametrize("name", ["bug", "system_request"])
def test_issue_forms_are_complete(name):
    form = parsed(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    asked = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert asked
    assert len(asked) == len(set(asked))


def test_the_citation_has_the_packages_version():
    from ipa_bridge import __version__

    citation = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", __version__)
    assert citation["authors"] == [{"name": "IPA Twins contributors"}]
    assert citation["references"][0]["doi"] == "10.1038/s41586-021-03819-2"
