"""Weights go between haiku, torch and files bit for bit, and what does not fit is named."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of, replace_attention
from ipa_bridge.parameters import ipa_parameters, torch_name
from ipa_bridge.weights import Weights, files
from ipa_bridge.weights.assumptions import functional_fields
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR

CONFIGS = {
    "alphafold2": IPAConfig.alphafold2(),
    "alphafold-multimer": IPAConfig.alphafold_multimer(),
    "esmfold": IPAConfig.esmfold(),
    "lucidrains": IPAConfig.lucidrains(64, eps=1e-5),
    "odd": ODD,
    "odd multimer": ODD_MULTIMER,
    "no pair": ODD_NO_PAIR,
    "no bias": ODD_NO_BIAS,
    "framediff": IPAConfig.framediff(),
    "down_z": ODD_DOWN_Z,
    "structure module": StructureModuleConfig.alphafold2(),
    "structure module multimer": StructureModuleConfig(ipa=ODD_MULTIMER, position_scale=20.0, sidechain_channel=5),
    "untied structure module": StructureModuleConfig(
        ipa=ODD, num_layer=3, tied_layers=False, num_layer_in_transition=2
    ),
    "confidence head": PredictedLDDTConfig(),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
FULL_ROOT = "alphafold/alphafold_iteration/structure_module/fold_iteration/invariant_point_attention"


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


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
def test_any_config_is_inferred_and_goes_round(widths, layout, scalar_bias, point_bias, paired):
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
def test_metadata_that_is_no_config(junk, tmp_path):
    path = tmp_path / "w.safetensors"
    Weights.random(ODD).save(path)
    with files.open_arrays(path) as file:
        arrays = {key: file[key] for key in file.keys}
    files.write_arrays(path, arrays, {"ipa_config": junk})
    with pytest.raises(ValueError, match=r"w\.safetensors: its ipa_config metadata is no config .*pass config="):
        Weights.load(path)
    assert Weights.load(path, config=ODD).config == ODD


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_names_tell_the_layout_whatever_the_suffix(suffix, tmp_path):
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


def spoiled(**changes):
    arrays = dict(Weights.random(ODD).arrays)
    for name, x in changes.items():
        if x is None:
            del arrays[name]
        else:
            arrays[name] = x
    return arrays


def haiku_tree(arrays):
    tree = {}
    for name, x in arrays.items():
        module, _, leaf = f"invariant_point_attention/{name}".rpartition("/")
        tree.setdefault(module, {})[leaf] = x
    return tree


def test_everything_wrong_is_named_at_once():
    nan = Weights.random(ODD).arrays["output_projection/bias"].copy()
    nan[3] = np.nan
    arrays = spoiled(
        **{
            "q_scalar/weights": None,
            "attention_2d/bias": None,
            "q_scalar_2/weights": np.ones(3),
            "kv_scalar/bias": np.ones(2, np.float32),
            "output_projection/bias": nan,
            "q_point_local/bias": np.ones(45, np.int64),
        }
    )
    with pytest.raises(ValueError, match="these parameters do not fit") as error:
        Weights(arrays, ODD)
    for line in (
        "missing q_scalar/weights (11, 12)",
        "missing attention_2d/bias (3,)",
        "unexpected q_scalar_2/weights (3,)",
        "kv_scalar/bias must be (18,), got (2,)",
        "output_projection/bias holds NaN or infinity",
        "q_point_local/bias must be floating-point, got int64",
    ):
        assert f"\n  {line}" in str(error.value)
    assert str(error.value).count("\n") == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_scalar/weights": np.ones((11, 13))}, "q_scalar/weights has 13 outputs, which 3 heads do not divide"),
        ({"q_point_local/weights": np.ones((11, 12))}, "has 12 outputs, which 3 heads of 3 coordinates do not divide"),
        ({"kv_scalar/weights": None}, "no invariant point attention without kv_scalar/weights"),
        ({"kv_scalar/weights": np.ones((11, 6))}, "num_scalar_v must be a positive integer; got -2"),
        ({"trainable_point_weights": np.ones(0)}, "empty, or have too few axes: trainable_point_weights (0,)"),
        ({"attention_2d/weights": np.ones(())}, "empty, or have too few axes: attention_2d/weights ()"),
        ({"q_scalar/weights": np.ones(12)}, "empty, or have too few axes: q_scalar/weights (12,)"),
        ({"q_scalar/weights": np.ones((0, 12))}, "empty, or have too few axes: q_scalar/weights (0, 12)"),
    ],
)
def test_shapes_that_no_config_has(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Weights.from_haiku(haiku_tree(spoiled(**changes)))


@pytest.mark.parametrize("given", [True, False], ids=["config given", "config inferred"])
@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (ODD, "trainable_point_weights", (3, 1)),
        (ODD, "q_scalar/bias", (12, 1)),
        (ODD, "output_projection/bias", (1, 11)),
        (ODD_MULTIMER, "q_scalar_projection/weights", (11, 12)),
        (ODD_MULTIMER, "q_point_projection/point_projection/bias", (45,)),
    ],
)
def test_right_size_in_the_wrong_shape_is_refused(config, name, shape, given):
    arrays = dict(Weights.random(config).arrays)
    expected = arrays[name].shape
    arrays[name] = arrays[name].reshape(shape)
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {expected}, got {shape}")):
        Weights.from_haiku(haiku_tree(arrays), config=config if given else None)


def test_torch_state_dicts_are_checked_too():
    torch = pytest.importorskip("torch")
    state = Weights.random(ODD).to_torch()
    del state["q_scalar.bias"]
    state["extra.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="do not fit") as error:
        Weights.from_torch(state, config=ODD)
    for part in ("missing q_scalar/bias", "unexpected extra/weights"):
        assert part in str(error.value)
    state = Weights.random(ODD).to_torch()
    state["output_projection.bias"][0] = torch.inf
    with pytest.raises(ValueError, match="output_projection/bias holds NaN or infinity"):
        Weights.from_torch(state, config=ODD)


def test_torch_parameters_in_the_wrong_shape_are_refused():
    torch = pytest.importorskip("torch")
    state = Weights.random(ODD).to_torch() | {"trainable_point_weights": torch.ones(3, 1)}
    with pytest.raises(ValueError, match=r"trainable_point_weights must be \(3,\), got \(3, 1\)"):
        Weights.from_torch(state)


def test_what_is_no_tensor_is_named():
    pytest.importorskip("torch")
    state = Weights.random(ODD).to_torch()
    state |= {"_extra_state": {"step": 1}, "q_scalar.bias": state["q_scalar.bias"].numpy()}
    with pytest.raises(ValueError, match=r"tensors were expected.*q_scalar\.bias \(ndarray\), _extra_state \(dict\)"):
        Weights.from_torch(state)
    with pytest.raises(ValueError, match="a state dict or a module was expected; got a list"):
        Weights.from_torch([])


def test_parameters_noncontiguous_or_with_gradients_are_taken():
    torch = pytest.importorskip("torch")
    state = Weights.random(ODD).to_torch()
    odd = {name: torch.nn.Parameter(x.T.contiguous().T if x.ndim == 2 else x) for name, x in state.items()}
    assert_same_bits(Weights.from_torch(odd).arrays, Weights.from_torch(state).arrays)


def test_jax_arrays_are_taken():
    jax = pytest.importorskip("jax")
    weights = Weights.random(ODD, dtype=ml_dtypes.bfloat16)
    tree = jax.tree.map(jax.numpy.asarray, weights.to_haiku())
    found = Weights.from_haiku(tree).arrays
    assert_same_bits({name: found[name] for name in weights.arrays}, weights.arrays)


def test_arrays_are_read_only_and_tensors_are_not_theirs():
    torch = pytest.importorskip("torch")
    weights = Weights.random(ODD)
    with pytest.raises(ValueError, match="read-only"):
        weights.arrays["q_scalar/bias"][0] = 1
    before = weights.arrays["q_scalar/bias"].copy()
    torch.nn.init.zeros_(weights.to_torch()["q_scalar.bias"])
    assert (weights.arrays["q_scalar/bias"] == before).all()


def test_later_changes_of_numpy_arrays_do_not_reach_the_weights():
    expected = Weights.random(ODD)
    source = {name: x.copy() for name, x in expected.arrays.items()}
    made = Weights(source, ODD), Weights.from_haiku(haiku_tree(source))
    for x in source.values():
        x += 1
    for weights in made:
        assert_same_bits(weights.arrays, expected.arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_on_does_not_reach_the_weights(dtype):
    torch = pytest.importorskip("torch")
    expected = Weights.random(ODD, dtype=np.dtype(dtype))
    module = torch.nn.ParameterDict({name.replace(".", "|"): x for name, x in expected.to_torch().items()})
    snapshot = Weights.from_torch({name.replace("|", "."): x for name, x in module.items()})
    with torch.no_grad():
        for x in module.values():
            x.add_(1)
    assert_same_bits({name: snapshot.arrays[name] for name in expected.arrays}, expected.arrays)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_later_changes_of_the_file_do_not_reach_the_weights(suffix, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / f"w{suffix}"
    expected = Weights.random(ODD)
    expected.save(path)
    loaded = Weights.load(path)
    with open(path, "r+b") as handle:
        handle.write(bytes(path.stat().st_size))
    assert_same_bits({name: loaded.arrays[name] for name in expected.arrays}, expected.arrays)


def test_random_weights_are_seeded_and_nowhere_initial():
    config = IPAConfig.alphafold2()
    weights = Weights.random(config, seed=3)
    assert_same_bits(weights.arrays, Weights.random(config, seed=3).arrays)
    assert {name: x.shape for name, x in weights.arrays.items()} == ipa_parameters(config)
    other = Weights.random(config, seed=4).arrays
    assert all((x != other[name]).any() and (x != 0).all() for name, x in weights.arrays.items())


@pytest.mark.parametrize("config", [IPAConfig.alphafold2(), IPAConfig.alphafold_multimer(), IPAConfig.esmfold()])
def test_random_weights_have_the_size_of_trained_ones(config):
    for name, x in Weights.random(config).arrays.items():
        if name == "trainable_point_weights":
            assert abs(x.mean() - config.point_weight_init) < 0.3
            assert 0.1 < x.std() < 0.6
        else:
            scale = len(x) ** -0.5 if name.endswith("/weights") else 0.1
            assert 0.5 < x.std() / scale < 2, name


ITERATION = "alphafold/alphafold_iteration"


def test_alphafolds_file_holds_a_structure_module_an_attention_and_a_head(tmp_path):
    """Each is found among a whole model's parameters, by what it is or by where."""
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


def test_safetensors_keep_what_shapes_do_not_tell(tmp_path):
    config = StructureModuleConfig(
        ipa=dataclasses.replace(ODD, frame_unit=3.0), num_layer=5, position_scale=3.0, dropout=0.5
    )
    Weights.random(config).save(tmp_path / "weights.safetensors")
    assert Weights.load(tmp_path / "weights.safetensors").config == config
    with pytest.warns(UserWarning, match=r"num_layer is 5, not 8; that position_scale is 3\.0, not 10\.0"):
        Weights.random(config).save(tmp_path / "weights.npz")


@pytest.mark.parametrize(
    "config", [IPAConfig.alphafold2(), StructureModuleConfig.alphafold_multimer(), IPABlockConfig.lucidrains(8)]
)
def test_files_saved_before_the_frames_unit_was_known_load(config, tmp_path):
    """Their metadata do not tell it: it is unknown."""
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


# --- What is told, and what is assumed


BLOCK = IPABlockConfig(ipa=ODD_NO_BIAS, num_layer_in_transition=2, post_norm=False)
TRANSFORMER = IPATransformerConfig(block=BLOCK, num_layer=2, detach_rotations=False)
MODULE = StructureModuleConfig(ipa=ODD_MULTIMER, num_layer=4, position_scale=15.0, sidechain_channel=5)
HEAD = PredictedLDDTConfig(num_channel=5, hidden_channel=4, num_bin=3)
NORM = {"norm_form", "norm_epsilon"}
UNTOLD = {
    "attention": (ODD, NORM | {"position_scale"}),
    "block": (BLOCK, {"post_norm", "ipa.norm_form", "ipa.norm_epsilon", "ipa.position_scale"}),
    "transformer": (
        TRANSFORMER,
        {"detach_rotations", "original_composition_order", "block.post_norm"}
        | {f"block.ipa.{name}" for name in NORM | {"position_scale"}},
    ),
    "structure module": (MODULE, {"num_layer", "position_scale"} | {f"ipa.{name}" for name in NORM}),
    "untied structure module": (
        dataclasses.replace(MODULE, tied_layers=False, num_layer=2),
        {"position_scale"} | {f"ipa.{name}" for name in NORM},
    ),
    "confidence head": (HEAD, set()),
}
"""By kind of module, what a trained one computes by and neither names nor shapes tell."""


@pytest.mark.parametrize("name", UNTOLD)
def test_what_names_and_shapes_do_not_tell_is_assumed(name):
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
def test_saving_what_is_assumed_warns_once_with_the_config_to_pass(name, suffix, tmp_path, recwarn):
    """The guess differs from what was meant in post_norm, in the number of layers, in Å."""
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
def test_a_file_keeps_what_is_assumed_apart(name, tmp_path):
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
def test_our_own_modules_tell(name, tmp_path):
    """Alone and within a model of someone else's."""
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
def test_alphafolds_own_files_tell_everything(layout, tmp_path):
    """Its path tells whose it is: each module converts to any system without a warning."""
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
    """As of a file that is older than the field."""
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
    with pytest.raises(ValueError, match=r"assumed must name fields of the config, as ipa\.num_channel; got norm_form"):
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
def test_the_unit_of_frames_that_a_file_cannot_say_is_warned_of(unit, suffix, tmp_path):
    """A protein's frames would come ten times too small, and nothing else would tell."""
    weights = Weights.random(dataclasses.replace(IPAConfig.alphafold2(), frame_unit=unit))
    with pytest.warns(UserWarning, match=f"cannot say that frame_unit is {unit}, not 10.0, as Weights.load will"):
        weights.save(tmp_path / f"w{suffix}")


def test_what_is_no_config_has_no_weights():
    with pytest.raises(ValueError, match=r"config must be one of IPAConfig, .*; got 'alphafold2'"):
        Weights.random("alphafold2")
