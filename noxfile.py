"""Runs the suite under the oldest and the newest versions that users have: `make compat`.

Every pair of JAX and PyTorch gets an environment of its own, in `.nox`, with the packages of
`pip install '.[jax,torch,structures]'`. Other published implementations are not installed, and tests that need them are
skipped; `make test` runs those. PyTorch's CUDA builds take 6 GB of disk a pair. On a machine without a GPU, set
`TORCH_INDEX` to an index of CPU builds.
"""

import json
import os
import re
import shutil
import subprocess
import time
import tomllib
import xml.etree.ElementTree
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True

DECLARED = tomllib.loads(Path("pyproject.toml").read_text())["project"]
EXTRAS = DECLARED["optional-dependencies"]
RESULTS = Path(".nox/compat.json")
SHOWN = ("jax", "torch", "numpy", "dm-haiku", "triton")

PAIRS = {
    "oldest": ("3.11", "oldest", "oldest"),
    "newest-jax": ("3.12", "newest", "oldest"),
    "newest-torch": ("3.13", "oldest", "newest"),
    "newest": ("3.13", "newest", "newest"),
    "between": ("3.12", "0.11.2", "2.11.0"),  # the versions of a GPU machine in November 2026
}
"""Versions of Python, JAX and PyTorch by session; `make test` uses the pins of constraints.txt under any Python."""


def oldest(requirements: list[str]) -> list[str]:
    """Pins at the lowest versions that pyproject.toml declares."""
    return [re.sub(r">=([\d.]+).*", r"==\1", x) for x in requirements if ">=" in x]


def requirements(jax: str, torch: str) -> list[str]:
    """Requirements of one pair: the lowest declared versions, the newest, or a given version."""
    pins = []
    if jax == torch == "oldest":
        needed = [
            x for x in DECLARED["dependencies"] if not x.startswith(("numpy", "ml_dtypes"))
        ]  # JAX needs newer ones
        pins += oldest(needed + EXTRAS["structures"])
    for extra, version in (("jax", jax), ("torch", torch)):
        pins += [] if version == "newest" else oldest(EXTRAS[extra]) if version == "oldest" else [f"{extra}=={version}"]
    return pins


if shutil.which("pyenv"):  # pyenv runs another version only if PYENV_VERSION lists it
    installed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    wanted = {version for version, _, _ in PAIRS.values()}
    os.environ.setdefault("PYENV_VERSION", ":".join(x for x in installed if x.rpartition(".")[0] in wanted))


VERSIONS = "import json, importlib.metadata as m; print(json.dumps({x.name: x.version for x in m.distributions()}))"


def compat(session: nox.Session, name: str) -> None:
    """Installs one pair and runs the suite on it."""
    _, jax, torch = PAIRS[name]
    index = ["--extra-index-url", os.environ["TORCH_INDEX"]] if "TORCH_INDEX" in os.environ else []
    session.install(
        *("--upgrade", *index, "--editable", ".[jax,torch,structures]", "pytest", "pytest-xdist", "hypothesis"),
        *requirements(jax, torch),
    )
    versions = session.run("python", "-c", VERSIONS, silent=True)
    if versions is None:  # nox --install-only
        return
    has = json.loads(versions)
    report = Path(session.create_tmp()) / "report.xml"
    start = time.monotonic()
    session.run(
        *("python", "-m", "pytest", "-m", "not exhaustive", "--numprocesses", "auto", "--maxprocesses", "4"),
        *("--dist", "worksteal", "--require=jax,torch,gemmi", f"--junitxml={report}", *session.posargs),
        success_codes=[0, 1],
    )
    counts = xml.etree.ElementTree.parse(report).getroot()[0].attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = {
        "python": session.python,
        **{x: has.get(x, "–") for x in SHOWN},
        "passed": int(counts["tests"]) - failed - int(counts["skipped"]),
        "skipped": int(counts["skipped"]),
        "failed": failed,
        "minutes": round((time.monotonic() - start) / 60, 1),
    }
    RESULTS.write_text(json.dumps(results, indent=1))
    if failed:
        session.error(f"{failed} tests failed")


for _name, (_python, _, _) in PAIRS.items():
    nox.session(lambda session, name=_name: compat(session, name), name=_name, python=_python)


@nox.session(venv_backend="none")
def table(session: nox.Session) -> None:
    """Prints the results of all pairs as the table of docs/versions.md."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    columns = ("python", *SHOWN, "passed", "skipped", "failed", "minutes")
    print("| pair |", " | ".join(columns), "|")
    print("|---|" + "---:|" * len(columns))
    for name in PAIRS:
        if name in rows:
            print(f"| {name} |", " | ".join(str(rows[name][column]) for column in columns), "|")
