"""Small structure files with one oddity each, in both formats."""

from __future__ import annotations

import numpy as np
import pytest

from ipa_bridge.proteins import Structure, load_structure
from ipa_bridge.proteins.frames import (
    backbone_frames,
)
from ipa_bridge.proteins.residues import ATOM_TYPES, RESTYPES

pytest.importorskip("gemmi", reason="structures are read by gemmi")
from small_files import POSITIONS, Atom, assert_same, mmcif, pdb, residue, written


@pytest.fixture(params=["pdb", "cif"])
def load(request, tmp_path):
    """Writes atoms in either format and loads them."""

    def write_and_load(atoms: list[Atom], **options) -> Structure:
        path = tmp_path / f"small.{request.param}"
        path.write_text(pdb(atoms) if request.param == "pdb" else mmcif(atoms))
        return load_structure(path, **options)

    return write_and_load


def test_frames_are_of_the_atoms_written(load):
    structure = load([*residue("GLY", 3), *residue("TRP", 4)])
    n, ca, c = np.moveaxis(POSITIONS[3:5], 1, 0)
    rotation, translation = backbone_frames(n, ca, c)
    np.testing.assert_array_equal(structure.rotation, rotation)
    np.testing.assert_array_equal(structure.translation, translation)
    assert structure.sequence == "GW"
    assert structure.aatype.tolist() == [RESTYPES.index("G"), RESTYPES.index("W")]


def test_highest_occupancy_wins_per_atom_and_the_first_of_equals(load):
    atoms = residue("ALA", 1)
    for name, occupancies in {"N": (0.3, 0.7), "CA": (0.5, 0.5), "C": (0.6, 0.4)}.items():
        (atom,) = (a for a in atoms if a.name == name)
        moved = atom._replace(xyz=tuple(np.round(np.array(atom.xyz) + 0.25, 3)), altloc="B", occupancy=occupancies[1])
        at = atoms.index(atom)
        atoms[at : at + 1] = [atom._replace(altloc="A", occupancy=occupancies[0]), moved]
    n, ca, c = POSITIONS[1]
    rotation, translation = backbone_frames(np.round(n + 0.25, 3), ca, c)
    structure = load(atoms)
    np.testing.assert_array_equal(structure.translation, [translation])
    np.testing.assert_allclose(structure.rotation, [rotation], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("occupancies", "sequence"), [((0.4, 0.6), "GTV"), ((0.6, 0.4), "GSV"), ((0.5, 0.5), "GSV")])
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_one_of_two_residues_at_one_position_is_kept(load, occupancies, sequence, apart):
    ser = residue("SER", 2, altloc="A", occupancy=occupancies[0])
    thr = residue("THR", 2, altloc="B", occupancy=occupancies[1], shift=0.5)
    gly, val = residue("GLY", 1), residue("VAL", 3)
    structure = load([*gly, *ser, *val, *thr] if apart else [*gly, *ser, *thr, *val])
    assert structure.sequence == sequence
    assert structure.residue_number.tolist() == [1, 2, 3]
    shift = 0.5 * (sequence == "GTV")
    np.testing.assert_allclose(structure.translation[1], POSITIONS[2, 1] + shift, rtol=0, atol=1e-12)


def test_insertion_codes_stay_in_file_order(load):
    codes = [(1, ""), (2, "B"), (2, "A"), (2, ""), (3, "")]
    atoms = [a for i, (number, code) in enumerate(codes) for a in residue("ALA", number, place=i, icode=code)]
    structure = load(atoms)
    assert list(zip(structure.residue_number.tolist(), structure.insertion_code.tolist(), strict=True)) == codes
    np.testing.assert_array_equal(structure.translation, POSITIONS[: len(codes), 1])


def test_models_count_from_one_in_the_order_of_the_file(load):
    atoms = [a for m in (1, 2, 7) for a in residue("ALA", 1, shift=float(m), model=m)]
    for model, shift in ((1, 1.0), (2, 2.0), (3, 7.0)):
        np.testing.assert_allclose(load(atoms, model=model).translation, [POSITIONS[1, 1] + shift], rtol=0, atol=1e-12)
    assert_same(load(atoms), load(atoms, model=1))
    for model in (0, -1, 4, 7, "1", None):
        with pytest.raises(ValueError, match="from 1 to 3"):
            load(atoms, model=model)


@pytest.mark.parametrize(
    ("name", "letter"),
    [("MSE", "M"), ("SEP", "S"), ("TPO", "T"), ("MLY", "K"), ("DAL", "A"), ("SEC", "X"), ("UNK", "X"), ("QQQ", "X")],
)
def test_modified_residues_stay_and_count_as_their_parent(load, name, letter):
    later = [*residue("MSE", 3, het=True), *residue("VAL", 4)]
    structure = load([*residue("GLY", 1), *residue(name, 2, het=name != "UNK"), *later])
    assert structure.sequence == f"G{letter}MV"
    assert structure.aatype[1] == (RESTYPES + "X").index(letter)
    assert structure.mask.all()


def test_the_twenty_in_alphafolds_order(load):
    names = pytest.importorskip("Bio.Data.PDBData", reason="Biopython is not installed").protein_letters_1to3

    atoms = [a for i, x in enumerate(RESTYPES) for a in residue(names[x].upper(), i + 1, place=i % 12)]
    assert load(atoms).aatype.tolist() == list(range(20))


@pytest.mark.parametrize("missing", ["N", "CA", "C"])
def test_missing_backbone_atom(load, missing):
    atoms = [a for i in (1, 2, 3) for a in residue("LEU", i) if (i, a.name) != (2, missing)]
    structure = load(atoms)
    assert structure.mask.tolist() == [True, False, True]
    assert structure.sequence == "LLL"
    np.testing.assert_array_equal(structure.rotation[1], np.eye(3))
    np.testing.assert_array_equal(structure.translation[1], np.zeros(3))
    np.testing.assert_array_equal(structure.translation[[0, 2]], POSITIONS[[1, 3], 1])


def test_backbone_on_a_line_has_no_frame(load):
    line = [Atom(name, "ALA", 2, (float(i), 0.0, 0.0)) for i, name in enumerate(("N", "CA", "C"))]
    structure = load([*residue("ALA", 1), *line])
    assert structure.mask.tolist() == [True, False]
    np.testing.assert_array_equal(structure.rotation[1], np.eye(3))
    np.testing.assert_array_equal(structure.translation[1], np.zeros(3))


def test_atoms_of_zero_occupancy_are_read(load):
    structure = load([*residue("ALA", 1, occupancy=0.0), *residue("ALA", 2)])
    assert structure.mask.all()


def test_ligands_waters_ions_caps_and_dna_are_left_out(load):
    cap = Atom("CH3", "ACE", 0, (8.0, 8.0, 8.0), het=True)
    protein = [a for i in (1, 2, 3) for a in residue("ALA", i)]
    others = [
        Atom("PG", "ATP", 101, (20.0, 0.0, 0.0), het=True),
        # A ligand may name its atoms as a residue does; calcium's is CA too.
        *residue("LIG", 102, place=9, shift=30.0, het=True),
        Atom("CA", "CA", 103, (25.0, 0.0, 0.0), het=True),
        *residue("GLU", 104, place=9, shift=40.0, het=True),
        Atom("O", "HOH", 201, (30.0, 0.0, 0.0), het=True),
    ]
    dna = [
        [Atom(x, "DA", i, (40.0 + i, y, 0.0), chain="B") for y, x in enumerate(("P", "C3'", "O3'"))] for i in (1, 2, 4)
    ]
    # A modified nucleotide may too.
    dna.insert(2, residue("QQQ", 3, chain="B", het=True))
    structure = load([cap, *protein, *others, *(atom for nucleotide in dna for atom in nucleotide)])
    assert structure.sequence == "AAA"
    assert set(structure.chain_id) == {"A"}
    assert structure.residue_number.tolist() == [1, 2, 3]


def test_chains_follow_in_file_order(load):
    structure = load([*residue("GLY", 5, chain="Z"), *residue("SER", 1, chain="A"), *residue("VAL", 3, chain="M")])
    assert structure.chain_id.tolist() == ["Z", "A", "M"]
    assert structure.sequence == "GSV"
    assert structure.residue_number.tolist() == [5, 1, 3]


# Atoms beyond the backbone


def names(structure: Structure, i: int = 0) -> list[str]:
    return [ATOM_TYPES[slot] for slot in np.flatnonzero(structure.atom37_mask[i])]


def with_atoms(atoms: list[Atom], **positions: tuple[float, float, float]) -> list[Atom]:
    """A residue with more atoms."""
    return atoms + [atoms[0]._replace(name=name, xyz=xyz) for name, xyz in positions.items()]


@pytest.mark.parametrize(
    ("residue_name", "others", "kept"),
    [
        ("ALA", "CB O OXT HA CG", "CB O OXT"),
        ("GLY", "O CB", "O"),
        ("MSE", "CB O CG SE CE", "CB O CG SD CE"),
        ("MET", "CB O CG SE CE", "CB O CG CE"),
        # Methylated lysine's CH2 is not tryptophan's.
        ("MLY", "CB O CG CD CE NZ CH1 CH2", "CB O CG CD CE NZ"),
        ("SEP", "CB O OG P O1P", "CB O OG"),
        ("UNK", "CB O CG CH2 OXT XX1", "CB O CG CH2 OXT"),
        ("SEC", "CB O SE", "CB O"),
    ],
)
def test_atoms_that_the_residue_can_have(load, residue_name, others, kept):
    positions = {name: (10.0 + i, 2.5, -3.125) for i, name in enumerate(others.split())}
    atoms = with_atoms(residue(residue_name, 2), **positions)
    structure = load([*residue("GLY", 1), *atoms, *residue("GLY", 3)])
    assert set(names(structure, 1)) == {"N", "CA", "C", *kept.split()}
    for name, position in positions.items():
        kept_as = "SD" if residue_name == "MSE" and name == "SE" else name
        if kept_as in kept.split():
            assert tuple(structure.atom37[1, ATOM_TYPES.index(kept_as)]) == position
    assert not structure.atom37[~structure.atom37_mask].any()


@pytest.mark.parametrize(("nh1", "nh2"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (2.0, None), (None, 1.0)])
@pytest.mark.parametrize("cd", [True, False])
def test_nearer_nitrogen_of_arginine_is_nh1(load, nh1, nh2, cd):
    x = {name: (20.0 + x, 0.0, 0.0) for name, x in {"NH1": nh1, "NH2": nh2}.items() if x}
    arginine = with_atoms(residue("ARG", 1), **x, **({"CD": (20.0, 0.0, 0.0)} if cd else {}))
    structure = load([*arginine, *residue("GLY", 2)])
    swapped = cd and (nh1, nh2) == (2.0, 1.0)
    for name, position in x.items():
        renamed = {"NH1": "NH2", "NH2": "NH1"}[name] if swapped else name
        assert tuple(structure.atom37[0, ATOM_TYPES.index(renamed)]) == position
    assert set(names(structure)) == {"N", "CA", "C", *x, *(["CD"] if cd else [])}


@pytest.mark.parametrize(("occupancies", "x"), [((0.3, 0.7), 2.0), ((0.5, 0.5), 1.0)])
def test_side_chain_atom_of_highest_occupancy(load, occupancies, x):
    alanine = residue("ALA", 1)
    alternatives = [
        alanine[0]._replace(name="CB", xyz=(x, 9.0, 9.0), altloc=altloc, occupancy=occupancy)
        for altloc, x, occupancy in zip("AB", (1.0, 2.0), occupancies, strict=True)
    ]
    assert load([*alanine, *alternatives]).atom37[0, ATOM_TYPES.index("CB")].tolist() == [x, 9.0, 9.0]


def test_side_chain_atom_given_twice_is_refused(load):
    alanine = with_atoms(residue("ALA", 1), CB=(1.0, 9.0, 9.0))
    with pytest.raises(ValueError, match="1 ALA"):
        load([*alanine, alanine[-1]._replace(xyz=(2.0, 9.0, 9.0))])


@pytest.mark.parametrize("missing", ["N", "CA", "C"])
def test_atoms_stay_where_there_is_no_frame(load, missing):
    atoms = with_atoms([a for a in residue("ALA", 2) if a.name != missing], CB=(1.0, 9.0, 9.0))
    structure = load([*residue("GLY", 1), *atoms, *residue("GLY", 3)])
    assert structure.mask.tolist() == [True, False, True]
    assert set(names(structure, 1)) == {"N", "CA", "C", "CB"} - {missing}


# PDB alone


@pytest.mark.parametrize("second_ter", [False, True])
def test_two_chains_of_one_name_apart_by_ter(tmp_path, second_ter):
    """Molecular dynamics programs write such files, without chain names."""
    atoms = [a for i, name in enumerate(("ALA", "GLY", "SER", "VAL"), 1) for a in residue(name, i, chain=" ")]
    structure = load_structure(written(tmp_path, pdb(atoms, after={5: "TER", **({11: "TER"} if second_ter else {})})))
    assert structure.sequence == "AGSV"
    assert structure.chain_id.tolist() == [""] * 4


def test_free_amino_acid_after_ter_is_a_ligand(tmp_path):
    atoms = [*residue("ALA", 1), *residue("GLY", 2), *residue("MSE", 9, het=True), *residue("GLU", 11, het=True)]
    assert load_structure(written(tmp_path, pdb(atoms, after={5: "TER"}))).sequence == "AG"
    assert load_structure(written(tmp_path, pdb(atoms))).sequence == "AG"


@pytest.mark.parametrize("names", [("ALA", "ALA"), ("ALA", "GLY")])
def test_numbering_that_starts_anew_in_one_chain_is_refused(tmp_path, names):
    atoms = [*residue(names[0], 1), *residue(names[1], 1, place=7)]
    with pytest.raises(ValueError, match=rf"1 {names[1]}.*name of its own"):
        load_structure(written(tmp_path, pdb(atoms, after={2: "TER"})))


@pytest.mark.parametrize("garbage", ["********", "        ", "  1.2.3 "])
def test_coordinates_that_are_not_numbers_raise(tmp_path, garbage):
    lines = pdb(residue("ALA", 1)).splitlines(keepends=True)
    lines[1] = lines[1][:38] + garbage + lines[1][46:]
    with pytest.raises(ValueError, match=r"line 2: expected coordinates"):
        load_structure(written(tmp_path, "".join(lines)))
