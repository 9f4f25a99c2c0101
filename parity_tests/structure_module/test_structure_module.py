"""The structure module agrees with AlphaFold's and in both frameworks, layer by layer."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from frameworks import Torch
from structure_module_cases import (
    CONFIGS,
    odd_case,
)

from ipa_bridge.config import PredictedLDDTConfig
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.proteins import load_structure, residues
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity import peers
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import compare
from ipa_parity.structure_module.cases import PRESETS, make_case
from ipa_parity.structure_module.judge import compare_stage, judge
from ipa_parity.structure_module.stages import RUNNERS, TERMS

PEERS = {
    "alphafold2": ("alphafold", peers.run_alphafold_structure_module),
    "alphafold-multimer": ("alphafold", peers.run_alphafold_structure_module),
    "esmfold": ("transformers", peers.run_esmfold_structure_module),
}
FEW_PEERS = [pytest.param(x, marks=[pytest.mark.exhaustive] * (x == "alphafold-multimer")) for x in PEERS]
"""`test_dialects.py` and `test_replace_alphafold.py` compare the multimer's too."""

LAYERED = ("rotation", "translation", "group_", "unnormalized_angles", "angles", "atom14", "act")


# Parameters.


@pytest.mark.parametrize("config", [*CONFIGS.values(), *(make() for make in PRESETS.values())])
def test_init_has_the_canonical_parameters(config, framework):
    number = 3
    if isinstance(framework, Torch):
        state = framework.package.StructureModule(config).state_dict()
        actual = {name: x.shape for name, x in Weights.from_torch(state, config=config).arrays.items()}
    else:
        width, pair_width = config.input_channels
        shapes = ((number, width), (number, number, pair_width))
        arrays = [framework.jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
        aatype = framework.jax.ShapeDtypeStruct((number,), "int32")
        init = framework.package.transform_structure_module(config).init
        params = framework.jax.eval_shape(init, framework.jax.random.key(0), *arrays, aatype)
        names = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
        actual = {name.removeprefix("structure_module/"): shape for name, shape in names.items()}
    assert actual == parameter_shapes(config)


@pytest.mark.parametrize("preset", ["alphafold2", "alphafold-multimer"])
def test_manifest_is_alphafolds_key_for_key(preset):
    """The manifest equals what alphafold-colabfold's own structure module and confidence head initialise."""
    jax, hk = pytest.importorskip("jax"), pytest.importorskip("haiku")
    pytest.importorskip("alphafold")
    case = replace(make_case(preset, PRESETS[preset]()), single=np.zeros((5, 384)), pair=np.zeros((5, 5, 128)))
    case = replace(case, aatype=case.aatype[:5], mask=case.mask[:5]).astype("float32")
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        transformed = hk.transform(peers.alphafold_structure_module(case))
        params = jax.eval_shape(transformed.init, jax.random.key(0), case.single, case.pair)
    theirs = {f"{module}/{leaf}": x.shape for module, leaves in params.items() for leaf, x in leaves.items()}
    assert theirs == {f"structure_module/{name}": shape for name, shape in parameter_shapes(case.config).items()}


def test_the_confidence_head_is_alphafolds(framework):
    """Its parameters agree by name and shape, and so do its logits."""
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
    ours = PRESETS[preset]()
    structure_module = theirs.structure_module
    for field in ("num_layer", "num_layer_in_transition", "dropout", "position_scale"):
        assert getattr(ours, field) == structure_module[field], field
    assert ours.sidechain_channel == structure_module.sidechain.num_channel
    assert ours.num_residual_block == structure_module.sidechain.num_residual_block
    head = PredictedLDDTConfig()
    assert (head.hidden_channel, head.num_bin) == (theirs.predicted_lddt.num_channels, theirs.predicted_lddt.num_bins)


# The frameworks against each other and against float64.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("untied multimer", "float64"), ("concatenated", "float64")),
        pytest.param("embedded", "float64", marks=pytest.mark.exhaustive),
        *(pytest.param(name, "float32", marks=pytest.mark.exhaustive) for name in ("odd multimer", "embedded")),
    ],
)
def test_the_frameworks_agree(name, dtype):
    judge_frameworks(odd_case(name), dtype)


@pytest.mark.exhaustive  # each is compared with published implementations on real proteins
@pytest.mark.parametrize("preset", ["alphafold2", "alphafold-multimer"])
def test_the_frameworks_agree_on_a_real_protein(preset, structures_dir):
    pytest.importorskip("gemmi")
    structure = load_structure(structures_dir / "1gcn.pdb")
    rows = judge_frameworks(make_case(preset, PRESETS[preset](), structure=structure), "float64")
    for row in rows:
        limit = 1e-10 if row.stage.startswith("gradient") else 1e-12
        assert row.error * np.finfo(np.float64).eps <= limit, str(row)


def judge_frameworks(case, dtype, **options):
    if len(installed_frameworks()) < 2:
        pytest.skip("both frameworks are compared, and one of them is not installed")
    rows = list(judge(case, dtype, **options))
    assert len({row.stage for row in rows}) >= 8 * case.config.num_layer + len(TERMS)
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
    """Errors of float32 runs, ours and theirs, are measured against our float64 in every layer."""
    package, run_theirs = PEERS[preset]
    pytest.importorskip("gemmi")
    pytest.importorskip(package)
    structure = first_residues(load_structure(structures_dir / protein), 120)
    case = make_case(preset, PRESETS[preset](), structure=structure).astype("float32")
    exact = RUNNERS[installed_frameworks()[-1]](case.astype("float64"), gradients=False)
    runs = {package: run_theirs(case, gradients=False)}
    runs |= {name: RUNNERS[name](case, gradients=False) for name in installed_frameworks()}
    if "atom37/layer 8" in runs[package]:
        atom37 = (
            np.take_along_axis(exact["atom14/layer 8"], residues.ATOM37_TO_ATOM14[case.aatype][..., None], -2)
            * (residues.ATOM37_MASK[case.aatype][..., None])
        )
        theirs = runs[package].pop("atom37/layer 8")
        assert np.abs(theirs - atom37)[case.mask].max() <= 32 * np.finfo(np.float32).eps * np.abs(atom37).max()
    groups = residues.GROUP_MASK[case.aatype]
    groups[:, :4] = True  # backbone, pre-ω, φ and ψ; their values of absent χs are arbitrary
    for stage, x in runs[package].items():
        if stage.startswith("group_"):
            present = np.expand_dims(groups, tuple(range(2, x.ndim)))
            runs[package][stage] = np.where(present, x, exact[stage].astype(x.dtype))
    stages = [stage for stage in exact if stage in runs[package] and stage.startswith(LAYERED)]
    assert len(stages) == (64 if package == "transformers" else 57)
    for stage in stages:
        rows = {
            name: compare_stage(
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
@pytest.mark.parametrize("preset", [pytest.param(x, marks=[pytest.mark.exhaustive] * (x != "esmfold")) for x in PEERS])
def test_gradients_are_those_of_a_published_implementation(preset, num_layer, structures_dir):
    """Gradients to both representations and every parameter, through all layers, agree."""
    package, run_theirs = PEERS[preset]
    pytest.importorskip("gemmi")
    pytest.importorskip(package)
    config = replace(PRESETS[preset](), num_layer=num_layer)
    case = make_case(preset, config, structure=load_structure(structures_dir / "1gcn.pdb"))
    valid = {name: x * case.mask.reshape(1, -1, *[1] * (x.ndim - 2)) for name, x in case.cotangents.items()}
    if package == "alphafold":
        valid["act"][:-1] = 0  # AlphaFold returns only the last layer's
    dtype = "float64" if preset == "alphafold2" else "float32"  # the other implementations compute geometry in float32
    case = replace(case, cotangents=valid).astype(dtype)
    theirs = run_theirs(case)
    for name in installed_frameworks():
        ours = RUNNERS[name](case)
        stages = [stage for stage in theirs if stage.startswith("gradient/")]
        assert set(stages) == {stage for stage in ours if stage.startswith("gradient/") and "/loss/" not in stage}
        for stage in stages:
            # AlphaFold holds its geometry's constants in float32 in any case.
            row = compare_stage(case, "float32", stage, package, theirs, name, ours)
            assert row.passed, str(row)
            if dtype == "float64" and not stage.endswith("attention_2d/bias"):
                assert np.abs(theirs[stage] - ours[stage]).max() <= 1e-6 * np.abs(ours[stage]).max(), stage


def first_residues(structure, number):
    arrays = {field.name: getattr(structure, field.name) for field in fields(structure)}
    return replace(structure, **{name: x[:number] for name, x in arrays.items() if isinstance(x, np.ndarray)})
