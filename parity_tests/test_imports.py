"""Each package works where the other framework, or an optional reader, is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None
"""

TINY_JAX = """
import jax, jax.numpy as jnp
import ipa_jax
from ipa_bridge import IPAConfig
config = IPAConfig.lucidrains(8, heads=2)
ipa = ipa_jax.transform_ipa(config)
single, pair, rigids = jnp.ones((3, 8)), jnp.ones((3, 3, 8)), ipa_jax.Rigid.random(jax.random.key(0), (3,))
params = ipa.init(jax.random.key(0), single, pair, rigids)
out = jax.jit(ipa.apply)(params, single, pair, rigids)
assert out.dtype == jnp.float32 and out.shape == (3, 8), out
assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
"""

TINY_TORCH = """
import torch
import ipa_torch
from ipa_bridge import IPAConfig
module = ipa_torch.InvariantPointAttention(IPAConfig.lucidrains(8, heads=2))
out = module(torch.ones(3, 8), torch.ones(3, 3, 8), ipa_torch.Rigid.random((3,)))
assert out.dtype == torch.float32 and out.shape == (3, 8), out
"""

NO_GEMMI = """
from ipa_bridge import load_structure
try:
    load_structure("x.pdb")
except ImportError as error:
    assert "pip install 'ipa-twins[structures]'" in str(error), error
else:
    raise AssertionError("gemmi is blocked, and yet it read")
"""

LIGHT = """
at_start = {name.partition(".")[0] for name in sys.modules}
import ipa_bridge
ours = {"ipa_bridge", "numpy"} | set(sys.stdlib_module_names)
third_party = {name.partition(".")[0] for name, module in sys.modules.items() if module} - ours - at_start
assert not third_party, third_party
"""


NO_COMPILER = """
import torch
before = set(sys.modules)
import ipa_torch
compilers = {"torch._dynamo", "torch._inductor"}
compilers |= {"sympy"} if torch.__version__ >= (2, 8) else set()  # before 2.8 torch's own operators need it
heavy = compilers & (set(sys.modules) - before)
assert not heavy, heavy
"""


CHECK_EQUINOX = """
import sys
sys.path.insert(0, "parity_tests/checking")
import jax
from equinox_attention import TABLE, EquinoxAttention
from ipa_parity.attention.cases import ODD_MULTIMER
from ipa_parity.checking import check
attention = EquinoxAttention(ODD_MULTIMER, key=jax.random.key(0))
report = check(attention, ODD_MULTIMER, parameters=TABLE, dtypes=("float32",))
assert report.passed, report
assert any(row.stage == "gradient/rotation" for row in report.comparisons), report
"""

CHECK_NUMPY = """
from ipa_parity.attention.cases import ODD
from ipa_parity.checking.formula import Formula, Inputs, compute
from ipa_parity.testing import Conformance, ipa_conformance
try:
    ipa_conformance(ODD)
except ModuleNotFoundError as error:
    assert "pytest" in str(error)
else:
    raise AssertionError("pytest is blocked")
from ipa_parity.checking import check

def attention(parameters, single, pair, rotation, translation, mask):
    return compute(Formula(), parameters, ODD, Inputs(single, pair, rotation, translation, mask.astype(single.dtype)))

report = check(attention, ODD)
assert report.passed, report
"""


HIDDEN = """
import importlib.util, sys
found, importlib.util.find_spec = importlib.util.find_spec, lambda name: None if name == "haiku" else found(name)
"""

MISCOMPILING_JAXLIB = """
import importlib
import jax  # which compares its own version with jaxlib's
import jaxlib.version
jaxlib.version.__version__ = "0.10.2"
for name in ["ipa_jax", "ipa_jax.attention", "ipa_parity.frameworks"]:
    try:
        package = importlib.import_module(name)
        getattr(package, "jax_point_attention", lambda: None)()
    except ImportError as error:
        assert "gradients" in str(error) and "0.10.2" in str(error) and "jaxlib==0.10.1" in str(error), error
    else:
        raise AssertionError(f"{name} was imported")
"""


def run(script: str, absent: tuple[str, ...] = ()) -> None:
    """Runs a script in a new interpreter; warnings are errors, except deprecations by torch and JAX 0.8."""
    ignored = ["-W", "ignore::DeprecationWarning:torch", "-W", "ignore:'maxsplit' is passed:DeprecationWarning"]
    command = [sys.executable, "-W", "error", *ignored, "-c"]
    result = subprocess.run(
        [*command, WITHOUT.format(absent=absent) + script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_ground_floor_is_numpy_only():
    run(LIGHT)


def test_haiku_without_torch():
    pytest.importorskip("jax")
    run(TINY_JAX, absent=("torch", "gemmi", "safetensors"))


def test_equinox_is_checked_without_haiku_and_torch():
    pytest.importorskip("equinox")
    run(CHECK_EQUINOX, absent=("haiku", "flax", "torch", "pytest"))


def test_functions_of_numpy_are_checked_without_frameworks():
    run(CHECK_NUMPY, absent=("jax", "haiku", "torch", "flax", "equinox", "pytest"))


@pytest.mark.parametrize("absent", [(), ("haiku",)], ids=["with Haiku", "without"])
def test_a_jaxlib_with_wrong_gradients_is_refused(absent):
    pytest.importorskip("jax")
    script = MISCOMPILING_JAXLIB
    if absent:  # the attention alone can still be imported, in a process of its own
        script = script.replace('"ipa_jax", "ipa_jax.attention", ', "")
        script = HIDDEN + script
    run(script)


def test_torch_without_jax():
    pytest.importorskip("torch")
    run(TINY_TORCH, absent=("jax", "jaxlib", "haiku", "gemmi", "safetensors"))


def test_torch_loads_no_compiler():
    """`torch._dynamo` takes over a second to load, and only compilation needs it."""
    pytest.importorskip("torch")
    run(NO_COMPILER)


def test_structures_without_gemmi():
    run(NO_GEMMI, absent=("gemmi",))


def test_types_are_shipped():
    for package in ("ipa_bridge", "ipa_jax", "ipa_torch", "ipa_parity"):
        assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize(
    ("absent", "code", "message"),
    [
        ("haiku", "import ipa_jax", "ipa_jax needs JAX and Haiku: pip install 'ipa-twins[jax]'"),
        ("torch", "import ipa_torch", "ipa_torch needs PyTorch: pip install 'ipa-twins[torch]'"),
        (
            "torch",
            "from ipa_bridge import IPAConfig, Weights; Weights.random(IPAConfig.lucidrains(8)).to_torch()",
            "tensors, state dicts and .pt files need PyTorch: pip install 'ipa-twins[torch]'",
        ),
        (
            "torch",
            "from ipa_bridge import IPAConfig, Weights; Weights.random(IPAConfig.lucidrains(8)).save('x.pt')",
            "tensors, state dicts and .pt files need PyTorch: pip install 'ipa-twins[torch]'",
        ),
        (
            "torch",
            "open('x.pt', 'wb').write(b'PK'); from ipa_bridge import Weights; Weights.load('x.pt')",
            "tensors, state dicts and .pt files need PyTorch: pip install 'ipa-twins[torch]'",
        ),
    ],
)
def test_a_missing_package_is_named_with_the_extra_to_install(absent, code, message, tmp_path):
    """The last line of the error says so; the file is not called damaged."""
    program = [sys.executable, "-c", WITHOUT.format(absent=[absent]) + code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.fullmatch(rf"\w*Error: {re.escape(message)}", run.stderr.splitlines()[-1]), run.stderr
