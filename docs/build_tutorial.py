"""Runs `tutorial.py` and writes it with its outputs to `tutorial.ipynb`, which code hosts render: `make docs`."""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).resolve().parent


def executed() -> nbformat.NotebookNode:
    """The tutorial with the outputs of a new run, without metadata that changes from run to run."""
    notebook = jupytext.read(DOCS / "tutorial.py")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(DOCS)}}).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    os.environ.setdefault("IPA_STRUCTURES", str(DOCS.parent.parent / "shared" / "structures"))
    nbformat.write(executed(), DOCS / "tutorial.ipynb")
