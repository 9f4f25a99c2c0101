"""Licences of the packages that `make trained` installs; `python licences.py PACKAGE…` prints a line for each."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LICENCES = {
    "flash-abb": "BSD-3-Clause",
    "lociPARSE": "GPL-3.0 (the wheel itself names none)",
    "igfold": "JHU Academic Software License, non-commercial use only",
    "antiberty": "MIT",
}


def pinned(package: str) -> str:
    """The version of a package that constraints.txt pins."""
    constraints = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text()
    (version,) = re.findall(rf"^{re.escape(package)}==(.*)$", constraints, re.MULTILINE)
    return version


if __name__ == "__main__":
    for package in sys.argv[1:]:
        print(f"{package} {pinned(package)}: {LICENCES[package]}")
