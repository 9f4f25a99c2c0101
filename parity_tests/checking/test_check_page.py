"""The page of the judge: every mistake that it shows is planted, and found in the words that it shows."""

from __future__ import annotations

import re
import sys

import pytest
from planted import ROOT, SOURCE

from ipa_parity.cli import main

PAGE = ROOT / "docs" / "check.md"
SHOWN = re.findall(r"\*\*([^*\n]+)\*\*:.*?```diff\n(.*?)```\n\n```console\n(.*?)```", PAGE.read_text(), flags=re.S)
LINES = 2
"""Lines of the report that the page shows: the verdict with the diagnosis, and the mend."""


def shown_output(diff: str, folder, capsys) -> list[str]:
    """The command's first lines on the example with a change."""
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if line.startswith("-"))
    new = "".join(f"{line[1:]}\n" for line in lines if line.startswith("+"))
    assert SOURCE.count(old) == 1, old
    (folder / "my_ipa.py").write_text(SOURCE.replace(old, new))
    main(["check", f"{folder / 'my_ipa.py'}:MyIPA", "--quiet", "--no-gradients"])
    return [without_errors(line) for line in capsys.readouterr().out.splitlines()[:LINES]]


def without_errors(line: str) -> str:
    """The line without its number of eps, which differs from machine to machine."""
    return re.sub(r"within \S+ eps", "within … eps", line)


@pytest.mark.parametrize(("name", "diff", "console"), SHOWN, ids=[name for name, *_ in SHOWN])
def test_mistakes_are_found_as_the_page_shows(name, diff, console, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.delitem(sys.modules, "my_ipa", raising=False)
    command, *expected = console.splitlines()
    assert command == "$ ipa-parity check my_ipa.py:MyIPA"
    assert shown_output(diff, tmp_path, capsys) == [without_errors(line) for line in expected]


def test_the_page_shows_at_least_five():
    assert len(SHOWN) >= 5
