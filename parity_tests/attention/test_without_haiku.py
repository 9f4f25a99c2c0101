"""JAX's attention without Haiku, and the GPU benchmark, which does not need Haiku."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from fused_cases import (
    interpreted,
    needs_triton,
)


def test_jax_without_haiku():
    """The core has no parameters, so it imports and runs with JAX alone."""
    pytest.importorskip("jax")
    code = """
import importlib.abc, sys

class NoHaiku(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "haiku":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoHaiku())
import importlib.util
found, importlib.util.find_spec = importlib.util.find_spec, lambda name: None if name == "haiku" else found(name)
import jax.numpy as jnp
from ipa_parity.frameworks import jax_point_attention
x, points = jnp.ones((3, 2, 4)), jnp.ones((3, 2, 4, 3))
out = jax_point_attention()(x, x, x, points, points, points, None, pair_bias_weight=None, point_weights=jnp.ones(2))
assert out[0].shape == (3, 2, 4) and "haiku" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@interpreted
@needs_triton
@pytest.mark.parametrize("pairs", [("none",), pytest.param(("float32", "none"), marks=pytest.mark.exhaustive)])
def test_the_gpu_benchmark(pairs, tmp_path):
    """The command runs on a CPU (where its figures mean nothing): parity check, table, JSON."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    systems = ["torch, fused", "torch, scaled_dot_product_attention", "JAX, streamed (jit)", "ipa_torch"]
    systems = systems if len(pairs) > 1 else systems[:2]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--residues", "6", "--repeats", "1"]
    options = ["--pair", *pairs, "--save", str(tmp_path / "gpu.json"), "--system", *systems]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    measured = {(row["system"], row["pair"], row["direction"]) for row in rows if row["seconds"]}
    every = {(x, pair, way) for x in systems for pair in pairs for way in ("forward", "forward + backward")}
    assert measured == every - {x for x in every if "scaled" in x[0] and x[1] == "float32"}
    assert all(name in run.stdout for name in systems)
    run = subprocess.run([*command[:3], "--residues", "6"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "a CUDA device was expected" in run.stderr
