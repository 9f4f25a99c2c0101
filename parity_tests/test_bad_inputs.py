"""Both frameworks refuse bad inputs with the same messages: what was expected, what came, how to mend it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from frameworks import Jax, Torch

from ipa_bridge import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
    Weights,
)
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_parity.attention.cases import CATALOGUE, ODD

IPA = {
    "single rank": (lambda s, z, r, t, m: (s[0], z, r, t, m), r"single must be \(\*batch, N, 11\).*got \(11,\)"),
    "single width": (lambda s, z, r, t, m: (s[:, :5], z, r, t, m), r"single must be .*got \(7, 5\)"),
    "pair size": (
        lambda s, z, r, t, m: (s, z[:3], r, t, m),
        r"pair must be \(7, 7, 6\) to fit single \(7, 11\); got \(3, 7, 6\)",
    ),
    "pair width": (lambda s, z, r, t, m: (s, z[..., :4], r, t, m), r"pair must be \(7, 7, 6\).*got \(7, 7, 4\)"),
    "pair missing": (lambda s, z, r, t, m: (s, None, r, t, m), "pair_channel is 6, but pair is None: pass the pair"),
    "rotation": (lambda s, z, r, t, m: (s, z, r[..., :2], t, m), r"rigids.rotation must be \(7, 3, 3\)"),
    "translation": (lambda s, z, r, t, m: (s, z, r, t[:1], m), r"rigids.translation must be \(7, 3\)"),
    "mask rank": (lambda s, z, r, t, m: (s, z, r, t, m[:, None]), r"mask must be \(7,\) to fit .*; got \(7, 1\)"),
    "mask size": (lambda s, z, r, t, m: (s, z, r, t, m[:4]), r"mask must be \(7,\)"),
    "batch": (lambda s, z, r, t, m: (s[None], z, r, t, m), r"must be \(1, 7"),
    "whole numbers": (
        lambda s, z, r, t, m: (s.astype(np.int32), z, r, t, m),
        r"single must be floating; got (torch\.)?int32: cast it",
    ),
    "true and false": (
        lambda s, z, r, t, m: (s, z > 0, r, t, m),
        r"pair must be floating; got (torch\.)?bool: cast it",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), IPA.values(), ids=IPA)
def test_ipa(framework, spoil, message):
    case = CATALOGUE["monomer"]().astype("float32")
    single, pair, rotation, translation, mask = spoil(
        case.single, case.pair, case.rotation, case.translation, case.mask
    )
    single, pair, rotation, translation, mask = map(framework.array, (single, pair, rotation, translation, mask))
    with pytest.raises(ValueError, match=message):
        framework.ipa(case, single, pair, framework.package.Rigid(rotation, translation), mask)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tuple", r"rigids must be Rigid\(rotation .*\); got tuple: make a Rigid of the two arrays"),
        ("4x4", r"rigids must be Rigid\(.*; got .* \(7, 4, 4\): .*Rigid.from_4x4\(matrix\)"),
        ("numpy", "rigids.rotation must be a Tensor; got ndarray: pass torch.as_tensor"),
        ("structure", r"rigids must be Rigid\(.*\); got Structure: make a Rigid of .* structure.rigids\(config\)"),
        (
            "output",
            r"rigids must be Rigid\(.*\); got IPATransformerOutput: pass its .rigids, or .rigids\[-1\] if it has",
        ),
    ],
)
def test_frames_that_are_not_a_rigid_raise(framework, kind, message):
    case = CATALOGUE["monomer"]().astype("float32")
    rigids = {
        "tuple": (framework.array(case.rotation), framework.array(case.translation)),
        "4x4": framework.array(np.zeros((7, 4, 4), np.float32)),
        "numpy": framework.package.Rigid(case.rotation, case.translation),
        "structure": idealised_peptide(),
        "output": framework.package.IPATransformerOutput(None, None, None),
    }[kind]
    arrays = framework.array(case.single), framework.array(case.pair), rigids, framework.array(case.mask)
    if kind == "numpy" and isinstance(framework, Jax):
        assert framework.ipa(case, *arrays).shape == case.single.shape  # JAX takes numpy's
        return
    with pytest.raises(ValueError, match=message):
        framework.ipa(case, *arrays)


@pytest.mark.parametrize("name", ["single", "pair", "mask"])
def test_inputs_that_are_not_arrays_raise(framework, name):
    """Numpy arrays raise in PyTorch and are accepted in JAX."""
    case = CATALOGUE["monomer"]().astype("float32")
    rigids = framework.package.Rigid(framework.array(case.rotation), framework.array(case.translation))
    arrays = {name: framework.array(getattr(case, name)) for name in ("single", "pair", "mask")}
    for given in (getattr(case, name).tolist(), getattr(case, name)):
        inputs = {**arrays, name: given}
        if isinstance(given, list) or isinstance(framework, Torch):
            with pytest.raises(ValueError, match=rf"{name} must be an? (array|Tensor); got (list|ndarray): pass"):
                framework.ipa(case, inputs["single"], inputs["pair"], rigids, inputs["mask"])
        else:
            assert framework.ipa(case, inputs["single"], inputs["pair"], rigids, inputs["mask"]).dtype == "float32"


def test_arguments_that_are_not_a_config_raise(framework):
    """A preset not called, another module's config, weights, or a name."""
    package, attention = framework.package, IPAConfig.alphafold2()
    jax = isinstance(framework, Jax)
    kinds = {
        IPAConfig: package.transform_ipa if jax else package.InvariantPointAttention,
        StructureModuleConfig: package.transform_structure_module if jax else package.StructureModule,
        IPATransformerConfig: package.transform_ipa_transformer if jax else package.IPATransformer,
        PredictedLDDTConfig: package.transform_predicted_lddt if jax else package.PredictedLDDT,
    }
    for kind, make in kinds.items():
        for config in (IPAConfig.alphafold2, "alphafold2", None, *([] if kind is IPAConfig else [attention])):
            with pytest.raises(ValueError, match=rf"config must be an? {kind.__name__}; got .*: make one"):
                make(config)
    with pytest.raises(ValueError, match=r"must be None or one of reference, .*; got 'fastest'"):
        kinds[IPAConfig](attention, implementation="fastest")
    with pytest.raises(ValueError, match="config must be one of"):
        Weights.random("alphafold2")


def test_tokens_outside_the_vocabulary(framework):
    """They raise where values can be read and the mask is 1."""
    config = IPATransformerConfig.lucidrains(8, depth=1, heads=2, num_tokens=5, require_pairwise_repr=False)
    if isinstance(framework, Jax):
        params, transformed = Weights.random(config).to_haiku(), framework.package.transform_ipa_transformer(config)

        def run(tokens, **options):
            return transformed.apply(params, None, tokens, **options)
    else:
        run = framework.package.IPATransformer(config)
    for wrong in ([0, 5, 1], [0, -1, 1]):
        with pytest.raises(ValueError, match=rf"tokens must be 0–4, because config.num_token is 5; got {wrong[1]}"):
            run(framework.array(wrong and np.array(wrong)))
    with pytest.raises(ValueError, match=r"mask must be \(3,\) to fit single; got \(2,\)"):
        run(framework.array(np.array([0, 4, 1])), mask=framework.array(np.ones(2)))
    if isinstance(framework, Jax):
        mask = framework.array(np.array([1, 0, 1]))
        assert np.isfinite(run(framework.array(np.array([0, -1, 1])), mask=mask).act).all()


@pytest.mark.parametrize("kind", ["block", "confidence head", "atoms"])
def test_other_inputs_that_are_not_floating_arrays_raise(framework, kind):
    """Functions other than the attention check it too; integers once gave truncated results."""
    package, jax = framework.package, isinstance(framework, Jax)
    if kind == "atoms":
        with pytest.raises(ValueError, match=r"atom14 must be an? (array|Tensor); got list"):
            package.atom14_to_atom37([[0.0] * 3] * 14, framework.array(np.zeros(1, int)))
        return
    if kind == "block":
        config = IPABlockConfig(ipa=IPAConfig.lucidrains(8, heads=2, require_pairwise_repr=False), post_norm=False)
        make, more = package.IPABlock, (None, package.Rigid.identity((3,)))
    else:
        config, more = PredictedLDDTConfig(num_channel=8, hidden_channel=4), ()
        make = package.PredictedLDDT
    act = framework.array(np.ones((3, 8), np.int32))
    if jax:
        import haiku as hk

        transformed = hk.transform(lambda x: make(config)(x, *more))
        params = Weights.random(config).to_haiku()

        def run(x):
            return transformed.apply(params, None, x)
    else:

        def run(x):
            return make(config)(x, *more)

    with pytest.raises(ValueError, match=r"act must be floating; got (torch\.)?int32: cast it"):
        run(act)
    with pytest.raises(ValueError, match=r"act must be an? (array|Tensor); got list"):
        run([[1.0] * 8] * 3)


def test_pair_where_the_config_has_none(framework):
    case = CATALOGUE["no-pair"]().astype("float32")
    rigids = framework.package.Rigid(framework.array(case.rotation), framework.array(case.translation))
    pair = framework.array(np.zeros((7, 7, 6), np.float32))
    with pytest.raises(ValueError, match=r"pair_channel is None, but pair is \(7, 7, 6\): pass None"):
        framework.ipa(case, framework.array(case.single), pair, rigids, framework.array(case.mask))


def core_arguments():
    rng = np.random.default_rng(0)
    h, qk, v, p, pv, c_z = ODD.num_head, ODD.num_scalar_qk, ODD.num_scalar_v, ODD.num_point_qk, ODD.num_point_v, 6
    shapes = {
        "q": (2, 5, h, qk),
        "k": (2, 5, h, qk),
        "v": (2, 5, h, v),
        "q_points": (2, 5, h, p, 3),
        "k_points": (2, 5, h, p, 3),
        "v_points": (2, 5, h, pv, 3),
        "pair": (2, 5, 5, c_z),
        "pair_bias_weight": (c_z, h),
        "point_weights": (h,),
        "mask": (2, 5),
    }
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


CORE = {
    "q rank": ({"q": lambda x: x[0, 0]}, ValueError, r"q must be \(\*batch, N, H, C\); got \(3, 4\)"),
    "k width": ({"k": lambda x: x[..., :2]}, ValueError, r"k must be \(2, 5, 3, 4\) to fit q"),
    "v heads": ({"v": lambda x: x[:, :, :1]}, ValueError, r"v must be \(2, 5, 3, 2\)"),
    "points flat": ({"q_points": lambda x: x[..., 0]}, ValueError, r"q_points must be"),
    "key points": ({"k_points": lambda x: x[..., :1, :]}, ValueError, r"k_points must be \(2, 5, 3, 5, 3\)"),
    "bias weight transposed": ({"pair_bias_weight": lambda x: x.T}, ValueError, r"pair_bias_weight must be \(6, 3\)"),
    "weight alone": ({"pair": lambda x: None}, ValueError, "pair_bias_weight is given but pair is None"),
    "point weights": ({"point_weights": lambda x: x[:1]}, ValueError, r"point_weights must be \(3,\)"),
    "mask": ({"mask": lambda x: x[0]}, ValueError, r"mask must be \(2, 5\)"),
    "unknown": ({"implementation": "fastest"}, ValueError, "must be None or one of reference.*got 'fastest'"),
    "blocks": (
        {"implementation": "reference", "block_size": 4},
        NotImplementedError,
        "'reference' has no blocks: leave block_size None",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), CORE.values(), ids=CORE)
def test_core(framework, changes, error, message):
    arguments = core_arguments()
    options = {name: value for name, value in changes.items() if not callable(value)}
    arguments |= {name: change(arguments[name]) for name, change in changes.items() if callable(change)}
    arrays = {name: framework.array(x) for name, x in arguments.items()}
    first = [arrays.pop(name) for name in ("q", "k", "v", "q_points", "k_points", "v_points", "pair")]
    with pytest.raises(error, match=message):
        framework.package.point_attention(*first, **arrays, **options)


def test_outputs_are_taken_by_name(framework):
    """`prediction[-1]` raises (it would be the last field, not the last layer); unpacking by position still works."""
    package = framework.package
    kinds = named_tuples(package)
    assert {"StructureModuleOutput", "IPATransformerOutput", "StructureTarget", "TorsionAngles"} <= set(kinds)
    for name, kind in kinds.items():
        output = kind(*kind._fields)
        for index in (-1, 0, slice(1), ...):
            with pytest.raises(
                TypeError, match=f"{name} has fields, not items: take one of {', '.join(kind._fields)} by"
            ):
                output[index]
        first, *_ = output
        assert first == kind._fields[0] == output._replace()._asdict()[first]
        assert pickle.loads(pickle.dumps(output)) == kind._make(output) == output


def named_tuples(package):
    """Public named tuples that hold results, by name."""
    public = (getattr(package, name) for name in package.__all__)
    return {x.__name__: x for x in public if isinstance(x, type) and issubclass(x, tuple) and x is not package.Rigid}


READS_AATYPE = {
    "torsion_angles_to_frames": lambda p, a, x, m: p.torsion_angles_to_frames(
        p.Rigid.identity((3,)), x(np.zeros((3, 7, 2), np.float32)), a, mask=m
    ),
    "frames_to_atom14": lambda p, a, x, m: p.frames_to_atom14(p.Rigid.identity((3, 8)), a, mask=m),
    "atom14_to_atom37": lambda p, a, x, m: p.atom14_to_atom37(x(np.zeros((3, 14))), a, mask=m),
    "atom37_to_atom14": lambda p, a, x, m: p.atom37_to_atom14(x(np.zeros((3, 37))), a, mask=m),
    "atom37_to_frames": lambda p, a, x, m: p.atom37_to_frames(x(PROTEIN37), m[:, None][:, [0] * 37], a),
    "atom37_to_torsion_angles": lambda p, a, x, m: p.atom37_to_torsion_angles(x(PROTEIN37), m[:, None][:, [0] * 37], a),
    "structure_target": lambda p, a, x, m: p.structure_target(
        x(PROTEIN37), m[:, None][:, [0] * 37], a, m, x(np.arange(3))
    ),
    "rename_ambiguous_atoms": lambda p, a, x, m: p.rename_ambiguous_atoms(
        x(PROTEIN14), x(PROTEIN14), m[:, None][:, [0] * 14], a
    ),
    "rename_ambiguous_frames": lambda p, a, x, m: p.rename_ambiguous_frames(p.Rigid.identity((3, 8)), a, m, mask=m),
    "supervised_chi_loss": lambda p, a, x, m: p.supervised_chi_loss(
        x(np.ones((1, 3, 7, 2), np.float32)),
        x(np.zeros((3, 4, 2), np.float32)),
        m[:, None][:, [0] * 4],
        a,
    ),
    "find_structural_violations": lambda p, a, x, m: p.find_structural_violations(
        x(PROTEIN14), m[:, None][:, [0] * 14], x(np.arange(3)), a
    ),
}
PROTEIN37, PROTEIN14 = (np.random.default_rng(0).standard_normal((3, n, 3)).astype(np.float32) for n in (37, 14))


@pytest.mark.parametrize("reads", READS_AATYPE.values(), ids=READS_AATYPE)
def test_residue_types_out_of_range(framework, reads):
    """They raise at valid residues; at padding they count as unknown (20)."""
    at_hand = framework.at_hand

    def run(*aatype, valid, dtype=np.int64):
        mask = at_hand(np.array([True, True, valid]))
        return framework.shapes(
            lambda: reads(framework.package, at_hand(np.array(aatype, dtype)), framework.array, mask)
        )

    expected = run(0, 5, 20, valid=False)
    for padding in (-1, -2, -100, 21, 127):
        for actual, wanted in zip(run(0, 5, padding, valid=False, dtype=np.int8), expected, strict=True):
            np.testing.assert_array_equal(actual, wanted)
        with pytest.raises(ValueError, match=f"aatype must be 0–19, or 20 .* valid; got {padding}: give unknown"):
            run(0, 5, padding, valid=True)
    run(0, 5, 20, valid=True, dtype=np.uint8)
    with pytest.raises(ValueError, match="aatype must hold integers"):
        run(0, 5, 20, valid=True, dtype=np.float32)


def test_residue_types_whose_values_cannot_be_read(framework):
    """In compiled, exported or mapped functions, types out of range count as unknown (20)."""
    mask, atom37 = framework.array(np.ones(3, bool)), framework.array(PROTEIN37)

    def target(aatype):
        return framework.package.atom37_to_atom14(atom37, aatype, mask=mask)

    beyond, unknown = (framework.array(np.array([0, 5, last])) for last in (22, 20))
    for transform in framework.transforms(beyond):
        np.testing.assert_array_equal(transform(target)(beyond), target(unknown))
    np.testing.assert_array_equal(framework.vmap(target)(beyond[None])[0], target(unknown))
