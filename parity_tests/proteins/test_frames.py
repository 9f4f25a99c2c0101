"""Random frames are uniform rigid motions; the idealised peptide has its specified geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipa_bridge.proteins.frames import (
    BOND_ANGLES,
    BOND_LENGTHS,
    HELIX,
    STRAND,
    TURN,
    backbone_frames,
    build_backbone,
    idealised_peptide,
    random_frames,
    random_rotations,
)
from ipa_bridge.proteins.residues import ATOM37_MASK, ATOM_TYPES

MANY = 40_000


def dihedral(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Degrees, by the IUPAC sign: positive when d turns clockwise, seen from b to c."""
    axis = (c - b) / np.linalg.norm(c - b, axis=-1, keepdims=True)
    before = np.cross(b - a, axis)
    after = np.cross(axis, d - c)
    sine = np.sum(np.cross(before, after) * axis, -1)
    return np.rad2deg(np.arctan2(sine, np.sum(before * after, -1)))


def bend(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    u, v = a - b, c - b
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(u, v), axis=-1), np.sum(u * v, -1)))


def length(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(b - a, axis=-1)


def helix_axis(points: np.ndarray) -> tuple[float, float]:
    """Rise per residue and residues per turn of a regular helix: the screw motion from each residue to the next."""
    second = points[2:] - 2 * points[1:-1] + points[:-2]
    # Second differences of points on a helix are perpendicular to its axis.
    axis = np.cross(second[0], second[1])
    axis /= np.linalg.norm(axis)
    turn = bend(second[0], np.zeros(3), second[1])
    return abs((points[1] - points[0]) @ axis), 360.0 / turn


# Random frames


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5), (0,)])
def test_shapes(shape):
    rotation, translation = random_frames(np.random.default_rng(0), shape)
    assert rotation.shape == (*shape, 3, 3)
    assert translation.shape == (*shape, 3)
    assert rotation.dtype == translation.dtype == np.float64
    assert random_rotations(np.random.default_rng(0), shape).shape == (*shape, 3, 3)


@given(st.integers(0, 2**32 - 1))
def test_rotations_are_rotations(seed):
    rotation = random_rotations(np.random.default_rng(seed), (11,))
    np.testing.assert_allclose(np.swapaxes(rotation, -1, -2) @ rotation, np.tile(np.eye(3), (11, 1, 1)), atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0, rtol=0, atol=1e-14)


def test_rotations_are_uniform():
    """Moments and angle distribution of the Haar measure; 5 standard errors of the mean of 40 000."""
    rotation = random_rotations(np.random.default_rng(20210715), (MANY,))
    flat = rotation.reshape(MANY, 9)
    # E[R] = 0, E[R_ij R_kl] = δ_ik δ_jl / 3, Var(R_ij²) = 1/5 − 1/9.
    assert np.abs(flat.mean(0)).max() < 5 * np.sqrt(1 / 3 / MANY)
    assert np.abs(flat.T @ flat / MANY - np.eye(9) / 3).max() < 5 * np.sqrt((1 / 5 - 1 / 9) / MANY)
    # The angle's density is (1 − cos θ)/π: its distribution function is (θ − sin θ)/π.
    angle = np.sort(np.arccos(np.clip((np.trace(rotation, axis1=-2, axis2=-1) - 1) / 2, -1, 1)))
    expected = (angle - np.sin(angle)) / np.pi
    kolmogorov = np.abs(expected - np.arange(MANY) / MANY).max()
    assert kolmogorov < 1.95 / np.sqrt(MANY)


def test_rotations_stay_uniform_when_turned():
    """Haar measure is invariant: third moments of R and of Q·R agree, for a fixed Q."""
    rng = np.random.default_rng(4)
    rotation, turn = random_rotations(rng, (MANY,)), random_rotations(rng)
    for turned in (turn @ rotation, rotation @ turn):
        difference = (turned**3 - rotation**3).reshape(MANY, 9)
        assert np.abs(difference.mean(0)).max() < 5 * difference.std(0).max() / np.sqrt(MANY)


@pytest.mark.parametrize(("spread", "offset"), [(10.0, 0.0), (2.0, 0.0), (3.0, 1000.0)])
def test_translations_fill_their_cube(spread, offset):
    _, translation = random_frames(np.random.default_rng(1), (MANY,), spread=spread, offset=offset)
    centre = (translation.max(0) + translation.min(0)) / 2
    half_side = (translation.max(0) - translation.min(0)) / 2
    np.testing.assert_allclose(half_side, spread, rtol=1e-3)
    assert (half_side <= spread).all()
    assert abs(np.linalg.norm(centre) - offset) < 1e-3 * spread * np.sqrt(3)
    standardised = (translation - centre) / spread
    np.testing.assert_allclose((standardised**2).mean(0), 1 / 3, atol=5 * np.sqrt((1 / 5 - 1 / 9) / MANY))
    np.testing.assert_allclose(np.corrcoef(standardised.T), np.eye(3), atol=5 / np.sqrt(MANY))


def test_offset_takes_all_directions():
    centres = np.array([random_frames(np.random.default_rng(i), spread=0.0, offset=1.0)[1] for i in range(2000)])
    np.testing.assert_allclose(np.linalg.norm(centres, axis=-1), 1.0, atol=1e-14)
    assert np.abs(centres.mean(0)).max() < 5 * np.sqrt(1 / 3 / 2000)
    assert np.abs(centres.T @ centres / 2000 - np.eye(3) / 3).max() < 5 * np.sqrt((1 / 5 - 1 / 9) / 2000)


def test_a_seed_gives_the_same_frames_again():
    first, second = (random_frames(np.random.default_rng(3), (5,), offset=2.0) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        np.testing.assert_array_equal(left, right)


# The peptide

ANGLES = st.floats(-180.0, 180.0)


@given(st.lists(st.tuples(ANGLES, ANGLES), min_size=2, max_size=9))
def test_built_backbones_have_their_bonds_angles_and_dihedrals(dihedrals):
    n, ca, c = build_backbone(dihedrals)
    for name, value in {"N-CA": length(n, ca), "CA-C": length(ca, c), "C-N": length(c[:-1], n[1:])}.items():
        np.testing.assert_allclose(value, BOND_LENGTHS[name], rtol=0, atol=1e-10)
    np.testing.assert_allclose(bend(n, ca, c), BOND_ANGLES["N-CA-C"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(bend(ca[:-1], c[:-1], n[1:]), BOND_ANGLES["CA-C-N"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(bend(c[:-1], n[1:], ca[1:]), BOND_ANGLES["C-N-CA"], rtol=0, atol=1e-10)
    phi, psi = np.array(dihedrals).T
    turns = {
        "phi": dihedral(c[:-1], n[1:], ca[1:], c[1:]) - phi[1:],
        "psi": dihedral(n[:-1], ca[:-1], c[:-1], n[1:]) - psi[:-1],
        "omega": dihedral(ca[:-1], c[:-1], n[1:], ca[1:]) - 180.0,
    }
    for name, difference in turns.items():
        np.testing.assert_allclose((difference + 180.0) % 360.0 - 180.0, 0.0, rtol=0, atol=1e-10, err_msg=name)


def test_geometry_is_engh_and_hubers():
    assert BOND_LENGTHS == {"N-CA": 1.458, "CA-C": 1.525, "C-N": 1.329}
    assert BOND_ANGLES == {"N-CA-C": 111.0, "CA-C-N": 117.2, "C-N-CA": 121.7}


def test_dihedral_sign_is_biopythons():
    pdb = pytest.importorskip("Bio.PDB", reason="Biopython is not installed")
    points = np.random.default_rng(2).normal(size=(4, 3))
    theirs = np.rad2deg(pdb.calc_dihedral(*(pdb.Vector(*x) for x in points)))
    np.testing.assert_allclose(dihedral(*points), theirs, rtol=0, atol=1e-10)


def test_peptide_is_a_helix_a_turn_and_a_strand():
    peptide = idealised_peptide()
    dihedrals = [HELIX] * 20 + list(TURN) + [STRAND] * 20
    n, ca, c = build_backbone(dihedrals)
    rotation, translation = backbone_frames(n, ca, c)
    np.testing.assert_array_equal(peptide.rotation, rotation)
    np.testing.assert_array_equal(peptide.translation, translation)
    assert peptide.sequence == "A" * 42
    assert peptide.mask.dtype == bool
    assert peptide.mask.all()
    assert peptide.residue_number.tolist() == list(range(1, 43))
    assert set(peptide.chain_id) == {"A"}
    assert set(peptide.insertion_code) == {""}
    assert peptide.name == "idealised peptide"


def test_peptides_atoms_are_alanines():
    """Bonds and angles within three standard deviations of Engh & Huber's, and L-amino acids."""
    peptide = idealised_peptide()
    n, ca, c, cb, o = (peptide.atom37[:, ATOM_TYPES.index(name)] for name in ("N", "CA", "C", "CB", "O"))
    for ours, built in zip((n, ca, c), build_backbone([HELIX] * 20 + list(TURN) + [STRAND] * 20), strict=True):
        np.testing.assert_array_equal(ours, built)
    np.testing.assert_array_equal(peptide.atom37_mask, ATOM37_MASK[peptide.aatype])
    np.testing.assert_array_equal(peptide.atom37.any(-1) | (np.arange(37) == 1), peptide.atom37_mask)
    np.testing.assert_allclose(length(c, o), 1.229, rtol=0, atol=3 * 0.019)
    np.testing.assert_allclose(length(ca, cb), 1.520, rtol=0, atol=3 * 0.021)
    np.testing.assert_allclose(bend(ca, c, o), 120.1, rtol=0, atol=3 * 2.1)
    np.testing.assert_allclose(bend(n, ca, cb), 110.1, rtol=0, atol=3 * 1.4)
    np.testing.assert_allclose(bend(c, ca, cb), 110.1, rtol=0, atol=3 * 1.5)
    # Seen along N–Cα, Cβ lies 122.5° from C, on the side that makes an L-amino acid.
    np.testing.assert_allclose(dihedral(c, n, ca, cb), -122.5, rtol=0, atol=3.0)
    # The peptide group is planar, O opposite to the next N.
    np.testing.assert_allclose(np.abs(dihedral(n[1:], ca[:-1], c[:-1], o[:-1])), 180.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bend(o[:-1], c[:-1], n[1:]), 122.7, rtol=0, atol=3 * 1.6)


def test_helix_has_its_hydrogen_bonds():
    """O of residue i lies near N of residue i + 4, 2.9 Å in Pauling's helix."""
    peptide = idealised_peptide()
    o, n = peptide.atom37[:16, ATOM_TYPES.index("O")], peptide.atom37[4:20, ATOM_TYPES.index("N")]
    np.testing.assert_allclose(length(o, n), 2.9, rtol=0, atol=0.2)


def test_the_helix_is_an_alpha_helix():
    rise, residues_per_turn = helix_axis(idealised_peptide().translation[:20])
    assert rise == pytest.approx(1.5, abs=0.05)
    assert residues_per_turn == pytest.approx(3.6, abs=0.1)


def test_the_helix_is_right_handed():
    first = idealised_peptide().translation[:4]
    assert dihedral(*first) == pytest.approx(50.0, abs=5.0)


def test_the_strand_is_extended():
    strand = idealised_peptide().translation[23:41]
    rise, _ = helix_axis(strand)
    assert rise == pytest.approx(3.3, abs=0.1)


def test_consecutive_residues_are_trans():
    # Cα–Cα across a trans peptide bond, whatever φ and ψ.
    np.testing.assert_allclose(np.diff(idealised_peptide().translation, axis=0) ** 2 @ np.ones(3), 3.8**2, rtol=0.01)


def test_peptide_folds_without_clashes():
    ca = idealised_peptide().translation
    distance = np.linalg.norm(ca[:, None] - ca[None], axis=-1)
    assert distance[np.triu_indices(len(ca), 2)].min() > 4.5
