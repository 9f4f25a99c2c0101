"""Options, settings and fixtures of the suite."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import pytest

if not any(x.startswith("--require") and "gpu" in x for x in sys.argv):  # with --require=gpu kernels run on the GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    # Before JAX is imported: compiling takes longer than running. `make test-all` compiles as users do.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""True where Triton interprets GPU kernels on the CPU; fixed for the whole run."""

from frameworks import Jax, Torch, one_of

COMPARED = pytest.StashKey[list]()
COMPARED_WITH_PEERS = pytest.StashKey[list]()
COMPARED_WITH_STRUCTURE_MODULES = pytest.StashKey[list]()
CONVERSIONS = pytest.StashKey[list]()
MOTIONS = pytest.StashKey[list]()
"""Results of the run's comparisons, for the tables printed at its end."""

TABLES = (COMPARED, COMPARED_WITH_PEERS, COMPARED_WITH_STRUCTURE_MODULES, CONVERSIONS, MOTIONS)

ROOT = Path(__file__).resolve().parent.parent
STRUCTURES = Path(os.environ.get("IPA_STRUCTURES") or ROOT.parent / "shared" / "structures")

hypothesis.settings.register_profile("everywhere", derandomize=True, deadline=None)
hypothesis.settings.load_profile("everywhere")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ipa-twins")
    group.addoption(
        "--require",
        default="",
        help="modules that must be installed, as jax,torch, or the run fails; also gpu and structures",
    )
    group.addoption("--weights", help="run the parity tests alone, on the weights in this file")
    group.addoption("--preset", help="config of these tests; with --weights: the system whose norm and units to use")
    group.addoption("--structure", help="run the parity tests alone, on the protein in this PDB or mmCIF file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "users_own: runs on the weights and the protein given on the command line")
    config.addinivalue_line("markers", "gpu: runs on a GPU")
    config.addinivalue_line("markers", "trained: runs in make trained, on published weights")
    config.addinivalue_line("markers", "igfold: runs in make trained WITH=igfold; its licence is non-commercial")
    config.addinivalue_line(
        "markers", "exhaustive: runs in make test-all only; another test checks the same in make test"
    )
    config.addinivalue_line(
        "markers",
        "covering(*crossed): make test runs the fewest combinations that hold every value of each parameter (and all "
        "combinations of the parameters named); the others are exhaustive",
    )
    needed = [name for name in config.getoption("--require").split(",") if name]
    if "gpu" in needed:
        needed.remove("gpu")
        if INTERPRETED:
            raise pytest.UsageError("--require=gpu: kernels are interpreted; unset TRITON_INTERPRET, and write the =")
        needed += ["jax", "torch", "triton"]
        if absent := without_gpu():
            raise pytest.UsageError(f"--require=gpu: {absent}")
    elif "jax" in needed:
        needed.append("haiku")
    missing = [name for name in needed if name != "structures" and not importlib.util.find_spec(name)]
    missing += ["structures"] if "structures" in needed and not STRUCTURES.is_dir() else []
    if missing:
        raise pytest.UsageError(f"--require: not installed: {', '.join(missing)}")
    if importlib.util.find_spec("jax"):
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_default_matmul_precision", "highest")
    if importlib.util.find_spec("torch"):
        import torch

        if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with two threads each would wait for each other
            torch.set_num_threads(1)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def without_gpu() -> str | None:
    """A message that names the framework without a GPU; None if both have one."""
    if importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            return "a CUDA device was expected; PyTorch sees none"
    if importlib.util.find_spec("jax"):
        import jax

        if jax.default_backend() != "gpu":
            return f"a CUDA device was expected as JAX's default; it is {jax.default_backend()}"
    return None


@pytest.fixture(scope="module", params=[Jax, Torch], ids=lambda kind: kind.name)
def framework(request: pytest.FixtureRequest) -> Jax | Torch:
    """Each framework in turn."""
    return one_of(request.param)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs GPU kernels on the CPU, in the interpreters of Triton and Pallas; skips the test in runs on a GPU."""
    if not INTERPRETED:
        pytest.skip("kernels run on a GPU, and are not interpreted")
    if importlib.util.find_spec("torch"):
        monkeypatch.setattr("ipa_torch.attention.fused.INTERPRETED", True)
    if importlib.util.find_spec("jax"):
        from ipa_parity.frameworks import jax_point_attention

        jax_point_attention()  # imports it without Haiku too
        monkeypatch.setattr("ipa_jax.attention.fused.INTERPRETED", True)


@pytest.hookimpl(tryfirst=True)  # before pytest itself chooses by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_combinations_to_test_all(items)
    on_users_own = bool(config.getoption("--weights") or config.getoption("--structure"))
    chosen = [item for item in items if bool(item.get_closest_marker("users_own")) == on_users_own]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def leave_combinations_to_test_all(items: list[pytest.Item]) -> None:
    """Marks as exhaustive the combinations that a test marked `covering` does not need."""
    tests: dict[Any, dict[pytest.Item, set]] = defaultdict(dict)
    for item in items:
        if (covering := item.get_closest_marker("covering")) and not item.get_closest_marker("exhaustive"):
            values = {name: repr(x) for name, x in item.callspec.params.items()}
            crossed = tuple(values.pop(name) for name in covering.args)
            tests[item.parent, item.function][item] = {(crossed, x) for x in values.items()}
    for combinations in tests.values():
        for item in combinations.keys() - few_with_every_value(combinations):
            item.add_marker("exhaustive")


def few_with_every_value(combinations: dict[pytest.Item, set]) -> set[pytest.Item]:
    """A few combinations that together hold every value: greedily the one with most new values, ties to rare values."""
    seen = Counter(dict.fromkeys(set.union(*combinations.values()), 0))
    chosen: set[pytest.Item] = set()

    def gain(item: pytest.Item) -> tuple[int, int]:
        return sum(not seen[x] for x in combinations[item]), -sum(seen[x] for x in combinations[item])

    while not all(seen.values()):
        best = max((item for item in combinations if item not in chosen), key=gain)
        seen.update(combinations[best])
        chosen.add(best)
    return chosen


@pytest.fixture(scope="session")
def structures_dir() -> Path:
    """The folder of real proteins: $IPA_STRUCTURES, or ../shared/structures."""
    if not STRUCTURES.is_dir():
        pytest.skip(f"no real proteins: {STRUCTURES} is not there; name a folder of them in IPA_STRUCTURES")
    return STRUCTURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    compared, with_peers, of_layers, conversions, motions = (config.stash.get(key, []) for key in TABLES)
    if not any(config.stash.get(key, []) for key in TABLES):
        return
    from ipa_parity.report import table, worst_by_case

    if compared:
        terminalreporter.section(f"parity: worst of {len(compared)} comparisons, in eps")
        terminalreporter.write_line(table(compared))
    if with_peers:
        terminalreporter.section(f"published implementations: worst of {len(with_peers)} comparisons, in eps")
        terminalreporter.write_line(worst_by_case(with_peers))
    if of_layers:
        terminalreporter.section("structure modules in float32 against float64: root mean square errors, in eps")
        terminalreporter.write_line(table(of_layers))
    if conversions:
        terminalreporter.section("other systems' weights: their outputs against ours, in eps of float32")
        for row in sorted(conversions, key=lambda row: (row.case, row.stage, row.subject)):
            line = f"{row.case:40} {row.stage:5} {row.subject:6} {row.error:5.1f} of {row.bound:.0f}"
            terminalreporter.write_line(line)
    if motions:
        terminalreporter.section("residues moved, reordered, padded: worst differences, in eps")
        for row in sorted(motions, key=lambda row: (row.case, row.subject, row.dtype, row.reference)):
            line = f"{row.case:17} {row.subject:6} {row.dtype:8} {row.reference:12} {row.error:6.1f}  {row.stage}"
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Sends the comparisons of a worker process to the main process, as plain data."""
    if hasattr(session.config, "workeroutput"):
        rows = [[asdict(row) for row in session.config.stash.get(key, [])] for key in TABLES]
        session.config.workeroutput["tables"] = json.dumps(rows, default=float)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Collects the comparisons of a worker process in the main process."""
    handed_over = getattr(node, "workeroutput", {}).get("tables")
    if handed_over:
        from ipa_parity.report import Comparison

        for key, rows in zip(TABLES, json.loads(handed_over), strict=True):
            node.config.stash.setdefault(key, []).extend(Comparison(**row) for row in rows)


@pytest.fixture(scope="session")
def compared(request: pytest.FixtureRequest) -> list:
    """Collects comparisons for the table at the end of the run."""
    return request.config.stash.setdefault(COMPARED, [])


@pytest.fixture(scope="session")
def compared_with_peers(request: pytest.FixtureRequest) -> list:
    """Collects comparisons with published implementations for their own table."""
    return request.config.stash.setdefault(COMPARED_WITH_PEERS, [])


@pytest.fixture(scope="session")
def compared_with_structure_modules(request: pytest.FixtureRequest) -> list:
    """Collects errors of published structure modules and ours, layer by layer, for a table of their own."""
    return request.config.stash.setdefault(COMPARED_WITH_STRUCTURE_MODULES, [])


@pytest.fixture(scope="session")
def conversions(request: pytest.FixtureRequest) -> list:
    """Collects comparisons of other systems' modules with ours on the same weights, for a table of their own."""
    return request.config.stash.setdefault(CONVERSIONS, [])


@pytest.fixture(scope="session")
def motions(request: pytest.FixtureRequest) -> list:
    """Collects what motions, reordering and padding change, for a table of their own."""
    return request.config.stash.setdefault(MOTIONS, [])
