"""Moving, reordering and padding residues, tested for every module in both frameworks and dtypes in one table.

Frames that are moved alike move what is predicted with them, and nothing else; reordered residues reorder it; masked
ones that are added change nothing. Errors are in eps of the dtype, of the worst output.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.config import IPABlockConfig, IPAConfig, IPATransformerConfig, StructureModuleConfig
from ipa_bridge.proteins.frames import random_frames, random_rotations
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import compare

MODULES = {
    "attention": IPAConfig.alphafold2(),
    "block": IPABlockConfig(ipa=IPAConfig.alphafold2()),
    "transformer": IPATransformerConfig(
        block=IPABlockConfig(ipa=IPAConfig.alphafold2()), num_layer=4, predict_points=True
    ),
    "structure module": StructureModuleConfig.alphafold2(),
}
CHANGES = ("rotation", "translation", "permutation", "padding")
RESIDUES, PADDED = 20, 27
MOVED = ("rotation", "translation", "points", "atom14")


@cache
def inputs(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    config = MODULES[name]
    rotation, translation = random_frames(rng, (RESIDUES,), spread=2.0)
    ipa = config if isinstance(config, IPAConfig) else config.ipa
    if isinstance(config, StructureModuleConfig):
        translation = translation * config.position_scale  # its frames are in Å
    return {
        "single": rng.standard_normal((RESIDUES, ipa.num_channel)),
        "pair": rng.standard_normal((RESIDUES, RESIDUES, ipa.pair_channel)),
        "rotation": rotation,
        "translation": translation,
        "mask": rng.random(RESIDUES) > 0.2,
        "aatype": rng.integers(0, 20, RESIDUES),
    }


@cache
def model(name: str, framework: str, dtype: str) -> Callable[[dict], dict[str, np.ndarray]]:
    """A function from input arrays to outputs, both by name."""
    config = MODULES[name]
    weights = Weights.random(config, dtype=np.dtype(dtype))
    return model_in_jax(config, weights) if framework == "jax" else model_in_torch(config, weights, dtype)


def name_outputs(config, found) -> dict:
    """Outputs by name, from the last layer if there are several."""
    if isinstance(config, IPAConfig | IPABlockConfig):
        return {"out": found}
    whole = isinstance(config, StructureModuleConfig)
    rigids = type(found.rigids)(*(x[-1] for x in found.rigids)) if whole else found.rigids
    moved = {"rotation": rigids.rotation, "translation": rigids.translation}
    if isinstance(config, IPATransformerConfig):
        return {"act": found.act, **moved, "points": found.points}
    return {
        "act": found.act[-1],
        **moved,
        "unnormalized_angles": found.unnormalized_angles[-1],
        "atom14": found.atom14[-1],
    }


def model_in_jax(config, weights: Weights) -> Callable[[dict], dict[str, np.ndarray]]:
    import haiku as hk
    import jax

    import ipa_jax

    transforms = {
        IPAConfig: lambda c: hk.transform(lambda *xs: ipa_jax.InvariantPointAttention(c)(*xs)),
        IPABlockConfig: lambda c: hk.transform(lambda *xs: ipa_jax.IPABlock(c)(*xs)),
        IPATransformerConfig: ipa_jax.transform_ipa_transformer,
        StructureModuleConfig: ipa_jax.transform_structure_module,
    }
    transformed = transforms[type(config)](config)
    params = jax.tree.map(jax.numpy.asarray, weights.to_haiku())

    @jax.jit
    def apply(x):
        rigids = ipa_jax.Rigid(x["rotation"], x["translation"])
        if isinstance(config, StructureModuleConfig):
            found = transformed.apply(params, None, x["single"], x["pair"], x["aatype"], x["mask"], rigids=rigids)
        else:
            found = transformed.apply(params, None, x["single"], x["pair"], rigids, x["mask"])
        return name_outputs(config, found)

    return lambda x: jax.tree.map(np.asarray, apply(x))


def model_in_torch(config, weights: Weights, dtype: str) -> Callable[[dict], dict[str, np.ndarray]]:
    import torch

    import ipa_torch

    classes = {
        IPAConfig: ipa_torch.InvariantPointAttention,
        IPABlockConfig: ipa_torch.IPABlock,
        IPATransformerConfig: ipa_torch.IPATransformer,
        StructureModuleConfig: ipa_torch.StructureModule,
    }
    module = classes[type(config)](config).to(getattr(torch, dtype)).eval()
    module.load_state_dict(weights.to_torch())

    def call(x):
        x = {field: torch_tensor(y) for field, y in x.items()}
        rigids = ipa_torch.Rigid(x["rotation"], x["translation"])
        with torch.no_grad():
            if isinstance(config, StructureModuleConfig):
                found = module(x["single"], x["pair"], x["aatype"], x["mask"], rigids=rigids)
            else:
                found = module(x["single"], x["pair"], rigids, x["mask"])
        return {field: y.numpy() for field, y in name_outputs(config, found).items()}

    return call


def changed(change: str, x: dict) -> tuple[dict, Callable[[str, np.ndarray], np.ndarray]]:
    """The inputs after a change, and the function that maps an output to the expected changed output."""
    rng = np.random.default_rng(5)
    if change == "rotation":
        turn = random_rotations(rng)
        after = {**x, "rotation": turn @ x["rotation"], "translation": x["translation"] @ turn.T}
        return after, lambda field, y: turn @ y if field == "rotation" else y @ turn.T if field in MOVED else y
    if change == "translation":
        shift = 30 * rng.standard_normal(3)
        after = {**x, "translation": x["translation"] + shift}
        return after, lambda field, y: y + shift if field in MOVED[1:] else y
    if change == "permutation":
        order = rng.permutation(RESIDUES)
        after = {field: y[order] for field, y in x.items()}
        after["pair"] = after["pair"][:, order]
        return after, lambda field, y: y[order]
    more = PADDED - RESIDUES
    after = {field: np.concatenate([y, y[:more]]) for field, y in x.items()}
    after["pair"] = np.pad(x["pair"], ((0, more), (0, more), (0, 0)), mode="wrap")
    after["mask"][RESIDUES:] = False
    return after, lambda field, y: np.concatenate([y, y[:more]])


@pytest.mark.covering("framework", "name")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("change", CHANGES)
def test_it_moves_with_its_residues(change, name, framework, dtype, motions):
    if framework not in installed_frameworks():
        pytest.skip(f"{framework} is not installed")
    before = inputs(name)
    after, makes = changed(change, before)
    calls = model(name, framework, dtype)
    original, result = (
        calls({f: y.astype(dtype) if y.dtype == float else y for f, y in x.items()}) for x in (before, after)
    )
    rows = []
    for field, y in original.items():
        expected = makes(field, y.astype(np.float64))
        # Atoms that a residue type lacks are at the origin wherever the residue is.
        there = (y != 0).any(-1, keepdims=True) if field == "atom14" else np.ones_like(y[..., :1], bool)
        there = makes("mask", there) if change in ("permutation", "padding") else there
        valid = after["mask"].reshape(-1, *(1,) * (y.ndim - 1)) & there
        rows.append(
            compare(
                result[field].astype(np.float64),
                expected,
                case=name,
                stage=field,
                dtype=dtype,
                subject=framework,
                reference=change,
                meaningful=np.broadcast_to(valid, expected.shape),
            )
        )
    failures = [str(row) for row in rows if not row.passed]
    assert not failures, "\n".join(failures)
    motions.append(max(rows, key=lambda row: row.error))


def test_the_readmes_table_has_these_rows():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    section = readme.partition("### Motions")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([a-z ]+?) \| (Haiku|PyTorch) \|", section, re.M)
    assert rows == [(name, framework) for name in MODULES for framework in ("Haiku", "PyTorch")]
