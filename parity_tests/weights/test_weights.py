"""Weights round-trip bit for bit through Haiku, PyTorch and files; an attention is found in a larger model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weights_cases import CONFIGS, DTYPES, FULL_ROOT, assert_same_bits

from ipa_bridge.config import (
    IPAConfig,
)
from ipa_bridge.parameters import torch_name
from ipa_bridge.weights import Weights, files
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_haiku_round_trip(config, dtype):
    weights = Weights.random(config, dtype=np.dtype(dtype))
    tree = weights.to_haiku()
    again = Weights.from_haiku(tree, config=config)
    assert_same_bits(again.arrays, weights.arrays)
    for module, leaves in again.to_haiku().items():
        assert_same_bits(leaves, tree[module])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_torch_round_trip(config, dtype):
    torch = pytest.importorskip("torch")
    weights = Weights.random(config, dtype=np.dtype(dtype))
    state = weights.to_torch()
    assert {x.dtype for x in state.values()} == {getattr(torch, dtype)}
    assert_same_bits(Weights.from_torch(state, config=config).arrays, weights.arrays)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    widths=st.lists(st.integers(1, 5), min_size=7, max_size=7),
    layout=st.sampled_from(["monomer", "multimer"]),
    scalar_bias=st.booleans(),
    point_bias=st.booleans(),
    paired=st.booleans(),
)
def test_any_config_is_inferred_and_round_trips(widths, layout, scalar_bias, point_bias, paired):
    pytest.importorskip("torch")
    c_s, c_z, h, qk, v, p, pv = widths
    norm = {"norm_form": "clamp"} if layout == "multimer" and point_bias else {}
    multimers = 20.0 if point_bias else None
    config = IPAConfig(
        num_channel=c_s,
        pair_channel=c_z if paired else None,
        num_head=h,
        num_scalar_qk=qk,
        num_scalar_v=v,
        num_point_qk=p,
        num_point_v=pv,
        layout=layout,
        scalar_bias=scalar_bias,
        point_bias=point_bias,
        frame_unit=10.0 if layout == "monomer" else multimers,
        zero_init=layout == "monomer" or point_bias,
        **norm,
    )
    weights = Weights.random(config)
    for again in (Weights.from_haiku(weights.to_haiku()), Weights.from_torch(weights.to_torch())):
        assert again.config == config
        assert_same_bits(again.arrays, weights.arrays)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [ODD, ODD_MULTIMER, ODD_NO_PAIR, ODD_NO_BIAS, ODD_DOWN_Z])
def test_files_round_trip(config, dtype, suffix, tmp_path):
    pytest.importorskip("torch")
    weights = Weights.random(config, dtype=np.dtype(dtype))
    path = tmp_path / f"weights{suffix}"
    if (suffix, dtype) == (".npz", "bfloat16"):
        with pytest.raises(ValueError, match=r"\.npz cannot hold bfloat16"):
            weights.save(path)
        assert not list(tmp_path.iterdir())
        return
    weights.save(path)
    again = Weights.load(path)
    assert again.config == config
    assert_same_bits(dict(sorted(again.arrays.items())), dict(sorted(weights.arrays.items())))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saved_files_load_without_us(tmp_path):
    """AlphaFold's own reader takes the .npz; load_file and torch.load give state dicts."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    weights = Weights.random(ODD)
    for suffix in (".npz", ".safetensors", ".pt"):
        weights.save(tmp_path / f"w{suffix}")
    pytest.importorskip("haiku")
    utils = pytest.importorskip("alphafold.model.utils", reason="alphafold-colabfold is not installed")
    with np.load(tmp_path / "w.npz") as archive:
        tree = utils.flat_params_to_haiku(dict(archive))
    for module, leaves in weights.to_haiku().items():
        assert_same_bits({k: np.asarray(v) for k, v in sorted(tree[module].items())}, dict(sorted(leaves.items())))
    for state in (load_file(tmp_path / "w.safetensors"), torch.load(tmp_path / "w.pt", weights_only=True)):
        assert {name: x.shape for name, x in state.items()} == {n: x.shape for n, x in weights.to_torch().items()}


def test_config_travels_in_safetensors_and_can_be_overridden(tmp_path):
    config = dataclasses.replace(IPAConfig.lucidrains(8, heads=2, eps=3e-5), norm_form="clamp")
    path = tmp_path / "w.safetensors"
    Weights.random(config).save(path)
    assert Weights.load(path).config == config
    other = dataclasses.replace(config, norm_epsilon=1e-3)
    assert Weights.load(path, config=other).config == other


@pytest.mark.parametrize("junk", ["{", "[1]", "null", '{"num_head": 3}', '{"heads": 3}'])
def test_metadata_that_is_not_a_config(junk, tmp_path):
    path = tmp_path / "w.safetensors"
    Weights.random(ODD).save(path)
    with files.open_arrays(path) as file:
        arrays = {key: file[key] for key in file.keys}
    files.write_arrays(path, arrays, {"ipa_config": junk})
    with pytest.raises(ValueError, match=r"w\.safetensors: its ipa_config metadata is not a config .*pass config="):
        Weights.load(path)
    assert Weights.load(path, config=ODD).config == ODD


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_names_identify_the_layout_whatever_the_suffix(suffix, tmp_path):
    pytest.importorskip("torch")
    weights = Weights.random(ODD_MULTIMER)
    haiku = {f"{module}//{leaf}": x for module, leaves in weights.to_haiku().items() for leaf, x in leaves.items()}
    for arrays in (haiku, {name: x.numpy() for name, x in weights.to_torch().items()}):
        files.write_arrays(tmp_path / f"w{suffix}", arrays)
        found = Weights.load(tmp_path / f"w{suffix}")
        assert_same_bits({name: found.arrays[name] for name in weights.arrays}, weights.arrays)


def test_torch_names_follow_the_rule():
    assert torch_name("q_scalar/weights") == "q_scalar.weight"
    assert torch_name("q_point_projection/point_projection/bias") == "q_point_projection.point_projection.bias"
    assert torch_name("trainable_point_weights") == "trainable_point_weights"
    assert torch_name("single_layer_norm/scale") == "single_layer_norm.weight"
    assert torch_name("single_layer_norm/offset") == "single_layer_norm.bias"


def full_model(weights):
    """A haiku tree with an attention deep inside a larger model."""
    tree = weights.to_haiku(root=FULL_ROOT)
    tree["alphafold/alphafold_iteration/evoformer/preprocess_1d"] = {"weights": np.zeros((3, 4), np.float32)}
    tree[FULL_ROOT.rpartition("/")[0] + "/transition"] = {"weights": np.full((2, 2), np.nan)}
    return tree


def test_attention_is_found_in_a_larger_haiku_tree():
    weights = Weights.random(ODD)
    found = Weights.from_haiku(full_model(weights))
    assert found.root == FULL_ROOT
    assert_same_bits(found.arrays, weights.arrays)
    assert set(found.to_haiku()) == set(weights.to_haiku(root=FULL_ROOT))
    assert set(found.to_haiku(root="mine")) == set(weights.to_haiku(root="mine"))


def test_attention_is_found_in_a_larger_file_and_only_it_is_read(tmp_path, monkeypatch):
    weights = Weights.random(IPAConfig.alphafold2())
    flat = {f"{module}//{leaf}": x for module, leaves in full_model(weights).items() for leaf, x in leaves.items()}
    np.savez(tmp_path / "params_model_1.npz", **flat)
    read = []
    original = files.ArrayFile.__getitem__
    monkeypatch.setattr(files.ArrayFile, "__getitem__", lambda self, key: read.append(key) or original(self, key))
    found = Weights.load(tmp_path / "params_model_1.npz")
    assert_same_bits(found.arrays, weights.arrays)
    assert found.config == IPAConfig.alphafold2()
    assert found.root == "invariant_point_attention"
    assert set(read) == {key for key in flat if key.startswith(FULL_ROOT)}


def test_attention_is_found_under_a_torch_prefix():
    torch = pytest.importorskip("torch")
    weights = Weights.random(ODD_MULTIMER)
    state = {f"structure_module.ipa.{name}": x for name, x in weights.to_torch().items()}
    state["structure_module.transition.weight"] = torch.zeros(2)
    found = Weights.from_torch(state)
    assert_same_bits(dict(sorted(found.arrays.items())), dict(sorted(weights.arrays.items())))
    assert set(found.to_torch()) == set(weights.to_torch())


def test_flat_haiku_keys_are_taken_too():
    weights = Weights.random(ODD)
    flat = {f"{module}//{leaf}": x for module, leaves in weights.to_haiku().items() for leaf, x in leaves.items()}
    assert_same_bits(Weights.from_haiku(flat).arrays, weights.arrays)


def test_an_attention_without_a_path_above_it(tmp_path):
    weights = Weights.random(ODD)
    tree = weights.to_haiku(root="")
    assert set(tree) == {"", *(name.rpartition("/")[0] for name in weights.arrays)}
    flat = {f"{module}//{leaf}" if module else leaf: x for module, leaves in tree.items() for leaf, x in leaves.items()}
    for params in (tree, flat):
        found = Weights.from_haiku(params, config=ODD)
        assert found.root == ""
        for module, leaves in found.to_haiku().items():
            assert_same_bits(leaves, tree[module])
    found.save(tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as archive:
        assert set(archive) == set(flat)
    assert_same_bits(Weights.load(tmp_path / "w.npz").arrays, weights.arrays)


def test_several_attentions_need_a_choice():
    weights = Weights.random(ODD)
    tree = weights.to_haiku(root="block_0/ipa") | weights.to_haiku(root="block_1/ipa")
    with pytest.raises(ValueError, match=r"2 invariant point attentions .*root=, one of 'block_0/ipa', 'block_1/ipa'"):
        Weights.from_haiku(tree)
    assert Weights.from_haiku(tree, root="block_1/ipa").root == "block_1/ipa"
    with pytest.raises(ValueError, match="no module at root='block_2/ipa'"):
        Weights.from_haiku(tree, root="block_2/ipa")


def test_no_attention_at_all():
    with pytest.raises(ValueError, match=r"no name ends in .*trainable_point_weights.*; names are linear/w"):
        Weights.from_haiku({"linear": {"w": np.ones(3)}})
