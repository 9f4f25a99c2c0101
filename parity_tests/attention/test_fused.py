"""The GPU kernels, run in interpreters, compute the reference's function."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from frameworks import MASKS, Jax, Torch
from fused_cases import (
    INTERPRETED,
    RAGGED,
    arrays_of,
    interpreted,
    judge_against_the_reference,
    needs_triton,
    run,
)

from ipa_bridge import tiling
from ipa_bridge.weights.tensors import torch_tensor


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "the package triton is needed and is not installed"), ((3, 2), "triton 3.6 or later .*; got 3.2")],
)
def test_another_triton_is_told(version, message, monkeypatch):
    torch = pytest.importorskip("torch")
    from ipa_torch.attention import fused, point_attention

    monkeypatch.setattr(fused, "_TRITON", version)
    arrays, _ = arrays_of((5,), 2, 32)
    tensors = {name: None if x is None else torch.tensor(x) for name, x in arrays.items()}
    with pytest.raises(NotImplementedError, match=rf"{message}.*; implementation='streamed' has no such limit"):
        point_attention(**tensors, implementation="fused")


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="kernels run on a GPU")
def test_kernels_that_are_interpreted_unasked_are_refused(monkeypatch):
    """TRITON_INTERPRET=1 on a GPU would silently give wrong products with bfloat16."""
    torch = pytest.importorskip("torch")
    from ipa_torch.attention import fused, point_attention

    monkeypatch.setattr(fused, "_no_place_to_run", lambda device: None)
    arrays, _ = arrays_of((5,), 2, 32)
    tensors = {name: None if x is None else torch.tensor(x) for name, x in arrays.items()}
    with pytest.raises(NotImplementedError, match="only tests set TRITON_INTERPRET=1; unset it"):
        point_attention(**tensors, implementation="fused")


@interpreted
@needs_triton
@pytest.mark.parametrize("case", RAGGED)
def test_interpreted_it_is_the_reference(framework, case):
    arrays, cotangents = arrays_of(**RAGGED[case])
    if not arrays["q"].size:
        outputs, gradients = run(framework, arrays, cotangents, implementation="fused")
        assert [x.shape for x in outputs] == [x.shape for x in cotangents]
        assert {name: x.shape for name, x in gradients.items()} == {
            name: x.shape for name, x in arrays.items() if x is not None and name not in MASKS
        }
        return
    judge_against_the_reference(framework, arrays, cotangents)


def test_what_the_kernels_cannot_do(framework):
    cases = {
        "its arithmetic is float32; got float64": ({"width": 32}, "float64"),
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
            run(framework, arrays, cotangents, implementation="fused")
    arrays, cotangents = arrays_of((1, 3), 2, 32)
    with pytest.raises(NotImplementedError, match="'fused' has no blocks"):
        run(framework, arrays, cotangents, implementation="fused", block_size=2)
    with pytest.raises(NotImplementedError, match="'fused' cannot return the attention"):
        run(framework, arrays, cotangents, implementation="fused", return_attention=True)
    if framework.name == "torch":  # in JAX these are XLA's part
        with pytest.raises(NotImplementedError, match="fused': no pair_mask was expected"):
            run(framework, {**arrays, "pair_mask": np.ones((1, 3, 3))}, cotangents, implementation="fused")
        with pytest.raises(NotImplementedError, match="fused': distance_form 'squared' was expected"):
            run(framework, arrays, cotangents, implementation="fused", distance_form="unsquared")
    half = {**arrays, "pair": arrays["pair"].astype("float16")}
    with pytest.raises(NotImplementedError, match="a pair in float32 or bfloat16 was expected; got float16"):
        run(framework, half, cotangents, implementation="fused")


@pytest.mark.skipif(not INTERPRETED, reason="there is a GPU")
@needs_triton
def test_without_a_gpu_it_says_so(framework):
    with pytest.raises(NotImplementedError, match=r"CUDA device .*expected.*; got cpu; "):
        run(framework, *arrays_of((1, 3), 2, 32), implementation="fused")


@pytest.mark.parametrize("sizes", [(1, 5), (3, 5), (1, 700), (2, 1024), (1, 9000), (5, 264), (9000, 3), (0, 3), (3, 0)])
def test_chunks_are_all_queries_once(sizes):
    examples, number = sizes
    seen = np.zeros((examples, number), int)
    of = tiling.Sizes(examples, number, 12, 16, 12, 40, 128)
    for chunk in tiling.chunks(of):
        seen[chunk.example : chunk.example + chunk.examples, chunk.row : chunk.row + chunk.rows] += 1
        assert chunk.example + chunk.examples <= examples
        assert chunk.row + chunk.rows <= number
        assert chunk.examples == 1 or chunk.rows == number
        queries = chunk.examples * chunk.rows
        assert chunk.examples * of.heads <= tiling.MAX_PROGRAMS
        assert queries <= tiling.MIN_QUERIES or 4 * 12 * queries * max(tiling.stride(of), 128) <= tiling.CHUNK_BYTES
    assert (seen == 1).all()
    last = [chunk.rows for chunk in tiling.chunks(of)][-1:]
    assert all(rows > 0.8 * next(tiling.chunks(of)).rows for rows in last), (
        "every chunk costs the same number of launches"
    )


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tiling, "CHUNK_BYTES", 1)
    monkeypatch.setattr(tiling, "MIN_QUERIES", 7)


@interpreted
@needs_triton
@pytest.mark.parametrize("shape", [(1, 17), (3, 3)])
def test_in_many_chunks(framework, shape, small_chunks):
    """Chunks of unequal length, of one example and of several."""
    judge_against_the_reference(framework, *arrays_of(shape, 2, 32))


@interpreted
@needs_triton
def test_far_from_the_origin(framework):
    """300 units from the origin the kernels are as accurate as the reference, because they square differences."""
    arrays, cotangents = arrays_of((1, 12), 2, 32)
    exact = {name: x.copy() for name, x in arrays.items()}
    for name in ("q_points", "k_points"):
        arrays[name] = np.round(arrays[name] * 2**10) / np.float32(2**10)
        exact[name] = arrays[name]
        arrays[name] = arrays[name] + np.float32(300)
    here, there = (run(framework, x, cotangents, implementation="fused") for x in (exact, arrays))
    for x, y in zip((*here[0], *here[1].values()), (*there[0], *there[1].values()), strict=True):
        assert np.array_equal(x, y)


@interpreted
@needs_triton
def test_torch_operators_are_sound():
    """Shapes without data, gradients and vmap work, and the operators compile into one graph."""
    torch = pytest.importorskip("torch")
    import ipa_torch
    from ipa_torch.attention import fused
    from ipa_torch.attention.operands import Operands

    arrays, _ = arrays_of((2, 5), 2, 32)
    tensors = {name: torch_tensor(x) for name, x in arrays.items()}
    operands = Operands.from_inputs(**tensors, allowed=None, logit_terms=3)
    inputs = [None if x is None else x.contiguous() for x in operands[:-1]]
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
def test_a_pair_with_another_memory_layout(lies):
    """The gradient may have another memory layout too."""
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
