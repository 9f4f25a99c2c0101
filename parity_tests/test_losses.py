"""The losses are AlphaFold's, the same in both frameworks, and finite, invariant and differentiable everywhere."""

from __future__ import annotations

import importlib
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.proteins import load_structure, residues
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.tolerance import bound, epsilon
from ipa_bridge.weights.tensors import torch_tensor

DTYPES = ("float32", "float64")


def allowed(stage, dtype="float64"):
    """What the tolerance table allows, relative to the largest value."""
    return bound(stage, dtype) * epsilon(dtype)


LOSS, GRADIENT = allowed("loss"), allowed("gradient")
NUM_LAYER = 3


class Frames(NamedTuple):
    """numpy frames, which become each framework's Rigid."""

    rotation: np.ndarray
    translation: np.ndarray


class Problem(NamedTuple):
    """A true structure and a prediction of it."""

    # prediction
    backbone: Frames
    groups: Frames
    atom14: np.ndarray
    angles: np.ndarray
    unnormalized: np.ndarray
    logits: np.ndarray
    # truth
    true_groups: Frames
    true_atom14: np.ndarray
    true_chi: np.ndarray
    group_mask: np.ndarray
    atom14_mask: np.ndarray
    chi_mask: np.ndarray
    exists: np.ndarray
    mask: np.ndarray
    aatype: np.ndarray
    residue_index: np.ndarray
    chain_id: np.ndarray
    resolution: np.ndarray
    clamped: np.ndarray


LAYERED = {"backbone", "angles", "unnormalized"}
PREDICTED = ("backbone", "groups", "atom14", "angles", "unnormalized", "logits")


def gathered(positions, slots):
    return np.take_along_axis(positions, slots[..., None], -2)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


def true_group_frames(aatype, atom37, atom37_mask):
    """(N, 8) frames of the rigid groups, by the atoms that define them; the identity where these are not all there."""
    points = np.stack([gathered(atom37, residues.GROUP_ATOMS[aatype][:, :, i]) for i in range(3)], -2)
    known = np.stack([np.take_along_axis(atom37_mask, residues.GROUP_ATOMS[aatype][:, :, i], 1) for i in range(3)], -1)
    mask = residues.GROUP_MASK[aatype] & known.all(-1)
    x, origin, xy = np.moveaxis(points, -2, 0)
    e1 = unit(x - origin) * np.array([1, *[-1] * 7])[:, None]
    e2 = unit((xy - origin) - e1 * ((xy - origin) * e1).sum(-1, keepdims=True))
    rotation = np.stack([e1, e2, np.cross(e1, e2)], -1)
    return Frames(np.where(mask[..., None, None], rotation, np.eye(3)), np.where(mask[..., None], origin, 0)), mask


def true_chis(aatype, atom37, atom37_mask):
    """(sin, cos) of χ1–χ4 and which of them are known."""
    slots = residues.CHI_ATOMS[aatype]
    a, b, c, d = (gathered(atom37, slots[:, :, i]) for i in range(4))
    mask = residues.CHI_MASK[aatype] & np.all([np.take_along_axis(atom37_mask, slots[:, :, i], 1) for i in range(4)], 0)
    n1, n2 = np.cross(b - a, c - b), np.cross(c - b, d - c)
    sin, cos = (np.cross(n1, n2) * unit(c - b)).sum(-1), (n1 * n2).sum(-1)
    return np.where(mask[..., None], unit(np.stack([sin, cos], -1)), 0), mask


def small_turns(rng, shape, spread):
    """Random rotations of a few degrees or many."""
    q = np.concatenate([np.ones((*shape, 1)), spread * rng.standard_normal((*shape, 3))], -1)
    w, x, y, z = np.moveaxis(unit(q), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def make_problem(aatype, atom37, atom37_mask, residue_index, chain_id, mask, seed=0, noise=0.7):
    """The structure with some atoms lost, and a prediction that is off by ångströms, more in the first layers."""
    rng = np.random.default_rng(seed)
    n = len(aatype)
    atom37_mask = atom37_mask & mask[:, None] & (rng.random(atom37_mask.shape) > 0.04)
    groups, group_mask = true_group_frames(aatype, atom37, atom37_mask)
    chi, chi_mask = true_chis(aatype, atom37, atom37_mask)
    slots = residues.ATOM14_TO_ATOM37[aatype]
    exists = residues.ATOM14_MASK[aatype] & mask[:, None]
    atom14_mask = exists & np.take_along_axis(atom37_mask, slots, -1)
    atom14 = np.where(atom14_mask[..., None], gathered(atom37, slots), 0)
    full_atom14 = np.where(exists[..., None], gathered(atom37, slots), 0)
    # Ambiguous atoms half of the time under their other names.
    swap = np.where(rng.random((n, 1)) < 0.5, residues.ATOM14_SWAP[aatype], np.arange(14))
    predicted = gathered(full_atom14, swap) + noise * rng.standard_normal((n, 14, 3)) * exists[..., None]
    off = noise * np.array([9.0, 3.0, 1.0]).reshape(NUM_LAYER, 1, 1)
    backbone = Frames(
        groups.rotation[:, 0] @ small_turns(rng, (NUM_LAYER, n), 0.3),
        groups.translation[:, 0] + off * rng.standard_normal((NUM_LAYER, n, 3)),
    )
    turned = Frames(
        groups.rotation @ small_turns(rng, (n, 8), 0.3),
        groups.translation + 3 * noise * rng.standard_normal((n, 8, 3)),
    )
    unnormalized = rng.standard_normal((NUM_LAYER, n, 7, 2))
    return Problem(
        backbone=backbone,
        groups=turned,
        atom14=predicted,
        angles=unit(unnormalized),
        unnormalized=unnormalized,
        logits=3 * rng.standard_normal((n, 50)),
        true_groups=groups,
        true_atom14=atom14,
        true_chi=chi,
        group_mask=group_mask,
        atom14_mask=atom14_mask,
        chi_mask=chi_mask,
        exists=exists,
        mask=mask,
        aatype=aatype,
        residue_index=residue_index,
        chain_id=chain_id,
        resolution=np.array(2.0),
        clamped=np.array(0.3),
    )


def load_problem(path, seed=0, noise=0.7):
    """10 residues before and 9 after a chain's end, and 2 of padding: as many as `synthetic_problem` has."""
    structure = load_structure(path)
    chain = np.unique(structure.chain_id, return_inverse=True)[1].astype(np.int32)
    end = int((chain == chain[0]).sum())
    keep, padding = slice(end - 10, end + 9), 2

    def padded(x):
        return np.concatenate([x[keep], np.zeros((padding, *x.shape[1:]), x.dtype)])

    aatype, atom37, atom37_mask = structure.aatype.astype(np.int32), structure.atom37, structure.atom37_mask
    number = structure.residue_number.astype(np.int32)
    valid = np.ones(len(chain), bool)
    return make_problem(*map(padded, (aatype, atom37, atom37_mask, number, chain, valid)), seed=seed, noise=noise)


def synthetic_problem(seed=0, noise=0.7):
    """Every residue type once and the unknown one, in two chains, made of the literature's groups laid loosely."""
    rng = np.random.default_rng(seed)
    aatype = np.arange(21, dtype=np.int32)
    slots = residues.ATOM14_TO_ATOM37[aatype]
    atom14 = (
        residues.ATOM14_POSITIONS[aatype] + 0.5 * rng.standard_normal((21, 14, 3)) + 4 * np.arange(21)[:, None, None]
    )
    atom37, atom37_mask = np.zeros((21, 37, 3)), np.zeros((21, 37), bool)
    for i in range(21):
        present = residues.ATOM14_MASK[i]
        atom37[i, slots[i][present]], atom37_mask[i, slots[i][present]] = atom14[i][present], True
    chain = (np.arange(21) > 9).astype(np.int32)
    index = np.arange(21, dtype=np.int32)
    return make_problem(aatype, atom37, atom37_mask, index, chain, np.arange(21) != 7, seed, noise)


@pytest.fixture(scope="module", params=["2rbg.pdb", "every residue type"])
def problem(request):
    if request.param == "every residue type":
        return synthetic_problem()
    pytest.importorskip("gemmi")
    return load_problem(request.getfixturevalue("structures_dir") / request.param)


class Jax:
    """numpy in, numpy out, through ipa_jax.losses, under jit."""

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        pytest.importorskip("haiku")
        self.losses = importlib.import_module("ipa_jax.losses")
        self.rigid = importlib.import_module("ipa_jax").Rigid

        self.cache = {}

    def array(self, x):
        return self.jax.numpy.asarray(x)

    def numpy(self, tree):
        return [np.asarray(x) for x in self.jax.tree.leaves(tree)]

    def compiled(self, function, make):
        """What `make` makes of a function, compiled once."""
        if (function, make) not in self.cache:
            self.cache[function, make] = self.jax.jit(make(self, function))
        return self.cache[function, make]

    def call(self, function, p):
        return self.numpy(self.compiled(function, Jax.bound)(inputs(self, p)))

    def bound(self, function):
        return partial(function, self.losses)

    def gradients(self, function, p):
        """To all of the prediction, of the outputs weighted at random."""
        x = inputs(self, p)
        return self.numpy(self.compiled(function, Jax.gradient)([getattr(x, name) for name in PREDICTED], x))

    def gradient(self, function):
        def scalar(predicted, rest):
            x = rest._replace(**dict(zip(PREDICTED, predicted, strict=True)))
            leaves = self.jax.tree.leaves(function(self.losses, x))
            floats = [y for y in leaves if self.jax.numpy.issubdtype(y.dtype, self.jax.numpy.floating)]
            return sum((y * self.array(cotangent(i, y.shape)).astype(y.dtype)).sum() for i, y in enumerate(floats))

        return self.jax.grad(scalar)

    def vmapped(self, function, p):
        return self.numpy(self.compiled(function, Jax.vmap)(inputs(self, p)))

    def vmap(self, function):
        axes = Problem(*(1 if name in LAYERED else 0 for name in Problem._fields))
        return self.jax.vmap(partial(function, self.losses), (axes,))


class Torch:
    """numpy in, numpy out, through ipa_torch.losses."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.losses = importlib.import_module("ipa_torch.losses")
        self.rigid = importlib.import_module("ipa_torch").Rigid

    array = staticmethod(torch_tensor)

    def numpy(self, tree):
        return [x.detach().numpy() for x in self.torch.utils._pytree.tree_leaves(tree)]

    def call(self, function, p):
        return self.numpy(function(self.losses, inputs(self, p)))

    def gradients(self, function, p):
        """To all of the prediction, of the outputs weighted at random."""
        x = inputs(self, p)
        leaves = self.torch.utils._pytree.tree_leaves([getattr(x, name) for name in PREDICTED])
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = self.torch.utils._pytree.tree_leaves(function(self.losses, x))
        floats = [y for y in outputs if y.is_floating_point()]
        scalar = sum((y * self.array(cotangent(i, y.shape)).to(y.dtype)).sum() for i, y in enumerate(floats))
        if not (hasattr(scalar, "requires_grad") and scalar.requires_grad):
            return [np.zeros(leaf.shape) for leaf in leaves]
        return self.numpy(self.torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True))

    def vmapped(self, function, p):
        axes = Problem(*(1 if name in LAYERED else 0 for name in Problem._fields))
        x = inputs(self, p)
        axes = Problem(*(self.rigid(a, a) if isinstance(v, Frames) else a for a, v in zip(axes, p, strict=True)))
        return self.numpy(self.torch.func.vmap(partial(function, self.losses), (axes,))(x))


def cotangent(seed, shape):
    return np.random.default_rng(seed).standard_normal(tuple(shape))


def inputs(framework, p):
    return Problem(
        *(framework.rigid(*map(framework.array, x)) if isinstance(x, Frames) else framework.array(x) for x in p)
    )


@cache
def one_of(kind):
    """One object for all tests, since JAX compiles longer than it runs."""
    return kind()


@pytest.fixture(scope="module", params=[Jax, Torch], ids=["jax", "torch"])
def framework(request):
    return one_of(request.param)


def map_floats(function, p):
    """The problem with a function of name and array on its floats."""

    def each(name, x):
        if isinstance(x, Frames):
            return Frames(*(each(name, y) for y in x))
        return function(name, x) if np.issubdtype(x.dtype, np.floating) else x

    return Problem(*(each(name, x) for name, x in zip(Problem._fields, p, strict=True)))


def cast(p, dtype):
    return map_floats(lambda _, x: x.astype(dtype), p)


# What is tested: each loss on the fields of a problem, with the twins' module as `losses`.


def true_backbone(x):
    return type(x.true_groups)(x.true_groups.rotation[..., 0, :, :], x.true_groups.translation[..., 0, :])


def last(frames):
    return type(frames)(frames.rotation[-1], frames.translation[-1])


def fape(losses, x, **options):
    frames, true = last(x.backbone), true_backbone(x)
    known = x.group_mask[..., 0]
    return losses.frame_aligned_point_error(
        frames, true, known, x.atom14[..., 4, :], x.true_atom14[..., 4, :], x.atom14_mask[..., 4], **options
    )


def fape_of_pairs(losses, x, **options):
    pair_mask = x.chain_id[..., :, None] != x.chain_id[..., None, :]
    return fape(losses, x, pair_mask=pair_mask, clamp_distance=30.0, length_scale=20.0, **options)


def backbone(losses, x, **options):
    return losses.backbone_loss(x.backbone, true_backbone(x), x.group_mask[..., 0], **options)


def renamed(losses, x, **options):
    return losses.rename_ambiguous_atoms(x.atom14, x.true_atom14, x.atom14_mask, x.aatype, **options)


def renamed_frames(losses, x):
    return losses.rename_ambiguous_frames(x.true_groups, x.aatype, x.mask)


def sidechain(losses, x, **options):
    return losses.sidechain_loss(
        x.groups, x.true_groups, x.group_mask, x.atom14, x.true_atom14, x.atom14_mask, **options
    )


def chi(losses, x):
    return losses.supervised_chi_loss(x.angles, x.true_chi, x.chi_mask, x.aatype)


def angle_norm(losses, x):
    return losses.angle_norm_loss(x.unnormalized, x.mask)


def bonds(losses, x, **options):
    return losses.between_residue_bond_loss(x.atom14, x.exists, x.residue_index, x.aatype, **options)


def clashes(losses, x, **options):
    return losses.between_residue_clash_loss(x.atom14, x.exists, x.residue_index, x.aatype, **options)


def within(losses, x):
    return losses.within_residue_violations(x.atom14, x.exists, x.aatype)


def violations(losses, x, chains=False, **options):
    chain_id = x.chain_id if chains else None
    found = losses.find_structural_violations(
        x.atom14, x.exists, x.residue_index, x.aatype, chain_id=chain_id, **options
    )
    metrics = losses.violation_metrics(found, x.atom14, x.exists, x.residue_index, x.mask, chain_id=chain_id)
    return found, losses.structural_violation_loss(found, x.exists), metrics


def lddt(losses, x):
    arrays = x.atom14[..., 1, :], x.true_atom14[..., 1, :], x.atom14_mask[..., 1]
    return losses.lddt(*arrays), losses.lddt(*arrays, per_residue=True), losses.lddt(*arrays, cutoff=8.0)


def plddt(losses, x, **options):
    arrays = x.logits, x.atom14[..., 1, :], x.true_atom14[..., 1, :], x.atom14_mask[..., 1]
    return losses.plddt_loss(*arrays, resolution=x.resolution, **options)


def total(losses, x, chains=False, **options):
    target = losses.StructureTarget(
        aatype=x.aatype,
        mask=x.mask,
        residue_index=x.residue_index,
        group_frames=x.true_groups,
        group_mask=x.group_mask,
        atom14=x.true_atom14,
        atom14_mask=x.atom14_mask,
        chi=x.true_chi,
        chi_mask=x.chi_mask,
        chain_id=x.chain_id if chains else None,
    )
    output = losses.StructureModuleOutput(
        rigids=x.backbone,
        frames=type(x.groups)(x.groups.rotation[None], x.groups.translation[None]),
        angles=x.angles,
        unnormalized_angles=x.unnormalized,
        atom14=x.atom14[None],
        act=x.angles,
    )
    return losses.structure_module_loss(output, target, **options)


def with_chains(function):
    return lambda losses, x: function(losses, x, chain_id=x.chain_id)


LOSSES = {
    "fape": fape,
    "fape clamped": partial(fape, clamp_distance=10.0, epsilon=1e-3, length_scale=7.0),
    "fape of pairs": fape_of_pairs,
    "backbone": backbone,
    "backbone half clamped": lambda losses, x: backbone(losses, x, use_clamped_fape=x.clamped),
    "backbone of chains": with_chains(backbone),
    "sidechain": sidechain,
    "renamed": renamed,
    "renamed frames": renamed_frames,
    "chi": chi,
    "angle norm": angle_norm,
    "bonds": bonds,
    "bonds of chains": with_chains(bonds),
    "clashes": clashes,
    "clashes of chains": with_chains(clashes),
    "within": within,
    "violations": violations,
    "violations of chains": partial(violations, chains=True),
    "lddt": lddt,
    "plddt": plddt,
    "total": total,
    "total of chains": partial(total, chains=True),
}

CHUNKED = {
    "fape": fape,
    "fape of pairs": fape_of_pairs,
    "backbone of chains": lambda losses, x, **options: backbone(losses, x, chain_id=x.chain_id, **options),
    "sidechain": sidechain,
    "renamed": renamed,
    "clashes": clashes,
    "clashes of chains": lambda losses, x, **options: clashes(losses, x, chain_id=x.chain_id, **options),
    "total of chains": partial(total, chains=True),
}


def assert_close(actual, expected, relative):
    """Trees of the same arrays; floats close in relation to the largest, all else equal."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = np.asarray(a), np.asarray(e)
        assert a.shape == e.shape, i
        if np.issubdtype(a.dtype, np.floating):
            error = np.abs(a.astype(np.float64) - e).max(initial=0.0)
            assert error <= relative * np.abs(e).max(initial=0.0), (i, error, np.abs(e).max())
        else:
            np.testing.assert_array_equal(a, e.astype(a.dtype))


# Against AlphaFold.


@cache
def alphafold():
    """Its modules, by name."""
    pytest.importorskip("alphafold")
    pytest.importorskip("ml_collections")
    names = ("all_atom", "all_atom_multimer", "folding", "folding_multimer", "lddt", "modules", "config", "r3")
    modules = {name: importlib.import_module(f"alphafold.model.{name}") for name in names}
    modules["geometry"] = importlib.import_module("alphafold.model.geometry")
    return type("AlphaFold", (), modules)


def as_alphafold(function, p, dtype="float64"):
    """AlphaFold's answer to a problem, under the promotion and the width it was written for; asked once."""
    key = function, id(p.mask), dtype
    if key not in ANSWERS:
        ANSWERS[key] = p, _as_alphafold(function, p, dtype)
    return ANSWERS[key][1]


ANSWERS = {}


def _as_alphafold(function, p, dtype):
    import jax

    def of_prediction(predicted):
        return function(p._replace(**predicted))

    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        return jax.tree.map(np.asarray, jax.jit(of_prediction)({name: getattr(p, name) for name in PREDICTED}))


def r3_rigids(frames):
    r3 = alphafold().r3
    rotation, translation = frames
    parts = [rotation[..., i, j] for i in range(3) for j in range(3)]
    return r3.Rigids(r3.Rots(*parts), r3.Vecs(*(translation[..., i] for i in range(3))))


def r3_vecs(x):
    return alphafold().r3.Vecs(*(x[..., i] for i in range(3)))


def rigid3(frames):
    geometry = alphafold().geometry
    return geometry.Rigid3Array.from_array4x4(to_4x4(frames))


def to_4x4(frames):
    import jax.numpy as jnp

    bottom = np.broadcast_to(np.array([0, 0, 0, 1], np.float32), (*frames.translation.shape[:-1], 1, 4))
    return jnp.concatenate([jnp.concatenate([frames.rotation, frames.translation[..., None]], -1), bottom], -2)


def to_tensor_7(frames):
    from ipa_jax import Rigid

    return Rigid(*frames).to_tensor_7()


def to_flat_12(frames):
    return np.concatenate([frames.rotation.reshape(*frames.rotation.shape[:-2], 9), frames.translation], -1)


def batch_of(p):
    """AlphaFold's batch of that problem."""
    dtype = p.atom14.dtype
    swap = residues.ATOM14_SWAP[p.aatype]
    turned = residues.GROUP_IS_AMBIGUOUS[p.aatype]
    rotation = np.where(turned[..., None, None], p.true_groups.rotation * np.array([1, -1, -1]), p.true_groups.rotation)
    alternative = Frames(rotation.astype(dtype), p.true_groups.translation)
    return {
        "aatype": p.aatype,
        "residue_index": p.residue_index,
        "seq_mask": p.mask.astype(dtype),
        "backbone_affine_tensor": to_tensor_7(true_backbone(p)),
        "backbone_affine_mask": p.group_mask[..., 0].astype(dtype),
        "rigidgroups_gt_frames": to_flat_12(p.true_groups),
        "rigidgroups_alt_gt_frames": to_flat_12(alternative),
        "rigidgroups_gt_exists": p.group_mask.astype(dtype),
        "atom14_gt_positions": p.true_atom14,
        "atom14_alt_gt_positions": gathered(p.true_atom14, swap),
        "atom14_atom_is_ambiguous": residues.ATOM14_IS_AMBIGUOUS[p.aatype].astype(dtype),
        "atom14_gt_exists": p.atom14_mask.astype(dtype),
        "atom14_alt_gt_exists": np.take_along_axis(p.atom14_mask, swap, -1).astype(dtype),
        "atom14_atom_exists": p.exists.astype(dtype),
        "residx_atom14_to_atom37": residues.ATOM14_TO_ATOM37[p.aatype],
        "chi_angles": np.arctan2(p.true_chi[..., 0], p.true_chi[..., 1]),
        "chi_mask": p.chi_mask.astype(dtype),
    }


def value_of(p):
    """AlphaFold's output of that prediction."""
    layered = Frames(*(x[None] for x in p.groups))
    return {
        "traj": to_tensor_7(p.backbone),
        "sidechains": {
            "frames": r3_rigids(layered),
            "atom_pos": r3_vecs(p.atom14[None]),
            "angles_sin_cos": p.angles,
            "unnormalized_angles_sin_cos": p.unnormalized,
        },
        "final_atom14_positions": p.atom14,
    }


def head_config(name="structure_module", multimer=False):
    config = alphafold().config
    return (config.CONFIG_MULTIMER if multimer else config.CONFIG).model.heads[name]


def flat_violations(found):
    """Ours or AlphaFold's, in one order."""
    b, w = found["between_residues"], found["within_residues"]
    return [
        *(b[f"{name}_loss_mean"] for name in ("bonds_c_n", "angles_ca_c_n", "angles_c_n_ca")),
        b["connections_per_residue_loss_sum"],
        b["connections_per_residue_violation_mask"],
        b["clashes_mean_loss"],
        b["clashes_per_atom_loss_sum"],
        b["clashes_per_atom_clash_mask"],
        w["per_atom_loss_sum"],
        w["per_atom_violations"],
        found["total_per_residue_violations_mask"],
    ]


METRICS = ("extreme_ca_ca_distance", "between_residue_bond", "between_residue_clash", "within_residue", "per_residue")


def alphafold_fape(p, clamp=None):
    module, true = alphafold().all_atom, true_backbone(p)
    return [
        module.frame_aligned_point_error(
            r3_rigids(last(p.backbone)),
            r3_rigids(true),
            p.group_mask[..., 0].astype(p.atom14.dtype),
            r3_vecs(p.atom14[..., 4, :]),
            r3_vecs(p.true_atom14[..., 4, :]),
            p.atom14_mask[..., 4].astype(p.atom14.dtype),
            length_scale=10.0 if clamp is None else 7.0,
            l1_clamp_distance=clamp,
            epsilon=1e-4 if clamp is None else 1e-3,
        )
    ]


def alphafold_backbone(p, **batch):
    ret = {"loss": 0.0}
    alphafold().folding.backbone_loss(ret, batch_of(p) | batch, value_of(p), head_config())
    return [ret["loss"], ret["fape"]]


def alphafold_renamed(p):
    found = alphafold().folding.compute_renamed_ground_truth(batch_of(p), p.atom14)
    return [found[f"renamed_atom14_gt_{name}"] for name in ("positions", "exists")] + [found["alt_naming_is_better"]]


def alphafold_sidechain(p):
    given = {
        "alt_naming_is_better": np.zeros(p.mask.shape, p.atom14.dtype),
        "renamed_atom14_gt_positions": p.true_atom14,
        "renamed_atom14_gt_exists": p.atom14_mask.astype(p.atom14.dtype),
    }
    return [alphafold().folding.sidechain_loss(batch_of(p), value_of(p) | given, head_config())["loss"]]


def alphafold_angles(p, name):
    ret = {"loss": 0.0}
    alphafold().folding.supervised_chi_loss(ret, batch_of(p), value_of(p), head_config())
    return [ret[name]]


def alphafold_violations(p):
    module, batch = alphafold().folding, batch_of(p)
    found = module.find_structural_violations(batch, p.atom14, head_config())
    ret = {"loss": 0.0}
    module.structural_violation_loss(ret, batch, {"violations": found}, head_config())
    metrics = module.compute_violation_metrics(batch, p.atom14, found)
    return [*flat_violations(found), ret["loss"], *(metrics[f"violations_{name}"] for name in METRICS)]


def alphafold_violations_of_chains(p):
    module, geometry, dtype = alphafold().folding_multimer, alphafold().geometry, p.atom14.dtype
    positions, exists = geometry.Vec3Array.from_array(p.atom14), p.exists.astype(dtype)
    config = head_config(multimer=True)
    found = module.find_structural_violations(p.aatype, p.residue_index, exists, positions, config, p.chain_id)
    loss = module.structural_violation_loss(exists, found, config)
    metrics = module.compute_violation_metrics(p.residue_index, exists, p.mask.astype(dtype), positions, found)
    return [*flat_violations(found), loss, *(metrics[f"violations_{name}"] for name in METRICS)]


def alphafold_lddt(p):
    arrays = p.atom14[None, :, 1], p.true_atom14[None, :, 1], p.atom14_mask[None, :, 1:2].astype(p.atom14.dtype)
    module = alphafold().lddt
    return [
        x[0] for x in (module.lddt(*arrays), module.lddt(*arrays, per_residue=True), module.lddt(*arrays, cutoff=8.0))
    ]


def alphafold_plddt(p):
    import haiku as hk
    import jax.numpy as jnp

    def in_atom37(x):  # of which Cα alone is read, the second in both
        return jnp.pad(x, [(0, 0), (0, 23), *[(0, 0)] * (x.ndim - 2)])

    batch = {
        "all_atom_positions": in_atom37(p.true_atom14),
        "all_atom_mask": in_atom37(p.atom14_mask),
        "resolution": p.resolution,
    }
    value = {
        "structure_module": {"final_atom_positions": in_atom37(p.atom14)},
        "predicted_lddt": {"logits": p.logits},
    }

    def loss():
        head = alphafold().modules.PredictedLDDTHead(head_config("predicted_lddt"), None)
        return head.loss(value, batch)["loss"]

    return [hk.transform(loss).apply({}, None)]


def alphafold_total(p, gradient=False):
    import haiku as hk
    import jax

    def loss(atom14, rotation, translation, angles, unnormalized):
        value = value_of(p._replace(atom14=atom14, groups=Frames(rotation, translation)))
        value["sidechains"] |= {"angles_sin_cos": angles, "unnormalized_angles_sin_cos": unnormalized}

        def of_module():
            return alphafold().folding.StructureModule(head_config(), None).loss(value, batch_of(p))

        ret = hk.transform(of_module).apply({}, None)
        return ret["loss"], [ret[name] for name in ("fape", "sidechain_fape", "chi_loss", "angle_norm_loss")]

    arrays = (p.atom14, *p.groups, p.angles, p.unnormalized)
    if gradient:
        return jax.grad(loss, tuple(range(5)), has_aux=True)(*arrays)[0]
    value, terms = loss(*arrays)
    return [value, *terms]


def ours_total(losses, x):
    loss = total(losses, x)
    return loss.loss, loss.fape, loss.sidechain_fape, loss.chi, loss.angle_norm


MONOMER = {
    "fape": (fape, alphafold_fape),
    "fape clamped": (LOSSES["fape clamped"], partial(alphafold_fape, clamp=10.0)),
    "backbone": (backbone, alphafold_backbone),
    "backbone half clamped": (
        partial(backbone, use_clamped_fape=0.3),
        partial(alphafold_backbone, use_clamped_fape=np.float64(0.3)),
    ),
    "sidechain": (sidechain, alphafold_sidechain),
    "renamed": (renamed, alphafold_renamed),
    "chi": (chi, partial(alphafold_angles, name="chi_loss")),
    "angle norm": (angle_norm, partial(alphafold_angles, name="angle_norm_loss")),
    "violations": (violations, alphafold_violations),
    "lddt": (lddt, alphafold_lddt),
    "plddt": (plddt, alphafold_plddt),
    "total": (ours_total, alphafold_total),
}


ROUNDED = {"chi": 1e-11, "plddt": 1e-8, "violations": 1e-6, "total": 1e-6, "backbone half clamped": 1e-6}
"""What AlphaFold holds in float32 in any case: masks and their epsilon, bounds within residues, the clamped share."""


@pytest.mark.covering("framework")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", MONOMER)
def test_alphafold_agrees(loss, dtype, problem, framework):
    ours, theirs = MONOMER[loss]
    p = cast(problem, dtype)
    expected = as_alphafold(theirs, p, dtype)
    actual = framework.call(ours, p)
    assert {x.dtype.name for x in actual if np.issubdtype(x.dtype, np.floating)} == {dtype}
    assert_close(actual, expected, allowed("loss", dtype) if dtype == "float32" else ROUNDED.get(loss, LOSS))


def test_alphafolds_gradients_agree(problem, framework):
    expected = as_alphafold(partial(alphafold_total, gradient=True), problem)

    def ours(losses, x):
        return total(losses, x).loss

    weight = cotangent(0, ())
    _, _, rotation, translation, atom14, angles, unnormalized, logits = framework.gradients(ours, problem)
    assert (logits == 0).all()
    actual = [x / weight for x in (atom14, rotation, translation, angles, unnormalized)]
    assert_close(actual, expected, 1e-6)


def test_distances_within_residues_agree_to_the_last_digits(problem, framework):
    bounds = [x[problem.aatype] for x in residues.atom14_distance_bounds()]

    def theirs(p):
        return list(alphafold().all_atom.within_residue_violations(p.atom14, p.exists.astype(float), *bounds).values())

    expected = as_alphafold(theirs, problem)
    assert_close(framework.call(within, problem), expected, LOSS)


def test_alphafold_multimer_agrees(problem, framework):
    """It tells chains apart by gaps in the index, and its √max(d², ε²) is √(d² + ε) here."""
    p = cast(problem, "float32")
    p = p._replace(residue_index=p.residue_index + 5 * p.chain_id)
    expected = as_alphafold(alphafold_violations_of_chains, p, "float32")
    actual = framework.call(partial(violations, chains=True), p)
    assert_close(actual, expected, 1e-4)


def test_chains_are_told_apart(framework):
    """Two chains, the second 50 Å away, whose numbers run on: no bond and no neighbours between them, but clashes."""
    p = synthetic_problem()
    second = p.chain_id == 1
    steps = 2.2 * np.arange(21) + 50.0 * second  # along the diagonal: Cα 3.8 Å apart
    p = p._replace(atom14=residues.ATOM14_POSITIONS[p.aatype] + steps[:, None, None])
    ends = np.flatnonzero(np.diff(p.chain_id))
    assert (np.diff(p.residue_index) == 1).all()
    assert len(ends) == 1
    one, apart = framework.call(bonds, p), framework.call(with_chains(bonds), p)
    assert one[0] > apart[0] + 1
    *_, one = framework.call(lambda losses, x: violations(losses, x)[2].extreme_ca_ca_distance, p)
    *_, apart = framework.call(lambda losses, x: violations(losses, x, chains=True)[2].extreme_ca_ca_distance, p)
    assert one > 0
    assert apart == 0
    # The bond that is none any more is a clash, were the atoms as close as bonded ones.
    c, n = 2, 0
    atom14 = 300.0 * np.arange(21)[:, None, None] + 6.0 * np.arange(14)[None, :, None] + np.zeros(3)
    atom14[ends[0] + 1, n] = atom14[ends[0], c] + [1.33, 0, 0]
    close = p._replace(atom14=atom14, exists=residues.ATOM14_MASK[p.aatype])
    assert framework.call(clashes, close)[0] == 0
    assert framework.call(with_chains(clashes), close)[0] > 0


def test_alphafold_multimers_clashes_know_chains(framework):
    """Its asym_id is our chain_id, where numbers run on from one chain to the next."""
    p = cast(synthetic_problem(), "float32")
    end = int(np.flatnonzero(np.diff(p.chain_id))[0])
    atom14 = p.atom14.copy()
    atom14[end + 1, 0] = atom14[end, 2] + np.array([1.33, 0, 0], np.float32)
    p = p._replace(atom14=atom14)

    def theirs(p):
        found = alphafold().all_atom_multimer.between_residue_clash_loss(
            alphafold().geometry.Vec3Array.from_array(p.atom14),
            p.exists.astype(np.float32),
            residues.ATOM14_RADIUS[p.aatype].astype(np.float32),
            p.residue_index,
            p.chain_id,
        )
        return [found[name] for name in ("mean_loss", "per_atom_loss_sum", "per_atom_clash_mask")]

    expected = as_alphafold(theirs, p, "float32")
    assert_close(framework.call(with_chains(clashes), p), expected, 1e-4)
    without = framework.call(clashes, p)
    assert np.abs(without[1] - expected[1]).max() > 0.1


def test_alphafold_multimers_side_chains_agree(problem, framework):
    p = cast(problem, "float32")

    def flat(frames):
        return rigid3(Frames(frames.rotation.reshape(-1, 3, 3), frames.translation.reshape(-1, 3)))

    def theirs(p):
        vec3 = alphafold().geometry.Vec3Array.from_array
        return [
            alphafold().all_atom_multimer.frame_aligned_point_error(
                pred_frames=flat(p.groups),
                target_frames=flat(p.true_groups),
                frames_mask=p.group_mask.reshape(-1).astype(np.float32),
                pred_positions=vec3(p.atom14.reshape(-1, 3)),
                target_positions=vec3(p.true_atom14.reshape(-1, 3)),
                positions_mask=p.atom14_mask.reshape(-1).astype(np.float32),
                pair_mask=None,
                length_scale=10.0,
                l1_clamp_distance=10.0,
            )
        ]

    assert_close(framework.call(sidechain, p), as_alphafold(theirs, p, "float32"), 1e-3)


def test_alphafold_multimers_backbone_agrees(problem, framework):
    """Its FAPE is √max(d², ε²) where ours is √(d² + ε): they differ by less than ε/2d."""
    p = cast(problem, "float32")
    config = head_config(multimer=True)
    known = p.group_mask[..., 0].astype(np.float32)

    def theirs(p, pair_mask, config):
        return alphafold().folding_multimer.backbone_loss(
            gt_rigid=rigid3(true_backbone(p)),
            gt_frames_mask=known,
            gt_positions_mask=known,
            target_rigid=rigid3(p.backbone),
            config=config,
            pair_mask=pair_mask,
        )

    same = (p.chain_id[:, None] == p.chain_id).astype(np.float32)
    intra = as_alphafold(partial(theirs, pair_mask=same, config=config.intra_chain_fape), p, "float32")
    inter = as_alphafold(partial(theirs, pair_mask=1 - same, config=config.interface_fape), p, "float32")
    expected = [one + other for one, other in zip(intra, inter, strict=True)]
    assert_close(framework.call(with_chains(backbone), p), expected, 1e-3)
    if p.chain_id[0] != p.chain_id[-1]:
        assert inter[0] > 0.1
        assert abs(framework.call(backbone, p)[0] - expected[0]) > 0.01


def test_alphafold_multimers_renaming_agrees(problem, framework):
    p = cast(problem, "float32")
    batch, vec3 = batch_of(p), alphafold().geometry.Vec3Array.from_array

    def theirs(p):
        return alphafold().all_atom_multimer.find_optimal_renaming(
            vec3(batch["atom14_gt_positions"]),
            vec3(batch["atom14_alt_gt_positions"]),
            batch["atom14_atom_is_ambiguous"],
            batch["atom14_gt_exists"],
            vec3(p.atom14),
        )

    *_, better = framework.call(renamed, p)
    np.testing.assert_array_equal(better, as_alphafold(theirs, p, "float32").astype(bool))


def test_renamed_frames_are_alphafolds_alternatives(structures_dir, framework):
    """Frames from renamed atoms, by AlphaFold, are the frames that we rename."""
    pytest.importorskip("gemmi")
    import jax

    structure = load_structure(structures_dir / "2rbg.pdb")
    atom37, mask, aatype = structure.atom37, structure.atom37_mask, structure.aatype.astype(np.int32)
    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(alphafold().all_atom.atom37_to_frames)(aatype, atom37, mask.astype(np.float64))
        theirs = jax.tree.map(np.asarray, theirs)
    groups, group_mask = true_group_frames(aatype, atom37, mask)
    assert (theirs["rigidgroups_gt_exists"].astype(bool) == group_mask).all()
    known = group_mask[..., None]
    assert_close([to_flat_12(groups) * known], [theirs["rigidgroups_gt_frames"] * known], 1e-6)

    better = framework.array(np.ones(len(aatype), bool))
    frames = framework.losses.rename_ambiguous_frames(
        framework.rigid(*map(framework.array, groups)), framework.array(aatype), better
    )
    ours = to_flat_12(Frames(*framework.numpy(frames)))
    assert_close([ours * known], [theirs["rigidgroups_alt_gt_frames"] * known], 1e-6)
    assert np.abs(ours - to_flat_12(groups)).max() > 0.1


# The frameworks against each other.


@pytest.mark.covering
@pytest.mark.parametrize("loss", LOSSES)
def test_the_frameworks_agree(loss, problem):
    jax, torch = one_of(Jax), one_of(Torch)
    assert_close(torch.call(LOSSES[loss], problem), jax.call(LOSSES[loss], problem), LOSS)
    assert_close(torch.gradients(LOSSES[loss], problem), jax.gradients(LOSSES[loss], problem), GRADIENT)


@pytest.mark.parametrize("loss", ["violations", "total of chains", "plddt"])
def test_the_frameworks_agree_in_float32(loss, problem):
    p = cast(problem, "float32")
    assert_close(one_of(Torch).call(LOSSES[loss], p), one_of(Jax).call(LOSSES[loss], p), allowed("loss", "float32"))


# Properties.


def two(seed_problem):
    """A batch of two problems, and the two."""
    other = map_floats(
        lambda name, x: x + (0.3 * cotangent(len(name), x.shape) if name == "atom14" else 0), seed_problem
    )
    other = other._replace(
        aatype=seed_problem.aatype[::-1].copy(), mask=seed_problem.mask[::-1].copy(), clamped=np.array(0.9)
    )
    ones = (seed_problem, other)

    def stack(name, xs):
        if isinstance(xs[0], Frames):
            return Frames(*(stack(name, ys) for ys in zip(*xs, strict=True)))
        return np.stack(xs, 1 if name in LAYERED else 0)

    return Problem(*(stack(name, xs) for name, xs in zip(Problem._fields, zip(*ones, strict=True), strict=True))), ones


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_is_its_members(loss, framework):
    batch, ones = two(synthetic_problem())
    each = [framework.call(LOSSES[loss], one) for one in ones]
    expected = [np.stack(xs) for xs in zip(*each, strict=True)]
    assert_close(framework.call(LOSSES[loss], batch), expected, LOSS)
    assert_close(framework.vmapped(LOSSES[loss], batch), expected, LOSS)


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 2))
@pytest.mark.parametrize("loss", LOSSES)
def test_moving_everything_changes_nothing(loss, framework, seed):
    p = synthetic_problem()
    motions = [random_frames(np.random.default_rng(seed + i), (), spread=20.0) for i in range(2)]

    def moved(x, motion):
        rotation, translation = motion
        if isinstance(x, Frames):
            return Frames(rotation @ x.rotation, moved(x.translation, motion))
        return x @ rotation.T + translation

    q = p._replace(
        **{name: moved(getattr(p, name), motions[0]) for name in ("backbone", "groups", "atom14")},
        **{name: moved(getattr(p, name), motions[1]) for name in ("true_groups", "true_atom14")},
    )
    if loss in ("renamed", "renamed frames"):
        assert_close(framework.call(renamed, q)[1:], framework.call(renamed, p)[1:], 0)
    else:
        assert_close(framework.call(LOSSES[loss], q), framework.call(LOSSES[loss], p), GRADIENT)


@pytest.mark.covering("framework")
@pytest.mark.parametrize("chunk_size", [4, 1000])
@pytest.mark.parametrize("loss", CHUNKED)
def test_chunks_change_nothing(loss, chunk_size, framework):
    p, function = synthetic_problem(), CHUNKED[loss]
    chunked = partial(function, chunk_size=chunk_size)
    assert_close(framework.call(chunked, p), framework.call(function, p), LOSS)
    assert_close(framework.gradients(chunked, p), framework.gradients(function, p), GRADIENT)


def hard_problem(kind):
    p = synthetic_problem()
    if kind == "all at one point":
        return map_floats(lambda name, x: x * 0 if x.shape[-1:] == (3,) and x.shape[-2:] != (3, 3) else x, p)
    if kind == "all at one point and turned nowhere":
        return map_floats(lambda name, x: x * 0, p)
    if kind == "nothing known":
        return p._replace(**{n: getattr(p, n) & False for n in Problem._fields if "mask" in n or n == "exists"})
    if kind == "perfect":
        true = Frames(*(np.stack([x[:, 0]] * NUM_LAYER) for x in p.true_groups))
        return p._replace(backbone=true, groups=p.true_groups, atom14=p.true_atom14)
    if kind == "glycine and alanine":
        side_chain = np.arange(14) > 4
        keep = np.isin(p.aatype, [0, 7])
        smaller = np.where(keep, p.aatype, 7).astype(np.int32)
        exists = residues.ATOM14_MASK[smaller]
        return p._replace(aatype=smaller, exists=exists, atom14_mask=exists & ~side_chain, chi_mask=p.chi_mask & False)
    return Problem(
        *(Frames(*(one(n, y) for y in x)) if isinstance(x, Frames) else one(n, x) for n, x in p._asdict().items())
    )


def one(name, x):
    """A single residue."""
    return x if x.ndim == 0 else x[:, 3:4] if name in LAYERED else x[3:4]


HARD = (
    "all at one point",
    "all at one point and turned nowhere",
    "nothing known",
    "perfect",
    "glycine and alanine",
    "one residue",
)


def everything(losses, x):
    of_losses = [total(losses, x), total(losses, x, chains=True, chunk_size=4)]
    return of_losses, violations(losses, x), renamed(losses, x), lddt(losses, x), plddt(losses, x)


@pytest.mark.parametrize("kind", HARD)
def test_hard_cases_are_finite(kind, framework):
    p = cast(hard_problem(kind), "float32")

    assert all(np.isfinite(x).all() for x in framework.call(everything, p))
    assert all(np.isfinite(x).all() for x in framework.gradients(everything, p))


def test_a_perfect_prediction_loses_nothing(framework):
    p = hard_problem("perfect")
    loss = framework.losses.StructureModuleLoss(*framework.call(total, p))
    floor = np.sqrt(1e-4) / 10
    assert loss.fape <= floor * 1.001
    assert loss.backbone <= floor * 1.001
    assert loss.sidechain_fape <= floor * 1.001
    assert framework.call(lddt, p)[0] == pytest.approx(1)


def test_padding_does_not_count(structures_dir, framework):
    """The masked residues of a chain may hold anything."""
    pytest.importorskip("gemmi")
    p = load_problem(structures_dir / "2rbg.pdb")
    padding = ~p.mask
    assert padding.any()
    spoiled = p._replace(
        aatype=np.where(padding, -1, p.aatype),
        atom14=np.where(padding[:, None, None], 7.0, p.atom14),
        unnormalized=np.where(padding[:, None, None], 7.0, p.unnormalized),
        backbone=p.backbone._replace(translation=np.where(padding[:, None], 7.0, p.backbone.translation)),
    )
    for function in (total, partial(total, chains=True), plddt):
        assert_close(framework.call(function, spoiled), framework.call(function, p), LOSS)


def test_the_target_of_a_real_protein(structures_dir, framework):
    """Its frames, torsions and atoms are those of the atoms that are there; padding has none."""
    pytest.importorskip("gemmi")
    structure = load_structure(structures_dir / "2rbg.pdb")
    aatype, mask = structure.aatype.astype(np.int32), np.arange(len(structure)) % 9 > 0
    chain = np.unique(structure.chain_id, return_inverse=True)[1]
    numbers = structure.residue_number
    resolved = structure.atom37_mask & (np.random.default_rng(0).random(structure.atom37_mask.shape) > 0.04)
    arrays = (structure.atom37, resolved, aatype, mask, numbers)
    target = framework.losses.structure_target(*map(framework.array, arrays), chain_id=framework.array(chain))
    known = resolved & mask[:, None]
    frames, group_mask = true_group_frames(aatype, structure.atom37, known)
    chi, chi_mask = true_chis(aatype, structure.atom37, known)
    slots = residues.ATOM14_TO_ATOM37[aatype]
    atom14_mask = residues.ATOM14_MASK[aatype] & np.take_along_axis(known, slots, 1)
    assert 0 < group_mask[:, 0].sum() < mask.sum()
    assert 0 < chi_mask.sum() < residues.CHI_MASK[aatype][mask].sum()
    expected = (aatype, mask, numbers, *frames, group_mask, gathered(structure.atom37, slots), atom14_mask, chi)
    actual = framework.numpy(target)
    assert_close(actual[:6], [*expected[:3], *frames, group_mask], LOSS)
    np.testing.assert_allclose(actual[6][atom14_mask], expected[6][atom14_mask])
    np.testing.assert_array_equal(actual[7], atom14_mask)
    assert_close(actual[8:], [chi, chi_mask, chain], LOSS)
    with pytest.raises(ValueError, match="chain_id must be"):
        framework.losses.structure_target(*map(framework.array, arrays), chain_id=framework.array(chain[1:]))
    for anything in (np.nan, np.inf, 1e30):
        unknown = np.where(known[..., None], structure.atom37, anything)
        again = framework.losses.structure_target(
            *map(framework.array, (unknown, *arrays[1:])), chain_id=framework.array(chain)
        )
        np.testing.assert_array_equal(framework.numpy(again)[6], np.where(atom14_mask[..., None], actual[6], 0))
        assert_close(framework.numpy(again)[3:6], actual[3:6], LOSS)
        assert_close(framework.numpy(again)[8:], actual[8:], LOSS)


def target_of(framework, p, *, chains):
    atom37, mask37 = np.zeros((len(p.mask), 37, 3)), residues.ATOM37_MASK[p.aatype]
    atom37[mask37] = p.true_atom14[residues.ATOM14_MASK[p.aatype]]  # any atoms will do
    arrays = map(framework.array, (atom37, mask37, p.aatype, p.mask, p.residue_index))
    return framework.losses.structure_target(*arrays, chain_id=framework.array(p.chain_id) if chains else None)


@pytest.mark.parametrize("chains", [False, True])
def test_targets_collate(chains):
    """By torch's DataLoader, alone and within other data; a monomer has no chain_id."""
    framework = Torch()
    collate = framework.torch.utils.data.default_collate
    arrays = lambda target: framework.numpy(target if chains else list(target)[:-1])  # noqa: E731
    one, other = (target_of(framework, synthetic_problem(seed), chains=chains) for seed in (0, 1))
    batch = collate([one, other])
    assert type(batch) is framework.losses.StructureTarget
    assert (batch.chain_id is not None) == chains
    assert type(batch.group_frames) is framework.rigid
    for i, member in enumerate((one, other)):
        for actual, expected in zip(arrays(batch), arrays(member), strict=True):
            np.testing.assert_array_equal(actual[i], expected)
    nested = collate([{"target": one}, {"target": other}])["target"]
    for actual, expected in zip(arrays(nested), arrays(batch), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_targets_with_and_without_chains_are_no_batch():
    framework = Torch()
    targets = [target_of(framework, synthetic_problem(), chains=chains) for chains in (True, False)]
    with pytest.raises(
        ValueError, match="chain_id must be given in all targets of a batch or in none; 1 of 2 have none"
    ):
        framework.torch.utils.data.default_collate(targets)


def test_unknown_residues_have_the_frames_of_their_backbones(framework):
    """Of whose rotations AlphaFold predicts zeros, so that there a perfect prediction loses."""
    rng = np.random.default_rng(0)
    aatype = np.full(4, residues.UNKNOWN_AATYPE, np.int32)
    rigids, angles = random_frames(rng, (4,)), unit(rng.standard_normal((4, 7, 2)))
    atoms, known = rng.standard_normal((4, 14, 3)), np.ones((4, 14), bool)
    backbone = np.tile(np.arange(8) == 0, (4, 1))

    def frames_and_losses(rotation, translation, angles, aatype, backbone, atoms, known):
        of_module = importlib.import_module(framework.losses.__package__).torsion_angles_to_frames
        frames = of_module(framework.rigid(rotation, translation), angles, aatype)
        losses = (
            framework.losses.sidechain_loss(predicted, frames, backbone, atoms, atoms, known)
            for predicted in (frames, frames._replace(rotation=0 * frames.rotation))
        )
        return frames.rotation, *losses

    jit = framework.jax.jit if isinstance(framework, Jax) else lambda function: function
    arrays = map(framework.array, (*rigids, angles, aatype, backbone, atoms, known))
    rotation, ours, theirs = framework.numpy(jit(frames_and_losses)(*arrays))
    np.testing.assert_array_equal(rotation[:, 0], rigids[0])
    assert ours == pytest.approx(np.sqrt(1e-4) / 10, rel=1e-3)
    assert theirs > 0.05
    if importlib.util.find_spec("alphafold"):
        from alphafold.common import residue_constants

        assert not residue_constants.restype_rigid_group_default_frame[residues.UNKNOWN_AATYPE].any()


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_no_residue_loses_nothing(chunk_size, framework):
    def nothing(name, x):
        if isinstance(x, Frames):
            return Frames(*(nothing(name, y) for y in x))
        return x if x.ndim == 0 else x[:, :0] if name in LAYERED else x[:0]

    p = synthetic_problem()
    p = Problem(*(nothing(name, x) for name, x in p._asdict().items()))
    assert all((x == 0).all() for x in framework.call(partial(total, chains=True, chunk_size=chunk_size), p))
    emptied = Problem(
        *(
            Frames(*(y[:, None][:, :0] if n in LAYERED else y[None][:0] for y in x))
            if isinstance(x, Frames)
            else x[:, None][:, :0]
            if n in LAYERED
            else np.asarray(x)[None][:0]
            for n, x in synthetic_problem()._asdict().items()
        )
    )
    assert framework.call(partial(total, chunk_size=chunk_size), emptied)[0].shape == (0,)


def test_the_loss_comes_in_the_predictions_dtype(framework):
    """The truth of a structure file is float64."""
    p = synthetic_problem()
    truth = {"true_groups", "true_atom14", "true_chi"}
    mixed = map_floats(lambda name, x: x if name in truth else x.astype(np.float32), p)
    assert {x.dtype.name for x in framework.call(total, mixed)} == {"float32"}
    expected = framework.call(total, cast(p, "float32"))
    assert_close(framework.call(total, mixed), expected, allowed("loss", "float32"))


def test_masks_of_any_dtype(framework):
    p = synthetic_problem()
    names = ("group_mask", "atom14_mask", "chi_mask", "exists", "mask")
    for dtype in (np.int32, np.float64):
        q = p._replace(**{name: getattr(p, name).astype(dtype) for name in names})
        for function in (LOSSES["total of chains"], fape_of_pairs, plddt):
            assert_close(framework.call(function, q), framework.call(function, p), LOSS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_computes_in_float32(dtype, framework):
    from ipa_bridge.weights.tensors import numpy_dtype

    half = map_floats(lambda _, x: x.astype(np.float32).astype(numpy_dtype(dtype)), synthetic_problem())
    widened = Problem(
        *(
            Frames(*(y.astype(np.float32) for y in x))
            if isinstance(x, Frames)
            else x.astype(np.float32)
            if x.dtype == numpy_dtype(dtype)
            else x
            for x in half
        )
    )
    for function in (total, plddt):
        assert_close(framework.call(function, half), framework.call(function, widened), allowed("loss", "float32"))


def test_disulfides_and_prolines(framework):
    """Two sulfurs 1.7 Å apart are bonded, a C at the same distance clashes; a bond to proline may be longer."""
    cysteine, proline = residues.RESTYPES.index("C"), residues.RESTYPES.index("P")
    p = synthetic_problem()
    atom14 = 200.0 * np.arange(2)[:, None, None] + 6.0 * np.arange(14)[None, :, None] + np.zeros(3)
    index = np.array([0, 5], np.int32)
    q = p._replace(aatype=np.array([cysteine] * 2, np.int32), residue_index=index, chain_id=index * 0)
    q = q._replace(exists=residues.ATOM14_MASK[q.aatype])

    def clash(slot, other):
        moved = atom14.copy()
        moved[1, other] = moved[0, slot] + [1.7, 0, 0]
        return framework.call(clashes, q._replace(atom14=moved))[0]

    assert clash(5, 5) == 0
    assert clash(5, 4) > 0
    assert clash(2, 0) > 0
    assert framework.call(clashes, q._replace(residue_index=np.array([0, 1], np.int32), atom14=atom14))[0] == 0

    def bond(aatype, length):
        moved = atom14.copy()
        moved[1, 0] = moved[0, 2] + [length, 0, 0]
        x = q._replace(aatype=np.array([0, aatype], np.int32), residue_index=np.array([4, 5], np.int32), atom14=moved)
        return framework.call(bonds, x)[0]

    assert bond(0, 1.329 + 0.18) > 0
    assert bond(proline, 1.329 + 0.18) == 0


# Under the frameworks' transformations, and in memory.


def test_jax_chunks_keep_memory_linear():
    """No intermediate of forward and backward is as large as frames × points."""
    framework = one_of(Jax)
    jax = framework.jax
    p, chunk = inputs(framework, synthetic_problem()), 4
    n, losses = p.mask.shape[0], framework.losses

    def largest(chunk_size):
        def scalar(atom14):
            x = p._replace(atom14=atom14)
            return sidechain(losses, x, chunk_size=chunk_size) + clashes(losses, x, chunk_size=chunk_size).loss

        return max(sizes(jax.make_jaxpr(jax.grad(scalar))(p.atom14).jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from sizes(inner)

    assert largest(None) >= 8 * n * 14 * n * 9
    assert largest(chunk) <= 14 * chunk * 14 * n * 9
    assert largest(1000) == largest(None)


def test_torch_chunks_keep_memory_linear():
    """No tensor of forward and backward is as large as frames × points, nor all that is kept between them."""
    framework = one_of(Torch)
    torch = framework.torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            tensors = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
            self.number = max([self.number, *(x.numel() for x in tensors)])
            return output

    p, chunk, losses = inputs(framework, synthetic_problem()), 4, framework.losses
    n = p.mask.shape[0]

    def measure(chunk_size):
        atom14, kept = p.atom14.clone().requires_grad_(), []
        x = p._replace(atom14=atom14)

        def keep(tensor):
            kept.append(tensor.numel())
            return tensor

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = sidechain(losses, x, chunk_size=chunk_size) + clashes(losses, x, chunk_size=chunk_size).loss
            loss.backward()
        return largest.number, sum(kept)

    whole, whole_kept = measure(None)
    largest, kept = measure(chunk)
    assert whole >= 8 * n * 14 * n * 3
    assert largest <= 14 * chunk * 14 * n * 9
    assert kept < whole_kept / 20


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.exhaustive)])
def test_torch_compiles_whole(backend):
    """By Dynamo into one graph; and backwards, traced ahead of time, which takes much longer."""
    framework = one_of(Torch)
    torch = framework.torch

    def everything(x):
        losses = framework.losses
        of_structure = total(losses, x, chains=True, chunk_size=11)
        return of_structure, lddt(losses, x), plddt(losses, x)

    p = synthetic_problem()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    expected = framework.call(lambda _, x: everything(x), p)
    assert_close(framework.call(lambda _, x: compiled(x), p), expected, LOSS)
    expected = framework.gradients(lambda _, x: everything(x), p)
    assert_close(framework.gradients(lambda _, x: compiled(x), p), expected, GRADIENT)


def test_torch_autocast_changes_nothing():
    framework = one_of(Torch)
    p = cast(synthetic_problem(), "float32")
    expected = [framework.call(function, p) for function in (total, violations, lddt, plddt)]
    with framework.torch.autocast("cpu", dtype=framework.torch.bfloat16):
        actual = [framework.call(function, p) for function in (total, violations, lddt, plddt)]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 0)


def test_what_does_not_fit_is_refused(framework):
    p = synthetic_problem()
    n = len(p.mask)
    with pytest.raises(
        ValueError, match=rf"predicted_points must be \({n}, 3\) to fit points_mask; got \({n - 1}, 3\)"
    ):
        framework.call(
            lambda losses, x: losses.frame_aligned_point_error(
                last(x.backbone), true_backbone(x), x.mask, x.atom14[1:, 1], x.true_atom14[:, 1], x.mask
            ),
            p,
        )
    for function in (fape, sidechain, renamed, clashes):
        with pytest.raises(ValueError, match="chunk_size must be at least 1"):
            framework.call(partial(function, chunk_size=0), p)
    with pytest.raises(ValueError, match="residue_index must be"):
        framework.call(clashes, p._replace(residue_index=p.residue_index[1:]))
    with pytest.raises(ValueError, match="chain_id must be"):
        framework.call(with_chains(bonds), p._replace(chain_id=p.chain_id[1:]))
    with pytest.raises(ValueError, match="logits must be"):
        framework.call(plddt, p._replace(logits=p.logits[1:]))


@pytest.mark.parametrize("resolution", [0.0, 2.9, 3.1])
def test_plddt_counts_good_structures_only(resolution, framework):
    p = synthetic_problem()
    (loss,) = framework.call(plddt, p._replace(resolution=np.array(resolution)))
    assert (loss > 0) == (resolution == 2.9)
