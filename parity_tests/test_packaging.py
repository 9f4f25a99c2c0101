"""Releases: an sdist with tests, docs and changelog, and a wheel with the four packages and their data."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.exhaustive  # it installs setuptools into an environment of its own; nothing else here packs
def test_a_release_holds_what_it_should(tmp_path):
    pytest.importorskip("build")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build"))
    command = [sys.executable, "-m", "build", "--outdir", tmp_path, source]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr
    (sdist,) = tmp_path.glob("ipa_twins-*.tar.gz")
    (wheel,) = tmp_path.glob("ipa_twins-*.whl")

    with tarfile.open(sdist) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    folders = ["ipa_bridge", "ipa_jax", "ipa_torch", "ipa_parity", "parity_tests", "benchmarks", "examples", "docs"]
    wanted = {path.relative_to(source).as_posix() for folder in folders for path in (source / folder).rglob("*.*")}
    wanted |= {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "noxfile.py", "pyproject.toml"}
    wanted |= {"ARCHITECTURE.md", "CONTRIBUTING.md", "RELEASE.md", "CITATION.cff"}
    assert not wanted - packed, sorted(wanted - packed)

    with zipfile.ZipFile(wheel) as file:
        installed = {name for name in file.namelist() if ".dist-info/" not in name}
    assert installed == {name for name in wanted if name.partition("/")[0] in folders[:4]}
