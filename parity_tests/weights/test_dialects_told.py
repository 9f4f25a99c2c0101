"""Names and shapes identify the system of weights; what a system cannot store raises or warns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dialect_cases import (
    NATIVE,
    ONE_WIDTH,
    SMALL_MODULE,
    assert_same_bits,
    convert,
    replace_untold,
    state_of,
)

from ipa_bridge.config import (
    IPAConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.assumptions import is_functional
from ipa_bridge.weights.conversion import LOSSES
from ipa_bridge.weights.dialects import DIALECTS
from ipa_bridge.weights.finding import find_module
from ipa_parity import peers
from ipa_parity.attention.cases import ODD, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR, make_case
from ipa_parity.attention.stages import RUNNERS
from ipa_parity.report import compare


@pytest.mark.parametrize("root", ["", "model.structure_module", "a.b"])
@pytest.mark.parametrize("name", [name for name, (dialect, _) in NATIVE.items() if dialect != "alphafold"])
def test_names_and_shapes_identify_the_dialect(name, root):
    dialect, config = NATIVE[name]
    if "confidence" in name:
        root = f"{root}.plddt".removeprefix(".")
    if dialect == "esmfold" and root:
        root = f"{root.replace('model.structure_module', 'trunk.structure_module')}"
    if dialect == "igfold":
        root = f"{root}.structure_ipa".removeprefix(".")
    state = {f"{root}.{x}".removeprefix("."): y.shape for x, y in state_of(Weights.random(config), dialect).items()}
    found, inferred, _ = find_module(state)
    alike = {"esmfold": {"openfold_v1"} if "trunk" not in root else set()}
    alike |= {"ibex": {"abodybuilder3"}, "lociparse": {"openfold_v1"}}
    if "confidence" not in name:  # OpenFold's versions use the same name
        assert found.dialect.name in {dialect} | alike.get(dialect, set())
    assert (found.kind, found.root) == (type(config), root)
    assert replace_untold(inferred) == replace_untold(config), (
        "the config inferred from names and shapes (left) is not that of NATIVE (right): a field that they do not "
        "show has a default, unless `finish` of the dialect sets it (its `Form` does not)"
    )


def test_an_ambiguous_system_raises(monkeypatch):
    """The test gives ESMFold another function than OpenFold under the same names."""
    state = {name: x.shape for name, x in state_of(Weights.random(ONE_WIDTH), "openfold_v1").items()}
    other = replace(DIALECTS["esmfold"], finish=lambda config: replace(config, norm_epsilon=1e-12))
    monkeypatch.setitem(DIALECTS, "esmfold", other)
    with pytest.raises(
        ValueError, match=r"several dialects.*'openfold_v1' \(OpenFold 1\) or 'esmfold' \(ESMFold\), or config="
    ):
        find_module(state)
    assert find_module(state, config=ONE_WIDTH)[1] == ONE_WIDTH  # with the config given, both read it the same


def test_an_extra_name_is_not_ignored():
    """FrameDiff's down_z under OpenFold's name is another function."""
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(x) for name, x in state_of(Weights.random(ONE_WIDTH), "openfold_v1").items()}
    with pytest.raises(ValueError, match=r"unexpected linear_x\.weight \(2, 2\)"):
        Weights.from_torch(state | {"linear_x.weight": torch.ones(2, 2)}, dialect="openfold_v1")
    with pytest.raises(ValueError, match=r"no invariant point attentions .*with the names of OpenFold 1"):
        Weights.from_torch(state | {"down_z.weight": torch.ones(2, 2)}, dialect="openfold_v1", config=ONE_WIDTH)


def test_shape_errors_give_both_names():
    torch = pytest.importorskip("torch")
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold")
    state["linear_q.weight"] = torch.ones(3, 11)
    with pytest.raises(
        ValueError, match=r"q_scalar/weights must be \(11, .*\(linear_q\.weight: \(.*, 11\), got \(3, 11\)"
    ):
        Weights.from_torch(state, config=ONE_WIDTH)
    with pytest.raises(ValueError, match=r"dialect must be one of alphafold, .*; got 'rosetta'"):
        Weights.from_torch(state, dialect="rosetta")


def test_openfolds_checkpoints_hold_several(tmp_path):
    """With Lightning's or DeepSpeed's prefixes and an average beside the weights, the user must choose one."""
    torch = pytest.importorskip("torch")
    weights = [Weights.random(SMALL_MODULE, seed=seed) for seed in (1, 2)]
    plain, averaged = (x.to_torch(dialect="openfold") for x in weights)
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"model.structure_module.{name}": x for name, x in plain.items()},
        "ema": {"params": {f"structure_module.{name}": x for name, x in averaged.items()}, "decay": 0.999},
        "optimizer_states": [{"state": {}}],
    }
    torch.save(checkpoint, tmp_path / "checkpoint.ckpt.pt")
    with pytest.raises(ValueError, match=r"2 structure modules .*'state_dict\.model\.structure_module', 'ema\.params"):
        Weights.load(tmp_path / "checkpoint.ckpt.pt")
    for root, expected in (
        ("state_dict.model.structure_module", weights[0]),
        ("ema.params.structure_module", weights[1]),
    ):
        again = Weights.load(tmp_path / "checkpoint.ckpt.pt", root=root)
        assert_same_bits(again.arrays, expected.arrays)
    torch.save({f"module.model.structure_module.{name}": x for name, x in plain.items()}, tmp_path / "deepspeed.pt")
    assert_same_bits(Weights.load(tmp_path / "deepspeed.pt").arrays, weights[0].arrays)


# --- What a system cannot store


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (ODD, "openfold", "OpenFold 2 cannot represent this:\n.*num_scalar_v must be 4, not 2"),
        (ONE_WIDTH, "framediff", "down_z is c_z / 4 = 1 wide, and pair_value_channel here is none"),
        (
            IPAConfig.bioemu(12, n_head=3),
            "alphafold",
            "its attention has distance_form='squared', and here it is 'unsq",
        ),
        (
            replace(IPAConfig.bioemu(12, n_head=3), num_point_v=7),
            "bioemu",
            "4 query and 8 value points per head, not 4 and",
        ),
        (replace(IPAConfig.bioemu(12, n_head=3), num_channel=11), "bioemu", "here it is 3 × 4, and num_channel is 11"),
        (
            replace(IPAConfig.bioemu(12, n_head=3), pair_value_channel=5),
            "bioemu",
            "pair_value_channel must be 4, not 5",
        ),
        (ODD, "bioemu", "its attention has pair_value_per_head=True, and here it is False"),
        (
            replace(ODD_NO_PAIR, logit_terms=3),
            "lucidrains",
            r"scales its logits by √\(1/2\), and logit_terms is 3 here",
        ),
        (ODD_NO_PAIR, "alphafold", "always reads a pair representation"),
        (replace(SMALL_MODULE, tied_layers=False), "alphafold", "tied_layers must be True"),
        (replace(SMALL_MODULE, num_layer_in_transition=2), "openfold", "its transition has 3 linear layers, not 2"),
        (SMALL_MODULE, "lucidrains", "invariant-point-attention has no structure module"),
        (PredictedLDDTConfig(), "esmfold", "ESMFold has no confidence head"),
    ],
)
def test_what_a_system_cannot_store_raises(config, target, message):
    with pytest.raises(ValueError, match=message):
        convert(Weights.random(config), target, allow_lossy=list(LOSSES))


@pytest.mark.parametrize(
    ("config", "target", "losses", "apart"),
    [
        (ONE_WIDTH, "lucidrains", ["scalar_bias", "point_bias"], 1.0),
        (ODD_MULTIMER, "lucidrains", ["point_bias", "norm"], 1.0),
        (replace(ONE_WIDTH, norm_epsilon=1e-12), "alphafold", ["norm"], 1e-6),
        (NATIVE["esmfold"][1], "alphafold", [], 1e-13),
        (ODD_NO_BIAS, "alphafold", [], 1e-13),
        (NATIVE["omegafold"][1], "alphafold", ["norm"], 1e-6),
        (ODD, "omegafold", ["norm"], 1e-6),
        (NATIVE["framediff"][1], "openfold", ["down_z"], 1e-6),
        (NATIVE["openfold multimer"][1], "esmfold", ["norm"], 1e-6),
    ],
)
def test_losses_have_names_and_are_allowed_by_them(config, target, losses, apart):
    weights = Weights.random(config)
    if losses:
        with pytest.raises(ValueError, match=rf"cannot represent all of .*--allow-lossy {','.join(losses)}"):
            convert(weights, target)
        with pytest.raises(ValueError, match=f"--allow-lossy {losses[-1]} "):
            convert(weights, target, allow_lossy=losses[:-1])
    result, conversion = convert(weights, target, allow_lossy=losses)
    assert [loss.name for loss in conversion.losses] == losses
    probes = [
        semantics.probe("ipa_jax", weights.arrays, config),
        semantics.probe(target, state_of(result, target), result.config),
    ]
    assert semantics.distance(*probes) < apart
    with pytest.raises(ValueError, match="allow_lossy must name norm, "):
        convert(weights, target, allow_lossy=["everything"])


def test_the_layout_with_the_smaller_loss_is_chosen():
    """Losing the form of a norm's ε at 1e-8 is preferred to losing biases."""
    config = replace(ONE_WIDTH, layout="multimer", scalar_bias=True, norm_form="clamp")
    weights = Weights.random(config)
    for allowed in (["norm"], ["norm", "scalar_bias"]):
        converted, conversion = convert(weights, "openfold", allow_lossy=allowed)
        assert [loss.name for loss in conversion.losses] == ["norm"]
        assert converted.config.layout == "monomer"
    _, conversion = convert(weights, "openfold", allow_lossy=["scalar_bias"])
    assert [loss.name for loss in conversion.losses] == ["scalar_bias"]


def test_what_a_file_cannot_store_is_reported(tmp_path):
    pytest.importorskip("torch")
    weights = Weights.random(
        replace(SMALL_MODULE, position_scale=3.0, ipa=replace(ONE_WIDTH, norm_epsilon=1e-6, frame_unit=3.0))
    )
    with pytest.warns(UserWarning, match=r" for OpenFold 2: ") as told:
        weights.save(tmp_path / "of.safetensors", dialect="openfold")
    messages = [str(x.message) for x in told]
    assert any("construct the module with eps=1e-06" in x for x in messages)
    assert any("construct the module with 3 for our position_scale" in x for x in messages)
    again = Weights.load(tmp_path / "of.safetensors")  # the weights themselves know it
    assert again.config == weights.config
    with pytest.warns(UserWarning, match="its `rotations` are the transpose of ours"):
        Weights.random(ODD_NO_BIAS).save(tmp_path / "l.safetensors", dialect="lucidrains")
    with pytest.warns(UserWarning, match="divide the translations of its frames by 10"):
        Weights.random(NATIVE["framediff"][1]).save(tmp_path / "f.pt", dialect="framediff")


def test_transformers_reads_what_is_written(tmp_path):
    """Its loader needs a format entry in .safetensors metadata."""
    pytest.importorskip("torch")
    from safetensors import safe_open

    Weights.random(replace(ONE_WIDTH, norm_epsilon=1e-8)).save(
        tmp_path / "e.safetensors", dialect="esmfold", root="trunk.structure_module.ipa"
    )
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert all(key.startswith("trunk.structure_module.ipa.") for key in file.keys())
    assert Weights.load(tmp_path / "e.safetensors").config == ONE_WIDTH


# --- Names and shapes of systems without a package


MANIFESTS = json.loads((Path(__file__).parents[1] / "data" / "manifests.json").read_text())


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_and_shapes_are_theirs(name):
    """The lists, at real sizes, were written from `CONVENTIONS` and not from our tables."""
    manifest = MANIFESTS[name]
    presets = {"ipa": IPAConfig, "structure module": StructureModuleConfig}
    config = getattr(presets[manifest["module"]], manifest["preset"])()
    weights = Weights.random(config)
    expected = {
        name.format(layer): shape
        for name, shape in manifest["shapes"].items()
        for layer in range(manifest.get("layers", 1) if "{}" in name else 1)
    }
    assert {name: list(x.shape) for name, x in state_of(weights, manifest["dialect"]).items()} == expected


@pytest.mark.parametrize("dialect", [None, "openfold_v1", "esmfold"])
def test_two_systems_with_the_same_function_are_not_ambiguous(dialect, tmp_path):
    """OpenFold 1 and ESMFold have the same names and functions, so a structure module's config is fully known."""
    pytest.importorskip("torch")
    state = Weights.random(SMALL_MODULE).to_torch(dialect="openfold_v1", root="model.structure_module")
    found = Weights.from_torch(state, dialect=dialect)
    assert (replace_untold(found.config), found.assumed_function) == (replace_untold(SMALL_MODULE), {})
    found.save(tmp_path / "a.npz", dialect="alphafold")
    found.save(tmp_path / "a.safetensors")


def test_an_attention_in_openfold_1s_names_may_be_anothers():
    """ABodyBuilder3 has another ε under these names, so ε is known only if the user names the system."""
    pytest.importorskip("torch")
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1", root="a")
    assert set(Weights.from_torch(state).assumed_function) == {"norm_epsilon"}
    for dialect in ("openfold_v1", "esmfold"):
        assert not Weights.from_torch(state, dialect=dialect).assumed
    state = Weights.random(ONE_WIDTH).to_torch(dialect="esmfold", root="trunk.structure_module.ipa")
    assert not Weights.from_torch(state).assumed


@pytest.mark.parametrize(
    ("name", "assumed"),
    [
        ("openfold", set()),
        ("openfold multimer", set()),
        ("framediff", set()),
        ("frameflow", set()),
        ("openfold structure module", set()),
        ("openfold multimer structure module", set()),
        ("bioemu", set()),
        ("omegafold", set()),
        ("lucidrains", {"norm_epsilon"}),
        ("lucidrains block", {"ipa.norm_epsilon", "post_norm"}),
        ("lucidrains transformer", {"block.ipa.norm_epsilon", "block.post_norm", "detach_rotations"}),
    ],
)
def test_a_system_determines_what_all_its_models_share(name, assumed):
    """It does not determine what its constructors take as arguments."""
    dialect, config = NATIVE[name]
    state = {f"a.{x}": y.shape for x, y in state_of(Weights.random(config), dialect).items()}
    for each in (None, dialect):
        *_, found = find_module(state, dialect=each)
        assert {path for path in found if is_functional(path)} == assumed


def test_esmfolds_epsilon_is_that_of_its_published_class():
    """Value points of zero length have a norm of ε alone, so 1e-12 in its place would show."""
    pytest.importorskip("transformers")
    from transformers.models.esm.configuration_esm import StructureModuleConfig as EsmConfig

    assert IPAConfig.esmfold().norm_epsilon == StructureModuleConfig.esmfold().ipa.norm_epsilon == EsmConfig().epsilon
    weights = Weights.random(IPAConfig.esmfold())
    arrays = {name: x * (0 if name.startswith("kv_") else 1) for name, x in weights.arrays.items()}
    rest = arrays["output_projection/weights"].copy()
    scalars, lengths = 12 * 16 + 3 * 12 * 8, 12 * 8
    rest[:scalars], rest[scalars + lengths :] = 0, 0
    arrays |= {"output_projection/weights": rest, "output_projection/bias": 0 * arrays["output_projection/bias"]}
    case = make_case("lengths", IPAConfig.esmfold(), (1,), weights=replace(weights, arrays=arrays))
    case = replace(case, mask=np.ones_like(case.mask)).astype("float32")
    theirs = peers.run_esmfold(case)["out"]
    assert np.abs(theirs).max() > 1e-5
    names = {"case": "lengths", "stage": "out", "dtype": "float32", "subject": "torch", "reference": "theirs"}
    for epsilon, same in ((1e-8, True), (1e-12, False)):
        weights = replace(case.weights, config=replace(case.config, norm_epsilon=epsilon))
        row = compare(RUNNERS["torch"](replace(case, weights=weights), gradients=False)["out"], theirs, **names)
        assert row.passed == same, str(row)
