"""The 20 amino acids in AlphaFold's order: their atoms, rigid groups, torsions and stereochemistry as arrays.

The values lie in data/amino_acids.json, which names its sources. Axis 0 of every table is aatype: the 20 and, last,
the unknown residue, which has no atoms of its own. Positions are in Å; absent entries are zero or False.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from numpy import ndarray

from ipa_bridge.config import LossConfig

RESTYPES = "ARNDCQEGHILKMFPSTWYV"
"""One-letter codes; a residue's aatype is its index here."""

UNKNOWN_AATYPE = len(RESTYPES)
"""aatype of a residue that is none of the 20 (AlphaFold's X)."""

_AMINO_ACIDS: dict[str, dict[str, Any]] = json.loads((files(__package__) / "data" / "amino_acids.json").read_text())[
    "amino_acids"
]

RESTYPE_NAMES = (*_AMINO_ACIDS, "UNK")
"""Three-letter codes by aatype."""

# fmt: off
ATOM_TYPES = (
    "N", "CA", "C", "CB", "O", "CG", "CG1", "CG2", "OG", "OG1", "SG", "CD", "CD1", "CD2", "ND1", "ND2", "OD1", "OD2",
    "SD", "CE", "CE1", "CE2", "CE3", "NE", "NE1", "NE2", "OE1", "OE2", "CH2", "NH1", "NH2", "OH", "CZ", "CZ2", "CZ3",
    "NZ", "OXT",
)
# fmt: on
"""Heavy atom names in the order of atom37, one slot per name whatever the residue."""

ATOM_ORDER = {name: slot for slot, name in enumerate(ATOM_TYPES)}
"""atom37 slot by atom name."""

ATOM14_NAMES = (
    *((*(name for name, *_ in acid["atoms"]), *[""] * (14 - len(acid["atoms"]))) for acid in _AMINO_ACIDS.values()),
    ("",) * 14,
)
"""Atom names by aatype in the order of atom14, one slot per atom that the residue has; "" beyond those."""

N_SLOT, CA_SLOT, C_SLOT, SG_SLOT = (ATOM14_NAMES[RESTYPES.index("C")].index(name) for name in ("N", "CA", "C", "SG"))
"""atom14 slots of the backbone's N, Cα and C, the same in every residue, and of cysteine's sulfur."""

PROLINE_AATYPE = RESTYPES.index("P")
"""aatype of proline; peptide bonds to its nitrogen are longer."""

NUM_GROUP = 8
"""Rigid groups (Suppl. Table 2): backbone, pre-ω, φ, ψ, χ1, χ2, χ3, χ4; the last seven each turn by their torsion."""

VAN_DER_WAALS_RADIUS = {"C": 1.7, "N": 1.55, "O": 1.52, "S": 1.8}
"""Å by element."""

CA_CA_DISTANCE = 3.80209737096
"""Å between the Cα of consecutive residues joined by a trans peptide bond."""

PEPTIDE_BOND_LENGTH = {"mean": (1.329, 1.341), "stddev": (0.014, 0.016)}
"""Length of C–N in Å: first to any residue but proline, then to proline."""

PEPTIDE_BOND_COSINES = {"CA-C-N": (-0.4473, 0.0311), "C-N-CA": (-0.5203, 0.0353)}
"""Mean and standard deviation of the cosines of the angles at the peptide bond."""

TOLERATED_CA_C_N_STDDEV = PEPTIDE_BOND_LENGTH["stddev"][0]
"""Standard deviation that AlphaFold's code uses for CA-C-N: that of C–N lengths. Its weights were trained with it."""


def _fill(shape: tuple[int, ...], entries: Mapping[Any, Any], dtype: type) -> ndarray:
    """A read-only table over aatype, zero where there is no entry."""
    table: ndarray = np.zeros((len(RESTYPE_NAMES), *shape), dtype)
    for index, value in entries.items():
        table[index] = value
    table.flags.writeable = False
    return table


def _atoms() -> list[tuple[int, int, str, int, ndarray]]:
    """(aatype, atom14 slot, name, group, position) of every atom."""
    return [
        (aatype, slot, name, group, np.array(position))
        for aatype, acid in enumerate(_AMINO_ACIDS.values())
        for slot, (name, group, *position) in enumerate(acid["atoms"])
    ]


def _chis() -> list[tuple[int, int, list[str], bool]]:
    """(aatype, number from 0, its four atoms' names, is it pi-periodic) of every side-chain torsion."""
    return [
        (aatype, chi, names, periodic)
        for aatype, acid in enumerate(_AMINO_ACIDS.values())
        for chi, (names, periodic) in enumerate(zip(acid["chi_atoms"], acid["chi_pi_periodic"], strict=True))
    ]


def _atom37(names: list[str]) -> list[int]:
    return [ATOM_ORDER[name] for name in names]


ATOM14_MASK = _fill((14,), {(a, slot): True for a, slot, *_ in _atoms()}, bool)
"""True where the residue has that atom."""

ATOM37_MASK = _fill((37,), {(a, ATOM_ORDER[name]): True for a, _, name, *_ in _atoms()}, bool)
"""`ATOM14_MASK` in atom37's order; OXT belongs to no residue type."""

ATOM14_TO_ATOM37 = _fill((14,), {(a, slot): ATOM_ORDER[name] for a, slot, name, *_ in _atoms()}, int)
"""atom37 slot of each atom14 slot."""

ATOM37_TO_ATOM14 = _fill((37,), {(a, ATOM_ORDER[name]): slot for a, slot, name, *_ in _atoms()}, int)
"""atom14 slot of each atom37 slot."""

ATOM14_GROUP = _fill((14,), {(a, slot): group for a, slot, _, group, _ in _atoms()}, int)
"""The rigid group that carries each atom."""

ATOM14_POSITIONS = _fill((14, 3), {(a, slot): position for a, slot, _, _, position in _atoms()}, float)
"""Each atom in the frame of its group, Å."""

ATOM14_RADIUS = _fill((14,), {(a, slot): VAN_DER_WAALS_RADIUS[name[0]] for a, slot, name, *_ in _atoms()}, float)
"""Van der Waals radii, Å."""

CHI_MASK = _fill((4,), {(a, chi): True for a, chi, *_ in _chis()}, bool)
"""True where the residue has that side-chain torsion."""

CHI_ATOMS = _fill((4, 4), {(a, chi): _atom37(names) for a, chi, names, _ in _chis()}, int)
"""atom37 slots of the four atoms that define each side-chain torsion."""

CHI_PI_PERIODIC = _fill((4,), {(a, chi): periodic for a, chi, _, periodic in _chis()}, bool)
"""True where turning the side-chain torsion by π gives the same residue except for atom names."""

TORSION_ATOMS = _fill(
    (7, 4),
    {
        (a, torsion): slots
        for a in range(len(RESTYPE_NAMES))
        for torsion, slots in enumerate(([38, 39, 0, 1], [39, 0, 1, 2], [0, 1, 2, 4]))
    }
    | {(a, 3 + chi): _atom37(names) for a, chi, names, _ in _chis()},
    int,
)
"""atom37 slots of the four atoms of pre-ω, φ, ψ, χ1–χ4; slots 37–39 are N, Cα, C of the previous residue.

ψ is measured to the oxygen, which is π away from the next residue's nitrogen.
"""

TORSION_MASK = _fill(
    (7,),
    {(a, torsion): True for a in range(len(RESTYPE_NAMES)) for torsion in range(3)}
    | {(a, 3 + chi): True for a, chi, *_ in _chis()},
    bool,
)
"""True where the residue type has that torsion."""

TORSION_PI_PERIODIC = _fill((7,), {(a, 3 + chi): periodic for a, chi, _, periodic in _chis()}, bool)
"""`CHI_PI_PERIODIC` for all seven torsions; False for the backbone's."""

GROUP_MASK = _fill(
    (NUM_GROUP,),
    {(a, group): True for a in range(len(RESTYPE_NAMES)) for group in (0, 3)}
    | {(a, 4 + chi): True for a, chi, *_ in _chis()},
    bool,
)
"""True where the residue has atoms that define that group: the backbone, ψ (oxygen) and its χs."""

GROUP_ATOMS = _fill(
    (NUM_GROUP, 3),
    {(a, 0): _atom37(["C", "CA", "N"]) for a in range(len(RESTYPE_NAMES))}
    | {(a, 3): _atom37(["CA", "C", "O"]) for a in range(len(RESTYPE_NAMES))}
    | {(a, 4 + chi): _atom37(names[1:]) for a, chi, names, _ in _chis()},
    int,
)
"""atom37 slots of three atoms that define the group's frame: one on the x-axis, the origin, one in the xy-plane.

The first lies on the positive x-axis of the backbone's frame and on the negative one of every other's.
"""


def _swaps() -> dict[tuple[int, int], int]:
    """(aatype, atom14 slot) to the slot that it is exchanged with."""
    pairs = [
        (aatype, [ATOM14_NAMES[aatype].index(name) for name in swap])
        for aatype, acid in enumerate(_AMINO_ACIDS.values())
        for swap in acid["swaps"]
    ]
    return {(aatype, i): j for aatype, (one, other) in pairs for i, j in ((one, other), (other, one))}


ATOM14_SWAP = _fill((14,), {(a, i): i for a in range(len(RESTYPE_NAMES)) for i in range(14)} | _swaps(), int)
"""atom14 slot of each atom under the alternative naming, which is as correct (Suppl. Table 3: ASP, GLU, PHE, TYR)."""

ATOM14_IS_AMBIGUOUS = _fill((14,), dict.fromkeys(_swaps(), True), bool)
"""True where the atom's name is ambiguous."""

ATOM14_AMBIGUOUS_SLOTS = _fill(
    (4,), dict(enumerate(np.argsort(~ATOM14_IS_AMBIGUOUS, axis=-1, kind="stable")[:, :4])), int
)
"""atom14 slots of a residue's ambiguous atoms, at most four; filled up with other slots if there are fewer."""

GROUP_IS_AMBIGUOUS = _fill(
    (NUM_GROUP,), {(a, 3 + int(CHI_MASK[a].sum())): True for a in sorted({a for a, _ in _swaps()})}, bool
)
"""True for the group that turns by π when ambiguous atoms are renamed: the last χ of its residue."""


def _frame(x: ndarray, xy: ndarray, origin: ndarray) -> tuple[ndarray, ndarray]:
    """The frame at `origin` with its x-axis along `x` and `xy` in the half of its xy-plane where y > 0."""
    e1 = x / np.linalg.norm(x)
    e2 = xy - e1 * (xy @ e1)
    e2 /= np.linalg.norm(e2)
    return np.stack([e1, e2, np.cross(e1, e2)], -1), origin


def _group_frames(acid: Mapping[str, Any]) -> dict[int, tuple[ndarray, ndarray]]:
    """The groups' frames at torsion zero (Suppl. 1.8.4): of χ2–χ4 relative to the previous χ, else to the backbone."""
    atoms = {name: np.array(position) for name, _, *position in acid["atoms"]}
    n, ca, c = atoms["N"], atoms["CA"], atoms["C"]
    frames = {2: _frame(n - ca, np.array([1.0, 0.0, 0.0]), n), 3: _frame(c - ca, ca - n, c)}
    for chi, names in enumerate(acid["chi_atoms"]):
        before, axis_start, axis_end = (atoms[name] for name in names[:3])
        if chi == 0:
            frames[4] = _frame(axis_end - axis_start, before - axis_start, axis_end)
        else:  # the axis starts at the origin of the group before
            frames[4 + chi] = _frame(axis_end, np.array([-1.0, 0.0, 0.0]), axis_end)
    return frames


_FRAMES = {
    (a, group): frame for a, acid in enumerate(_AMINO_ACIDS.values()) for group, frame in _group_frames(acid).items()
}

GROUP_ROTATION = _fill(
    (NUM_GROUP, 3, 3),
    {(a, group): np.eye(3) for a in range(len(RESTYPE_NAMES)) for group in range(NUM_GROUP)}
    | {(a, group): rotation if a < UNKNOWN_AATYPE else np.eye(3) for (a, group), (rotation, _) in _FRAMES.items()},
    float,
)
"""Rotations of the groups' frames at torsion zero, in their parents' frames; the identity where there is none."""

GROUP_TRANSLATION = _fill((NUM_GROUP, 3), {key: translation for key, (_, translation) in _FRAMES.items()}, float)
"""Origins of the groups' frames at torsion zero, in their parents' frames, Å."""


def _known_distances(acid: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard deviation, in Å, of distances over one bond, and over two bonds by the angle between them."""
    bonds = {frozenset((a, b)): (length, stddev) for a, b, length, stddev in acid["bonds"]}
    distances = {(a, b): (length, stddev) for a, b, length, stddev in acid["bonds"]}
    for a, b, c, degrees, stddev_degrees in acid["angles"]:
        (ab, error_ab), (bc, error_bc) = bonds[frozenset((a, b))], bonds[frozenset((b, c))]
        angle, error_angle = np.deg2rad([degrees, stddev_degrees])
        length = np.sqrt(ab**2 + bc**2 - 2 * ab * bc * np.cos(angle))
        error = np.linalg.norm(
            [
                ab * bc * np.sin(angle) * error_angle,
                (ab - bc * np.cos(angle)) * error_ab,
                (bc - ab * np.cos(angle)) * error_bc,
            ]
        )
        distances[a, c] = (float(length), float(error / length))
    return distances


_DISTANCES = {
    (aatype, *order): values
    for aatype, acid in enumerate(_AMINO_ACIDS.values())
    for names, values in _known_distances(acid).items()
    for slots in ([ATOM14_NAMES[aatype].index(name) for name in names],)
    for order in (slots, slots[::-1])
}

ATOM14_DISTANCE = _fill((14, 14), {key: length for key, (length, _) in _DISTANCES.items()}, float)
"""Distance in Å from the literature for atoms one bond apart, by the law of cosines for two bonds; else zero."""

ATOM14_DISTANCE_STDDEV = _fill((14, 14), {key: stddev for key, (_, stddev) in _DISTANCES.items()}, float)
"""Standard deviation of `ATOM14_DISTANCE`, Å; for two bonds, errors are propagated as independent."""

ATOM14_PAIR_MASK = _fill(
    (14, 14), dict(enumerate(ATOM14_MASK[:, :, None] & ATOM14_MASK[:, None, :] & ~np.eye(14, dtype=bool))), bool
)
"""True where both atoms exist and are different atoms, (21, 14, 14)."""

ATOM14_PAIR_RADIUS = _fill((14, 14), dict(enumerate(ATOM14_RADIUS[:, :, None] + ATOM14_RADIUS[:, None, :])), float)
"""Sum of two atoms' van der Waals radii, Å."""


def atom14_distance_bounds(
    *,
    bond_length_tolerance: float = LossConfig.tolerance_factor,
    overlap_tolerance: float = LossConfig.overlap_tolerance,
) -> tuple[ndarray, ndarray]:
    """Least and greatest distances in Å between the atoms of one residue, (21, 14, 14) each.

    Atoms one or two bonds apart may deviate from `ATOM14_DISTANCE` by bond_length_tolerance; other atoms may overlap by
    overlap_tolerance. Absent atoms and the diagonal have bounds of zero.

    Args:
        bond_length_tolerance: allowed deviation in standard deviations.
        overlap_tolerance: allowed overlap of van der Waals spheres, Å.
    """
    known, slack = ATOM14_DISTANCE > 0, bond_length_tolerance * ATOM14_DISTANCE_STDDEV
    lower = np.where(ATOM14_PAIR_MASK, ATOM14_PAIR_RADIUS - overlap_tolerance, 0.0)
    upper = np.where(ATOM14_PAIR_MASK, 1e10, 0.0)
    return np.where(known, ATOM14_DISTANCE - slack, lower), np.where(known, ATOM14_DISTANCE + slack, upper)


def may_have(aatype: int) -> ndarray:
    """The atoms of atom37 that a residue can have: its type's and OXT, or any if it is unknown."""
    return ATOM37_MASK[aatype] | (aatype == UNKNOWN_AATYPE) | (np.arange(len(ATOM_TYPES)) == ATOM_ORDER["OXT"])
