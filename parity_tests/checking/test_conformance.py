"""`ipa_parity.testing`: users' tests fail where their attention is wrong, and say what it computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipa_parity.attention.cases import ODD
from ipa_parity.checking.formula import Formula, Inputs, compute, torch_backend
from ipa_parity.testing import ipa_conformance

ROOT = Path(__file__).resolve().parents[2]
ORDINARY = {"random frames", "points near zero", "far from the origin", "a batch"}
MASKED, MOVED = "other values in masked residues", "all frames moved together"


def conformances(config=ODD, **options):
    """The tests of a decorator by id."""
    return {each.id: each.values[0] for each in ipa_conformance(config, **options).args[1]}


def failures(candidate, **options):
    """Ids of failing tests with their messages."""
    found = {}
    for name, each in conformances(**options).items():
        try:
            each.check(candidate)
        except AssertionError as error:
            found[name] = str(error)
    return found


def torch_function(formula, change=lambda stages, inputs: stages):
    """Algorithm 22 with some options, as a function of tensors."""

    def attention(parameters, single, pair, rotation, translation, mask):
        inputs = Inputs(single, pair, rotation, translation, mask.to(single.dtype))
        return change(compute(formula, parameters, ODD, inputs, torch_backend()), inputs)

    return attention


def test_ids():
    assert list(conformances(dtypes=["float32"], stages=["logits"])) == [
        "float32-random frames-output",
        "float32-random frames-logits",
        "float32-random frames-gradients",
        "float32-random frames-dtype",
        "float32-random frames-same twice",
        "float32-points near zero-output",
        "float32-points near zero-gradients",
        "float32-far from the origin-output",
        "float32-a batch-output",
        f"float32-{MASKED}-output",
        f"float32-{MOVED}-output",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_right_function_passes(dtype):
    pytest.importorskip("torch")
    stages = ("logits", "attention", "o", "points", "norms", "o_pair")
    assert not failures(torch_function(Formula()), framework="torch", stages=stages, dtypes=[dtype])


@pytest.mark.parametrize(
    ("changes", "probes", "name"),
    [
        ({"rotation": "transposed"}, ORDINARY | {MOVED}, "rotations transposed"),
        ({"mask": "ignored"}, ORDINARY | {MASKED}, "the mask never read"),
        ({"half": 1.0}, ORDINARY, "½ missing from the point term"),
        ({"unit": 10.0}, ORDINARY - {"points near zero"}, "translations ten times too large"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_mistake_fails_where_it_shows(changes, probes, name):
    pytest.importorskip("torch")
    found = failures(torch_function(Formula(**changes)), framework="torch", dtypes=["float64"], gradients=False)
    assert set(found) == {f"float64-{probe}-output" for probe in probes}
    for test, message in found.items():
        assert f"its outputs equal Algorithm 22 with {name}" in message, message
        assert message.startswith(f"output on {test.split('-')[1]} in float64:")
        assert " of Algorithm 22: " in message


def test_stages():
    """The first stage that departs fails, and so do those that depend on it."""
    pytest.importorskip("torch")
    stages = ("logits", "o", "norms")
    wrong = torch_function(Formula(norm="squared"))
    found = failures(wrong, framework="torch", dtypes=["float64"], gradients=False, stages=stages)
    assert {x for x in found if "random" in x} == {"float64-random frames-output", "float64-random frames-norms"}


def test_a_stage_that_is_not_returned():
    pytest.importorskip("torch")
    without = torch_function(Formula(), lambda stages, inputs: stages["out"])
    found = failures(without, framework="torch", dtypes=["float64"], gradients=False, stages=["norms"])
    assert list(found) == ["float64-random frames-norms"]
    assert "it does not return norms" in found["float64-random frames-norms"]


def test_gradients():
    pytest.importorskip("torch")
    wrong = torch_function(Formula(stop=frozenset({"rotations"})))
    found = failures(wrong, framework="torch", dtypes=["float64"])
    assert set(found) == {"float64-random frames-gradients", "float64-points near zero-gradients"}
    assert all("no gradient to rotations" in message for message in found.values())


def test_dtype_and_changed_inputs():
    pytest.importorskip("torch")

    def writes(stages, inputs):
        inputs.single.mul_(2)
        return stages["out"].float()

    found = failures(torch_function(Formula(), writes), framework="torch", dtypes=["float64"], gradients=False)
    assert "the output is float32; float64" in found["float64-random frames-dtype"]
    assert "writes into its input single" in found["float64-random frames-same twice"]


def test_exceptions_fail_every_test():
    def broken(parameters, single, pair, rotation, translation, mask):
        raise RuntimeError("no luck")

    found = failures(broken, framework="numpy", dtypes=["float64"])
    assert set(found) == set(conformances(dtypes=["float64"]))
    assert all("raises RuntimeError: no luck" in message for message in found.values())


def test_bad_arguments():
    for options, message in (
        ({"dtypes": ["float8"]}, r"dtypes of float64, .* were expected; got \['float8'\]"),
        ({"dtypes": "float32"}, "dtypes of .* were expected; got 'float32'"),
        ({"stages": ["out"]}, r"stages of logits, .* were expected; got \['out'\]"),
        ({"config": "alphafold9"}, r"config of alphafold2, .* were expected; got \['alphafold9'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ipa_conformance(**options)


FILE = """
import numpy as np
from ipa_parity.attention.cases import ODD
from ipa_parity.checking.formula import Formula, Inputs, compute
from ipa_parity.testing import ipa_conformance

def function(formula):
    def attention(parameters, single, pair, rotation, translation, mask=None):
        mask = np.ones(single.shape[:-1]) if mask is None else mask.astype(single.dtype)
        return compute(formula, parameters, ODD, Inputs(single, pair, rotation, translation, mask))["out"]
    return attention

@ipa_conformance(ODD, dtypes=["float64"], framework="numpy")
def test_right(conformance):
    conformance.check(function(Formula()))

class TestMine:
    @ipa_conformance(ODD, dtypes=["float64"], framework="numpy")
    def test_wrong(self, conformance):
        conformance.check(function(Formula(back="none")))

@ipa_conformance(ODD, dtypes=["float64"], framework="numpy")
def test_maskless(conformance):
    attention = function(Formula())
    conformance.check(lambda p, s, z, R, t: attention(p, s, z, R, t))
"""


def test_in_a_run_of_pytest(tmp_path):
    """No plugin is registered. Ids and messages are those that users see; numpy's functions have no gradients."""
    file = tmp_path / "test_mine.py"
    file.write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-W", "error", "--strict-markers", file]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "400"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    outcomes = {
        outcome: {
            x.removeprefix(f"{outcome} test_mine.py::").partition(" - ")[0]
            for x in lines
            if x.startswith(f"{outcome} test_mine")
        }
        for outcome in ("PASSED", "FAILED")
    }
    wrong = {f"TestMine::test_wrong[float64-{probe}-output]" for probe in ORDINARY | {MOVED}}
    assert outcomes["FAILED"] == wrong
    assert {f"test_right[float64-{probe}-output]" for probe in ORDINARY | {MASKED, MOVED}} <= outcomes["PASSED"]
    assert f"test_maskless[float64-{MASKED}-output]" not in outcomes["PASSED"]
    assert sum("with output points not taken back to the local frame" in x for x in lines) >= len(wrong)
    assert "7 skipped" in lines[-1]
