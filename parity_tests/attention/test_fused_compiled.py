"""The GPU kernels compile for a GPU and compute the reference's function there."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
from frameworks import Torch
from fused_cases import (
    INTERPRETED,
    RAGGED,
    arrays_of,
    judge_against_the_reference,
    without_triton,
)

from ipa_parity.frameworks import jax_point_attention
from ipa_parity.report import compare

ON_GPU = {
    "float32": {"shape": (1, 300), "heads": 12, "width": 128, "widths": (16, 16, 4, 8)},
    "bfloat16": {"shape": (1, 300), "heads": 12, "width": 128, "widths": (16, 16, 4, 8), "pair_dtype": "bfloat16"},
    "aligned": {"shape": (1, 256), "heads": 12, "width": 128, "widths": (16, 16, 4, 8)},
    "aligned, bfloat16": {"shape": (1, 1024), "heads": 12, "width": 32, "pair_dtype": "bfloat16"},
    "several chunks": {"shape": (3, 700), "heads": 12, "width": 32, "widths": (16, 16, 4, 8)},
    "wide, float32": {"shape": (1, 130), "heads": 16, "width": 256},
    "wide, bfloat16": {"shape": (1, 130), "heads": 16, "width": 256, "pair_dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=["alphafold", pytest.param("every pair", marks=pytest.mark.exhaustive)])
def resources(request):
    """Registers and memory that the kernels need, compiled in a process without the interpreter."""
    if reason := without_triton():
        pytest.skip(reason)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_resources", "--json"]
    command += ["--target", "sm_90", "--pair-channel", "128"] if request.param == "alphafold" else []
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    return json.loads(run.stdout)


def test_the_kernels_fit_without_spilling(resources):
    """Only a float32 pair of 256 channels and the widest heads spill, and only this much."""
    limits = {"sm_80": 163 << 10, "sm_90": 227 << 10}
    assert {x["target"] for x in resources} <= set(limits)
    assert {x["kernel"] for x in resources} >= {"logits", "attend_to_pair", "pair_gradients", "key_gradients"}
    for x in resources:
        wide = x["pair_dtype"] == "float32" and x["pair_channel"] == 256
        assert x["spilled"] <= (512 if wide else 32 if x["channels"] > 16 else 0), x
        assert x["shared"] <= limits[x["target"]]
        at_once = min(65536 // (32 * x["warps"] * x["registers"]), limits[x["target"]] // max(1, x["shared"]))
        if x["pair_channel"] in (32, 64, 128) and (x["kernel"], x["pair_dtype"]) != ("pair_gradients", "float32"):
            assert at_once >= 2, x  # two programs fit on a multiprocessor, so that one computes while the other reads


def an_abstract_gpu():
    """An abstract GPU: JAX 0.11 and later can compile for it without a real one."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
    except ImportError:
        return contextlib.nullcontext()
    if len(inspect.signature(AbstractDevice).parameters) < 3:  # an older JAX does not need it
        return contextlib.nullcontext()
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_the_pallas_kernels_lower_for_a_gpu(monkeypatch):
    """Both kernels lower, forward and backward, batched or not; Triton's own result is not checked here."""
    jax = pytest.importorskip("jax")
    attend = jax_point_attention()
    from ipa_jax.attention import fused

    monkeypatch.setattr(fused, "_no_place_to_run", lambda: None)
    for shape in ((100,), (2, 100)):
        for pair_dtype in ("float32", "bfloat16"):
            arrays, _ = arrays_of(shape, 12, 128, widths=(16, 16, 4, 8), pair_dtype=pair_dtype)

            def loss(arrays):
                outputs = attend(**arrays, implementation="fused")
                return sum((x**2).sum() for x in outputs)

            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
            with an_abstract_gpu():
                text = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
            kernel = re.compile(r'name = "(attend_to_pair|pair_gradients)"')
            assert sorted(set(kernel.findall(text))) == ["attend_to_pair", "pair_gradients"]
            assert "__gpu$xla.gpu.triton" in text


def on_gpu(test):
    """Marks a test that `make gpu` runs; it is skipped elsewhere."""
    reason = "kernels are interpreted here; make gpu runs them on a GPU"
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED, reason=reason)(test))


@on_gpu
@pytest.mark.parametrize("case", [*RAGGED, *ON_GPU])
def test_on_a_gpu_it_is_the_reference(framework, case):
    arrays, cotangents = arrays_of(**{**RAGGED, **ON_GPU}[case])
    if arrays["q"].size:
        judge_against_the_reference(framework.on_gpu(), arrays, cotangents)


@on_gpu
def test_a_pair_with_more_numbers_than_32_bits_can_index():
    """The last queries read their own rows."""
    torch = pytest.importorskip("torch")
    import ipa_torch

    arrays, _ = arrays_of((4208,), 2, None)
    tensors = Torch().on_gpu().tensors(arrays)
    pair = torch.randn(4208, 4208, 128, device="cuda", dtype=torch.bfloat16)
    assert pair.numel() > 2**31
    tensors |= {"pair": pair, "pair_bias_weight": torch.randn(128, 2, device="cuda")}
    fused, streamed = (ipa_torch.point_attention(**tensors, implementation=name) for name in ("fused", "streamed"))
    names = {"case": "large", "stage": "out", "dtype": "float32", "subject": "fused", "reference": "streamed"}
    for x, e in zip(fused, streamed, strict=True):
        row = compare(x[-9:].double().cpu().numpy(), e[-9:].double().cpu().numpy(), **names)
        assert row.passed, str(row)


@on_gpu
@pytest.mark.parametrize("implementation", ["streamed", "fused"])
def test_a_cuda_graph_of_it(implementation):
    """Forward and backward can be captured, so nothing waits for the GPU; a replay uses the inputs' new values."""
    torch = pytest.importorskip("torch")
    import ipa_torch

    device = Torch().on_gpu()
    arrays, _ = arrays_of((1, 200), 12, 128)
    tensors = device.tensors(arrays)
    leaves = [tensors[name].requires_grad_() for name in ("q", "pair")]

    def step():
        outputs = ipa_torch.point_attention(**tensors, implementation=implementation)
        return torch.autograd.grad(sum((x**2).sum() for x in outputs), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        tensors["q"].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(found, step(), strict=True):
        assert torch.equal(x, y)
