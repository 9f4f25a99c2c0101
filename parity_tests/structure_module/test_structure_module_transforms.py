"""The structure module under the transformations of JAX and PyTorch, and its dropout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from frameworks import Jax, Torch, needs_torch, one_of
from structure_module_cases import (
    CONFIGS,
    assert_same,
    batch_of,
    odd_case,
    start_of,
)

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.weights import Weights
from ipa_parity.structure_module.cases import make_case
from ipa_parity.structure_module.stages import named_layers


def test_jax_transforms_are_the_same_function():
    framework, case = one_of(Jax), odd_case()
    jax = framework.jax
    batch = batch_of(case, replace(case, single=case.single[::-1]))
    params, single, pair, aatype, mask, *_ = framework.arguments(batch, None, None)
    apply = partial(framework.package.transform_structure_module(case.config).apply, params, None)

    def named(output):
        return named_layers(jax.tree.map(np.asarray, output))

    expected = framework.run_structure_module(batch)
    mapped = framework.jax.jit(jax.vmap(apply, out_axes=1))(single, pair, aatype, mask)
    assert_same(named(mapped), expected)
    scalar = lambda f, x: (f(x, pair[0], aatype[0], mask[0]).atom14 ** 2).sum()  # noqa: E731
    plain, rematerialised = (
        framework.jax.jit(jax.grad(partial(scalar, f)))(single[0]) for f in (apply, jax.checkpoint(apply))
    )
    np.testing.assert_allclose(rematerialised, plain, rtol=1e-10, atol=1e-10 * np.abs(plain).max())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", ["proteins", "start frames", "parameters", "one layer's parameters"])
def test_jax_under_shard_map(split, check_vma):
    """Each device has its own proteins, start frames of one protein, or parameters; the rest is replicated."""
    framework, case = Jax(), odd_case()
    jax, jnp = framework.jax, framework.jax.numpy
    params, single, pair, aatype, mask, rigids, _ = framework.arguments(case, start_of(case), None)
    inputs = {
        "parameters": params,
        "proteins": (single[:3], pair[:3, :3], aatype[:3], mask[:3]),
        "start frames": jax.tree.map(lambda x: x[:3], rigids) if split == "start frames" else None,
    }
    structure_module = framework.package.transform_structure_module(case.config)
    own, shared = jax.sharding.PartitionSpec("devices"), jax.sharding.PartitionSpec()
    specs = {name: own if name == split else shared for name in inputs}
    if split.startswith("one"):
        specs["parameters"] = {name: own if "fold_iteration" in name else shared for name in params}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))

    def scalar(inputs):
        """A scalar of the outputs without side chains, which take long to compile."""
        output = structure_module.apply(
            inputs["parameters"],
            jax.random.key(0),
            *inputs["proteins"],
            rigids=inputs["start frames"],
            is_training=True,
        )
        return (jnp.sum(output.act**2) + jnp.sum(output.rigids.translation**2))[None]

    mapped = jax.shard_map(scalar, mesh=mesh, in_specs=(specs,), out_specs=own, check_vma=check_vma)
    gradients = [jax.grad(lambda xs, f=f: f(inputs | {"parameters": xs}).sum()) for f in (mapped, scalar)]
    if split != "proteins" or not check_vma:  # tracing alone finds wrong types, so nothing is compiled
        jax.eval_shape(gradients[0], params)
        return
    found, expected = (framework.jax.jit(gradient)(params) for gradient in gradients)
    jax.tree.map(lambda x, e: np.testing.assert_allclose(x, e, rtol=1e-8, atol=1e-8), found, expected)


def test_jax_dropout_is_explicit_and_only_in_training():
    framework, case = one_of(Jax), odd_case()
    jax = framework.jax
    params, single, pair, aatype, mask, *_ = framework.arguments(case, None, None)
    apply = framework.package.transform_structure_module(case.config).apply
    apply = jax.jit(apply, static_argnames="is_training")

    def act(seed, is_training):
        key = None if seed is None else jax.random.key(seed)
        return np.asarray(apply(params, key, single, pair, aatype, mask, is_training=is_training).act)

    np.testing.assert_array_equal(act(None, False), act(3, False))
    np.testing.assert_array_equal(act(3, True), act(3, True))
    assert np.abs(act(3, True) - act(3, False)).max() > 0.01
    assert np.abs(act(3, True) - act(4, True)).max() > 0.01
    with pytest.raises(ValueError, match="PRNG"):
        act(None, True)
    never = framework.package.transform_structure_module(replace(case.config, dropout=0.0)).apply
    never = jax.jit(never, static_argnames="is_training")
    still = never(params, None, single, pair, aatype, mask, is_training=True).act
    np.testing.assert_allclose(np.asarray(still), act(None, False), rtol=1e-10, atol=1e-12)


def test_jax_layers_do_not_share_their_dropout():
    """If every layer used one mask, layers with equal inputs would have equal outputs."""
    framework, case = one_of(Jax), odd_case("untied")
    jax, drawn = framework.jax, []
    params, single, pair, aatype, mask, *_ = framework.arguments(case, None, None)
    with pytest.MonkeyPatch.context() as patch:
        honest = jax.random.bernoulli
        patch.setattr(jax.random, "bernoulli", lambda key, *rest: drawn.append(np.asarray(key)) or honest(key, *rest))
        apply = framework.package.transform_structure_module(case.config).apply
        apply(params, jax.random.PRNGKey(0), single, pair, aatype, mask, is_training=True)
    assert len({key.tobytes() for key in drawn}) == 2 * case.config.num_layer


def test_jax_compiles_the_layers_once():
    """One body for eight layers, under AlphaFold's names."""
    framework = one_of(Jax)
    jax = framework.jax
    config = StructureModuleConfig.alphafold2()
    apply = framework.package.transform_structure_module(config).apply
    shapes = ((5, 384), (5, 5, 128))
    arrays = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    params = {
        module: {leaf: jax.ShapeDtypeStruct(x.shape, x.dtype) for leaf, x in leaves.items()}
        for module, leaves in Weights.random(config).to_haiku().items()
    }
    text = str(jax.make_jaxpr(apply)(params, None, *arrays, jax.ShapeDtypeStruct((5,), "int32")))
    assert "length=8" in text
    assert text.count("exp ") <= 2  # of one softmax


def test_torch_dropout_is_only_in_training():
    framework, case = one_of(Torch), odd_case()
    torch = framework.torch
    inputs = framework.arguments(case, None, None)[:4]
    module = framework.structure_module(case)
    with torch.no_grad():
        still = module(*inputs).act
        assert torch.equal(module(*inputs).act, still)
        torch.manual_seed(0)
        first, second = (module.train()(*inputs).act for _ in range(2))
    assert (first - still).abs().max() > 0.01
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "num_layer"), [("untied multimer", 1), pytest.param("odd", 3, marks=pytest.mark.exhaustive)]
)
@needs_torch("2.8")
def test_torch_compiles_whole_and_exports(name, num_layer):
    framework = one_of(Torch)
    case = make_case(name, replace(CONFIGS[name], num_layer=num_layer))
    torch = framework.torch
    single, pair, aatype, mask, rigids, _ = framework.arguments(case, start_of(case), None)
    module = framework.structure_module(case)
    named = lambda output: named_layers(torch.utils._pytree.tree_map(lambda x: x.detach().numpy(), output))  # noqa: E731
    expected = named(module(single, pair, aatype, mask, rigids=rigids))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(named(compiled(single, pair, aatype, mask, rigids=rigids)), expected)
    exported = torch.export.export(module, (single, pair, aatype, mask), {"rigids": rigids}).module()
    assert_same(named(exported(single, pair, aatype, mask, rigids=rigids)), expected)
    length = torch.export.Dim("length", min=2, max=4096)
    of_any_length = torch.export.export(
        module,
        (single, pair, aatype, mask),
        dynamic_shapes=({0: length}, {0: length, 1: length}, {0: length}, {0: length}),
    ).module()
    shorter = [x[:9] for x in (single, pair[:, :9], aatype, mask)]
    assert_same(named(of_any_length(*shorter)), named(module(*shorter)))
    leaf = single.requires_grad_()
    gradients = [
        torch.autograd.grad(f(leaf, pair, aatype, mask, rigids=rigids).atom14.square().sum(), leaf)[0].numpy()
        for f in (compiled, module)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-10, atol=1e-10 * np.abs(gradients[0]).max())
    torch.compiler.reset()


def test_torch_func_vmap():
    framework, case = one_of(Torch), odd_case()
    torch = framework.torch
    batch = batch_of(case, replace(case, single=case.single[::-1]))
    inputs = framework.arguments(batch, None, None)[:4]
    module = framework.structure_module(case)
    named = lambda output: named_layers(torch.utils._pytree.tree_map(lambda x: x.detach().numpy(), output))  # noqa: E731
    assert_same(named(torch.func.vmap(module, out_dims=1)(*inputs)), named(module(*inputs)))


def test_torch_autocast_keeps_frames_in_float32():
    framework, case = one_of(Torch), odd_case("odd", "float32")
    torch = framework.torch
    inputs = framework.arguments(case, None, None)[:4]
    module = framework.structure_module(case)
    with torch.no_grad():
        exact = module(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(*inputs)
    assert {x.dtype for x in (*output.rigids, *output.frames, output.atom14)} == {torch.float32}
    assert output.atom14.isfinite().all()
    assert (output.atom14 - exact.atom14).abs().max() < 0.1 * exact.atom14.abs().max()
