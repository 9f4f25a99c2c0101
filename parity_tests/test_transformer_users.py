"""Blocks and transformers in use: motions, masks, dropout, dtypes, files, bad configs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_cases import (
    BLOCKS,
    FRAMEWORKS,
    RESIDUES,
    TRANSFORMERS,
    assert_close,
    draw,
    framework,
    run,
)

from ipa_bridge.config import IPATransformerConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.tolerance import bound, epsilon
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import numpy_dtype, torch_tensor
from ipa_parity.attention.cases import ODD


def moved(inputs: dict, rng) -> tuple[dict, np.ndarray, np.ndarray]:
    """The same inputs with all frames moved alike."""
    turn, shift = (x[0] for x in random_frames(rng, (1,), spread=20.0))
    rotation = turn @ inputs["rotation"]
    translation = inputs["translation"] @ turn.T + shift
    return {**inputs, "rotation": rotation, "translation": translation}, turn, shift


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, "plain", "tokens and points", "pre-norm blocks"])
@settings(max_examples=2)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_common_motion_moves_the_frames_and_nothing_else(name, each, seed):
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config, seed=seed)
    motion, turn, shift = moved(inputs, np.random.default_rng(seed))
    before, after = (run(framework(each), config, x) for x in (inputs, motion))
    expected = dict(before)
    if "rotation" in before:
        expected["rotation"] = turn @ before["rotation"]
        expected |= {x: before[x] @ turn.T + shift for x in ("translation", "points") if x in before}
    assert_close(after, expected, inputs["mask"], "float64")


@pytest.mark.parametrize("each", FRAMEWORKS)
def test_the_original_order_is_not_equivariant(each):
    """This is the negative control: the test detects the defect."""
    config = TRANSFORMERS["original order"]
    inputs = draw(config)
    motion, turn, _ = moved(inputs, np.random.default_rng(1))
    before, after = (run(framework(each), config, x) for x in (inputs, motion))
    off = np.abs(after["rotation"] - turn @ before["rotation"]).max()
    assert off > 1e3 * bound("rotation", "float64") * epsilon("float64")


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_valid_residues_ignore_the_masked_in_every_layer(name, each):
    """Neither the contents nor the number of masked residues matter."""
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config)
    other = draw(config, seed=77)
    mask = inputs["mask"]
    mixed = dict(inputs)
    for field in ("single", "rotation", "translation"):
        mixed[field] = np.where(mask.reshape(-1, *(1,) * (inputs[field].ndim - 1)), inputs[field], other[field])
    if inputs["pair"] is not None:
        both = (mask[:, None] & mask[None])[..., None]
        mixed["pair"] = np.where(both, inputs["pair"], other["pair"])
    before, after = (run(framework(each), config, x) for x in (inputs, mixed))
    assert_close(after, before, mask, "float64")
    short = {x: y[mask] if isinstance(y, np.ndarray) else y for x, y in inputs.items()}
    if inputs["pair"] is not None:
        short["pair"] = inputs["pair"][mask][:, mask]
    alone = run(framework(each), config, short)
    assert_close({x: y[mask] for x, y in before.items()}, alone, mask[mask], "float64")


# --- Uses


@pytest.mark.parametrize("each", FRAMEWORKS)
def test_frames_start_at_the_origin_and_tokens_are_checked(each):
    framework(each)
    config = TRANSFORMERS["tokens and points"]
    inputs = draw(config)
    if each == "jax":
        import jax

        import ipa_jax

        transformed = ipa_jax.transform_ipa_transformer(config)
        params = jax.tree.map(jax.numpy.asarray, inputs["weights"].to_haiku())
        call = lambda single, rigids=None: transformed.apply(params, None, single, None, rigids)  # noqa: E731
        identity = ipa_jax.Rigid.identity((RESIDUES,), dtype=jax.numpy.float64)
        tokens, floats = jax.numpy.asarray(inputs["single"]), jax.numpy.zeros((RESIDUES, 11))
    else:
        import torch

        import ipa_torch

        module = ipa_torch.IPATransformer(config).double()
        module.load_state_dict(inputs["weights"].to_torch())
        call = lambda single, rigids=None: module(single, None, rigids)  # noqa: E731
        identity = ipa_torch.Rigid.identity((RESIDUES,), dtype=torch.float64)
        tokens, floats = torch_tensor(inputs["single"]), torch.zeros(RESIDUES, 11)
    default, given_identity = call(tokens), call(tokens, identity)
    assert np.array_equal(_array(default.points), _array(given_identity.points))
    assert np.abs(_array(default.rigids.translation)).max() > 0.01
    with pytest.raises(ValueError, match=r"single must hold tokens, integers \(\*batch, N\).* is 5"):
        call(floats)


def _array(x) -> np.ndarray:
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)


def test_dropout_is_for_training_only():
    config = IPATransformerConfig(
        block=replace(BLOCKS["post-norm"], attention_dropout=0.5, transition_dropout=0.5), num_layer=2
    )
    inputs = draw(config)
    calm = run(framework("torch"), config, inputs)
    assert_close(calm, run(framework("jax"), config, inputs), inputs["mask"], "float64")
    import jax
    import torch

    import ipa_jax
    import ipa_torch

    module = ipa_torch.IPATransformer(config).double().train()
    module.load_state_dict(inputs["weights"].to_torch())
    arrays = [torch_tensor(inputs[x]) for x in ("single", "pair")]
    torch.manual_seed(0)
    assert not np.allclose(module(*arrays).act.detach().numpy(), module(*arrays).act.detach().numpy())
    apply = ipa_jax.transform_ipa_transformer(config).apply
    params = jax.tree.map(jax.numpy.asarray, inputs["weights"].to_haiku())
    arrays = [jax.numpy.asarray(inputs[x]) for x in ("single", "pair")]
    one, same, other = (apply(params, jax.random.key(k), *arrays, is_training=True).act for k in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.allclose(one, other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("each", FRAMEWORKS)
def test_half_precision_keeps_frames_in_float32(each, dtype):
    config = TRANSFORMERS["plain"]
    inputs = draw(config, dtype=dtype)
    found = run(framework(each), config, inputs)
    assert found["rotation"].dtype == np.float32
    wide = {
        x: y.astype(np.float64) if getattr(y, "dtype", None) == numpy_dtype(dtype) else y for x, y in inputs.items()
    }
    wide["weights"] = inputs["weights"].astype(np.float64)
    expected = run(each, config, wide)
    off = np.abs(found["act"].astype(np.float64) - expected["act"])[inputs["mask"]].max()
    assert off <= 8 * epsilon(dtype) * np.abs(expected["act"]).max()


def test_torch_compiles_and_checkpoints():
    torch = pytest.importorskip("torch")
    import ipa_torch

    config = TRANSFORMERS["pre-norm blocks"]
    inputs = draw(config)
    module = ipa_torch.IPATransformer(config).double().eval()
    module.load_state_dict(inputs["weights"].to_torch())
    single, pair, rotation, translation, mask = (
        torch_tensor(inputs[x]) for x in ("single", "pair", "rotation", "translation", "mask")
    )
    rigids = ipa_torch.Rigid(rotation, translation)
    eager = module(single, pair, rigids, mask)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(single, pair, rigids, mask)
    torch.testing.assert_close(compiled.act, eager.act, rtol=1e-12, atol=1e-12)
    exported = torch.export.export(module, (single, pair, rigids, mask)).module()
    torch.testing.assert_close(exported(single, pair, rigids, mask).act, eager.act, rtol=1e-12, atol=1e-12)


@pytest.mark.covering
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_files_round_trip(name, suffix, tmp_path):
    pytest.importorskip("torch")
    config = (BLOCKS | TRANSFORMERS)[name]
    weights = Weights.random(config)
    path = tmp_path / f"x{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fields that .npz and .pt cannot store
        weights.save(path)
    again = Weights.load(path, config=None if suffix == ".safetensors" else config)
    assert again.config == config
    assert all(again.arrays[x].tobytes() == y.tobytes() for x, y in weights.arrays.items())
    if isinstance(config, IPATransformerConfig):
        assert again.subtree("ipa_block_1").config == config.block
        assert again.subtree("ipa_block/invariant_point_attention").config == config.ipa


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layer": 0}, "num_layer must be a positive integer"),
        ({"num_token": 0}, "num_token must be a positive integer; got 0; pass None"),
        ({"predict_points": 1}, "predict_points must be True or False; got 1"),
        ({"block": ODD}, "block must be an IPABlockConfig"),
    ],
)
def test_impossible_transformers_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TRANSFORMERS["plain"], **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition_factor": 0}, "transition_factor must be a positive integer"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be a rate in \[0, 1\)"),
        ({"post_norm": None}, "post_norm must be True or False"),
        ({"ipa": None}, "ipa must be an IPAConfig"),
    ],
)
def test_impossible_blocks_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BLOCKS["post-norm"], **change)
