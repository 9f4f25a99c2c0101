"""The structure module is AlphaFold's and the same in both frameworks, layer by layer, and does as its users expect."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.config import PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.proteins import load_structure, residues
from ipa_bridge.proteins.frames import idealised_peptide, random_frames
from ipa_bridge.weights import Weights, canonical_from_haiku, canonical_from_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity import peers
from ipa_parity import structure_module as parity
from ipa_parity.cases import ODD, ODD_MULTIMER
from ipa_parity.parity import installed_frameworks
from ipa_parity.report import compare

ODD_MODULE = StructureModuleConfig(
    ipa=replace(ODD, frame_unit=None),
    num_layer=3,
    num_layer_in_transition=2,
    dropout=0.2,
    position_scale=7.0,
    sidechain_channel=5,
    num_residual_block=3,
)
ODD_MULTIMER_MODULE = replace(
    ODD_MODULE, ipa=replace(ODD_MULTIMER, frame_unit=None), num_layer_in_transition=3, num_residual_block=1
)
UNTIED_MODULE = replace(ODD_MODULE, tied_layers=False)
CONFIGS = {
    "odd": ODD_MODULE,
    "odd multimer": ODD_MULTIMER_MODULE,
    "untied": UNTIED_MODULE,
    "untied multimer": replace(ODD_MULTIMER_MODULE, tied_layers=False, num_layer=2),
}
PEERS = {
    "alphafold2": ("alphafold", peers.run_alphafold_structure_module),
    "alphafold-multimer": ("alphafold", peers.run_alphafold_structure_module),
    "esmfold": ("transformers", peers.run_esmfold_structure_module),
}
FEW_PEERS = [pytest.param(x, marks=[pytest.mark.exhaustive] * (x == "alphafold-multimer")) for x in PEERS]
"""The multimer's is held against ours by `test_dialects.py` and `test_replace_alphafold.py` too."""

LAYERED = ("rotation", "translation", "group_", "unnormalized_angles", "angles", "atom14", "act")


class Jax:
    """numpy in, numpy out."""

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        pytest.importorskip("haiku")
        import ipa_jax

        self.package, self.array = ipa_jax, self.jax.numpy.asarray
        self.apply = cache(lambda config: self.jax.jit(ipa_jax.transform_structure_module(config).apply))
        self.gradients = cache(self._gradients)

    def run(self, case, *, rigids=None, update_mask=None):
        """Every layer's predictions, by stage."""
        params, single, pair, aatype, mask, rigids, update_mask = self.arguments(case, rigids, update_mask)
        apply = self.apply(case.config)
        output = apply(params, None, single, pair, aatype, mask, rigids=rigids, update_mask=update_mask)
        return parity.named_layers(self.jax.tree.map(np.asarray, output))

    def run_eagerly(self, case):
        params, *inputs, _, _ = self.arguments(case, None, None)
        return self.package.transform_structure_module(case.config).apply(params, None, *inputs)

    def loss_and_gradients(self, case):
        """The whole loss, and its gradients to representations, start frames and every parameter."""
        params, single, pair, aatype, mask, rigids, _ = self.arguments(case, start_of(case), None)
        target = parity.target_of(self.package, case, self.array)
        value, gradients = self.gradients(case.config)(params, single, pair, rigids, aatype, mask, target)
        params, single, pair, rigids = self.jax.tree.map(np.asarray, gradients)
        named = canonical_from_haiku(params, case.weights.root)
        return float(value), {"single": single, "pair": pair, **rigids._asdict(), **named}

    def _gradients(self, config):
        apply = self.package.transform_structure_module(config).apply

        def loss(params, single, pair, rigids, aatype, mask, target):
            output = apply(params, None, single, pair, aatype, mask, rigids=rigids)
            return self.package.structure_module_loss(output, target).loss

        return self.jax.jit(self.jax.value_and_grad(loss, (0, 1, 2, 3)))

    def arguments(self, case, rigids, update_mask):
        arrays = (case.single, case.pair, case.aatype, case.mask)
        rigids = None if rigids is None else self.package.Rigid(*map(self.array, rigids))
        update_mask = None if update_mask is None else self.array(update_mask)
        return self.jax.tree.map(self.array, case.weights.to_haiku()), *map(self.array, arrays), rigids, update_mask


class Torch:
    """numpy in, numpy out."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        import ipa_torch

        self.package, self.array = ipa_torch, torch_tensor

    def run(self, case, *, rigids=None, update_mask=None):
        """Every layer's predictions, by stage."""
        single, pair, aatype, mask, rigids, update_mask = self.arguments(case, rigids, update_mask)
        with self.torch.no_grad():
            output = self.module(case)(single, pair, aatype, mask, rigids=rigids, update_mask=update_mask)
        return parity.named_layers(self.torch.utils._pytree.tree_map(lambda x: x.numpy(), output))

    def run_eagerly(self, case):
        return self.run(case)

    def loss_and_gradients(self, case):
        """The whole loss, and its gradients to representations, start frames and every parameter."""
        single, pair, aatype, mask, rigids, _ = self.arguments(case, start_of(case), None)
        module = self.module(case)
        parameters = dict(module.named_parameters())
        leaves = [x.requires_grad_() for x in (single, pair, *rigids)] + list(parameters.values())
        target = parity.target_of(self.package, case, self.array)
        loss = self.package.structure_module_loss(module(single, pair, aatype, mask, rigids=rigids), target).loss
        gradients = [x.numpy() for x in self.torch.autograd.grad(loss, leaves)]
        inputs = dict(zip(("single", "pair", "rotation", "translation"), gradients[:4], strict=True))
        named = canonical_from_torch(dict(zip(parameters, gradients[4:], strict=True)), case.config)
        return loss.item(), {**inputs, **named}

    def module(self, case):
        module = self.package.StructureModule(case.config).eval().to(torch_tensor(case.single).dtype)
        module.load_state_dict(case.weights.to_torch())
        return module

    def arguments(self, case, rigids, update_mask):
        arrays = (case.single, case.pair, case.aatype, case.mask)
        rigids = None if rigids is None else self.package.Rigid(*map(self.array, rigids))
        return *map(self.array, arrays), rigids, None if update_mask is None else self.array(update_mask)


def start_of(case):
    """The idealised peptide's frames, as (rotation, translation)."""
    peptide, (*batch, number, _) = idealised_peptide(), case.single.shape
    return (
        np.broadcast_to(peptide.rotation[:number], (*batch, number, 3, 3)).astype(case.single.dtype),
        np.broadcast_to(peptide.translation[:number], (*batch, number, 3)).astype(case.single.dtype),
    )


@cache
def one_of(kind):
    """One object for all tests, since JAX compiles longer than it runs."""
    return kind()


@pytest.fixture(scope="module", params=[Jax, Torch], ids=["jax", "torch"])
def framework(request):
    return one_of(request.param)


@cache
def odd_case(name="odd", dtype="float64"):
    return parity.make_case(name, CONFIGS[name]).astype(dtype)


def assert_same(actual, expected, dtype="float64", rows=slice(None), conditioning=1.0):
    """Every layer of every output, by the tolerance table."""
    assert set(actual) == set(expected)
    for stage, x in expected.items():
        conditions = conditioning
        if stage.startswith(("angles", "atom14", "group_")):
            lengths = np.linalg.norm(expected[f"unnormalized_angles/{stage.partition('/')[2]}"], axis=-1)
            conditions *= lengths.mean() / lengths.min()
        row = compare(
            actual[stage][rows],
            x[rows],
            case="",
            stage=stage,
            dtype=dtype,
            subject="other",
            reference="one",
            conditioning=conditions,
        )
        assert row.passed, str(row)


# Parameters.


@pytest.mark.parametrize("config", [*CONFIGS.values(), *(make() for make in parity.PRESETS.values())])
def test_init_has_the_canonical_parameters(config, framework):
    number = 3
    if isinstance(framework, Torch):
        state = framework.package.StructureModule(config).state_dict()
        actual = {name: x.shape for name, x in Weights.from_torch(state, config=config).arrays.items()}
    else:
        shapes = ((number, config.num_channel), (number, number, config.pair_channel))
        arrays = [framework.jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        aatype = framework.jax.ShapeDtypeStruct((number,), "int32")
        init = framework.package.transform_structure_module(config).init
        params = framework.jax.eval_shape(init, framework.jax.random.key(0), *arrays, aatype)
        names = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
        actual = {name.removeprefix("structure_module/"): shape for name, shape in names.items()}
    assert actual == parameter_shapes(config)


@pytest.mark.parametrize("preset", ["alphafold2", "alphafold-multimer"])
def test_manifest_is_alphafolds_key_for_key(preset):
    """What alphafold-colabfold's own structure module initialises, by name and shape; and its confidence head."""
    jax, hk = pytest.importorskip("jax"), pytest.importorskip("haiku")
    pytest.importorskip("alphafold")
    case = replace(
        parity.make_case(preset, parity.PRESETS[preset]()), single=np.zeros((5, 384)), pair=np.zeros((5, 5, 128))
    )
    case = replace(case, aatype=case.aatype[:5], mask=case.mask[:5]).astype("float32")
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        transformed = hk.transform(peers.alphafold_structure_module(case))
        params = jax.eval_shape(transformed.init, jax.random.key(0), case.single, case.pair)
    theirs = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
    assert theirs == {f"structure_module/{name}": shape for name, shape in parameter_shapes(case.config).items()}


def test_the_confidence_head_is_alphafolds(framework):
    """The parameters by name and shape, and the logits."""
    jax, hk = pytest.importorskip("jax"), pytest.importorskip("haiku")
    modules = pytest.importorskip("alphafold.model.modules")
    ml_collections = pytest.importorskip("ml_collections")
    from alphafold.model.config import model_config

    config, act = PredictedLDDTConfig(), np.random.default_rng(0).standard_normal((2, 7, 384)).astype(np.float32)
    weights = Weights.random(config)
    global_config = ml_collections.ConfigDict({"zero_init": True})

    def theirs(act):
        head = modules.PredictedLDDTHead(model_config("model_1").model.heads.predicted_lddt, global_config)
        return head({"structure_module": act}, {}, is_training=False)["logits"]

    transformed = hk.without_apply_rng(hk.transform(theirs))
    with jax.numpy_dtype_promotion("standard"):
        params = jax.eval_shape(transformed.init, jax.random.key(0), act[0])
        expected = np.stack([transformed.apply(weights.to_haiku(), x) for x in act])
    names = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
    assert names == {f"predicted_lddt_head/{name}": shape for name, shape in parameter_shapes(config).items()}
    if isinstance(framework, Torch):
        head = framework.package.PredictedLDDT(config)
        head.load_state_dict(weights.to_torch())
        logits = head(torch_tensor(act)).detach()
    else:
        logits = framework.package.transform_predicted_lddt(config).apply(weights.to_haiku(), framework.array(act))
    row = compare(
        np.asarray(logits), expected, case="", stage="act", dtype="float32", subject="ours", reference="alphafold"
    )
    assert row.passed, str(row)
    plddt = np.asarray(framework.package.predicted_lddt(framework.array(expected)))
    shares = np.exp(expected.astype(np.float64)) / np.exp(expected.astype(np.float64)).sum(-1, keepdims=True)
    np.testing.assert_allclose(plddt, 100 * (shares * (np.arange(50) + 0.5) / 50).sum(-1), rtol=1e-6)


@pytest.mark.parametrize("preset", ["alphafold2", "alphafold-multimer"])
def test_presets_are_alphafolds(preset):
    alphafold_config = pytest.importorskip("alphafold.model.config")
    name = {"alphafold2": "model_1", "alphafold-multimer": "model_1_multimer_v3"}[preset]
    theirs = alphafold_config.model_config(name).model.heads
    ours = parity.PRESETS[preset]()
    structure_module = theirs.structure_module
    for field in ("num_layer", "num_layer_in_transition", "dropout", "position_scale"):
        assert getattr(ours, field) == structure_module[field], field
    assert ours.sidechain_channel == structure_module.sidechain.num_channel
    assert ours.num_residual_block == structure_module.sidechain.num_residual_block
    head = PredictedLDDTConfig()
    assert (head.hidden_channel, head.num_bin) == (theirs.predicted_lddt.num_channels, theirs.predicted_lddt.num_bins)


# The frameworks against each other and against float64.


@pytest.mark.parametrize(("name", "dtype"), [("odd multimer", "float32"), ("untied multimer", "float64")])
def test_the_frameworks_agree(name, dtype):
    judge_frameworks(odd_case(name), dtype)


@pytest.mark.parametrize("preset", ["alphafold2", pytest.param("alphafold-multimer", marks=pytest.mark.exhaustive)])
def test_the_frameworks_agree_on_a_real_protein(preset, structures_dir):
    pytest.importorskip("gemmi")
    structure = load_structure(structures_dir / "1gcn.pdb")
    rows = judge_frameworks(parity.make_case(preset, parity.PRESETS[preset](), structure=structure), "float64")
    for row in rows:
        limit = 1e-10 if row.stage.startswith("gradient") else 1e-12
        assert row.error * np.finfo(np.float64).eps <= limit, str(row)


def judge_frameworks(case, dtype, **options):
    if len(installed_frameworks()) < 2:
        pytest.skip("both frameworks are compared, and one of them is not installed")
    rows = list(parity.judge(case, dtype, **options))
    assert len({row.stage for row in rows}) >= 8 * case.config.num_layer + len(parity.TERMS)
    failures = [str(row) for row in rows if not row.passed]
    assert not failures, "\n".join(failures)
    return rows


# Published implementations.


@pytest.mark.covering
@pytest.mark.parametrize("protein", ["1gcn.pdb", "2rbg.pdb"])
@pytest.mark.parametrize("preset", FEW_PEERS)
def test_errors_are_no_more_than_twice_a_published_implementations(
    preset, protein, structures_dir, compared_with_structure_modules
):
    """Every layer in float32 against our float64, which the published one agrees with as well as we do."""
    package, run_theirs = PEERS[preset]
    pytest.importorskip("gemmi")
    pytest.importorskip(package)
    structure = first_residues(load_structure(structures_dir / protein), 120)
    case = parity.make_case(preset, parity.PRESETS[preset](), structure=structure).astype("float32")
    exact = parity.RUNNERS[installed_frameworks()[-1]](case.astype("float64"), gradients=False)
    runs = {package: run_theirs(case, gradients=False)}
    runs |= {name: parity.RUNNERS[name](case, gradients=False) for name in installed_frameworks()}
    if "atom37/layer 8" in runs[package]:
        atom37 = (
            np.take_along_axis(exact["atom14/layer 8"], residues.ATOM37_TO_ATOM14[case.aatype][..., None], -2)
            * (residues.ATOM37_MASK[case.aatype][..., None])
        )
        theirs = runs[package].pop("atom37/layer 8")
        assert np.abs(theirs - atom37)[case.mask].max() <= 32 * np.finfo(np.float32).eps * np.abs(atom37).max()
    groups = residues.GROUP_MASK[case.aatype]
    groups[:, :4] = True  # backbone, pre-ω, φ and ψ; of absent χs theirs are zero or anything
    for stage, x in runs[package].items():
        if stage.startswith("group_"):
            present = np.expand_dims(groups, tuple(range(2, x.ndim)))
            runs[package][stage] = np.where(present, x, exact[stage].astype(x.dtype))
    stages = [stage for stage in exact if stage in runs[package] and stage.startswith(LAYERED)]
    assert len(stages) == (64 if package == "transformers" else 57)
    for stage in stages:
        rows = {
            name: parity.compare_stage(
                case, "float32", stage, name, arrays, "float64", exact, valid_only=True, norm="euclidean"
            )
            for name, arrays in runs.items()
        }
        compared_with_structure_modules += rows.values()
        for name in installed_frameworks():
            assert rows[name].passed, str(rows[name])
            assert rows[name].error <= 2 * rows[package].error, f"{rows[name]}; {rows[package]}"
        assert rows[package].passed, str(rows[package])


@pytest.mark.parametrize("num_layer", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("preset", FEW_PEERS)
def test_gradients_are_those_of_a_published_implementation(preset, num_layer, structures_dir):
    """To both representations and every parameter, through all layers."""
    package, run_theirs = PEERS[preset]
    pytest.importorskip("gemmi")
    pytest.importorskip(package)
    config = replace(parity.PRESETS[preset](), num_layer=num_layer)
    case = parity.make_case(preset, config, structure=load_structure(structures_dir / "1gcn.pdb"))
    valid = {name: x * case.mask.reshape(1, -1, *[1] * (x.ndim - 2)) for name, x in case.cotangents.items()}
    if package == "alphafold":
        valid["act"][:-1] = 0  # it returns the last layer's only
    dtype = "float64" if preset == "alphafold2" else "float32"  # the others' own geometry is float32
    case = replace(case, cotangents=valid).astype(dtype)
    theirs = run_theirs(case)
    for name in installed_frameworks():
        ours = parity.RUNNERS[name](case)
        stages = [stage for stage in theirs if stage.startswith("gradient/")]
        assert set(stages) == {stage for stage in ours if stage.startswith("gradient/") and "/loss/" not in stage}
        for stage in stages:
            # AlphaFold holds its geometry's constants in float32 in any case.
            row = parity.compare_stage(case, "float32", stage, package, theirs, name, ours)
            assert row.passed, str(row)
            if dtype == "float64" and not stage.endswith("attention_2d/bias"):
                assert np.abs(theirs[stage] - ours[stage]).max() <= 1e-6 * np.abs(ours[stage]).max(), stage


def first_residues(structure, number):
    arrays = {field.name: getattr(structure, field.name) for field in fields(structure)}
    return replace(structure, **{name: x[:number] for name, x in arrays.items() if isinstance(x, np.ndarray)})


# Symmetry, masks and batches.


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(["odd", "odd multimer"]))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_predicted_moves_with_the_start(framework, dtype, seed, name):
    """SE(3): atoms and frames move, angles and activations stay; the inputs' rounding grows with the distance."""
    case = odd_case(name)
    start = start_of(case)
    turn, shift = random_frames(np.random.default_rng(seed), (), spread=30.0)
    moved = (turn @ start[0], start[1] @ turn.T + shift)
    as_dtype = lambda frames: tuple(x.astype(dtype) for x in frames)  # noqa: E731
    still = framework.run(case.astype(dtype), rigids=as_dtype(start))
    expected = {stage: move(stage, x, turn, shift) for stage, x in still.items()}
    actual = framework.run(case.astype(dtype), rigids=as_dtype(moved))
    size = 1 + np.abs(moved[1]).max() / np.abs(start[1]).max()
    assert_same(actual, expected, dtype, conditioning=4 * size)


def move(stage, x, turn, shift):
    if stage.startswith(("rotation", "group_rotation")):
        return turn @ x
    if stage.startswith(("translation", "group_translation")):
        return x @ turn.T + shift
    if stage.startswith("atom14"):
        return np.where((x == 0).all(-1, keepdims=True), 0, x @ turn.T + shift)
    return x


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_no_valid_residue(framework, name, dtype):
    case, rng, more = odd_case(name, dtype), np.random.default_rng(1), 5
    number = len(case.mask)

    def pad(x, axes=1):
        junk = 10 * rng.standard_normal([n + more if i < axes else n for i, n in enumerate(x.shape)])
        junk = (junk * 2).astype(x.dtype) if x.dtype != bool else np.zeros(junk.shape, bool)
        junk[tuple(slice(number) for _ in range(axes))] = x
        return junk

    padded = replace(
        case,
        single=pad(case.single),
        pair=pad(case.pair, 2),
        mask=pad(case.mask),
        aatype=np.resize(case.aatype, number + more),
    )
    actual, expected = framework.run(padded), framework.run(case)
    assert_same({k: x[:number] for k, x in actual.items()}, expected, dtype, rows=case.mask)


def test_frozen_residues_keep_their_frames(framework):
    case = odd_case()
    start = start_of(case)
    frozen = np.arange(len(case.mask)) % 3 == 0
    arrays = framework.run(case, rigids=start, update_mask=~frozen)
    for layer in range(1, 4):
        assert_close(arrays[f"rotation/layer {layer}"][frozen], start[0][frozen])
        assert_close(arrays[f"translation/layer {layer}"][frozen], start[1][frozen])
    assert (np.abs(arrays["translation/layer 1"] - start[1]).max(-1)[~frozen] > 1e-3).all()
    assert_same(framework.run(case, rigids=start, update_mask=frozen | True), framework.run(case, rigids=start))
    of_floats = framework.run(case, rigids=start, update_mask=(~frozen).astype(np.float32))
    assert_same(of_floats, arrays)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-13, atol=1e-13)


def batch_of(*cases):
    """One case with a batch axis; weights and target of the first."""
    stacked = {name: np.stack([getattr(x, name) for x in cases]) for name in ("single", "pair", "aatype", "mask")}
    return replace(cases[0], **stacked)


@pytest.mark.covering
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_is_its_members(framework, name):
    first = odd_case(name)
    other = replace(
        first, single=first.single[::-1], pair=first.pair[::-1], aatype=first.aatype[::-1], mask=first.mask[::-1]
    )
    each = [framework.run(x, rigids=start_of(x)) for x in (first, other)]
    batch = batch_of(first, other)
    assert_same(framework.run(batch, rigids=start_of(batch)), {k: np.stack([x[k] for x in each]) for k in each[0]})
    batches = batch_of(batch, batch)
    both = framework.run(batches, rigids=start_of(batches))
    assert both["atom14/layer 1"].shape == (2, 2, len(first.mask), 14, 3)
    assert_same({k: x[1] for k, x in both.items()}, {k: np.stack([x[k] for x in each]) for k in each[0]})


def test_start_frames_are_alphafolds_where_none_are_given(framework):
    case = odd_case()
    number = len(case.mask)
    origin = np.broadcast_to(np.eye(3), (number, 3, 3)).copy(), np.zeros((number, 3))
    assert_same(framework.run(case), framework.run(case, rigids=origin))


def test_untied_layers_are_layers_of_their_own(framework):
    """With every layer's weights the same they are tied ones; with other ones in the last, the last differs."""
    tied, config = odd_case(), UNTIED_MODULE
    arrays = dict(tied.weights.arrays)
    for name, x in tied.weights.arrays.items():
        if name.startswith("fold_iteration/"):
            arrays |= {name.replace("fold_iteration/", f"fold_iteration_{layer}/"): x for layer in (1, 2)}
    same = replace(tied, weights=Weights(arrays, config))
    expected = framework.run(tied)
    assert_same(framework.run(same), expected)
    changed = {n: x * 1.5 if n.startswith("fold_iteration_2/transition") else x for n, x in arrays.items()}
    actual = framework.run(replace(tied, weights=Weights(changed, config)))
    assert_close(actual["atom14/layer 2"], expected["atom14/layer 2"])
    assert np.abs(actual["atom14/layer 3"] - expected["atom14/layer 3"]).max() > 1e-3


# Gradients.


def hard_case(kind):
    case = odd_case("odd", "float32")
    nothing = np.zeros_like(case.atom37_mask)
    if kind == "all masked":
        return replace(case, mask=np.zeros_like(case.mask), atom37_mask=nothing)
    if kind == "glycine and alanine":
        aatype = np.where(np.arange(len(case.aatype)) % 2, residues.RESTYPES.index("G"), residues.RESTYPES.index("A"))
        return replace(case, aatype=aatype, atom37_mask=case.atom37_mask & residues.ATOM37_MASK[aatype])
    if kind == "unknown residues":
        aatype = np.full_like(case.aatype, 20)
        return replace(case, aatype=aatype, atom37_mask=case.atom37_mask & residues.ATOM37_MASK[aatype])
    if kind == "no side chains":
        return replace(case, atom37_mask=case.atom37_mask & (np.arange(37) < 3))
    if kind == "coincident atoms":
        return replace(case, atom37=np.zeros_like(case.atom37))
    if kind == "nothing resolved":
        return replace(case, atom37_mask=nothing)
    zeroed = {name: x * (not name.endswith("unnormalized_angles/weights")) for name, x in case.weights.arrays.items()}
    return replace(case, weights=Weights(zeroed, case.config))


@pytest.mark.parametrize(
    "kind",
    [
        "all masked",
        "glycine and alanine",
        "unknown residues",
        "no side chains",
        "coincident atoms",
        "nothing resolved",
        "no torsion vectors",
    ],
)
def test_hard_cases_have_finite_gradients(framework, kind):
    loss, gradients = framework.loss_and_gradients(hard_case(kind))
    assert np.isfinite(loss)
    assert all(np.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("name", ["odd", "odd multimer", pytest.param("alphafold2", marks=pytest.mark.exhaustive)])
def test_the_frameworks_agree_on_the_whole_losss_gradients(name):
    """To representations, start frames and every parameter; in multimer, of chains."""
    case = odd_case(name) if name in CONFIGS else parity.make_case(name, parity.PRESETS[name]())
    if name == "odd multimer":
        case = replace(case, chain_id=(np.arange(len(case.mask)) > 20).astype(np.int64))
    (one, ours), (other, theirs) = one_of(Jax).loss_and_gradients(case), one_of(Torch).loss_and_gradients(case)
    assert one == pytest.approx(other, rel=1e-12)
    assert set(ours) == set(theirs) == {"single", "pair", "rotation", "translation", *parameter_shapes(case.config)}
    for stage, x in theirs.items():
        scale = np.abs(theirs[stage.replace("attention_2d/bias", "attention_2d/weights")]).max()
        assert scale > 0
        assert np.abs(ours[stage] - x).max() <= 1e-10 * scale, stage


def test_rotations_pass_no_gradient_between_layers(framework):
    """With one layer the start rotations have a gradient through atoms; of two, the second sends none back by them."""
    case = odd_case()
    one = replace(case, weights=Weights(case.weights.arrays, replace(case.config, num_layer=1)))
    gradients = {name: rotation_gradient(framework, x) for name, x in (("one", one), ("three", case))}
    assert all(np.isfinite(x).all() and np.abs(x).max() > 1e-6 for x in gradients.values())
    free = rotation_gradient(framework, case, patched=True)
    assert np.abs(free - gradients["three"]).max() > 1e-3 * np.abs(free).max()


def rotation_gradient(framework, case, patched=False):
    """Of all layers' atoms to the rotations of the start; patched, without the stops between layers."""
    rigid = framework.package.Rigid
    with pytest.MonkeyPatch.context() as patch:
        if patched:
            patch.setattr(rigid, "stop_rotation_gradient", lambda self: self)
        single, pair, aatype, mask, rigids = framework.arguments(case, start_of(case), None)[-6:-1]
        cotangent = framework.array(case.cotangents["atom14"][: case.config.num_layer])
        if isinstance(framework, Torch):
            rigids.rotation.requires_grad_()
            output = framework.module(case)(single, pair, aatype, mask, rigids=rigids)
            return framework.torch.autograd.grad((output.atom14 * cotangent).sum(), rigids.rotation)[0].numpy()
        apply = framework.package.transform_structure_module(case.config).apply
        params = case.weights.to_haiku()

        def scalar(rotation):
            start = rigid(rotation, rigids.translation)
            return (apply(params, None, single, pair, aatype, mask, rigids=start).atom14 * cotangent).sum()

        return np.asarray(framework.jax.jit(framework.jax.grad(scalar))(rigids.rotation))


# Controls: other functions that must be told from ours.


def chi_turned_the_other_way(module, side_chains, patch):
    honest = side_chains.torsion_angles_to_frames
    patch.setattr(
        "ipa_torch.structure_module.torsion_angles_to_frames",
        lambda rigids, angles, *rest, **named: honest(rigids, angles * angles.new_tensor([-1.0, 1.0]), *rest, **named),
    )


def updates_composed_from_the_left(module, side_chains, patch):
    rigid = side_chains.Rigid
    honest = rigid.compose
    patch.setattr(rigid, "compose", lambda self, other: honest(other, self))


def frames_in_a_thousandth_larger_a_unit(module, side_chains, patch):
    larger = replace(module.config, position_scale=1.001 * module.config.position_scale)
    patch.setattr(module, "config", larger)


def the_first_transition_left_out(module, side_chains, patch):
    from ipa_torch import structure_module

    patch.setattr(structure_module, "transition", lambda act, layers: 0 * act)


def side_chains_that_forget_the_first_activations(module, side_chains, patch):
    honest = module.fold_iteration.rigid_sidechain.forward
    patch.setattr(module.fold_iteration.rigid_sidechain, "forward", lambda act, initial: honest(act, act))


def a_bond_a_thousandth_longer(module, side_chains, patch):
    other = side_chains.residues.GROUP_TRANSLATION.copy()
    other[:, 5] *= 1.001
    patch.setattr(side_chains.residues, "GROUP_TRANSLATION", other)


CONTROLS = (
    chi_turned_the_other_way,
    updates_composed_from_the_left,
    frames_in_a_thousandth_larger_a_unit,
    the_first_transition_left_out,
    side_chains_that_forget_the_first_activations,
    a_bond_a_thousandth_longer,
)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.__name__)
def test_controls_are_caught(control, dtype):
    framework, case = one_of(Torch), odd_case("odd", dtype)
    from ipa_torch import side_chains

    expected = framework.run(odd_case("odd", "float64") if dtype == "float64" else case.astype("float64"))
    module = framework.module(case)
    inputs = framework.arguments(case, None, None)[:4]

    def caught():
        with framework.torch.no_grad():
            output = module(*inputs)
        arrays = parity.named_layers(framework.torch.utils._pytree.tree_map(lambda x: x.numpy(), output))
        rows = [parity.compare_stage(case, dtype, stage, "torch", arrays, "float64", expected) for stage in expected]
        return {row.stage for row in rows if not row.passed}

    assert not caught()
    with pytest.MonkeyPatch.context() as patch:
        control(module, side_chains, patch)
        assert "atom14/layer 3" in caught()


# Dtypes and bad input.


@pytest.mark.covering("framework")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["odd", "odd multimer"])
def test_half_precision_keeps_frames_in_float32(framework, name, dtype):
    case = odd_case(name).astype(dtype)
    arrays = framework.run(case) if isinstance(framework, Jax) else run_half(framework, case)
    exact = framework.run(case.astype("float32"))
    assert arrays["atom14/layer 3"].dtype == np.float32
    assert arrays["rotation/layer 3"].dtype == np.float32
    error = np.abs(arrays["atom14/layer 3"] - exact["atom14/layer 3"])[case.mask].max()
    assert 0 < error < 0.1 * np.abs(exact["atom14/layer 3"]).max()


def run_half(framework, case):
    single, pair, aatype, mask, *_ = framework.arguments(case, None, None)
    with framework.torch.no_grad():
        output = framework.module(case)(single, pair, aatype, mask)
    assert output.act.dtype == single.dtype
    output = framework.torch.utils._pytree.tree_map(lambda x: x.float().numpy(), output)
    return parity.named_layers(output)


@pytest.mark.parametrize("name", ["odd", "untied multimer"])
def test_float32_representations_and_float64_parameters(framework, name):
    """As in a model that is refined in float64: frames are float64, the activations float32."""
    case = odd_case(name)
    mixed = replace(case, single=case.single.astype(np.float32), pair=case.pair.astype(np.float32))
    if isinstance(framework, Jax):
        arrays = framework.run(mixed)
    else:
        single, pair, aatype, mask, *_ = framework.arguments(mixed, None, None)
        with framework.torch.no_grad():
            output = framework.module(case)(single, pair, aatype, mask)
        arrays = parity.named_layers(framework.torch.utils._pytree.tree_map(lambda x: x.numpy(), output))
    assert {arrays[f"{field}/layer 1"].dtype.name for field in ("rotation", "translation", "atom14")} == {"float64"}
    assert arrays["act/layer 1"].dtype == np.float32
    assert_same(arrays, framework.run(case), "float32", rows=case.mask)


def test_start_frames_do_not_decide_the_dtype(framework):
    """Those of a protein come in float64; a model in float32 stays in it."""
    case = odd_case("odd", "float32")
    rotation, translation = start_of(case)
    exact = framework.run(case, rigids=(rotation.astype(np.float64), translation.astype(np.float64)))
    assert {x.dtype.name for x in exact.values()} == {"float32"}
    assert_same(exact, framework.run(case, rigids=(rotation, translation)), "float32", rows=case.mask)


def test_masks_of_any_dtype(framework):
    case = odd_case()
    expected = framework.run(case)
    for dtype in (np.int32, np.float32):
        assert_same(framework.run(replace(case, mask=case.mask.astype(dtype))), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"single": np.zeros((4, 7))}, r"single must be \(\*batch, N, 11\), num_channel last; got \(4, 7\)"),
        ({"pair": np.zeros((3, 4, 6))}, r"pair must be"),
        ({"aatype": np.zeros(4)}, "aatype must hold integers, 0–19 or 20 for unknown; got"),
        ({"aatype": np.zeros(3, int)}, "aatype must be"),
        ({"mask": np.zeros((1, 4), bool)}, "mask must be"),
    ],
)
def test_what_does_not_fit_is_refused(framework, change, message):
    case = odd_case()
    fits = {
        "single": np.zeros((4, 11)),
        "pair": np.zeros((4, 4, 6)),
        "aatype": np.zeros(4, int),
        "mask": np.ones(4, bool),
    }
    with pytest.raises(ValueError, match=message):
        framework.run(replace(case, **fits | change))


def test_residue_types_of_padding_may_be_anything(framework):
    """Where a residue is valid and its type is at hand, those that are none are refused."""
    case = odd_case()
    assert not case.mask.all()
    unknown, padded, wrong = (
        replace(case, aatype=np.where(where, other, case.aatype))
        for where, other in ((~case.mask, 20), (~case.mask, -100), (case.mask, 21))
    )
    assert_same(framework.run(padded), framework.run(unknown))
    with pytest.raises(ValueError, match="aatype must be 0–19, or 20 for unknown, where a residue is valid; got 21"):
        framework.run_eagerly(wrong)


def test_start_frames_and_update_masks_that_do_not_fit_are_refused(framework):
    case = odd_case()
    rotation, translation = start_of(case)
    with pytest.raises(ValueError, match=r"rigids\.translation must be"):
        framework.run(case, rigids=(rotation, translation[1:]))
    with pytest.raises(ValueError, match="update_mask must be"):
        framework.run(case, update_mask=case.mask[1:])


# As JAX and torch users call it.


def test_jax_transforms_are_the_same_function():
    framework, case = one_of(Jax), odd_case()
    jax = framework.jax
    batch = batch_of(case, replace(case, single=case.single[::-1]))
    params, single, pair, aatype, mask, *_ = framework.arguments(batch, None, None)
    apply = partial(framework.package.transform_structure_module(case.config).apply, params, None)

    def named(output):
        return parity.named_layers(jax.tree.map(np.asarray, output))

    expected = framework.run(batch)
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
    """Devices have proteins of their own, or start frames of one protein, or parameters; they share the rest."""
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
        """Without side chains, which take long to compile."""
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
    if split != "proteins" or not check_vma:  # types that do not fit are found before anything is compiled
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
    """Were one mask used in every layer, identical layers in would be identical layers out."""
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
    module = framework.module(case)
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
def test_torch_compiles_whole_and_exports(name, num_layer):
    framework = one_of(Torch)
    case = parity.make_case(name, replace(CONFIGS[name], num_layer=num_layer))
    torch = framework.torch
    single, pair, aatype, mask, rigids, _ = framework.arguments(case, start_of(case), None)
    module = framework.module(case)
    named = lambda output: parity.named_layers(torch.utils._pytree.tree_map(lambda x: x.detach().numpy(), output))  # noqa: E731
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
    module = framework.module(case)
    named = lambda output: parity.named_layers(torch.utils._pytree.tree_map(lambda x: x.detach().numpy(), output))  # noqa: E731
    assert_same(named(torch.func.vmap(module, out_dims=1)(*inputs)), named(module(*inputs)))


def test_torch_autocast_keeps_frames_in_float32():
    framework, case = one_of(Torch), odd_case("odd", "float32")
    torch = framework.torch
    inputs = framework.arguments(case, None, None)[:4]
    module = framework.module(case)
    with torch.no_grad():
        exact = module(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(*inputs)
    assert {x.dtype for x in (*output.rigids, *output.frames, output.atom14)} == {torch.float32}
    assert output.atom14.isfinite().all()
    assert (output.atom14 - exact.atom14).abs().max() < 0.1 * exact.atom14.abs().max()
