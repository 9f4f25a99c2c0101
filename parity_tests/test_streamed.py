"""The streamed attention is the reference's function, forwards and backwards, in memory linear beyond the pair."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import partial
from typing import ClassVar

import numpy as np
import pytest

from ipa_bridge import tiling, tolerance
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.cases import CATALOGUE, ODD, make_case
from ipa_parity.report import compare
from ipa_parity.stages import RUNNERS, run_oracle


class Jax:
    """numpy in, numpy out."""

    name = "jax"

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        pytest.importorskip("haiku")
        import ipa_jax

        self.attend, self.array = ipa_jax.point_attention, self.jax.numpy.asarray

    def run(self, arrays, cotangents, **options):
        """Outputs, and gradients to every array but the mask."""
        jax = self.jax
        arrays = {name: None if x is None else self.array(x) for name, x in arrays.items()}
        mask = arrays.pop("mask")

        def scalar(arrays):
            outputs = self.attend(*first(arrays), **rest(arrays), mask=mask, **options)
            found = [x for x in outputs if x is not None]
            return sum((x * c).sum() for x, c in zip(found, map(self.array, cotangents), strict=False)), found

        gradients, outputs = jax.jit(jax.grad(scalar, has_aux=True))(arrays)
        return [np.asarray(x) for x in outputs], {n: np.asarray(x) for n, x in gradients.items() if x is not None}


class Torch:
    """numpy in, numpy out."""

    name = "torch"

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        import ipa_torch

        self.attend, self.array = ipa_torch.point_attention, torch_tensor

    def run(self, arrays, cotangents, **options):
        """Outputs, and gradients to every array but the mask."""
        arrays = {name: None if x is None else torch_tensor(x) for name, x in arrays.items()}
        mask = arrays.pop("mask")
        leaves = {name: x.requires_grad_() for name, x in arrays.items() if x is not None}
        outputs = [x for x in self.attend(*first(arrays), **rest(arrays), mask=mask, **options) if x is not None]
        scalar = sum((x * torch_tensor(c)).sum() for x, c in zip(outputs, cotangents, strict=False))
        gradients = self.torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return [x.detach().numpy() for x in outputs], {n: g.numpy() for n, g in zip(leaves, gradients, strict=True)}


def first(arrays):
    return [arrays[name] for name in ("q", "k", "v", "q_points", "k_points", "v_points", "pair")]


def rest(arrays):
    return {name: arrays[name] for name in ("pair_bias_weight", "point_weights")}


@pytest.fixture(params=[Jax, Torch], ids=lambda kind: kind.name)
def framework(request):
    return request.param()


def core_arrays(shape=(9,), *, pair=True, mask=True, spread=1.0, dtype="float64", seed=0):
    """Of widths that are all different; frames of neighbours lie together, however far the groups lie apart."""
    rng = np.random.default_rng(seed)
    *batch, n = shape
    heads, c, cv, p, pv, cz = 3, 4, 2, 5, 7, 6
    r = lambda *s: rng.standard_normal((*batch, *s))  # noqa: E731
    centre = (
        np.repeat(spread * rng.uniform(-1, 1, (*batch, n, 1, 1, 3)), 3, -4)[..., :n, :, :, :] if n else r(0, 1, 1, 3)
    )
    arrays = {
        "q": r(n, heads, c),
        "k": r(n, heads, c),
        "v": r(n, heads, cv),
        "q_points": centre + r(n, heads, p, 3),
        "k_points": centre + r(n, heads, p, 3),
        "v_points": r(n, heads, pv, 3),
        "pair": r(n, n, cz) if pair else None,
        "pair_bias_weight": rng.standard_normal((cz, heads)) / 3 if pair else None,
        "point_weights": rng.random(heads),
        "mask": (rng.random((*batch, n)) > 0.2).astype(float) if mask else None,
    }
    cotangents = [r(n, heads, cv), r(n, heads, pv, 3), *([r(n, heads, cz)] if pair else []), r(heads, n, n)]
    return {n: None if x is None else x.astype(dtype) for n, x in arrays.items()}, [x.astype(dtype) for x in cotangents]


def judge(actual, expected, stage, dtype, conditioning=1.0):
    names = {"case": "core", "stage": stage, "dtype": dtype, "subject": "streamed", "reference": "reference"}
    row = compare(np.asarray(actual, np.float64), np.asarray(expected, np.float64), **names, conditioning=conditioning)
    assert row.passed, str(row)


def judge_all(actual, expected, dtype):
    (outputs, gradients), (wanted, of_reference) = actual, expected
    assert [x.shape for x in outputs] == [x.shape for x in wanted]
    for x, e in zip(outputs, wanted, strict=True):
        judge(x, e, "out", dtype)
    assert set(gradients) == set(of_reference)
    for name, x in of_reference.items():
        judge(gradients[name], x, f"gradient/{name}", dtype)


@pytest.mark.covering("framework")
@pytest.mark.parametrize("return_attention", [False, True])
@pytest.mark.parametrize("block_size", [None, 1, 4])
@pytest.mark.parametrize("options", [{}, {"pair": False}, {"mask": False, "shape": (2, 7)}, {"shape": (2, 3, 5)}])
def test_it_is_the_reference(framework, options, block_size, return_attention):
    arrays, cotangents = core_arrays(**options)
    run = partial(framework.run, arrays, cotangents, return_attention=return_attention)
    judge_all(run(implementation="streamed", block_size=block_size), run(implementation="reference"), "float64")


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_float32_is_as_exact_as_the_reference(framework, spread):
    """Against float64, on the same rounded inputs; twice the reference's error, gradients three times."""
    arrays, cotangents = core_arrays((60,), spread=spread, dtype="float32")
    wide = {name: None if x is None else x.astype("float64") for name, x in arrays.items()}
    exact = framework.run(wide, [x.astype("float64") for x in cotangents], implementation="reference")
    runs = {
        name: framework.run(arrays, cotangents, implementation=name, **options)
        for name, options in (("reference", {}), ("streamed", {"block_size": 16}))
    }

    def errors(run):
        outputs, gradients = run
        of_outputs = [np.linalg.norm(x - e) / np.linalg.norm(e) for x, e in zip(outputs, exact[0], strict=True)]
        return of_outputs, {n: np.linalg.norm(gradients[n] - e) / np.linalg.norm(e) for n, e in exact[1].items()}

    (outputs, gradients), (of_reference, of_gradients) = errors(runs["streamed"]), errors(runs["reference"])
    eps = tolerance.epsilon("float32")
    assert all(x <= 2 * e + eps for x, e in zip(outputs, of_reference, strict=True))
    assert all(x <= 3 * of_gradients[name] + eps for name, x in gradients.items())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("monomer", "bfloat16"),
        ("multimer", "float64"),
        ("no-pair", "float32"),
        ("batch-of-batches", "float64"),
        ("spread-50", "float32"),
        ("offset-1000", "float32"),
        ("offset-1000", "float64"),
        ("alphafold2", "float32"),
    ],
)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_whole_module_is_the_oracles(framework, name, dtype):
    """Every stage, and gradients to everything against the reference's."""
    pytest.importorskip(framework)
    case = CATALOGUE[name]().astype(dtype)
    run = RUNNERS[framework]
    exact = run_oracle(case) | {
        stage: x
        for stage, x in run(case.astype("float64"), implementation="reference").items()
        if stage.startswith("gradient/")
    }
    actual = run(case, implementation="streamed")
    assert set(actual) == set(exact)
    for stage, expected in exact.items():
        if stage == "logits" or (stage == "gradient/translation" and name == "spread-50"):
            continue  # the reference's own; and what is left where a residue sees itself alone
        conditioning = 1.0
        if stage in ("points", "norms"):
            conditioning = tolerance.conditioning(case.translation, case.mask, exact["points"])
        scale = None
        if stage == "gradient/attention_2d/bias":
            scale = float(np.abs(exact["gradient/attention_2d/weights"]).max())
        row = compare(
            actual[stage],
            expected,
            case=name,
            stage=stage,
            dtype=dtype,
            subject=framework,
            reference="float64",
            conditioning=conditioning,
            scale=scale,
        )
        assert row.passed, str(row)


@pytest.mark.parametrize("implementation", [None, "streamed"])
def test_block_sizes_below_one_are_refused(framework, implementation):
    arrays, cotangents = core_arrays()
    with pytest.raises(ValueError, match="block_size must be at least 1, or None for a size that suits N; got 0"):
        framework.run(arrays, cotangents, implementation=implementation, block_size=0)


def test_a_block_size_or_the_length_chooses_it(framework):
    module = importlib.import_module(f"ipa_{framework.name}.attention")
    choose, named = module.choose_implementation, module.IMPLEMENTATIONS
    assert choose(None, 4, block_size=4) is named["streamed"]
    assert choose(None, module.STREAMED_FROM) is named["streamed"]
    assert choose(None, module.STREAMED_FROM - 1) is named["reference"]
    assert choose("reference", 10 * module.STREAMED_FROM) is named["reference"]


@pytest.mark.covering("framework")
@pytest.mark.parametrize("block_size", [None, 4])
def test_no_residue_and_one(framework, block_size):
    for shape in ((0,), (1,), (2, 0)):
        arrays, cotangents = core_arrays(shape)
        outputs, gradients = framework.run(arrays, cotangents, implementation="streamed", block_size=block_size)
        wanted, of_reference = framework.run(arrays, cotangents, implementation="reference")
        assert [x.shape for x in outputs] == [x.shape for x in wanted]
        assert {n: x.shape for n, x in gradients.items()} == {n: x.shape for n, x in of_reference.items()}
        assert all(np.isfinite(x).all() for x in (*outputs, *gradients.values()))


def test_everything_masked_is_finite(framework):
    arrays, cotangents = core_arrays()
    arrays["mask"] = np.zeros_like(arrays["mask"])
    run = partial(framework.run, arrays, cotangents)
    judge_all(run(implementation="streamed", block_size=4), run(implementation="reference"), "float64")


# JAX.


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
    # A frozen pair has no gradient but the zeros that JAX asks for.
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
    """Gradients of gradients, which hold as much in memory as the reference."""
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
    """Examples lie on the devices, the weights on all of them; gradients are taken without and within."""
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


# torch.


def torch_inputs(shape=(2, 9), **options):
    framework = Torch()
    arrays, _ = core_arrays(shape, mask=False, **options)
    arrays = {name: None if x is None else torch_tensor(x) for name, x in arrays.items()}
    shared = rest(arrays)

    def attend(implementation, *inputs):
        return framework.attend(*inputs, **shared, implementation=implementation)[:3]

    return framework.torch, attend, first(arrays)


def test_torch_func_transforms():
    torch, attend, inputs = torch_inputs()
    scalar = lambda name, *xs: sum(x.square().sum() for x in attend(name, *xs))  # noqa: E731
    streamed, reference = (partial(scalar, name) for name in ("streamed", "reference"))
    judge(torch.func.vmap(streamed)(*inputs), torch.func.vmap(reference)(*inputs), "out", "float64")
    for argument in (0, 3, 6):
        derivatives = [torch.func.grad(f, argument) for f in (streamed, reference)]
        judge(*(f(*inputs) for f in derivatives), f"gradient/{argument}", "float64")
        judge(*(torch.func.vmap(f)(*inputs) for f in derivatives), f"gradient/{argument}", "float64")


def test_torch_forward_mode_and_second_derivatives_name_the_reference():
    torch, attend, inputs = torch_inputs()
    scalar = lambda q: attend("streamed", q, *inputs[1:])[0].sum()  # noqa: E731
    message = "implementation='reference' has all others"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(scalar, (inputs[0],), (inputs[0],))
    leaf = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(leaf) ** 2, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.parametrize("pair", [True, False])
def test_torch_compiles_whole_and_exports(pair):
    torch, attend, inputs = torch_inputs(pair=pair)
    compiled = torch.compile(partial(attend, "streamed"), fullgraph=True, backend="aot_eager")
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    present = [x for x in leaves if x is not None]
    gradients = [
        torch.autograd.grad(sum(x.square().sum() for x in f(*leaves) if x is not None), present)
        for f in (compiled, partial(attend, "streamed"))
    ]
    for x, e in zip(*gradients, strict=True):
        judge(x, e, "gradient", "float64")
    torch.compiler.reset()
    if not pair:
        return

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return attend("streamed", *inputs)

    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(
        Module(), tuple(inputs), dynamic_shapes=((*[{1: length}] * 6, {1: length, 2: length}),)
    ).module()
    shorter = [*(x[:, :5] for x in inputs[:6]), inputs[6][:, :5, :5]]
    for x, e in zip(exported(*shorter), attend("streamed", *shorter), strict=True):
        judge(x, e, "out", "float64")


@pytest.mark.parametrize("with_attention", [True, False])
def test_torch_operators_pass_opcheck(with_attention):
    torch = pytest.importorskip("torch")
    from ipa_torch.attention import streamed

    torch.manual_seed(0)
    shapes = [(2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 6), (2, 3, 5, 9), (2, 3, 5, 9), (3,), (2, 5, 5, 7), (7, 3)]
    inputs = [torch.rand(shape) for shape in shapes]
    mask = torch.ones(2, 5)
    torch.library.opcheck(streamed._attend, (*inputs, mask, 2, with_attention))
    d_attention = torch.rand(2, 3, 5, 5) if with_attention else torch.empty(0)
    cotangents = (torch.rand(2, 3, 5, 6), torch.rand(2, 5, 3, 7), d_attention)
    torch.library.opcheck(streamed._attend_backward, (*cotangents, *inputs, mask, 2, with_attention, True))


def test_torch_keeps_nothing_of_pairs_but_the_pair_and_a_block():
    """No tensor of forward and backward is larger than the pair; a frozen pair has no gradient."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            leaves = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
            self.seen += [x.numel() for x in leaves if not is_of(x, inputs[6])]  # what is not a view of the pair
            return output

    _, attend, inputs = torch_inputs((40,))

    def is_of(x, whole):
        return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

    def largest(implementation, **wanted):
        leaves = [x.detach().requires_grad_(i in wanted["to"]) for i, x in enumerate(inputs)]
        with Sizes() as sizes:
            sum(x.sum() for x in attend(implementation, *leaves)).backward()
        return max(sizes.seen), [leaf.grad is not None for leaf in leaves]

    pair = inputs[6].numel()
    assert largest("reference", to={0, 6})[0] > pair
    size, wanted = largest("streamed", to={0, 6})
    assert (size, wanted[6]) == (pair, True)
    size, wanted = largest("streamed", to={0})
    assert size < pair / 2
    assert not wanted[6]


def test_torch_autocast_and_inference_mode_change_nothing():
    torch, attend, inputs = torch_inputs(dtype="float32")
    expected = attend("streamed", *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, e in zip(attend("streamed", *inputs), expected, strict=True):
            assert torch.equal(x, e)
    with torch.inference_mode():
        for x, e in zip(attend("streamed", *inputs), expected, strict=True):
            assert torch.equal(x, e)


def test_torch_module_takes_it():
    torch = pytest.importorskip("torch")
    import ipa_torch

    case = make_case("", ODD, (7,)).astype("float64")
    module = ipa_torch.InvariantPointAttention(case.config, implementation="streamed").double()
    module.load_state_dict(case.weights.to_torch())
    other = ipa_torch.InvariantPointAttention(case.config).double()
    other.load_state_dict(case.weights.to_torch())
    rigids = ipa_torch.Rigid(torch_tensor(case.rotation), torch_tensor(case.translation))
    arguments = (torch_tensor(case.single), torch_tensor(case.pair), rigids, torch_tensor(case.mask))
    with torch.no_grad():
        judge(module(*arguments), other(*arguments), "out", "float64")


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_waits_for_a_gpu(backward):
    """No number is asked back from the device and none is sent there: what a CUDA graph can capture."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    from ipa_torch.attention import streamed
    from ipa_torch.attention.operands import Operands

    waits = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_to_copy", "lift_fresh")

    class Watched(TorchDispatchMode):
        seen: ClassVar[set] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    arrays, _ = core_arrays((2, 9))
    tensors = {name: torch_tensor(x).to(torch.float64) for name, x in arrays.items()}
    inputs = Operands.from_inputs(*first(tensors), *rest(tensors).values(), tensors["mask"])
    outputs = streamed._attend(*inputs, 4, False)
    with Watched() as watched:
        Operands.from_inputs(*first(tensors), *rest(tensors).values(), tensors["mask"])
        if backward:
            streamed._attend_backward._init_fn(*outputs, *inputs, 4, False, True)
        else:
            streamed._attend._init_fn(*inputs, 4, False)
    assert "bmm" in watched.seen
    assert not watched.seen & set(waits)


def test_blocks_on_a_gpu():
    """As large as cached logits and an eighth of the pair allow; and never none."""
    for package in ("jax", "torch"):
        block_bytes = importlib.import_module(f"ipa_{package}.attention.rows").BLOCK_BYTES
        size = partial(tiling.default_block_size, block_bytes=block_bytes)
        assert [size(n, 12, 128, on_gpu=True) for n in (1, 50, 256, 1024, 2048, 8192)] == [1, 50, 64, 128, 170, 42]
        assert size(10**6, 12, 128, on_gpu=True) == 1
