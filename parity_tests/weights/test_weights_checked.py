"""Errors in weights are named, and accepted weights never change afterwards."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from weights_cases import DTYPES, assert_same_bits

from ipa_bridge.config import (
    IPAConfig,
)
from ipa_bridge.parameters import ipa_parameters
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import ODD, ODD_MULTIMER


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
        ({"kv_scalar/weights": None}, "an invariant point attention must have kv_scalar/weights"),
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


def test_values_that_are_not_tensors_are_named():
    pytest.importorskip("torch")
    state = Weights.random(ODD).to_torch()
    state |= {"_extra_state": {"step": 1}, "q_scalar.bias": state["q_scalar.bias"].numpy()}
    with pytest.raises(ValueError, match=r"tensors were expected.*q_scalar\.bias \(ndarray\), _extra_state \(dict\)"):
        Weights.from_torch(state)
    with pytest.raises(ValueError, match="a state dict or a module was expected; got a list"):
        Weights.from_torch([])


def test_parameters_noncontiguous_or_with_gradients_are_accepted():
    torch = pytest.importorskip("torch")
    state = Weights.random(ODD).to_torch()
    odd = {name: torch.nn.Parameter(x.T.contiguous().T if x.ndim == 2 else x) for name, x in state.items()}
    assert_same_bits(Weights.from_torch(odd).arrays, Weights.from_torch(state).arrays)


def test_jax_arrays_are_accepted():
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
