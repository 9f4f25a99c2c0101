"""Random frames are uniform and where they were asked for; the idealised peptide is textbook geometry."""

from __future__ import annotations

import numpy as np
import pytest

from ipa_bridge.frames import (
    BOND_ANGLES,
    BOND_LENGTHS,
    HELIX,
    STRAND,
    TURN,
    build_backbone,
    idealised_peptide,
    random_frames,
    random_rotations,
)
from ipa_bridge.structures import backbone_frames
from ipa_parity.tolerance import BOUNDS

TOLERANCE = BOUNDS["points"] * np.finfo(np.float64).eps
DIHEDRALS = [HELIX] * 20 + list(TURN) + [STRAND] * 20


def test_random_rotations_are_rotations_and_uniform():
    """Over SO(3), E[tr R] = 0 and E[(tr R)²] = 1, and each entry has mean 0 and variance 1/3."""
    number = 40_000
    rotation = random_rotations(np.random.default_rng(0), (number,))
    assert np.abs(np.einsum("nxy,nxz->nyz", rotation, rotation) - np.eye(3)).max() <= TOLERANCE
    assert np.abs(np.linalg.det(rotation) - 1).max() <= TOLERANCE
    five_sigma = 5 / np.sqrt(number)
    trace = np.trace(rotation, axis1=-2, axis2=-1)
    assert abs(trace.mean()) < five_sigma
    assert abs((trace**2).mean() - 1) < 2 * five_sigma
    assert np.abs(rotation.mean(0)).max() < five_sigma
    assert np.abs((rotation**2).mean(0) - 1 / 3).max() < five_sigma


@pytest.mark.parametrize(("spread", "offset"), [(10.0, 0.0), (0.5, 1000.0)])
def test_random_frames_lie_where_asked(spread, offset):
    rotation, translation = random_frames(np.random.default_rng(1), (2, 500), spread=spread, offset=offset)
    assert rotation.shape == (2, 500, 3, 3)
    assert translation.shape == (2, 500, 3)
    centre = (translation.max((0, 1)) + translation.min((0, 1))) / 2
    half_sides = (translation.max((0, 1)) - translation.min((0, 1))) / 2
    assert (half_sides <= spread).all()
    assert (half_sides > 0.95 * spread).all()
    assert abs(np.linalg.norm(centre) - offset) < 0.1 * spread


def angle(a, b, c):
    u, v = a - b, c - b
    cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1) / np.linalg.norm(v, axis=-1)
    return np.rad2deg(np.arccos(cosine))


def dihedral(a, b, c, d):
    """IUPAC: the angle from a to d, clockwise as seen from b to c."""
    axis = (c - b) / np.linalg.norm(c - b, axis=-1, keepdims=True)
    first, second = np.cross(b - a, axis), np.cross(axis, d - c)
    return np.rad2deg(np.arctan2((np.cross(first, second) * axis).sum(-1), (first * second).sum(-1)))


def test_bonds_angles_and_dihedrals_are_the_textbooks():
    n, ca, c = build_backbone(DIHEDRALS)
    next_n, next_ca, next_c = (x[1:] for x in (n, ca, c))
    for name, a, b in (("N-CA", n, ca), ("CA-C", ca, c), ("C-N", c[:-1], next_n)):
        assert np.linalg.norm(b - a, axis=-1) == pytest.approx(BOND_LENGTHS[name], rel=1e-12)
    for name, atoms in (
        ("N-CA-C", (n, ca, c)),
        ("CA-C-N", (ca[:-1], c[:-1], next_n)),
        ("C-N-CA", (c[:-1], next_n, next_ca)),
    ):
        assert angle(*atoms) == pytest.approx(BOND_ANGLES[name], rel=1e-10)
    phi, psi = np.array(DIHEDRALS).T
    assert dihedral(c[:-1], next_n, next_ca, next_c) == pytest.approx(phi[1:], rel=1e-10)
    assert dihedral(n[:-1], ca[:-1], c[:-1], next_n) == pytest.approx(psi[:-1], rel=1e-10, abs=1e-10)
    assert np.abs(dihedral(ca[:-1], c[:-1], next_n, next_ca)) == pytest.approx(180)


def helix_of(rotation, translation):
    """Rise per residue in Å, and residues per turn, of the screw that takes each residue to the next."""
    step = rotation[:-1].swapaxes(-1, -2) @ rotation[1:]
    turn = np.arccos((np.trace(step, axis1=-2, axis2=-1) - 1) / 2)
    skew = np.stack([step[:, 2, 1] - step[:, 1, 2], step[:, 0, 2] - step[:, 2, 0], step[:, 1, 0] - step[:, 0, 1]], -1)
    axis = np.einsum("nxy,ny->nx", rotation[:-1], skew / (2 * np.sin(turn))[:, None])
    return ((translation[1:] - translation[:-1]) * axis).sum(-1), 2 * np.pi / turn


def test_helix_and_strand_have_their_known_shapes():
    peptide = idealised_peptide()
    assert len(peptide) == 42
    assert peptide.mask.all()
    assert peptide.sequence == "A" * 42
    rise, per_turn = helix_of(peptide.rotation[:19], peptide.translation[:19])
    assert rise == pytest.approx(1.5, abs=0.05)
    assert per_turn == pytest.approx(3.6, abs=0.06)
    rise, per_turn = helix_of(peptide.rotation[23:], peptide.translation[23:])
    assert np.abs(rise) == pytest.approx(3.3, abs=0.15)
    assert per_turn == pytest.approx(2, abs=0.3)


def test_peptide_folds_without_clashes():
    ca = idealised_peptide().translation
    distance = np.linalg.norm(ca[:, None] - ca[None], axis=-1)
    assert distance[np.triu_indices(len(ca), 2)].min() > 4.5


def test_peptide_frames_are_those_of_its_atoms():
    rotation, translation = backbone_frames(*build_backbone(DIHEDRALS))
    peptide = idealised_peptide()
    assert (peptide.rotation == rotation).all()
    assert (peptide.translation == translation).all()
