"""Tests of trained weights in published packages: `make trained` installs these packages and runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROWS = pytest.StashKey[dict[str, list]]()
"""Comparisons of attentions and of whole models, for the table printed at the end."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collects these tests only where -m names them: they need packages and licences of their own."""
    return None if "trained" in config.option.markexpr or "igfold" in config.option.markexpr else True


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> dict[str, list]:
    """Collects comparisons: "attentions" and "wholes"."""
    return request.config.stash.setdefault(ROWS, {"attentions": [], "wholes": []})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows: Any = config.stash.get(ROWS, None)
    if rows is None:
        return
    from trained_report import attentions_table, wholes_table

    terminalreporter.section("trained weights")
    terminalreporter.write_line(attentions_table(rows["attentions"]))
    terminalreporter.write_line("")
    terminalreporter.write_line(wholes_table(rows["wholes"]))
    if "igfold" not in config.option.markexpr:
        terminalreporter.write_line("\nIgFold was not run: make trained WITH=igfold (non-commercial use only)")
