"""Frames of a backbone (Suppl. Alg. 21), uniform random frames, and an idealised peptide."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ipa_bridge.proteins.residues import (
    ATOM14_NAMES,
    ATOM14_POSITIONS,
    ATOM37_MASK,
    ATOM_ORDER,
    ATOM_TYPES,
    GROUP_ROTATION,
    RESTYPES,
)
from ipa_bridge.proteins.structure import Structure

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float64
    from numpy import ndarray

BOND_LENGTHS = {"N-CA": 1.458, "CA-C": 1.525, "C-N": 1.329}
"""Å; Engh & Huber, Acta Cryst. A47 (1991) 392–400."""

BOND_ANGLES = {"N-CA-C": 111.0, "CA-C-N": 117.2, "C-N-CA": 121.7}
"""Degrees; the same authors' revision, International Tables for Crystallography F (2001), ch. 18.3."""

SMALLEST_AREA = 1e-3
"""Å²; three backbone atoms that span less lie on a line and define no frame."""

PSI = 3
"""The rigid group that turns by ψ and carries O."""

HELIX = (-57.8, -47.0)
STRAND = (-120.0, 115.0)
TURN = ((-60.0, -30.0), (-90.0, 0.0))
"""φ, ψ in degrees: textbook values for the α-helix and, close to the parallel sheet's (−119, 113), a β-strand;
residues 2 and 3 of a type I turn as in Venkatachalam, Biopolymers 6 (1968) 1425."""


def backbone_frames(
    n: Float[ndarray, "*B 3"], ca: Float[ndarray, "*B 3"], c: Float[ndarray, "*B 3"]
) -> tuple[Float64[ndarray, "*B 3 3"], Float64[ndarray, "*B 3"]]:
    """Rotations and translations from N, Cα and C positions (Suppl. Alg. 21, rigidFrom3Points).

    The origin is Cα, the x-axis points to C, and N lies in the xy-plane with y > 0. If an atom is missing (NaN) or the
    three lie on a line, the rotation is the identity and the translation zero. The result is always float64.
    """
    n, ca, c = (np.asarray(atom, np.float64) for atom in (n, ca, c))
    defined = defines_frame(n, ca, c)[..., None]
    v1, v2 = np.where(defined, c - ca, [1.0, 0.0, 0.0]), np.where(defined, n - ca, [0.0, 1.0, 0.0])  # lines 1–2
    e1 = v1 / np.linalg.norm(v1, axis=-1, keepdims=True)  # line 3
    u2 = v2 - e1 * np.sum(e1 * v2, -1, keepdims=True)  # line 4
    e2 = u2 / np.linalg.norm(u2, axis=-1, keepdims=True)  # line 5
    return np.stack([e1, e2, np.cross(e1, e2)], -1), np.where(defined, ca, 0.0)  # lines 6–8


def defines_frame(
    n: Float[ndarray, "*B 3"], ca: Float[ndarray, "*B 3"], c: Float[ndarray, "*B 3"]
) -> Bool[ndarray, "*B"]:
    """True where all three atoms are present and not on a line; a missing atom (NaN) compares as False."""
    return np.linalg.norm(np.cross(n - ca, c - ca), axis=-1) > SMALLEST_AREA


def random_rotations(rng: np.random.Generator, shape: Sequence[int] = ()) -> Float64[ndarray, "*shape 3 3"]:
    """Rotation matrices uniform over SO(3) (Haar measure): normalised Gaussian quaternions."""
    quaternion = rng.standard_normal((*shape, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    w, x, y, z = np.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def random_frames(
    rng: np.random.Generator, shape: Sequence[int] = (), *, spread: float = 10.0, offset: float = 0.0
) -> tuple[Float64[ndarray, "*shape 3 3"], Float64[ndarray, "*shape 3"]]:
    """Draws rotations and translations, independent and uniform.

    Args:
        rng: the source of randomness.
        shape: batch shape.
        spread: translations fill a cube of this half-side, in the unit the model takes (Å, or Å / position_scale).
        offset: distance of the cube's centre from the origin, in a random direction; the same unit.
    """
    direction = rng.standard_normal(3)
    centre = offset * direction / np.linalg.norm(direction)
    return random_rotations(rng, shape), centre + rng.uniform(-spread, spread, (*shape, 3))


def idealised_peptide() -> Structure:
    """A poly-alanine of 42 residues: an α-helix of 20, a type I turn of two and a β-strand of 20.

    O and Cβ lie where `residues` has them, in the frames of ψ and of the backbone.
    """
    dihedrals = [HELIX] * 20 + list(TURN) + [STRAND] * 20
    n, ca, c = build_backbone(dihedrals)
    rotation, translation = backbone_frames(n, ca, c)
    number = len(dihedrals)
    alanine = RESTYPES.index("A")
    local = dict(zip(ATOM14_NAMES[alanine], ATOM14_POSITIONS[alanine], strict=True))
    cb = ca + rotation @ local["CB"]
    o = c + np.einsum("nij,jk,nkl,l->ni", rotation, GROUP_ROTATION[alanine, PSI], _turns(dihedrals), local["O"])
    atom37 = np.zeros((number, len(ATOM_TYPES), 3))
    for name, position in {"N": n, "CA": ca, "C": c, "CB": cb, "O": o}.items():
        atom37[:, ATOM_ORDER[name]] = position
    return Structure(
        name="idealised peptide",
        rotation=rotation,
        translation=translation,
        mask=np.ones(number, bool),
        atom37=atom37,
        atom37_mask=np.tile(ATOM37_MASK[alanine], (number, 1)),
        aatype=np.full(number, alanine),
        chain_id=np.full(number, "A"),
        residue_number=np.arange(1, number + 1),
        insertion_code=np.full(number, ""),
    )


def _turns(dihedrals: Sequence[tuple[float, float]]) -> Float64[ndarray, "N 3 3"]:
    """Rotations by ψ about the x-axis."""
    psi = np.deg2rad([psi for _, psi in dihedrals])
    turns = np.tile(np.eye(3), (len(psi), 1, 1))
    turns[:, 1, 1] = turns[:, 2, 2] = np.cos(psi)
    turns[:, 2, 1], turns[:, 1, 2] = np.sin(psi), -np.sin(psi)
    return turns


def build_backbone(dihedrals: Sequence[tuple[float, float]]) -> tuple[Float64[ndarray, "N 3"], ...]:
    """N, Cα and C positions in Å from φ, ψ in degrees per residue; every peptide bond is trans.

    Bond lengths and angles are ideal. Each atom is placed from the three before it (NeRF; Parsons et al., J. Comput.
    Chem. 26 (2005) 1063).
    """
    angle = np.deg2rad(BOND_ANGLES["N-CA-C"])
    length = BOND_LENGTHS["CA-C"]
    atoms = [
        np.array([-BOND_LENGTHS["N-CA"], 0.0, 0.0]),
        np.zeros(3),
        np.array([-length * np.cos(angle), length * np.sin(angle), 0.0]),
    ]
    for (_, psi), (phi, _) in itertools.pairwise(dihedrals):
        for dihedral, bend, bond in ((psi, "CA-C-N", "C-N"), (180.0, "C-N-CA", "N-CA"), (phi, "N-CA-C", "CA-C")):
            atoms.append(_place(atoms[-3:], BOND_LENGTHS[bond], BOND_ANGLES[bend], dihedral))
    return tuple(np.array(atoms[i::3]) for i in range(3))


def _place(last: Sequence[ndarray], bond: float, bend: float, dihedral: float) -> ndarray:
    """The atom bonded to c, of the last three a, b, c, at the angle b–c–atom and dihedral a–b–c–atom in degrees."""
    a, b, c = last
    bend, dihedral = np.deg2rad(bend), np.deg2rad(dihedral)
    forward = (c - b) / np.linalg.norm(c - b)
    normal = np.cross(b - a, forward)
    normal /= np.linalg.norm(normal)
    side = np.cross(normal, forward)
    along, across = -np.cos(bend), np.sin(bend)
    return c + bond * (along * forward + across * (np.cos(dihedral) * side + np.sin(dihedral) * normal))
