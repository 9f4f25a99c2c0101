"""True structures and predictions of them, for all tests of the losses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ipa_bridge.proteins import load_structure, residues

NUM_LAYER = 3


class Frames(NamedTuple):
    """Frames in numpy; each framework converts them to its Rigid."""

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
    """(N, 8) frames of the rigid groups from their defining atoms; the identity where one of these is missing."""
    points = np.stack([gathered(atom37, residues.GROUP_ATOMS[aatype][:, :, i]) for i in range(3)], -2)
    known = np.stack([np.take_along_axis(atom37_mask, residues.GROUP_ATOMS[aatype][:, :, i], 1) for i in range(3)], -1)
    mask = residues.GROUP_MASK[aatype] & known.all(-1)
    x, origin, xy = np.moveaxis(points, -2, 0)
    e1 = unit(x - origin) * np.array([1, *[-1] * 7])[:, None]
    e2 = unit((xy - origin) - e1 * ((xy - origin) * e1).sum(-1, keepdims=True))
    rotation = np.stack([e1, e2, np.cross(e1, e2)], -1)
    return Frames(np.where(mask[..., None, None], rotation, np.eye(3)), np.where(mask[..., None], origin, 0)), mask


def true_chis(aatype, atom37, atom37_mask):
    """(sin, cos) of χ1–χ4, and the mask of known ones."""
    slots = residues.CHI_ATOMS[aatype]
    a, b, c, d = (gathered(atom37, slots[:, :, i]) for i in range(4))
    mask = residues.CHI_MASK[aatype] & np.all([np.take_along_axis(atom37_mask, slots[:, :, i], 1) for i in range(4)], 0)
    n1, n2 = np.cross(b - a, c - b), np.cross(c - b, d - c)
    sin, cos = (np.cross(n1, n2) * unit(c - b)).sum(-1), (n1 * n2).sum(-1)
    return np.where(mask[..., None], unit(np.stack([sin, cos], -1)), 0), mask


def small_turns(rng, shape, spread):
    """Random rotations; a larger spread makes larger angles."""
    q = np.concatenate([np.ones((*shape, 1)), spread * rng.standard_normal((*shape, 3))], -1)
    w, x, y, z = np.moveaxis(unit(q), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def make_problem(aatype, atom37, atom37_mask, residue_index, chain_id, mask, seed=0, noise=0.7):
    """The structure with some atoms removed, and a prediction with errors of a few Å, larger in the first layers."""
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
    # Half of the ambiguous atoms get their alternative names.
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
    """10 residues before and 9 after a chain's end, and 2 of padding: the length of `synthetic_problem`."""
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
    """Every residue type and the unknown one, in two chains, with ideal rigid groups placed roughly."""
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


def map_floats(function, p):
    """The problem with a function (of name and array) applied to its float arrays."""

    def each(name, x):
        if isinstance(x, Frames):
            return Frames(*(each(name, y) for y in x))
        return function(name, x) if np.issubdtype(x.dtype, np.floating) else x

    return Problem(*(each(name, x) for name, x in zip(Problem._fields, p, strict=True)))


def cast(p, dtype):
    return map_floats(lambda _, x: x.astype(dtype), p)


def cotangent(seed, shape):
    return np.random.default_rng(seed).standard_normal(tuple(shape))


def two(seed_problem):
    """A batch of two problems, and the two problems alone."""
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
