"""What names and shapes do not determine is assumed and marked as assumed."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
from weights_cases import FULL_ROOT, ITERATION, assert_same_bits

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.weights import Weights, files
from ipa_parity.attention.cases import ODD, ODD_MULTIMER, ODD_NO_BIAS

BLOCK = IPABlockConfig(ipa=ODD_NO_BIAS, num_layer_in_transition=2, post_norm=False)
TRANSFORMER = IPATransformerConfig(block=BLOCK, num_layer=2, detach_rotations=False)
MODULE = StructureModuleConfig(ipa=ODD_MULTIMER, num_layer=4, position_scale=15.0, sidechain_channel=5)
HEAD = PredictedLDDTConfig(num_channel=5, hidden_channel=4, num_bin=3)
FORMS = {"norm_form", "norm_epsilon", "distance_form", "distance_epsilon", "point_weight_form", "logit_terms"}
STRUCTURE = {"position_scale", "detach_rotations", "project_initial_act", "skip_connection", "smallest_angle_length"}
UNTOLD = {
    "attention": (ODD, FORMS | {"position_scale"}),
    "block": (BLOCK, {"post_norm"} | {f"ipa.{name}" for name in FORMS | {"position_scale"}}),
    "transformer": (
        TRANSFORMER,
        {"detach_rotations", "original_composition_order", "block.post_norm"}
        | {f"block.ipa.{name}" for name in FORMS | {"position_scale"}},
    ),
    "structure module": (MODULE, STRUCTURE | {"num_layer"} | {f"ipa.{name}" for name in FORMS}),
    "untied structure module": (
        dataclasses.replace(MODULE, tied_layers=False, num_layer=2),
        STRUCTURE | {f"ipa.{name}" for name in FORMS},
    ),
    "confidence head": (HEAD, set()),
}
"""Fields by kind of module that change its function but that names and shapes do not determine."""


@pytest.mark.parametrize("name", UNTOLD)
def test_what_names_and_shapes_do_not_determine_is_assumed(name):
    pytest.importorskip("torch")
    config, untold = UNTOLD[name]
    weights = Weights.random(config)
    assert not weights.assumed
    for again in (Weights.from_haiku(weights.to_haiku()), Weights.from_torch(weights.to_torch())):
        assert set(again.assumed_function) == untold
        assert again.assumed >= untold
    for again in (
        Weights.from_haiku(weights.to_haiku(), config=config),
        Weights.from_torch(weights.to_torch(), config=config),
    ):
        assert not again.assumed


@pytest.mark.parametrize("name", [name for name, (_, untold) in UNTOLD.items() if untold])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_saving_assumed_fields_warns_once_with_the_config_to_pass(name, suffix, tmp_path, recwarn):
    """The assumed post_norm, number of layers and unit differ from the true ones."""
    pytest.importorskip("torch")
    config, untold = UNTOLD[name]
    weights = Weights.random(config)
    guessed = Weights.from_torch(weights.to_torch())
    assert guessed.config != config or name == "attention"
    guessed.save(tmp_path / f"guessed{suffix}")
    (warning,) = recwarn
    message = str(warning.message)
    assert all(field.rpartition(".")[2] in message for field in untold)
    names = {x.__name__: x for x in (IPAConfig, IPABlockConfig, IPATransformerConfig, StructureModuleConfig)}
    assert eval(re.search(r"config=(\w+\(.*\))", message)[1], names) == guessed.config
    assert warning.filename == __file__


@pytest.mark.parametrize("name", [name for name, (_, untold) in UNTOLD.items() if untold])
def test_a_file_marks_assumed_fields(name, tmp_path):
    pytest.importorskip("torch")
    config, untold = UNTOLD[name]
    weights = Weights.random(config)
    guessed = Weights.from_haiku(weights.to_haiku())
    for path in (tmp_path / "once.safetensors", tmp_path / "twice.safetensors"):
        with pytest.warns(UserWarning, match="assumed"):
            guessed.save(path)
        guessed = Weights.load(path)
        assert set(guessed.assumed_function) == untold
    told = Weights.load(path, config=config)
    assert not told.assumed
    told.save(path)
    assert (Weights.load(path).config, Weights.load(path).assumed) == (config, frozenset())


@pytest.mark.parametrize("name", UNTOLD)
def test_our_own_modules_determine_their_config(name, tmp_path):
    """This holds alone and within another model."""
    torch = pytest.importorskip("torch")
    import ipa_torch

    kinds = {
        IPAConfig: ipa_torch.InvariantPointAttention,
        IPABlockConfig: ipa_torch.IPABlock,
        IPATransformerConfig: ipa_torch.IPATransformer,
        StructureModuleConfig: ipa_torch.StructureModule,
        PredictedLDDTConfig: ipa_torch.PredictedLDDT,
    }
    config, _ = UNTOLD[name]
    weights = Weights.random(config)
    module = kinds[type(config)](config)
    module.load_state_dict(weights.to_torch())
    model = torch.nn.ModuleDict({"theirs": torch.nn.Linear(2, 2), "ours": module})
    for again in (Weights.from_torch(module), Weights.from_torch(model), Weights.from_torch(model, root="ours")):
        assert (again.config, again.assumed) == (config, frozenset())
        assert_same_bits({x: again.arrays[x] for x in weights.arrays}, weights.arrays)
    again.save(tmp_path / "w.safetensors")
    other = dataclasses.replace(config, zero_init=False) if name == "confidence head" else config
    assert Weights.from_torch(module, config=other).config == other
    assert set(Weights.from_torch(module.state_dict()).assumed_function) == UNTOLD[name][1]


def test_a_part_has_the_status_of_the_whole(tmp_path):
    pytest.importorskip("torch")
    within = {"structure module": "fold_iteration/invariant_point_attention", "transformer": "ipa_block_1"}
    for name, path in within.items():
        config, _ = UNTOLD[name]
        weights = Weights.random(config)
        part = weights.subtree(path)
        assert not part.assumed
        guessed = Weights.from_haiku(weights.to_haiku())
        part = guessed.subtree(path)
        inner = part.config
        assert inner == (guessed.config.ipa if name == "structure module" else guessed.config.block)
        prefix = "ipa." if name == "structure module" else "block."
        assert part.assumed == {x.removeprefix(prefix) for x in guessed.assumed if x.startswith(prefix)}
        assert part.assumed_function
        with pytest.warns(UserWarning, match="assumed"):
            guessed.save(tmp_path / "w.safetensors")
        again = Weights.load(tmp_path / "w.safetensors", root=path.replace("/", "."))
        assert (again.config, again.assumed) == (inner, part.assumed)


@pytest.mark.parametrize("layout", ["monomer", "multimer"])
def test_alphafolds_own_files_determine_everything(layout, tmp_path):
    """The path identifies AlphaFold, so each module converts to any system without a warning."""
    pytest.importorskip("torch")
    ipa = {
        "monomer": dataclasses.replace(ODD, num_scalar_v=4),
        "multimer": dataclasses.replace(ODD_MULTIMER, num_scalar_v=4),
    }
    position_scale = {"monomer": 10.0, "multimer": 20.0}
    config = StructureModuleConfig(ipa=ipa[layout], position_scale=position_scale[layout], sidechain_channel=5)
    weights = Weights.random(config)
    tree = weights.to_haiku(root=f"{ITERATION}/structure_module")
    tree |= Weights.random(HEAD).to_haiku(root=f"{ITERATION}/predicted_lddt_head")
    path = tmp_path / "params_model_1.npz"
    np.savez(path, **{f"{name}//{leaf}": x for name, leaves in tree.items() for leaf, x in leaves.items()})
    for found in (Weights.load(path), Weights.from_haiku(tree)):
        assert (found.config, found.assumed) == (config, frozenset())
    attention = Weights.load(path, config=config.ipa)
    for part in (
        attention,
        Weights.load(path, root=FULL_ROOT),
        found.subtree(FULL_ROOT.partition("structure_module/")[2]),
    ):
        assert (part.config, part.assumed) == (config.ipa, frozenset())
    assert not Weights.load(path, root=f"{ITERATION}/predicted_lddt_head").assumed
    found.save(tmp_path / "sm.safetensors")
    found.save(tmp_path / "openfold.pt", dialect="openfold")
    again = Weights.load(tmp_path / "openfold.pt")
    assert (again.config, again.assumed) == (config, frozenset())
    again.save(tmp_path / "again.safetensors")
    assert not Weights.load(tmp_path / "again.safetensors").assumed


@pytest.mark.parametrize("junk", ["{", "3", '["nonesuch"]', "[1]", '"norm_form"', "[" * 100_000])
def test_metadata_that_marks_no_fields(junk, tmp_path):
    path = tmp_path / "w.safetensors"
    Weights.random(ODD).save(path)
    with files.open_arrays(path) as file:
        arrays, metadata = {key: file[key] for key in file.keys}, dict(file.metadata)
    files.write_arrays(path, arrays, metadata | {"ipa_assumed": junk})
    with pytest.raises(ValueError, match=r"w\.safetensors: its ipa_assumed metadata .*pass config="):
        Weights.load(path)
    assert Weights.load(path, config=ODD).config == ODD


def test_a_field_that_a_files_config_leaves_out_is_assumed(tmp_path):
    """This happens with a file that is older than the field."""
    path = tmp_path / "w.safetensors"
    Weights.random(ODD).save(path)
    with files.open_arrays(path) as file:
        arrays, config = {key: file[key] for key in file.keys}, json.loads(file.metadata["ipa_config"])
    del config["position_scale"]
    files.write_arrays(path, arrays, {"ipa_config": json.dumps(config)})
    assert Weights.load(path).assumed == {"position_scale"}


def test_assumed_fields_are_fields():
    weights = Weights.random(MODULE)
    assert dataclasses.replace(weights, assumed={"ipa.norm_form"}).assumed == {"ipa.norm_form"}
    with pytest.raises(
        ValueError, match=r"assumed must name fields of the config, such as ipa\.num_channel; got norm_form"
    ):
        dataclasses.replace(weights, assumed={"norm_form"})


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copies_are_read_only_too(copied, dtype):
    weights = dataclasses.replace(Weights.random(ODD), root="a/b", assumed={"norm_form"}).astype(dtype)
    again = copied(weights)
    assert_same_bits(again.arrays, weights.arrays)
    assert (again.config, again.root, again.assumed) == (weights.config, "a/b", {"norm_form"})
    for x in again.arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 1


def test_weights_print_in_a_line_or_two():
    assert repr(Weights.random(ODD)).startswith("Weights(13 arrays of ")
    assert len(repr(Weights.random(StructureModuleConfig.alphafold2()))) < 500


@pytest.mark.parametrize(("unit", "suffix"), [(1.0, ".npz"), (None, ".pt")])
def test_a_unit_of_frames_that_a_file_cannot_store_warns(unit, suffix, tmp_path):
    """Otherwise a protein's frames could be ten times too small without any sign."""
    weights = Weights.random(dataclasses.replace(IPAConfig.alphafold2(), frame_unit=unit))
    with pytest.warns(UserWarning, match=rf"cannot store frame_unit={unit} \(Weights\.load will assume 10\.0\)"):
        weights.save(tmp_path / f"w{suffix}")


def test_weights_need_a_config():
    with pytest.raises(ValueError, match=r"config must be one of IPAConfig, .*; got 'alphafold2'"):
        Weights.random("alphafold2")
