"""IPA blocks and the transformer: twins, the published ones' function, invariance and equivariance, masks, dropout."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.config import IPABlockConfig, IPATransformerConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.tolerance import bound, epsilon
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.dialects import find_dialect
from ipa_bridge.weights.tensors import numpy_dtype, torch_tensor
from ipa_parity.cases import ODD, ODD_MULTIMER, ODD_NO_PAIR
from ipa_parity.parity import installed_frameworks
from ipa_parity.report import compare

FRAMEWORKS = ("jax", "torch")
BLOCKS = {
    "post-norm": IPABlockConfig(ipa=ODD, transition_factor=2),
    "pre-norm": IPABlockConfig(ipa=ODD_MULTIMER, post_norm=False, num_layer_in_transition=2),
    "no pair": IPABlockConfig(ipa=ODD_NO_PAIR, num_layer_in_transition=1),
    "lucidrains": IPABlockConfig.lucidrains(16, heads=3, ff_mult=2),
    "lucidrains pre-norm": IPABlockConfig.lucidrains(16, heads=3, post_norm=False, require_pairwise_repr=False),
}
TRANSFORMERS = {
    "plain": IPATransformerConfig(block=BLOCKS["post-norm"], num_layer=2),
    "tokens and points": IPATransformerConfig(
        block=BLOCKS["no pair"], num_layer=2, num_token=5, predict_points=True, detach_rotations=False
    ),
    "original order": IPATransformerConfig.lucidrains(
        16, depth=3, heads=3, num_tokens=7, predict_points=True, original_composition_order=True
    ),
    "pre-norm blocks": IPATransformerConfig(block=BLOCKS["pre-norm"], num_layer=2, predict_points=True),
}
RESIDUES = 9


def framework(name: str) -> str:
    if name not in installed_frameworks():
        pytest.skip(f"{name} is not installed")
    return name


def draw(config, shape=(RESIDUES,), seed=0, dtype="float64") -> dict:
    """Weights and inputs by name; numbers rounded to a dtype."""
    rng, to = np.random.default_rng(seed), numpy_dtype(dtype)
    ipa = config.ipa
    single = rng.standard_normal((*shape, ipa.num_channel)).astype(to)
    if getattr(config, "num_token", None) is not None:
        single = rng.integers(0, config.num_token, shape)
    pair = rng.standard_normal((*shape, shape[-1], ipa.pair_channel)).astype(to) if ipa.pair_channel else None
    rotation, translation = (x.astype(to) for x in random_frames(rng, shape, spread=2.0))
    mask = rng.random(shape) > 0.2
    mask[..., shape[-1] // 2], mask[..., 0] = False, True
    return {
        "weights": Weights.random(config, seed=seed + 1).astype(to),
        "single": single,
        "pair": pair,
        "rotation": rotation,
        "translation": translation,
        "mask": mask,
    }


def run(framework: str, config, inputs: dict, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """Outputs by name, and gradients of their squared sum to parameters and frames."""
    weights, arrays = inputs["weights"], [inputs[x] for x in ("single", "pair", "rotation", "translation", "mask")]
    return (run_jax if framework == "jax" else run_torch)(config, weights, arrays, gradients)


def run_jax(config, weights, arrays, gradients):
    import jax

    arrays = [None if x is None else jax.numpy.asarray(x) for x in arrays]
    params = jax.tree.map(jax.numpy.asarray, weights.to_haiku())
    outputs, gradient = compiled_by_jax(config)
    found = jax.tree.map(np.asarray, outputs(params, *arrays))
    if gradients:
        by_module, *by_frames = gradient(params, *arrays)
        again = Weights.from_haiku(jax.tree.map(np.asarray, by_module), config=config)
        found |= {f"gradient/{name}": x for name, x in again.arrays.items()}
        found |= {f"gradient/{x}": np.asarray(y) for x, y in zip(("rotation", "translation"), by_frames, strict=True)}
    return found


@cache
def compiled_by_jax(config):
    """Outputs by name, and gradients of their squared sum: kept, since JAX compiles longer than it runs."""
    import haiku as hk
    import jax

    import ipa_jax

    if isinstance(config, IPATransformerConfig):
        transformed = ipa_jax.transform_ipa_transformer(config)
    else:
        transformed = hk.transform(lambda *xs: ipa_jax.IPABlock(config)(*xs))

    def outputs(params, single, pair, rotation, translation, mask):
        found = transformed.apply(params, None, single, pair, ipa_jax.Rigid(rotation, translation), mask)
        if not isinstance(config, IPATransformerConfig):
            return {"act": found}
        named = {"act": found.act, "rotation": found.rigids.rotation, "translation": found.rigids.translation}
        return named | ({} if found.points is None else {"points": found.points})

    loss = lambda *xs: sum((x**2).sum() for x in outputs(*xs).values())  # noqa: E731
    return jax.jit(outputs), jax.jit(jax.grad(loss, (0, 3, 4)))


def run_torch(config, weights, arrays, gradients):
    import torch

    import ipa_torch

    single, pair, rotation, translation, mask = (None if x is None else torch_tensor(x) for x in arrays)
    whole = isinstance(config, IPATransformerConfig)
    module = (ipa_torch.IPATransformer if whole else ipa_torch.IPABlock)(config).eval()
    module.to(next(iter(weights.to_torch().values())).dtype).load_state_dict(weights.to_torch())
    rotation.requires_grad_(), translation.requires_grad_()
    out = module(single, pair, ipa_torch.Rigid(rotation, translation), mask)
    found = {"act": out}
    if whole:
        found = {"act": out.act, "rotation": out.rigids.rotation, "translation": out.rigids.translation}
        found |= {} if out.points is None else {"points": out.points}
    arrays = {
        name: x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()
        for name, x in found.items()
    }
    if gradients:
        sum((x**2).sum() for x in found.values()).backward()
        grads = {name: x.grad for name, x in module.named_parameters()}
        arrays |= {f"gradient/{name}": x for name, x in Weights.from_torch(grads, config=config).arrays.items()}
        arrays |= {"gradient/rotation": rotation.grad.numpy(), "gradient/translation": translation.grad.numpy()}
    return arrays


def assert_close(actual, expected, mask, dtype):
    """Every stage within the tolerance table, in valid residues."""
    assert actual.keys() == expected.keys()
    for stage, x in expected.items():
        gradient = stage.startswith("gradient/")
        meaningful = None
        if not gradient:
            meaningful = np.broadcast_to(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x.shape)
        row = compare(
            actual[stage],
            x,
            case="transformer",
            stage=stage,
            dtype=dtype,
            subject="one",
            reference="other",
            meaningful=meaningful,
        )
        zero = gradient and not np.abs(x).max() > 1e-12
        assert zero or row.passed, str(row)


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (RESIDUES,)) for name in [*BLOCKS, *TRANSFORMERS]), ("post-norm", (2, 7)), ("plain", (2, 7))],
)
def test_the_twins_agree_outputs_and_gradients(name, shape):
    """In float64, where no ReLU flips."""
    if len(installed_frameworks()) < 2:
        pytest.skip("one of the frameworks is not installed")
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config, shape)
    jax, torch = (run(each, config, inputs, gradients=True) for each in FRAMEWORKS)
    assert_close(jax, torch, inputs["mask"], "float64")


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_float32_is_float64_rounded(name, each):
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config, dtype="float32")
    wide = {x: y.astype(np.float64) if getattr(y, "dtype", None) == np.float32 else y for x, y in inputs.items()}
    wide["weights"] = inputs["weights"].astype(np.float64)
    actual, expected = (run(framework(each), config, x) for x in (inputs, wide))
    assert {x.dtype for x in actual.values()} == {np.dtype(np.float32)}
    assert_close(actual, expected, inputs["mask"], "float32")


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_they_are_what_numpy_makes_of_the_same_parameters(name, each):
    """`semantics` is written without either framework; its rigid motions are its own."""
    config = (BLOCKS | TRANSFORMERS)[name]
    inputs = draw(config)
    p = {x: y.astype(np.float64) for x, y in inputs["weights"].arrays.items()}
    arrays = [inputs[x] for x in ("single", "pair", "rotation", "translation", "mask")]
    if isinstance(config, IPATransformerConfig):
        act, rotation, translation, points = semantics.transformer("ipa_jax", p, config, *arrays)
        expected = {"act": act, "rotation": rotation, "translation": translation}
        expected |= {} if points is None else {"points": points}
    else:
        expected = {"act": semantics.block("ipa_jax", p, config, *arrays)}
    assert_close(run(framework(each), config, inputs), expected, inputs["mask"], "float64")


# --- The published ones


@pytest.fixture
def package(monkeypatch):
    """`invariant-point-attention`, which takes two functions from pytorch3d, by their documentation."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("invariant_point_attention")

    def quaternion_multiply(a, b):
        (aw, ax, ay, az), (bw, bx, by, bz) = a.unbind(-1), b.unbind(-1)
        product = [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
        product = torch.stack(product, -1)
        return torch.where(product[..., :1] < 0, -product, product)

    def quaternion_to_matrix(quaternions):
        import ipa_torch

        return ipa_torch.Rigid.from_quaternion(quaternions, torch.zeros_like(quaternions[..., 1:])).rotation

    transforms = types.ModuleType("pytorch3d.transforms")
    transforms.quaternion_multiply, transforms.quaternion_to_matrix = quaternion_multiply, quaternion_to_matrix
    monkeypatch.setitem(sys.modules, "pytorch3d", types.ModuleType("pytorch3d"))
    monkeypatch.setitem(sys.modules, "pytorch3d.transforms", transforms)
    return found


@pytest.mark.covering("each")
@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("paired", [True, False])
def test_their_block_is_ours(package, each, post_norm, paired):
    """It loads our parameters strictly, and we theirs, bit for bit; outputs are the same."""
    options = {"heads": 3, "ff_mult": 2, "ff_num_layers": 3, "post_norm": post_norm, "require_pairwise_repr": paired}
    config = IPABlockConfig.lucidrains(16, **options)
    inputs = draw(config, (2, RESIDUES))
    theirs = package.IPABlock(dim=16, **options).double().eval()
    theirs.load_state_dict(inputs["weights"].to_torch(dialect="lucidrains"))
    again = Weights.from_torch(theirs.state_dict(), config=config)
    assert all(again.arrays[name].tobytes() == x.tobytes() for name, x in inputs["weights"].arrays.items())
    single, pair, rotation, translation, mask = (
        None if inputs[x] is None else torch_tensor(inputs[x])
        for x in ("single", "pair", "rotation", "translation", "mask")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = theirs(single, pairwise_repr=pair, rotations=rotation.mT, translations=translation, mask=mask)
    expected = {"act": out.detach().numpy()}
    assert_close(run(framework(each), config, inputs), expected, inputs["mask"], "float64")


@pytest.mark.covering("each")
@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("predict_points", [True, False])
@pytest.mark.parametrize("detach_rotations", [True, False])
def test_their_transformer_is_ours_in_its_own_order(package, each, predict_points, detach_rotations):
    """Outputs, and gradients of its parameters. Without a mask: it takes one and does nothing with it."""
    torch = pytest.importorskip("torch")
    options = {"heads": 3, "depth": 3, "num_tokens": 7, "predict_points": predict_points}
    options |= {"detach_rotations": detach_rotations}
    config = IPATransformerConfig.lucidrains(16, original_composition_order=True, **options)
    inputs = draw(config, (2, RESIDUES))
    inputs["mask"][:] = True
    rng = np.random.default_rng(5)
    quaternions = rng.standard_normal((2, RESIDUES, 4))
    quaternions /= np.linalg.norm(quaternions, axis=-1, keepdims=True)
    import ipa_torch

    started = ipa_torch.Rigid.from_quaternion(torch_tensor(quaternions), torch.zeros(2, RESIDUES, 3).double())
    inputs["rotation"] = started.rotation.mT.contiguous().numpy()  # their frames are row-vector ones
    theirs = package.IPATransformer(dim=16, **options).double().eval()
    theirs.load_state_dict(inputs["weights"].to_torch(dialect="lucidrains"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = theirs(
            torch_tensor(inputs["single"]),
            translations=torch_tensor(inputs["translation"]),
            quaternions=torch_tensor(quaternions),
            pairwise_repr=torch_tensor(inputs["pair"]),
        )
    ours = run(framework(each), config, inputs)
    if predict_points:
        expected = {"points": out.detach().numpy()}
    else:
        act, translation, turned = out
        rotation = ipa_torch.Rigid.from_quaternion(turned, translation).rotation.mT
        expected = {"act": act, "rotation": rotation, "translation": translation}
        expected = {name: x.detach().numpy() for name, x in expected.items()}
    assert_close({name: ours[name] for name in expected}, expected, inputs["mask"], "float64")
    if each == "torch" and predict_points:
        (out**2).sum().backward()
        grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in theirs.named_parameters()}
        grads = {
            name: torch.zeros_like(dict(theirs.named_parameters())[name]) if x is None else x
            for name, x in grads.items()
        }
        theirs_by_name = Weights.from_torch(grads, config=config).arrays
        module = ipa_torch.IPATransformer(config).double()
        module.load_state_dict(inputs["weights"].to_torch())
        rigids = ipa_torch.Rigid(torch_tensor(inputs["rotation"]), torch_tensor(inputs["translation"]))
        points = module(torch_tensor(inputs["single"]), torch_tensor(inputs["pair"]), rigids).points
        (points**2).sum().backward()
        mine = Weights.from_torch({name: x.grad for name, x in module.named_parameters()}, config=config).arrays
        for name, x in theirs_by_name.items():
            scale = np.abs(x).max()
            if scale > 1e-9:  # the pair bias's own bias has none
                assert np.abs(mine[name] - x).max() <= 1e-10 * scale, name


def test_the_right_order_is_another_function_and_said_to_be():
    config = replace(TRANSFORMERS["original order"], original_composition_order=False)
    weights = Weights.random(config)
    with pytest.raises(ValueError, match="--allow-lossy composition_order"):
        weights.to_torch(dialect="lucidrains")
    converted, _ = weights.converted(find_dialect("lucidrains"), allow_lossy=["composition_order"])
    assert converted.config.original_composition_order
    apart = [semantics.probe("ipa_jax", x.arrays, x.config) for x in (weights, converted)]
    assert semantics.distance(*apart) > 1e-3


# --- Motions


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
    """The negative control: this test sees the defect."""
    config = TRANSFORMERS["original order"]
    inputs = draw(config)
    motion, turn, _ = moved(inputs, np.random.default_rng(1))
    before, after = (run(framework(each), config, x) for x in (inputs, motion))
    off = np.abs(after["rotation"] - turn @ before["rotation"]).max()
    assert off > 1e3 * bound("rotation", "float64") * epsilon("float64")


@pytest.mark.parametrize("each", FRAMEWORKS)
@pytest.mark.parametrize("name", [*BLOCKS, *TRANSFORMERS])
def test_valid_residues_ignore_the_masked_in_every_layer(name, each):
    """Whatever lies in masked residues, and however many there are."""
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
        warnings.simplefilter("ignore")  # of what .npz and .pt cannot say
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
