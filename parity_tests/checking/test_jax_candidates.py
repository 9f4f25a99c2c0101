"""`ipa_parity.check` on modules in Flax, Equinox and Haiku: right ones pass, planted mistakes are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipa_parity.attention.cases import ODD, ODD_MULTIMER, ODD_NO_BIAS
from ipa_parity.checking import check

jax = pytest.importorskip("jax")

import jax.numpy as jnp

ALIKE = replace(ODD, num_scalar_v=ODD.num_scalar_qk)
"""Widths with which keys and values can be exchanged."""

EPSILON = replace(ODD_NO_BIAS, norm_form="add", norm_epsilon=1e-8)

BRIEFLY = {"dtypes": ("float32",), "gradients": False}
"""Options of `check`, and of `assert_right`."""


def flax_attention(**options):
    nnx = pytest.importorskip("flax.nnx")
    from flax_attention import FlaxAttention

    return FlaxAttention(ALIKE.num_channel, ALIKE.pair_channel, rngs=nnx.Rngs(0), **options)


def equinox_attention(mistake="", config=ODD_MULTIMER):
    pytest.importorskip("equinox")
    from equinox_attention import EquinoxAttention

    return EquinoxAttention(config, mistake, key=jax.random.key(0))


def table():
    from equinox_attention import TABLE

    return TABLE


def assert_right(report, *, gradients=True, dtypes=("float32", "float64")):
    assert report.verdict == "right", str(report)
    assert {row.dtype for row in report.comparisons} == set(dtypes)
    assert any(row.stage == "gradient/rotation" for row in report.comparisons) == gradients
    assert any(row.stage == "gradient/trainable_point_weights" for row in report.comparisons) == gradients


def named_first(report):
    """The first mistake that the diagnosis names."""
    assert report.verdict == "wrong", str(report)
    return report.diagnosis.mistakes[0][0].name


def test_flax_nnx():
    """Widths come from the parameters, names are OpenFold's, dropout is off, and parameters are not changed."""
    module = flax_attention()
    before = module.linear_q.kernel[...]
    assert_right(check(module))
    assert (module.linear_q.kernel[...] == before).all()
    assert not module.dropout.deterministic


def test_row_vectors_and_points_unflattened():
    """Names tell whose frames they are. Kernels have axes of heads and points, and ε is the module's own."""
    nnx = pytest.importorskip("flax.nnx")
    from flax_attention import RowVectorAttention

    module = RowVectorAttention(ODD.num_channel, ODD.pair_channel, rngs=nnx.Rngs(0))
    assert_right(check(module, dtypes=("float64",)), dtypes=("float64",))
    assert named_first(check(module, parameters="lucidrains", config=EPSILON, **BRIEFLY)) == "ε = 1e-06 in the lengths"


def test_equinox():
    """A table gives the names. The module takes no batch."""
    assert_right(check(equinox_attention(), ODD_MULTIMER, parameters=table()))


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        ("keys and values", "keys and values exchanged"),
        pytest.param("rotations", "rotations transposed", marks=pytest.mark.exhaustive),
        pytest.param("thirds", "√(1/3) missing from all logits", marks=pytest.mark.exhaustive),
    ],
)
def test_mistakes_in_flax(mistake, name):
    assert named_first(check(flax_attention(mistake=mistake), **BRIEFLY)) == name


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        ("back", "output points taken back with R instead of Rᵀ"),
        pytest.param("thirds", "√(1/3) missing from all logits", marks=pytest.mark.exhaustive),
        pytest.param("softplus", "softplus missing from γ", marks=pytest.mark.exhaustive),
    ],
)
def test_mistakes_in_equinox(mistake, name):
    report = check(equinox_attention(mistake), ODD_MULTIMER, parameters=table(), **BRIEFLY)
    assert named_first(report) == name


def test_a_gradient_that_ends():
    report = check(equinox_attention("gradient"), ODD_MULTIMER, parameters=table(), dtypes=("float64",))
    assert report.verdict == "wrong"
    assert report.diagnosis.kind == "gradient"
    assert "rotation" in report.diagnosis.text
    assert "translation" not in report.diagnosis.text


def test_our_haiku_module():
    """It takes no rng; its config is the one that it encloses."""
    pytest.importorskip("haiku")
    from ipa_jax import transform_ipa

    assert_right(check(transform_ipa(ODD)))


@pytest.mark.exhaustive  # test_peers.py judges it too
@pytest.mark.parametrize("layout", ["monomer", "multimer"])
@pytest.mark.parametrize("applied", ["with an rng", "without"])
def test_alphafolds_class(layout, applied):
    """Widths come from its init, rigids are QuatAffine and Rigid3Array, and masks have an axis more than ours."""
    hk, collections = pytest.importorskip("haiku"), pytest.importorskip("ml_collections")
    folding = pytest.importorskip("alphafold.model.folding")
    from alphafold.model import folding_multimer

    widths = ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v")
    config = collections.ConfigDict({name: getattr(ODD, name) for name in widths})
    settings = collections.ConfigDict({"zero_init": True})
    kind = (folding if layout == "monomer" else folding_multimer).InvariantPointAttention

    def forward(inputs_1d, inputs_2d, mask, affine):
        return kind(config, settings)(inputs_1d, inputs_2d, mask, affine)

    transformed = hk.transform(forward)
    if applied == "without":
        transformed = hk.without_apply_rng(transformed)
    wide = layout == "monomer" and applied == "without"  # multimer geometry is float32
    dtypes = ("float32", "float64") if wide else ("float32",)
    assert_right(check(transformed, gradients=wide, dtypes=dtypes), gradients=wide, dtypes=dtypes)


@pytest.mark.exhaustive  # a variant of NNX
def test_flax_linen():
    """A Linen module is initialised; here with AlphaFold's names, standard leaves and 4×4 frames."""
    nn = pytest.importorskip("flax.linen")

    class Linen(nn.Module):
        thirds: bool = True

        @nn.compact
        def __call__(self, x, edges, T, mask):
            h, c, p, pv = ODD.num_head, ODD.num_scalar_qk, ODD.num_point_qk, ODD.num_point_v
            rotation, origin = T[..., :3, :3], T[..., :3, 3]

            def place(y):
                return jnp.einsum("...nxy,...nhpy->...nhpx", rotation, y) + origin[..., None, None, :]

            def wide(name, n):
                return nn.Dense(h * n, name=name)(x).reshape(*x.shape[:-1], h, n)

            def points(name, n):
                return jnp.moveaxis(nn.Dense(3 * h * n, name=name)(x).reshape(*x.shape[:-1], 3, h, n), -3, -1)

            q, kv = wide("q_scalar", c), wide("kv_scalar", c + ODD.num_scalar_v)
            q_points, kv_points = place(points("q_point_local", p)), place(points("kv_point_local", p + pv))
            gamma = self.param("trainable_point_weights", nn.initializers.ones, (h,))
            offset = q_points[..., :, None, :, :, :] - kv_points[..., None, :, :, :p, :]
            logits = jnp.einsum("...ihc,...jhc->...ijh", q, kv[..., :c]) / c**0.5
            logits += nn.Dense(h, name="attention_2d")(edges)
            logits -= 0.5 * (2 / (9 * p)) ** 0.5 * nn.softplus(gamma) * (offset**2).sum((-1, -2))
            logits = logits / (3**0.5 if self.thirds else 1) - 1e9 * (1 - mask[..., None, :, None])
            a = nn.softmax(logits, -2)
            o = jnp.einsum("...ijh,...jhc->...ihc", a, kv[..., c:])
            there = jnp.einsum("...ijh,...jhpx->...ihpx", a, kv_points[..., p:, :]) - origin[..., None, None, :]
            there = jnp.einsum("...nxy,...nhpx->...nhpy", rotation, there)
            norms = jnp.sqrt((there**2).sum(-1) + 1e-8)
            o_pair = jnp.einsum("...ijh,...ijc->...ihc", a, edges)
            parts = [o, there[..., 0], there[..., 1], there[..., 2], norms, o_pair]
            flat = jnp.concatenate([y.reshape(*x.shape[:-1], -1) for y in parts], -1)
            return nn.Dense(x.shape[-1], name="output_projection")(flat)

    assert_right(check(Linen(), ODD, **BRIEFLY), **BRIEFLY)
    assert named_first(check(Linen(thirds=False), ODD, **BRIEFLY)) == "√(1/3) missing from all logits"


def test_a_users_own_call():
    """A call that gives the module its rotations transposed is judged together with it."""

    def call(module, single, pair, rotation, translation, mask):
        return module(single, pair, rotation.swapaxes(-1, -2), translation, mask)

    report = check(equinox_attention(), ODD_MULTIMER, parameters=table(), call=call, **BRIEFLY)
    assert named_first(report) == "rotations transposed"


def test_equinox_never_sees_a_batch():
    """It would not always raise."""

    def call(module, single, *others):
        return module(single, *others) if single.ndim == 2 else 0 * single

    assert_right(check(equinox_attention(), ODD_MULTIMER, parameters=table(), call=call, **BRIEFLY), **BRIEFLY)


def test_exceptions_are_findings():
    """Parameters that do not fit the config, and a forward that raises."""
    wider = replace(ODD_MULTIMER, num_scalar_qk=8)
    report = check(equinox_attention(), wider, parameters=table(), **BRIEFLY)
    assert report.verdict == "wrong"
    assert "scalars.q.weight was expected in the shape (24, 11); the module's is (12, 11)" in str(report)

    def call(module, *inputs):
        raise RuntimeError("no luck")

    report = check(equinox_attention(), ODD_MULTIMER, parameters=table(), call=call, **BRIEFLY)
    assert report.verdict == "wrong"
    assert "raises RuntimeError: no luck" in str(report)


def test_an_output_of_the_wrong_shape_is_a_finding():
    def call(module, *inputs):
        return module(*inputs)[:, :5]

    report = check(equinox_attention(), ODD_MULTIMER, parameters=table(), call=call, **BRIEFLY)
    assert report.verdict == "wrong"
    assert any("shape (17, 5) where (17, 11) was expected" in row.problem for row in report.comparisons)


def test_what_cannot_be_checked():
    """Each message says what to pass."""
    with pytest.raises(ValueError, match=r"names are gamma.*pass parameters=, a table"):
        check(equinox_attention())
    with pytest.raises(ValueError, match=r"to name scalars/k/weight.*got 'scalar\.q'"):
        check(equinox_attention(), ODD_MULTIMER, parameters={"scalar.q": "q_scalar_projection/weights.T"})
    with pytest.raises(ValueError, match=r"config= was expected beside a table"):
        check(equinox_attention(), parameters=table())


def test_what_haiku_cannot_give():
    hk = pytest.importorskip("haiku")
    with pytest.raises(ValueError, match=r"it takes args: pass call="):
        check(hk.transform(lambda *args: hk.Linear(3)(args[0])))
    with pytest.raises(ValueError, match=r"pass hk\.without_state"):
        check(hk.transform_with_state(lambda s, z, r, mask: hk.Linear(3)(s)))
    with pytest.raises(ValueError, match=r"pass config= if it has other widths.*7 channels"):
        check(hk.transform(narrow))


def narrow(s, z, rigids, mask):
    if s.shape[-1] != 7:
        raise ValueError("7 channels were expected")
    return s
