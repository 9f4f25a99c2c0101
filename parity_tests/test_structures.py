"""Backbone frames from PDB and mmCIF: real proteins against other readers, and every awkward kind of file."""

from __future__ import annotations

import gzip
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipa_bridge.frames import random_frames
from ipa_bridge.residues import RESTYPES, UNKNOWN_AATYPE
from ipa_bridge.structures import backbone_frames, load_structure
from ipa_parity.tolerance import BOUNDS

gemmi = pytest.importorskip("gemmi")

EPS = np.finfo(np.float64).eps

PROTEINS = {
    "1gcn.pdb": (29, 29, "A"),
    "2rbg.pdb": (248, 248, "AB"),
    "5nmu.pdb": (1248, 1248, "BCDEFG"),
    "3u8v.cif": (166, 166, "AB"),
    "3zee.cif": (84, 84, "A"),
    "4zey.cif": (84, 84, "A"),
}


@pytest.mark.parametrize(("name", "expected"), PROTEINS.items())
def test_real_proteins(name, expected, structures_dir):
    structure = load_structure(structures_dir / name)
    residues, framed, chains = expected
    assert (len(structure), structure.mask.sum()) == (residues, framed)
    assert "".join(dict.fromkeys(structure.chain_id)) == chains
    identity = np.einsum("nxy,nxz->nyz", structure.rotation, structure.rotation) - np.eye(3)
    assert np.abs(identity).max() <= BOUNDS["points"] * EPS
    assert np.abs(np.linalg.det(structure.rotation) - 1).max() <= BOUNDS["points"] * EPS


@pytest.mark.parametrize("name", ["1gcn.pdb", "2rbg.pdb", "5nmu.pdb"])
def test_real_proteins_as_alphafolds_reader_sees_them(name, structures_dir):
    """AlphaFold's PDB reader takes waters and ligands for unknown residues; those aside, all is equal."""
    protein = pytest.importorskip("alphafold.common.protein", reason="alphafold-colabfold is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = protein.from_pdb_string((structures_dir / name).read_text())
    ours = load_structure(structures_dir / name)
    chains = list(dict.fromkeys(ours.chain_id))
    keys = {
        key: i for i, key in enumerate(zip(theirs.chain_index.tolist(), theirs.residue_index.tolist(), strict=True))
    }
    rows = [keys[chains.index(c), n] for c, n in zip(ours.chain_id, ours.residue_number, strict=True)]
    n, ca, c = np.moveaxis(theirs.atom_positions[rows][:, :3].astype(np.float64).round(3), 1, 0)
    assert (theirs.atom_mask[rows][:, :3].all(-1) == ours.mask).all()
    known = theirs.aatype[rows] != UNKNOWN_AATYPE
    assert (theirs.aatype[rows][known] == ours.aatype[known]).all()
    assert set(ours.sequence[i] for i in np.flatnonzero(~known)) <= {"M"}, "only selenomethionine is known here alone"
    rotation, translation = backbone_frames(n, ca, c)
    assert np.abs(rotation - ours.rotation).max() <= BOUNDS["points"] * EPS
    assert (translation == ours.translation).all()


def test_pdb_and_mmcif_are_read_alike(structures_dir, tmp_path):
    for name in ("1gcn.pdb", "2rbg.pdb"):
        path = tmp_path / f"{name}.cif"
        gemmi_structure = gemmi.read_structure(str(structures_dir / name))
        gemmi_structure.setup_entities()
        gemmi_structure.make_mmcif_document().write_file(str(path))
        ours, again = load_structure(structures_dir / name), load_structure(path)
        for field in ("rotation", "translation", "mask", "aatype", "chain_id", "residue_number", "insertion_code"):
            assert (getattr(ours, field) == getattr(again, field)).all(), field


def atom(serial, name, residue, number, position, *, chain="A", altloc=" ", icode=" ", occupancy=1.0, record="ATOM"):
    x, y, z = position
    return (
        f"{record:<6}{serial:>5} {name:^4}{altloc}{residue:>3} {chain}{number:>4}{icode}   "
        f"{x:8.3f}{y:8.3f}{z:8.3f}{occupancy:6.2f}{10.0:6.2f}          {name[0]:>2}\n"
    )


def residue_lines(number, name="ALA", *, atoms=("N", "CA", "C", "O"), shift=(0.0, 0.0, 0.0), **options):
    """A residue whose backbone is the same everywhere but for a step of 3.8 Å along x per number, and a shift."""
    ideal = {"N": (0.0, 1.4, 0.0), "CA": (0.0, 0.0, 0.0), "C": (1.5, 0.0, 0.0), "O": (2.0, -1.1, 0.0), "P": (0, 0, 0)}
    at = {atom_name: np.add(ideal[atom_name], np.add((3.8 * number, 0, 0), shift)) for atom_name in atoms}
    return "".join(atom(number * 10 + i, a, name, number, at[a], **options) for i, a in enumerate(atoms))


def load_text(tmp_path, text, name="x.pdb", **options):
    path = tmp_path / name
    path.write_text(text)
    return load_structure(path, **options)


def chain_of(*parts):
    return "".join(parts) + "TER\nEND\n"


def test_missing_backbone_atom_is_masked(tmp_path):
    text = chain_of(residue_lines(1), residue_lines(2, atoms=("N", "CA", "O")), residue_lines(3))
    structure = load_text(tmp_path, text)
    assert structure.mask.tolist() == [True, False, True]
    assert (structure.rotation[1] == np.eye(3)).all()
    assert (structure.translation[1] == 0).all()
    assert (structure.rotation[0] == np.eye(3)).all()
    assert structure.translation[2].tolist() == [11.4, 0, 0]


@pytest.mark.parametrize(("first", "second", "shift"), [(0.4, 0.6, 1.0), (0.6, 0.4, 0.0), (0.5, 0.5, 0.0)])
def test_alternate_location_of_highest_occupancy_else_the_first(first, second, shift, tmp_path):
    text = chain_of(
        residue_lines(1),
        residue_lines(2, altloc="A", occupancy=first),
        residue_lines(2, altloc="B", occupancy=second, shift=(0, 0, 1.0)),
        residue_lines(3),
    )
    structure = load_text(tmp_path, text)
    assert len(structure) == 3
    assert structure.translation[1, 2] == shift


@pytest.mark.parametrize(("ser", "thr", "kept"), [(0.7, 0.3, "S"), (0.3, 0.7, "T"), (0.5, 0.5, "S")])
def test_two_residues_at_one_position(ser, thr, kept, tmp_path):
    text = chain_of(
        residue_lines(1),
        residue_lines(2, "SER", altloc="A", occupancy=ser),
        residue_lines(2, "THR", altloc="B", occupancy=thr),
        residue_lines(3),
    )
    assert load_text(tmp_path, text).sequence == f"A{kept}A"


def test_insertion_codes_are_residues_of_their_own(tmp_path):
    text = chain_of(residue_lines(1), residue_lines(1, "GLY", icode="A", shift=(3.8, 0, 0)), residue_lines(3))
    structure = load_text(tmp_path, text)
    assert structure.sequence == "AGA"
    assert structure.residue_number.tolist() == [1, 1, 3]
    assert structure.insertion_code.tolist() == ["", "A", ""]


@pytest.mark.parametrize(
    ("name", "letter"), [("MSE", "M"), ("SEP", "S"), ("ALA", "A"), ("UNK", "X"), ("SEC", "X"), ("TPO", "T")]
)
def test_non_standard_residues(name, letter, tmp_path):
    record = "ATOM" if name in ("ALA", "UNK") else "HETATM"
    text = chain_of(residue_lines(1), residue_lines(2, name, record=record), residue_lines(3))
    structure = load_text(tmp_path, text)
    assert structure.sequence == f"A{letter}A"
    assert structure.mask.all()


def test_ligands_and_waters_are_left_out(tmp_path):
    ligand = atom(90, "C1", "GOL", 200, (9, 9, 9), record="HETATM") + atom(
        91, "O", "HOH", 201, (5, 9, 9), record="HETATM"
    )
    structure = load_text(tmp_path, "".join(map(residue_lines, (1, 2, 3))) + "TER\n" + ligand + "END\n")
    assert structure.residue_number.tolist() == [1, 2, 3]


def test_models_are_chosen_by_number(tmp_path):
    models = [
        f"MODEL     {i:4}\n{''.join(residue_lines(n, shift=(0, 0, i)) for n in (1, 2, 3))}ENDMDL\n" for i in (1, 2)
    ]
    text = "".join(models) + "END\n"
    assert load_text(tmp_path, text).translation[0, 2] == 1
    assert load_text(tmp_path, text, model=2).translation[0, 2] == 2
    for model in (0, 3):
        with pytest.raises(ValueError, match=f"model must be from 1 to 2, which the file has; got {model}"):
            load_text(tmp_path, text, model=model)


def test_gzip_and_names_without_a_suffix(tmp_path):
    text = chain_of(*map(residue_lines, (1, 2, 3)))
    with gzip.open(tmp_path / "x.pdb.gz", "wt") as file:
        file.write(text)
    assert len(load_structure(tmp_path / "x.pdb.gz")) == 3
    assert len(load_text(tmp_path, text, "structure")) == 3


DNA = "".join(
    atom(i, name, "DA", n, (3.0 * n + i, i, 0)) for n in (1, 2, 3) for i, name in enumerate(("P", "O5'", "C5'", "C1'"))
)

BAD_FILES = {
    "empty": ("x.pdb", b"", "is empty"),
    "empty cif": ("x.cif", b"", "is empty"),
    "binary": ("x.pdb", bytes(range(256)) * 20, "expected a protein; the file has no chain at all"),
    "binary cif": ("x.cif", bytes(range(256)) * 20, "cannot be read as PDB or mmCIF"),
    "text": ("x.pdb", b"once upon a time\n" * 9, "expected a protein; the file has no chain at all"),
    "cut line": ("x.pdb", chain_of(*map(residue_lines, (1, 2, 3)))[:600].encode(), "cut or damaged"),
    "no protein": ("x.pdb", (DNA + "TER\nEND\n").encode(), r"expected a protein; the file has A \(Dna\)"),
    "not a number": (
        "x.pdb",
        chain_of(*map(residue_lines, (1, 2, 3))).replace("   7.600", "     nan").encode(),
        "residue A 2 ALA is at|cut or damaged",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_plain_errors(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_structure(tmp_path / name)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.8])
def test_cut_mmcif(kept, structures_dir, tmp_path):
    whole = (structures_dir / "3zee.cif").read_bytes()
    (tmp_path / "x.cif").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"cut or damaged|expected a protein"):
        load_structure(tmp_path / "x.cif")


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        load_structure(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_structure(tmp_path / "nothing.pdb")


def test_frames_are_algorithm_21():
    rng = np.random.default_rng(0)
    n, ca, c = rng.standard_normal((3, 50, 3))
    rotation, translation = backbone_frames(n, ca, c)
    local = [np.einsum("ixy,ix->iy", rotation, x - translation) for x in (n, ca, c)]
    tolerance = BOUNDS["points"] * EPS * np.abs(np.stack(local)).max()
    assert (translation == ca).all()
    assert np.abs(local[2][:, 1:]).max() <= tolerance
    assert (local[2][:, 0] > 0).all()
    assert np.abs(local[0][:, 2]).max() <= tolerance
    assert (local[0][:, 1] > 0).all()


@given(seed=st.integers(0, 2**32 - 1))
def test_frames_move_with_the_atoms(seed):
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((3, 7, 3))
    turn, shift = random_frames(rng, (), spread=10.0)
    rotation, translation = backbone_frames(*atoms)
    moved_rotation, moved_translation = backbone_frames(*(atoms @ turn.T + shift))
    # Gram–Schmidt loses as many bits as the atoms' angle is small.
    n, ca, c = atoms
    sine = np.linalg.norm(np.cross(n - ca, c - ca), axis=-1) / np.linalg.norm(n - ca, axis=-1)
    sine = (sine / np.linalg.norm(c - ca, axis=-1) / np.linalg.norm(c - ca, axis=-1).clip(max=1)).min()
    tolerance = BOUNDS["points"] * EPS * 20 / sine
    assert np.abs(moved_rotation - turn @ rotation).max() <= tolerance
    assert np.abs(moved_translation - (translation @ turn.T + shift)).max() <= tolerance


def test_collinear_atoms_have_no_frame():
    n, ca, c = (np.array([[x, 0.0, 0.0]]) for x in (-1, 0, 1))
    rotation, translation = backbone_frames(n, ca, c)
    assert (rotation == np.eye(3)).all()
    assert (translation == 0).all()


def test_sequence_letters():
    assert len(RESTYPES) == UNKNOWN_AATYPE == 20
