"""Tests of trained weights in published packages: `make trained` installs these packages and runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROWS = pytest.StashKey[dict[str, Any]]()
"""Models and comparisons of their attentions and of the whole, for the table printed at the end."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collects these tests only where -m names them: they need packages and licences of their own."""
    mark = "igfold" if "igfold" in collection_path.name else "trained"
    return None if collection_path.is_dir() or mark in config.option.markexpr.split() else True


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Collects models by name, comparisons of attentions and comparisons of whole models."""
    return request.config.stash.setdefault(ROWS, {"models": {}, "attentions": [], "wholes": []})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows: Any = config.stash.get(ROWS, None)
    if rows is None:
        return
    from trained_report import table

    terminalreporter.section(
        "trained weights: attentions in eps (float32: before / swapped / PyTorch / Haiku), whole models"
    )
    terminalreporter.write_line(table(**rows))
    if "igfold" not in config.option.markexpr:
        terminalreporter.write_line("\nIgFold was not run: make trained WITH=igfold (non-commercial use only)")
