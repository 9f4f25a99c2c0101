"""What the README tells a new user to do works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_quickstarts_run_one_after_the_other(tmp_path, monkeypatch):
    """The Haiku block saves what the PyTorch block loads; both give the twins of one function."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    haiku, torch = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    first: dict = {}
    with jax.enable_x64(False):
        exec(compile(haiku, "README.md: Haiku", "exec"), first)
    assert first["update"].shape == (48, 384)
    second: dict = {}
    exec(compile(torch, "README.md: PyTorch", "exec"), second)
    assert second["update"].shape == (48, 384)
    assert second["attention"].shape == (12, 48, 48)
    jax.tree.map(np.testing.assert_array_equal, second["params"], dict(first["params"]))


def test_commands_are_in_the_makefile():
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
