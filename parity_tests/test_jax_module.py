"""The Haiku IPA as JAX users call it: transforms, dtypes, degenerate and bad inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

jax = pytest.importorskip("jax")
hk = pytest.importorskip("haiku")

import jax.numpy as jnp
import numpy as np

import ipa_jax
from ipa_bridge.config import IPAConfig, IPATransformerConfig
from ipa_bridge.parameters import ipa_parameters
from ipa_parity.cases import CATALOGUE, ODD, ODD_MULTIMER, ODD_NO_PAIR, make_case
from ipa_parity.report import compare

ROOT = "invariant_point_attention"


def arguments(case, dtype="float32"):
    case = case.astype(dtype)
    single, rotation, translation, mask = map(jnp.asarray, (case.single, case.rotation, case.translation, case.mask))
    pair = None if case.pair is None else jnp.asarray(case.pair)
    params = jax.tree.map(jnp.asarray, case.weights.to_haiku())
    return params, single, pair, ipa_jax.Rigid(rotation, translation), mask


def judge(actual, expected, stage="out", dtype="float32"):
    row = compare(
        np.asarray(actual),
        np.asarray(expected),
        case="",
        stage=stage,
        dtype=dtype,
        subject="transformed",
        reference="plain",
    )
    assert row.passed, str(row)


@pytest.mark.parametrize(
    "config", [IPAConfig.alphafold2(), IPAConfig.alphafold_multimer(), ODD, ODD_MULTIMER, ODD_NO_PAIR]
)
def test_init_has_the_canonical_parameters(config):
    *_, single, pair, rigids, mask = arguments(make_case("", config, (3,)))
    params = jax.eval_shape(ipa_jax.transform_ipa(config).init, jax.random.key(0), single, pair, rigids, mask)
    shapes = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
    assert shapes == {f"{ROOT}/{name}": shape for name, shape in ipa_parameters(config).items()}
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("zero_init", [True, False])
def test_initial_values(zero_init):
    config = replace(IPAConfig.esmfold(), zero_init=zero_init)
    *_, single, pair, rigids, mask = arguments(make_case("", config, (3,)))
    params = ipa_jax.transform_ipa(config).init(jax.random.key(0), single, pair, rigids, mask)
    assert (params[ROOT]["trainable_point_weights"] == 0).all()
    assert (params[f"{ROOT}/output_projection"]["weights"] == 0).all() == zero_init
    assert (params[f"{ROOT}/q_scalar"]["weights"] != 0).all()
    assert all((leaves["bias"] == 0).all() for module, leaves in params.items() if module != ROOT)


def test_jit_vmap_and_checkpoint_are_the_same_function():
    case = CATALOGUE["batch"]()
    params, *inputs = arguments(case)
    apply = ipa_jax.transform_ipa(case.config).apply
    expected = apply(params, *inputs)
    judge(jax.jit(apply)(params, *inputs), expected)
    judge(jax.vmap(apply, (None, 0, 0, 0, 0))(params, *inputs), expected)
    judge(jax.checkpoint(apply)(params, *inputs), expected)


def test_gradients_through_jit_vmap_and_checkpoint():
    case = CATALOGUE["batch"]()
    params, single, pair, rigids, mask = arguments(case)
    apply = ipa_jax.transform_ipa(case.config).apply

    def gradient(function):
        return jax.grad(lambda *xs: (function(params, *xs, mask) * case.cotangent.astype("float32")).sum(), (0, 1, 2))

    expected = gradient(apply)(single, pair, rigids)
    for function in (jax.checkpoint(apply), jax.jit(apply), jax.vmap(apply, (None, 0, 0, 0, 0))):
        actual = gradient(function)(single, pair, rigids)
        jax.tree.map(lambda x, wanted: judge(x, wanted, "gradient"), actual, expected)


def test_forward_mode_agrees_with_reverse_mode():
    case = CATALOGUE["monomer"]()
    params, single, pair, rigids, mask = arguments(case, "float64")
    apply = ipa_jax.transform_ipa(case.config, implementation="reference").apply
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(single.shape))
    loss = lambda s: (apply(params, s, pair, rigids, mask) * case.cotangent).sum()  # noqa: E731
    forward = jax.jvp(loss, (single,), (direction,))[1]
    judge([forward], [(jax.grad(loss)(single) * direction).sum()], "gradient", "float64")


def test_inside_someone_elses_transform():
    def model(single, pair, rigids, mask):
        single = hk.Linear(ODD.num_channel)(single)
        return ipa_jax.InvariantPointAttention(ODD, name="ipa_of_mine")(single, pair, rigids, mask)

    _, *inputs = arguments(CATALOGUE["monomer"]())
    init, apply = hk.without_apply_rng(hk.transform(model))
    params = init(jax.random.key(0), *inputs)
    assert apply(params, *inputs).shape == inputs[0].shape
    assert {name.split("/")[0] for name in params} == {"linear", "ipa_of_mine"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_output_has_the_inputs_dtype_and_attention_at_least_float32(dtype):
    case = CATALOGUE["monomer"]()
    params, *inputs = arguments(case, dtype)
    apply = ipa_jax.transform_ipa(case.config).apply
    out, attention = apply(params, *inputs, return_attention=True)
    assert out.dtype == dtype
    assert attention.dtype == ("float64" if dtype == "float64" else "float32")
    judge(attention.sum(-1), np.ones(attention.shape[:-1]), "attention", "float32")
    initial = ipa_jax.transform_ipa(case.config).init(jax.random.key(0), *inputs)
    assert initial[f"{ROOT}/q_scalar"]["weights"].dtype == dtype


def test_half_precision_activations_with_float32_parameters():
    case = CATALOGUE["spread-50"]()
    params, *_ = arguments(case, "float32")
    _, single, pair, rigids, mask = arguments(case, "bfloat16")
    apply = ipa_jax.transform_ipa(case.config).apply
    out = apply(params, single, pair, rigids, mask)
    exact = apply(params, *(x.astype("float32") for x in (single, pair, rigids)), mask)
    assert out.dtype == jnp.bfloat16
    judge(out.astype("float32"), exact, "out", "bfloat16")


@pytest.mark.parametrize("activations", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("frames", ["float16", "float32", "float64"])
def test_frames_do_not_decide_the_dtype(activations, frames):
    """The activations do, at least float32: a protein's frames come in float64."""
    case = CATALOGUE["monomer"]()
    params, single, pair, rigids, mask = arguments(case, activations)
    apply = partial(ipa_jax.transform_ipa(case.config).apply, return_attention=True)
    out, attention = jax.eval_shape(apply, params, single, pair, rigids.astype(frames), mask)
    assert (out.dtype, attention.dtype) == (activations, "float64" if activations == "float64" else "float32")


def test_numpy_frames_in_float64_where_jax_has_none():
    """As `load_structure` hands them out; a warning would be an error here."""
    case = CATALOGUE["monomer"]()
    with jax.enable_x64(False):
        params, single, pair, _, mask = arguments(case)
        rigids = ipa_jax.Rigid(case.rotation, case.translation)
        assert rigids.translation.dtype == "float64"
        apply = ipa_jax.transform_ipa(case.config).apply
        out = jax.eval_shape(lambda: apply(params, single, pair, rigids, mask))
        assert out.dtype == "float32"


def test_frames_of_a_transformer_have_its_activations_dtype():
    config = IPATransformerConfig.lucidrains(8, depth=1, heads=2, require_pairwise_repr=False)
    init, apply = ipa_jax.transform_ipa_transformer(config)
    act, rigids = jnp.ones((5, 8), jnp.float32), ipa_jax.Rigid.identity((5,), dtype="float64")
    params = jax.eval_shape(init, jax.random.key(0), act, None, rigids)
    moved = jax.eval_shape(apply, params, None, act, None, rigids).rigids
    assert {x.dtype for x in moved} == {np.dtype("float32")}


@pytest.mark.parametrize("kind", [bool, "int32", "float32", "float16"])
def test_masks_of_any_dtype(kind):
    params, *inputs, mask = arguments(CATALOGUE["monomer"]())
    apply = ipa_jax.transform_ipa(ODD).apply
    assert (apply(params, *inputs, mask.astype(kind)) == apply(params, *inputs, mask)).all()


def test_masked_residues_are_ignored_by_valid_ones():
    params, single, pair, rigids, mask = arguments(CATALOGUE["monomer"]())
    apply = ipa_jax.transform_ipa(ODD).apply
    hidden = (~mask[:, None]).astype(single.dtype)
    moved = ipa_jax.Rigid(rigids.rotation, rigids.translation + 5 * hidden)
    changed = apply(params, single + 3 * hidden, pair, moved, mask)
    judge(changed[mask], apply(params, single, pair, rigids, mask)[mask])
    assert (jnp.abs(changed - apply(params, single, pair, rigids, mask))[~mask] > 1e-3).any()


@pytest.mark.covering
@pytest.mark.parametrize("config", [ODD, ODD_MULTIMER, ODD_NO_PAIR])
@pytest.mark.parametrize("residues", [0, 1])
def test_no_residue_and_one_residue(config, residues):
    params, *inputs = arguments(make_case("", config, (residues,)))
    apply = ipa_jax.transform_ipa(config).apply
    out, gradient = jax.value_and_grad(lambda s: apply(params, s, *inputs[1:]).sum())(inputs[0])
    assert gradient.shape == (residues, config.num_channel)
    assert np.isfinite(out)
    assert np.isfinite(gradient).all()


def test_everything_masked_is_finite():
    params, single, pair, rigids, mask = arguments(CATALOGUE["monomer"]())
    apply = ipa_jax.transform_ipa(ODD).apply
    loss = lambda *xs: apply(*xs, jnp.zeros_like(mask)).sum()  # noqa: E731
    for leaf in jax.tree.leaves(jax.value_and_grad(loss, (0, 1, 2, 3))(params, single, pair, rigids)):
        assert np.isfinite(leaf).all()


def test_coincident_frames_have_finite_gradients():
    """Every local point at its frame's origin: the norms' gradients are finite in both forms."""
    for config in (ODD, ODD_MULTIMER):
        params, single, pair, rigids, mask = arguments(make_case("", config, (5,)))
        still = ipa_jax.Rigid(rigids.rotation, jnp.zeros_like(rigids.translation))
        for module in (name for name in params if "point" in name):
            params[module] = jax.tree.map(jnp.zeros_like, params[module])
        apply = partial(ipa_jax.transform_ipa(config).apply, params)
        gradients = jax.grad(lambda s, r, apply=apply, z=pair, m=mask: apply(s, z, r, m).sum(), (0, 1))(single, still)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_nan_is_never_hidden():
    params, single, *inputs = arguments(CATALOGUE["monomer"]())
    assert np.isnan(ipa_jax.transform_ipa(ODD).apply(params, single.at[0, 0].set(np.nan), *inputs)[0]).all()


def test_geometry_and_attention_ask_for_full_precision():
    """On a GPU or TPU a product without Precision.HIGHEST may run in TF32 or bfloat16; the scalars' projections may."""
    for config in (ODD, ODD_MULTIMER):
        params, *inputs = arguments(make_case("", config, (5,)))
        apply = ipa_jax.transform_ipa(config, implementation="reference").apply
        with jax.default_matmul_precision("default"):
            jaxpr = jax.make_jaxpr(apply)(params, *inputs)
        highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
        products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        free = [eqn for eqn in products if eqn.params["precision"] != highest]
        scalars = 2 if config.layout == "monomer" else 3
        assert len(free) == scalars + 1, "the scalars' projections and the output's"
        assert len(products) >= len(free) + 2 + 5, (
            "the points' projections, and q·k, the pair bias, o, o_points, o_pair"
        )
