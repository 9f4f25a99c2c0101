"""The tutorial runs from start to end, and the notebook shows its current outputs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

for package in ("jax", "torch", "matplotlib", "gemmi", "ipykernel"):
    pytest.importorskip(package)
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def build_tutorial(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import build_tutorial

    yield build_tutorial
    del sys.modules["build_tutorial"]


@pytest.fixture(scope="module")
def shown():
    return nbformat.read(DOCS / "tutorial.ipynb", as_version=4)


def test_the_notebook_is_its_source(shown):
    source = jupytext.read(DOCS / "tutorial.py")
    assert [(x.cell_type, x.source) for x in shown.cells] == [(x.cell_type, x.source) for x in source.cells], (
        "docs/tutorial.ipynb is not docs/tutorial.py's: run make docs"
    )
    nbformat.validate(shown)
    assert len(pictures(shown)) == 4
    text = printed(shown)
    assert "2rbg.pdb: 124 residues" in text, "its pictures must show a real protein"
    assert "/site-packages/" not in str(shown.cells)


def test_a_new_run_prints_what_the_notebook_shows(build_tutorial, shown, structures_dir, monkeypatch):
    """Rounding errors, which depend on the machine, are left out."""
    monkeypatch.setenv("IPA_STRUCTURES", str(structures_dir))
    run = build_tutorial.executed()
    assert len(pictures(run)) == len(pictures(shown))
    assert measured(printed(run)) == measured(printed(shown))


@pytest.mark.exhaustive  # the same cells as above, on a peptide
def test_it_runs_without_a_protein(build_tutorial, monkeypatch, tmp_path):
    monkeypatch.setenv("IPA_STRUCTURES", str(tmp_path))
    run = build_tutorial.executed()
    assert len(pictures(run)) == 4
    assert "idealised peptide: 42 residues" in printed(run)
    assert all(cell.outputs for cell in run.cells if "same(" in cell.source and "def same" not in cell.source)


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook) -> list:
    return [x for x in outputs(notebook) if "image/png" in x.get("data", {})]


def printed(notebook) -> str:
    assert not [x for x in outputs(notebook) if x.output_type == "error" or x.get("name") == "stderr"]
    return "".join(x.text for x in outputs(notebook) if x.output_type == "stream")


def measured(text: str) -> str:
    return re.sub(r"to \d+ eps", "to … eps", text)
