"""The streamed attention under JAX's transformations, and its memory."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from frameworks import Jax
from streamed_cases import core_arrays, first, judge, rest


def test_jax_keeps_nothing_of_pairs_but_the_pair_and_a_block():
    framework = Jax()
    jax = framework.jax
    arrays, cotangents = core_arrays((40,))
    arrays = {name: framework.array(x) for name, x in arrays.items()}

    def largest(implementation, of, **options):
        def scalar(x):
            found = arrays | {of: x}
            mask = found["mask"]
            outputs = framework.attend(
                *first(found), **rest(found), mask=mask, implementation=implementation, **options
            )
            return sum((x * c).sum() for x, c in zip(outputs, map(framework.array, cotangents), strict=False))

        return sorted(sizes(jax.make_jaxpr(jax.grad(scalar))(arrays[of]).jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    pair = arrays["pair"].size
    assert max(largest("reference", "q")) > pair
    streamed = largest("streamed", "pair", block_size=4)
    assert max(streamed) == pair
    # A frozen pair has no gradient except the zeros that JAX requires.
    frozen = largest("streamed", "q", block_size=4)
    assert frozen.count(pair) < streamed.count(pair)


def test_jax_keeps_no_copy_of_the_pair_for_backward():
    framework = Jax()
    jax = framework.jax
    arrays, _ = core_arrays((40,))
    arrays = {name: framework.array(x) for name, x in arrays.items()}

    @jax.jit
    def scalar(pair):
        found = arrays | {"pair": pair}
        return framework.attend(*first(found), **rest(found), mask=found["mask"], implementation="streamed")[0].sum()

    forward, *_, backward = jax.make_jaxpr(jax.grad(scalar))(arrays["pair"]).jaxpr.eqns
    sizes = [sum(x.aval.size == arrays["pair"].size for x in call.outvars) for call in (forward, backward)]
    assert sizes == [0, 1]


@pytest.mark.parametrize(
    "transform",
    [
        *("jvp", "jvp in jit", "jvp of jit", "linearize", "vmap of linearize", "jit of vmap of linearize"),
        *("jacfwd in jit", "jacfwd of jit", "hessian", "hessian in jit", "hessian of jit"),
    ],
)
def test_jax_forward_mode_names_the_reference(transform):
    framework = Jax()
    jax = framework.jax
    arrays, _ = core_arrays()
    arrays = {name: framework.array(x) for name, x in arrays.items()}

    def scalar(q):
        found = arrays | {"q": q}
        return framework.attend(*first(found), **rest(found), mask=found["mask"], implementation="streamed")[0].sum()

    transformed = {
        "jvp": lambda x: jax.jvp(scalar, (x,), (x,)),
        "jvp in jit": jax.jit(lambda x: jax.jvp(scalar, (x,), (x,))),
        "linearize": lambda x: jax.linearize(scalar, x)[1](x),
        "jvp of jit": lambda x: jax.jvp(jax.jit(scalar), (x,), (x,)),
        "vmap of linearize": lambda x: jax.vmap(jax.linearize(scalar, x)[1])(x[None]),
        "jit of vmap of linearize": lambda x: jax.jit(jax.vmap(jax.linearize(scalar, x)[1]))(x[None]),
        "jacfwd of jit": jax.jacfwd(jax.jit(scalar)),
        "jacfwd in jit": jax.jit(jax.jacfwd(scalar)),
        "hessian of jit": jax.hessian(jax.jit(scalar)),
        "hessian": jax.hessian(scalar),
        "hessian in jit": jax.jit(jax.hessian(scalar)),
    }
    with pytest.raises(NotImplementedError, match="implementation='reference' has all others"):
        transformed[transform](arrays["q"])


def test_jax_reverse_mode_twice_is_the_references():
    """Gradients of gradients agree; they need as much memory as the reference."""
    framework = Jax()
    jax = framework.jax
    arrays, cotangents = core_arrays()
    arrays = {name: framework.array(x) for name, x in arrays.items()}
    mask = arrays.pop("mask")
    cotangents = [framework.array(x) for x in cotangents]

    def second(**options):
        def scalar(arrays):
            outputs = framework.attend(*first(arrays), **rest(arrays), mask=mask, **options)
            return sum((x * c).sum() for x, c in zip(outputs, cotangents, strict=False))

        twice = jax.grad(lambda x: sum((g**2).sum() for g in jax.grad(scalar)(x).values()))
        return jax.jit(twice, compiler_options={"xla_backend_optimization_level": 0})(arrays)

    found, expected = second(implementation="streamed", block_size=4), second(implementation="reference")
    for name, x in expected.items():
        judge(found[name], x, f"gradient/{name}", "float64")


@pytest.mark.parametrize("check_vma", [True, False])
def test_jax_under_shard_map(check_vma):
    """Examples are split over devices, weights replicated; gradients are taken outside and inside shard_map."""
    framework = Jax()
    jax = framework.jax
    arrays, cotangents = core_arrays((2, 3))
    arrays = {name: framework.array(x) for name, x in arrays.items()}
    shared, mask = {name: arrays.pop(name) for name in rest(arrays)}, arrays.pop("mask")
    inputs, cotangents = (arrays, shared, mask), [framework.array(x) for x in cotangents]
    split, whole = jax.sharding.PartitionSpec("examples"), jax.sharding.PartitionSpec()

    def attend(arrays, shared, mask):
        return framework.attend(*first(arrays), **shared, mask=mask, implementation="streamed", block_size=2)

    def gradient(function, *inputs):
        def scalar(*inputs):
            return sum((x * c).sum() for x, c in zip(function(*inputs), cotangents, strict=False))

        return jax.grad(scalar, (0, 1))(*inputs)

    mapped = partial(
        jax.shard_map,
        mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("examples",)),
        in_specs=(split, whole, split),
        check_vma=check_vma,
    )
    for x, e in zip(mapped(attend, out_specs=split)(*inputs), attend(*inputs), strict=True):
        judge(x, e, "out", "float64")
    jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling takes longer
    found, expected = (jit(partial(gradient, f))(*inputs) for f in (mapped(attend, out_specs=split), attend))
    jax.tree.map(lambda x, e: judge(x, e, "gradient", "float64"), found, expected)
    within = jax.eval_shape(mapped(partial(gradient, attend), out_specs=(split, whole)), *inputs)
    assert jax.tree.all(jax.tree.map(lambda x, e: x.shape == e.shape, within, expected))


ON_TWO_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from ipa_jax import point_attention

def scalars(arrays, shared):
    outputs = point_attention(*arrays, pair_bias_weight=shared[0], point_weights=shared[1], **options)
    return sum((x**2).reshape(len(x), -1).sum(-1) for x in outputs)

options = {"implementation": "streamed", "block_size": 2}
shapes = [(2, 5, 2, 3)] * 3 + [(2, 5, 2, 2, 3)] * 3 + [(2, 5, 5, 3), (3, 2), (2,)]
*arrays, bias, weights = (jax.random.uniform(jax.random.key(i), shape) for i, shape in enumerate(shapes))
split, whole = PartitionSpec("examples"), PartitionSpec()
mesh = jax.make_mesh((2,), ("examples",), (AxisType.Auto,))
mapped = jax.shard_map(scalars, mesh=mesh, in_specs=(split, whole), out_specs=split)
losses = (lambda *xs: mapped(*xs).sum(), lambda *xs: scalars(*xs).sum())
jit = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
of_both = [jit(jax.grad(loss, 1))(arrays, (bias, weights)) for loss in losses]
assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.allclose(x, y, rtol=1e-4, atol=1e-5)), *of_both)), of_both
"""


def test_jax_adds_up_the_weights_gradients_of_two_devices():
    pytest.importorskip("haiku")
    run = subprocess.run([sys.executable, "-c", ON_TWO_DEVICES], capture_output=True, text=True, check=False)
    assert not run.returncode, run.stderr


@pytest.mark.parametrize("implementation", ["streamed", "reference", None])
def test_jax_exports_a_symbolic_batch(implementation):
    from ipa_jax.attention import STREAMED_FROM

    framework = Jax()
    jax = framework.jax
    arrays, _ = core_arrays((3, STREAMED_FROM if implementation is None else 5))
    arrays = {name: framework.array(x) for name, x in arrays.items()}
    shared = rest(arrays)

    def attend(*inputs):
        return framework.attend(*inputs[:-1], **shared, mask=inputs[-1], implementation=implementation)

    inputs = [*first(arrays), arrays["mask"]]
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs]
    exported = jax.export.export(jax.jit(attend))(*shapes)
    for x, e in zip(exported.call(*inputs), attend(*inputs), strict=True):
        judge(x, e, "out", "float64")


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")  # for nothing returned has their shape
def test_jax_vmap_remat_and_donation():
    framework = Jax()
    jax = framework.jax
    arrays, _ = core_arrays((3, 9))
    arrays = {name: framework.array(x) for name, x in arrays.items()}
    shared = {name: arrays[name] for name in ("pair_bias_weight", "point_weights")}

    def attend(*inputs):
        return framework.attend(*inputs[:-1], **shared, mask=inputs[-1], implementation="streamed", block_size=4)[:3]

    inputs = [*first(arrays), arrays["mask"]]
    expected = attend(*inputs)
    for other in (jax.vmap(attend), jax.checkpoint(attend), jax.jit(attend, donate_argnums=6)):
        found = other(*(x.copy() for x in inputs))
        for x, e in zip(found, expected, strict=True):
            judge(x, e, "out", "float64")
