"""The GPU kernels: interpreted they are the reference's function; compiled, they fit a GPU; and there they run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from ipa_bridge import tiling
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention import jax_point_attention
from ipa_parity.report import compare

RAGGED = {
    "float32": {"shape": (1, 37), "heads": 3, "width": 32},
    "bfloat16": {"shape": (1, 37), "heads": 3, "width": 32, "pair_dtype": "bfloat16"},
    "batch, no mask": {"shape": (2, 2, 5), "heads": 2, "width": 64, "mask": False},
    "no pair": {"shape": (2, 19), "heads": 5, "width": None},
    "alphafold": {"shape": (1, 20), "heads": 12, "width": 128, "widths": (16, 16, 4, 8)},
    "all heads": {"shape": (1, 3), "heads": 16, "width": 256, "pair_dtype": "bfloat16"},
    "wide heads": {"shape": (1, 5), "heads": 2, "width": 32, "widths": (40, 30, 9, 11)},
    "one residue": {"shape": (1, 1), "heads": 2, "width": 32},
    "none": {"shape": (1, 0), "heads": 2, "width": 32},
    "no example": {"shape": (0, 5), "heads": 2, "width": 32},
    "no example, no pair": {"shape": (2, 0, 5), "heads": 2, "width": None},
}
ON_GPU = {
    "float32": {"shape": (1, 300), "heads": 12, "width": 128, "widths": (16, 16, 4, 8)},
    "bfloat16": {"shape": (1, 300), "heads": 12, "width": 128, "widths": (16, 16, 4, 8), "pair_dtype": "bfloat16"},
    "aligned": {"shape": (1, 256), "heads": 12, "width": 128, "widths": (16, 16, 4, 8)},
    "aligned, bfloat16": {"shape": (1, 1024), "heads": 12, "width": 32, "pair_dtype": "bfloat16"},
    "several chunks": {"shape": (3, 700), "heads": 12, "width": 32, "widths": (16, 16, 4, 8)},
    "wide, float32": {"shape": (1, 130), "heads": 16, "width": 256},
    "wide, bfloat16": {"shape": (1, 130), "heads": 16, "width": 256, "pair_dtype": "bfloat16"},
}


def arrays_of(shape, heads, width, *, widths=(5, 2, 3, 7), mask=True, pair_dtype="float32", spread=1.0, seed=0):
    """What `point_attention` takes, by name, and cotangents of its outputs; a pair that bfloat16 holds, if it is to."""
    rng = np.random.default_rng(seed)
    *batch, n = shape
    c, cv, p, pv = widths

    def draw(*shape):
        return rng.standard_normal(shape).astype("float32")

    centre = spread * draw(*batch, n, 1, 1, 3)
    arrays = {
        "q": draw(*batch, n, heads, c),
        "k": draw(*batch, n, heads, c),
        "v": draw(*batch, n, heads, cv),
        "q_points": centre + draw(*batch, n, heads, p, 3),
        "k_points": centre + draw(*batch, n, heads, p, 3),
        "v_points": draw(*batch, n, heads, pv, 3),
        "pair": None if width is None else draw(*batch, n, n, width),
        "pair_bias_weight": draw(width, heads) / 3 if width else None,
        "point_weights": abs(draw(heads)),
        "mask": (rng.random((*batch, n)) > 0.2).astype("float32") if mask else None,
    }
    if pair_dtype == "bfloat16":
        import ml_dtypes

        arrays["pair"] = arrays["pair"].astype(ml_dtypes.bfloat16)
    cotangents = [draw(*batch, n, heads, cv), draw(*batch, n, heads, pv, 3)]
    return arrays, cotangents + ([draw(*batch, n, heads, width)] if width else [])


def widened(arrays):
    return {name: None if x is None else x.astype("float64") for name, x in arrays.items()}


class Torch:
    name = "torch"

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        import ipa_torch

        self.attend, self.device = ipa_torch.point_attention, "cpu"

    def on_gpu(self):
        self.device = "cuda"
        return self

    def tensors(self, arrays):
        return {name: None if x is None else torch_tensor(x).to(self.device) for name, x in arrays.items()}

    def run(self, arrays, cotangents, **options):
        """Outputs, and gradients to every array but the mask; all memory that is not written is NaN."""
        torch = self.torch
        tensors = self.tensors(arrays)
        leaves = {n: x.requires_grad_() for n, x in tensors.items() if x is not None and n != "mask"}
        was = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=self.device != "cpu")
        try:
            outputs = [x for x in self.attend(**tensors, **options) if x is not None]
            given = self.tensors(dict(enumerate(cotangents)))
            scalar = sum((x * given[i].to(x.dtype)).sum() for i, x in enumerate(outputs))
            found = torch.autograd.grad(scalar, list(leaves.values()))
        finally:
            torch.use_deterministic_algorithms(was)
        gradients = dict(zip(leaves, found, strict=True))
        return [self.numpy(x) for x in outputs], {name: self.numpy(x) for name, x in gradients.items()}

    def numpy(self, x):
        return x.detach().to(self.torch.float64).cpu().numpy()


class Jax:
    name = "jax"

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.attend = jax_point_attention()

    def on_gpu(self):
        return self

    def run(self, arrays, cotangents, **options):
        """Outputs, and gradients to every array but the mask."""
        jax, jnp = self.jax, self.jax.numpy
        wide = arrays["q"].dtype == np.float64
        with jax.enable_x64(wide):  # with 64-bit numbers the interpreter mixes integers, which JAX does not
            arrays = {name: None if x is None else jnp.asarray(x) for name, x in arrays.items()}
            mask = arrays.pop("mask")

            def scalar(arrays):
                outputs = [x for x in self.attend(**arrays, mask=mask, **options) if x is not None]
                return sum(
                    (x * jnp.asarray(c).astype(x.dtype)).sum() for x, c in zip(outputs, cotangents, strict=False)
                ), outputs

            gradients, outputs = jax.jit(jax.grad(scalar, has_aux=True))(arrays)
            gradients = {name: x for name, x in gradients.items() if x is not None}
            return [np.asarray(x, float) for x in outputs], {n: np.asarray(x, float) for n, x in gradients.items()}


@pytest.fixture(params=[Jax, Torch], ids=lambda kind: kind.name)
def framework(request):
    return request.param()


def judge_against_the_reference(framework, arrays, cotangents):
    """Against float64, in eps of float32; the pair's gradient, which is returned in the pair's dtype, in that's."""
    outputs, gradients = framework.run(arrays, cotangents, implementation="fused")
    exact = framework.run(widened(arrays), cotangents, implementation="reference")
    names = {"case": "fused", "subject": framework.name, "reference": "reference"}
    rows = []
    for x, e in zip(outputs, exact[0], strict=True):
        rows.append(compare(x, e, stage="out", dtype="float32", **names))
    # Gradients of logits cancel to zero where there is one key; they are judged beside what is added up to them.
    scale = max(abs(x).max(initial=0) for x in cotangents)
    assert set(gradients) == set(exact[1])
    for name, e in exact[1].items():
        known = {"scale": max(scale, abs(e).max(initial=0)), **names}
        dtype = arrays["pair"].dtype.name if name == "pair" else "float32"
        rows.append(compare(gradients[name], e, stage=f"gradient/{name}", dtype=dtype, **known))
    failed = [str(row) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as conftest sets it, but on a GPU
interpreted = pytest.mark.usefixtures("interpreted")


def without_triton() -> str:
    """Why the kernels of PyTorch cannot even be interpreted; empty where they can."""
    if not importlib.util.find_spec("torch"):
        return "no torch"
    from ipa_torch.attention import fused

    installed = fused._installed_triton()
    return "" if installed and installed >= fused.OLDEST_TRITON else f"triton is {installed}"


needs_triton = pytest.mark.skipif(bool(without_triton()), reason=without_triton())


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "the package triton was expected, which is not installed"), ((3, 2), "triton 3.6 or later .*; got 3.2")],
)
def test_another_triton_is_told(version, message, monkeypatch):
    torch = pytest.importorskip("torch")
    from ipa_torch.attention import fused, point_attention

    monkeypatch.setattr(fused, "_TRITON", version)
    arrays, _ = arrays_of((5,), 2, 32)
    tensors = {name: None if x is None else torch.tensor(x) for name, x in arrays.items()}
    with pytest.raises(NotImplementedError, match=rf"{message}.*; implementation='streamed' has no such limit"):
        point_attention(**tensors, implementation="fused")


@interpreted
@needs_triton
@pytest.mark.parametrize("case", RAGGED)
def test_interpreted_it_is_the_reference(framework, case):
    arrays, cotangents = arrays_of(**RAGGED[case])
    if not arrays["q"].size:
        outputs, gradients = framework.run(arrays, cotangents, implementation="fused")
        assert [x.shape for x in outputs] == [x.shape for x in cotangents]
        assert {name: x.shape for name, x in gradients.items()} == {
            name: x.shape for name, x in arrays.items() if x is not None and name != "mask"
        }
        return
    judge_against_the_reference(framework, arrays, cotangents)


def test_what_the_kernels_cannot_do(framework):
    cases = {
        "its arithmetic is float32's; here it would be float64's": ({"width": 32}, "float64"),
        "a pair of 32, 64, 128, 256 channels was expected; got 48": ({"width": 48}, "float32"),
        "at most 16 heads were expected; got 17": ({"width": 32, "heads": 17}, "float32"),
        "1 to 64 channels of queries a head were expected; got 65": (
            {"width": 32, "widths": (65, 2, 3, 7)},
            "float32",
        ),
    }
    for reason, (options, dtype) in cases.items():
        arrays, cotangents = arrays_of((1, 3), **{"heads": 2, **options})
        arrays = {name: None if x is None else x.astype(dtype) for name, x in arrays.items()}
        with pytest.raises(NotImplementedError, match=rf"fused': {re.escape(reason)}; implementation='streamed' has"):
            framework.run(arrays, cotangents, implementation="fused")
    arrays, cotangents = arrays_of((1, 3), 2, 32)
    with pytest.raises(NotImplementedError, match="'fused' has no blocks"):
        framework.run(arrays, cotangents, implementation="fused", block_size=2)
    with pytest.raises(NotImplementedError, match="'fused' never holds the attention"):
        framework.run(arrays, cotangents, implementation="fused", return_attention=True)
    half = {**arrays, "pair": arrays["pair"].astype("float16")}
    with pytest.raises(NotImplementedError, match="a pair in float32 or bfloat16 was expected; got float16"):
        framework.run(half, cotangents, implementation="fused")


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU")
@needs_triton
def test_without_a_gpu_it_says_so(framework):
    with pytest.raises(NotImplementedError, match=r"CUDA device .*expected.*; got cpu; "):
        framework.run(*arrays_of((1, 3), 2, 32), implementation="fused")


@pytest.mark.parametrize("sizes", [(1, 5), (3, 5), (1, 700), (2, 1024), (1, 9000), (5, 264), (9000, 3), (0, 3), (3, 0)])
def test_chunks_are_all_queries_once(sizes):
    examples, number = sizes
    seen = np.zeros((examples, number), int)
    of = tiling.Sizes(examples, number, 12, 16, 12, 40, 128)
    for chunk in tiling.chunks(of):
        seen[chunk.example : chunk.example + chunk.examples, chunk.row : chunk.row + chunk.rows] += 1
        assert chunk.examples == 1 or chunk.rows == number
        queries = chunk.examples * chunk.rows
        assert chunk.examples * of.heads <= tiling.MAX_PROGRAMS
        assert queries <= tiling.MIN_QUERIES or 4 * 12 * queries * max(tiling.stride(of), 128) <= tiling.CHUNK_BYTES
    assert (seen == 1).all()
    last = [chunk.rows for chunk in tiling.chunks(of)][-1:]
    assert all(rows > 0.8 * next(tiling.chunks(of)).rows for rows in last), "a chunk costs as many launches as another"


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tiling, "CHUNK_BYTES", 1)
    monkeypatch.setattr(tiling, "MIN_QUERIES", 7)


@interpreted
@needs_triton
@pytest.mark.parametrize("shape", [(1, 17), (3, 3)])
def test_in_many_chunks(framework, shape, small_chunks):
    """Ragged ones of one example, and of several."""
    judge_against_the_reference(framework, *arrays_of(shape, 2, 32))


@interpreted
@needs_triton
def test_far_from_the_origin(framework):
    """Distances are sums of squared differences: 300 units off they lose nothing that the reference keeps."""
    arrays, cotangents = arrays_of((1, 12), 2, 32)
    exact = {name: x.copy() for name, x in arrays.items()}
    for name in ("q_points", "k_points"):
        arrays[name] = np.round(arrays[name] * 2**10) / np.float32(2**10)
        exact[name] = arrays[name]
        arrays[name] = arrays[name] + np.float32(300)
    here, there = (framework.run(x, cotangents, implementation="fused") for x in (exact, arrays))
    for x, y in zip((*here[0], *here[1].values()), (*there[0], *there[1].values()), strict=True):
        assert np.array_equal(x, y)


@interpreted
@needs_triton
def test_torch_operators_are_sound():
    """Their shapes without data, the rules of gradients and of vmap; and they compile as one graph."""
    torch = pytest.importorskip("torch")
    import ipa_torch
    from ipa_torch.attention import fused
    from ipa_torch.attention.operands import Operands

    arrays, _ = arrays_of((2, 5), 2, 32)
    tensors = {name: torch_tensor(x) for name, x in arrays.items()}
    inputs = [None if x is None else x.contiguous() for x in Operands.from_inputs(**tensors)]
    torch.library.opcheck(fused._attend, inputs)
    outputs = fused._attend(*inputs)
    torch.library.opcheck(fused._attend_backward, (*outputs[:2], *inputs, *outputs, True))

    attend = partial(ipa_torch.point_attention, implementation="fused")
    names = [name for name, x in tensors.items() if name not in ("pair_bias_weight", "point_weights")]
    of_all = {name: tensors[name] for name in ("pair_bias_weight", "point_weights")}
    each = torch.vmap(lambda *xs: attend(**dict(zip(names, xs, strict=True)), **of_all))(*(tensors[n] for n in names))
    for x, y in zip(each, attend(**tensors), strict=True):
        assert torch.equal(x, y)

    def loss(q, pair):
        return sum((x**2).sum() for x in attend(**{**tensors, "q": q, "pair": pair}))

    leaves = [tensors["q"].clone().requires_grad_(), tensors["pair"].clone().requires_grad_()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.func.grad(loss, (0, 1))(tensors["q"], tensors["pair"]), expected))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))
    with torch.no_grad():
        assert torch.equal(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), loss(*leaves))
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="first derivatives in reverse mode only"):
        torch.autograd.grad(torch.autograd.grad(loss(*leaves), leaves, create_graph=True)[0].sum(), leaves)


@interpreted
@pytest.mark.parametrize("transform", ["jvp", "jvp in jit", "gradient of a gradient", "the same in jit"])
def test_jax_other_derivatives_name_the_reference(transform):
    framework = Jax()
    jax = framework.jax
    arrays, _ = arrays_of((1, 3), 2, 32)
    with jax.enable_x64(False):
        arrays = {name: jax.numpy.asarray(x) for name, x in arrays.items()}

        def scalar(q):
            return (framework.attend(**arrays | {"q": q}, implementation="fused")[0] ** 2).sum()

        transformed = {
            "jvp": lambda x: jax.jvp(scalar, (x,), (x,)),
            "gradient of a gradient": jax.grad(lambda x: jax.grad(scalar)(x).sum()),
        }
        transformed |= {"jvp in jit": jax.jit(transformed["jvp"])}
        transformed |= {"the same in jit": jax.jit(transformed["gradient of a gradient"])}
        with pytest.raises(NotImplementedError, match="implementation='reference' has all others"):
            transformed[transform](arrays["q"])


@interpreted
@needs_triton
@pytest.mark.parametrize("lies", ["turned", "shared by all examples"])
def test_a_pair_that_lies_otherwise(lies):
    """In memory; its gradient too."""
    torch = pytest.importorskip("torch")
    framework = Torch()
    arrays, _ = arrays_of((2, 5), 2, 32)
    tensors = framework.tensors(arrays)
    pair = tensors["pair"]
    leaf = pair.permute(3, 2, 1, 0).contiguous() if lies == "turned" else pair[:1].clone()
    leaf.requires_grad_()
    view = leaf.permute(3, 2, 1, 0) if lies == "turned" else leaf.expand(2, -1, -1, -1)
    assert view.stride() != pair.stride()
    straight = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs, expected = (framework.attend(**{**tensors, "pair": x}, implementation="fused") for x in (view, straight))
    assert all(map(torch.equal, outputs, expected))
    (found,), (wanted,) = (
        torch.autograd.grad(sum((x**2).sum() for x in of), [x]) for of, x in ((outputs, leaf), (expected, straight))
    )
    wanted = wanted.permute(3, 2, 1, 0) if lies == "turned" else wanted.sum(0, keepdim=True)
    assert torch.equal(found, wanted)


@pytest.fixture(scope="module", params=["alphafold", pytest.param("every pair", marks=pytest.mark.exhaustive)])
def resources(request):
    """Registers and memory that kernels take of a GPU, compiled where nothing is interpreted."""
    if reason := without_triton():
        pytest.skip(reason)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernel_resources", "--json"]
    command += ["--target", "sm_90", "--pair-channel", "128"] if request.param == "alphafold" else []
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr
    return json.loads(run.stdout)


def test_the_kernels_fit_without_spilling(resources):
    """Registers and shared memory; a float32 pair of 256 channels and the widest heads are known to spill this much."""
    limits = {"sm_80": 163 << 10, "sm_90": 227 << 10}
    assert {x["target"] for x in resources} <= set(limits)
    assert {x["kernel"] for x in resources} >= {"logits", "attend_to_pair", "pair_gradients", "key_gradients"}
    for x in resources:
        wide = x["pair_dtype"] == "float32" and x["pair_channel"] == 256
        assert x["spilled"] <= (512 if wide else 32 if x["channels"] > 16 else 0), x
        assert x["shared"] <= limits[x["target"]]
        at_once = min(65536 // (32 * x["warps"] * x["registers"]), limits[x["target"]] // max(1, x["shared"]))
        if x["pair_channel"] in (32, 64, 128) and (x["kernel"], x["pair_dtype"]) != ("pair_gradients", "float32"):
            assert at_once >= 2, x  # programs on a multiprocessor, so that one computes while another reads


def an_abstract_gpu():
    """Where there is no GPU, JAX from 0.11 on compiles for one that it is told of."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
    except ImportError:
        return contextlib.nullcontext()
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_the_pallas_kernels_lower_for_a_gpu(monkeypatch):
    """Both, forwards and backwards, batched or not; what Triton makes of them is not seen here."""
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
    """A test that is run by `make gpu`, and skipped elsewhere."""
    reason = "kernels are interpreted here; make gpu runs them on a GPU"
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED, reason=reason)(test))


@on_gpu
@pytest.mark.parametrize("case", [*RAGGED, *ON_GPU])
def test_on_a_gpu_it_is_the_reference(framework, case):
    arrays, cotangents = arrays_of(**{**RAGGED, **ON_GPU}[case])
    if arrays["q"].size:
        judge_against_the_reference(framework.on_gpu(), arrays, cotangents)


@on_gpu
def test_a_pair_of_more_numbers_than_32_bits_count():
    """The last queries read what is theirs."""
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
    """Forwards and backwards are captured, so nothing waits for the GPU; and replay computes on what is there then."""
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


def test_jax_without_haiku():
    """The attention has no parameters: it is imported and runs where there is JAX alone."""
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
from ipa_parity.attention import jax_point_attention
x, points = jnp.ones((3, 2, 4)), jnp.ones((3, 2, 4, 3))
out = jax_point_attention()(x, x, x, points, points, points, None, pair_bias_weight=None, point_weights=jnp.ones(2))
assert out[0].shape == (3, 2, 4) and "haiku" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@interpreted
@needs_triton
@pytest.mark.parametrize("pairs", [("none",), pytest.param(("float32", "none"), marks=pytest.mark.exhaustive)])
def test_the_gpu_benchmark(pairs, tmp_path):
    """Its command on a CPU, where its figures mean nothing: gate, table, JSON."""
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
