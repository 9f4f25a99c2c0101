"""Weights of whole structure modules in files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from weights_cases import CONFIGS, FULL_ROOT, ITERATION, assert_same_bits

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of, replace_attention
from ipa_bridge.weights import Weights
from ipa_bridge.weights.assumptions import functional_fields
from ipa_parity.attention.cases import ODD


def test_alphafolds_file_holds_a_structure_module_an_attention_and_a_head(tmp_path):
    """Each is found among a whole model's parameters by its config or its path."""
    config, head = StructureModuleConfig.alphafold_multimer(), PredictedLDDTConfig()
    module, confidence = Weights.random(config), Weights.random(head)
    tree = module.to_haiku(root=f"{ITERATION}/structure_module")
    tree |= confidence.to_haiku(root=f"{ITERATION}/predicted_lddt_head")
    tree[f"{ITERATION}/evoformer/single_activations"] = {"weights": np.ones((3, 3), np.float32)}
    np.savez(
        tmp_path / "whole.npz", **{f"{name}//{leaf}": x for name, leaves in tree.items() for leaf, x in leaves.items()}
    )
    found = Weights.load(tmp_path / "whole.npz")
    assert found.config == config
    assert_same_bits(found.arrays, module.arrays)
    of_head = Weights.load(tmp_path / "whole.npz", root=f"{ITERATION}/predicted_lddt_head")
    assert of_head.config == head
    assert_same_bits(of_head.arrays, confidence.arrays)
    attention = found.subtree("fold_iteration/invariant_point_attention")
    assert attention.config == config.ipa
    again = Weights.load(tmp_path / "whole.npz", root=FULL_ROOT)
    assert_same_bits(again.arrays, attention.arrays)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("name", ["structure module", "untied structure module", "confidence head"])
def test_files_of_whole_modules_round_trip(name, suffix, tmp_path):
    pytest.importorskip("torch")
    weights = Weights.random(CONFIGS[name])
    weights.save(tmp_path / f"weights{suffix}")
    again = Weights.load(tmp_path / f"weights{suffix}")
    assert again.config == weights.config
    assert_same_bits(dict(sorted(again.arrays.items())), dict(sorted(weights.arrays.items())))


def test_safetensors_keep_what_shapes_do_not_determine(tmp_path):
    config = StructureModuleConfig(
        ipa=dataclasses.replace(ODD, frame_unit=3.0), num_layer=5, position_scale=3.0, dropout=0.5
    )
    Weights.random(config).save(tmp_path / "weights.safetensors")
    assert Weights.load(tmp_path / "weights.safetensors").config == config
    with pytest.warns(UserWarning, match=r"num_layer=5 \(.* 8\), position_scale=3\.0 \(.* 10\.0\)"):
        Weights.random(config).save(tmp_path / "weights.npz")


@pytest.mark.parametrize(
    "config", [IPAConfig.alphafold2(), StructureModuleConfig.alphafold_multimer(), IPABlockConfig.lucidrains(8)]
)
def test_files_saved_before_the_frames_unit_was_known_load(config, tmp_path):
    """Their metadata lack it, so it is unknown."""
    weights = Weights.random(config)
    weights.save(tmp_path / "new.safetensors")
    with safetensors.safe_open(tmp_path / "new.safetensors", "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    fields = json.loads(metadata["ipa_config"])
    del fields.get("ipa", fields)["frame_unit"]
    safetensors.numpy.save_file(arrays, tmp_path / "old.safetensors", {**metadata, "ipa_config": json.dumps(fields)})
    again = Weights.load(tmp_path / "old.safetensors")
    unknown = dataclasses.replace(attention_of(config), frame_unit=None)
    assert again.config == replace_attention(config, unknown)
    assert functional_fields(again.config) == functional_fields(config)
    assert_same_bits(dict(sorted(again.arrays.items())), dict(sorted(weights.arrays.items())))


def test_a_structure_modules_faults_are_named():
    weights = Weights.random(CONFIGS["untied structure module"])
    arrays = dict(weights.arrays)
    del arrays["fold_iteration_1/transition/weights"]
    with pytest.raises(ValueError, match="fold_iteration_1/transition/weights"):
        Weights(arrays, weights.config)
    with pytest.raises(ValueError, match="initial_projection"):
        Weights({**weights.arrays, "initial_projection/weights": np.zeros((2, 2))}, weights.config)
