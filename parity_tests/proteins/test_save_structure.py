"""save_structure writes files that load_structure and Biopython read back, and refuses what it cannot write."""

from __future__ import annotations

import dataclasses
import gzip
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ipa_bridge import Structure, load_structure, save_structure
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.proteins.residues import ATOM37_MASK, ATOM_TYPES, RESTYPE_NAMES, UNKNOWN_AATYPE

pytest.importorskip("gemmi", reason="structures are written by gemmi")

REAL = ["1gcn.pdb", "2rbg.pdb", "5nmu.pdb", "3u8v.cif", "3zee.cif", "4zey.cif"]
SUFFIXES = [".pdb", ".cif", ".pdb.gz", ".cif.gz"]

PEPTIDE = idealised_peptide()
N = len(PEPTIDE)


def save(path: Path, structure: Structure, **options) -> Path:
    fields = ("atom37_mask", "chain_id", "residue_number", "insertion_code")
    options = {field: getattr(structure, field) for field in fields} | options
    save_structure(path, structure.atom37, structure.aatype, **options)
    return path


def assert_same(left: Structure, right: Structure) -> None:
    """Asserts that structures are equal, positions to a thousandth of an Å."""
    for field in (field.name for field in dataclasses.fields(Structure) if field.name not in ("name", "rotation")):
        x, y = getattr(left, field), getattr(right, field)
        if x.dtype.kind == "f":
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-3, err_msg=field)
        else:
            np.testing.assert_array_equal(x, y, err_msg=field)


def of_every_kind() -> Structure:
    """A structure with two chains, all residue types and unknown ones, insertion codes, gaps and missing atoms."""
    rng = np.random.default_rng(7)
    aatype = np.concatenate([np.arange(21), rng.permutation(21)])
    mask = ATOM37_MASK[aatype] & (rng.random((N, 37)) < 0.9)
    mask[aatype == UNKNOWN_AATYPE] = rng.random((2, 37)) < 0.5
    mask[:, :3], mask[20, -1], mask[41, -1] = True, True, True
    return dataclasses.replace(
        PEPTIDE,
        atom37=np.where(mask[..., None], rng.uniform(-900, 9000, (N, 37, 3)).round(3), 0.0),
        atom37_mask=mask,
        aatype=aatype,
        chain_id=np.array(["B"] * 21 + ["A"] * 21),
        residue_number=np.array([*range(-5, 10), *[10] * 6, *range(9979, 10_000)]),
        insertion_code=np.array([""] * 15 + ["", *"BAaZ7"] + [""] * 21),
    )


# Round trips


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", REAL)
def test_real_proteins_come_back(structures_dir, tmp_path, name, suffix):
    original = load_structure(structures_dir / name)
    back = load_structure(save(tmp_path / f"copy{suffix}", original))
    assert_same(back, original)
    np.testing.assert_allclose(back.rotation, original.rotation, rtol=0, atol=1e-3)
    assert back.name == f"copy{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_residue_comes_back(tmp_path, suffix):
    original = of_every_kind()
    back = load_structure(save(tmp_path / f"x{suffix}", original))
    assert_same(dataclasses.replace(back, mask=original.mask, translation=original.translation), original)


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_defaults(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save_structure(path, PEPTIDE.atom37, PEPTIDE.aatype)
    assert_same(load_structure(path), PEPTIDE)
    chains = ["H"] * 20 + ["L"] * 22
    save_structure(path, PEPTIDE.atom37, PEPTIDE.aatype, chain_id=chains)
    back = load_structure(path)
    assert back.chain_id.tolist() == chains
    assert back.residue_number.tolist() == [*range(1, 21), *range(1, 23)]


def test_pdb_without_chain_names_comes_back(tmp_path):
    assert set(load_structure(save(tmp_path / "x.pdb", PEPTIDE, chain_id=[""] * N)).chain_id) == {""}


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,5}", fullmatch=True))
def test_long_chain_names_come_back_in_mmcif(tmp_path_factory, chain):
    assume(not chain.lower().startswith(("data_", "save_", "loop_", "stop_")))
    path = save(tmp_path_factory.getbasetemp() / "chains.cif", PEPTIDE, chain_id=[chain] * N)
    assert set(load_structure(path).chain_id) == {chain}


@pytest.mark.parametrize("position", [(-999.9994, 9999.9994, 0.0), (-0.0004, 0.0005, 1e-9)])
def test_widest_coordinates_of_pdb(tmp_path, position):
    atom37 = PEPTIDE.atom37.copy()
    atom37[3, 3] = position
    back = load_structure(save(tmp_path / "x.pdb", dataclasses.replace(PEPTIDE, atom37=atom37)))
    np.testing.assert_allclose(back.atom37, atom37, rtol=0, atol=5.01e-4)


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_residue_numbers_at_the_ends(tmp_path, suffix):
    numbers = [*range(-999, -978), *range(9979, 10_000)]
    assert (
        load_structure(save(tmp_path / f"x{suffix}", PEPTIDE, residue_number=numbers)).residue_number.tolist()
        == numbers
    )


def test_many_residues_in_mmcif(tmp_path):
    """A PDB file cannot hold so many."""
    numbers = np.arange(N) + 123_456
    back = load_structure(save(tmp_path / "x.cif", PEPTIDE, residue_number=numbers, b_factor=np.full(N, 12345.0)))
    assert back.residue_number.tolist() == numbers.tolist()


# Other readers


def biopython(path: Path):
    """The file's structure as Biopython reads it; warnings are errors in this suite."""
    parsers = pytest.importorskip("Bio.PDB", reason="Biopython is not installed")
    parser = parsers.PDBParser() if path.suffix == ".pdb" else parsers.MMCIFParser()
    return next(iter(parser.get_structure("x", path)))


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
@pytest.mark.parametrize("name", [*REAL, None])
def test_biopython_reads_the_same(structures_dir, tmp_path, name, suffix):
    original = load_structure(structures_dir / name) if name else of_every_kind()
    b_factor = np.random.default_rng(3).uniform(0, 100, (len(original), 37)).round(2)
    model = biopython(save(tmp_path / f"x{suffix}", original, b_factor=b_factor))
    assert [chain.id for chain in model] == list(dict.fromkeys(original.chain_id.tolist()))
    residues = [residue for chain in model for residue in chain]
    assert [residue.parent.id for residue in residues] == original.chain_id.tolist()
    assert [residue.resname for residue in residues] == [RESTYPE_NAMES[aatype] for aatype in original.aatype]
    numbers = zip(original.residue_number.tolist(), original.insertion_code.tolist(), strict=True)
    assert [residue.id for residue in residues] == [(" ", number, code or " ") for number, code in numbers]
    for residue, positions, mask, b in zip(residues, original.atom37, original.atom37_mask, b_factor, strict=True):
        slots = np.flatnonzero(mask)
        atoms = list(residue)
        assert [atom.id for atom in atoms] == [ATOM_TYPES[slot] for slot in slots]
        assert [atom.element for atom in atoms] == [ATOM_TYPES[slot][0] for slot in slots]
        np.testing.assert_allclose([atom.coord for atom in atoms], positions[slots], rtol=0, atol=1e-3)
        np.testing.assert_allclose([atom.bfactor for atom in atoms], b[slots], rtol=0, atol=1e-6)
        assert {atom.occupancy for atom in atoms} == {1.0}


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_alphafold_reads_the_same(structures_dir, tmp_path, suffix):
    protein = pytest.importorskip("alphafold.common.protein", reason="alphafold-colabfold is not installed")
    original = load_structure(structures_dir / "2rbg.pdb")
    path = save(tmp_path / f"x{suffix}", original, b_factor=np.arange(248) / 4)
    read = protein.from_pdb_string if suffix == ".pdb" else protein.from_mmcif_string
    theirs = read(path.read_text())
    np.testing.assert_array_equal(theirs.aatype, original.aatype)
    np.testing.assert_array_equal(theirs.residue_index, original.residue_number)
    np.testing.assert_array_equal(theirs.atom_mask, original.atom37_mask)
    np.testing.assert_allclose(theirs.atom_positions, original.atom37, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(theirs.b_factors[:, 1], np.arange(248) / 4)


def test_columns_of_a_pdb_file(tmp_path):
    """Fields are in the columns of the format, as strict readers need."""
    original = of_every_kind()
    lines = save(tmp_path / "x.pdb", original, name="A test").read_text().splitlines()
    assert {len(line) for line in lines} == {80}
    assert lines[0].rstrip() == "TITLE     A TEST"
    assert lines[-1].rstrip() == "END"
    assert not [line for line in lines if line.startswith(("CRYST1", "HETATM"))]
    sequence = [(line[11], line[19:70].split()) for line in lines if line.startswith("SEQRES")]
    for chain in "BA":
        names = [RESTYPE_NAMES[aatype] for aatype in original.aatype[original.chain_id == chain]]
        assert [name for of, row in sequence if of == chain for name in row] == names
    atoms = [line for line in lines if line.startswith(("ATOM  ", "TER   "))]
    assert [int(line[6:11]) for line in atoms] == list(range(1, len(atoms) + 1))
    ends = [i for i, line in enumerate(atoms) if line.startswith("TER")]
    assert [atoms[i][17:27] for i in ends] == [atoms[i - 1][17:27] for i in ends]
    assert [atoms[i][21] for i in ends] == ["B", "A"]
    assert ends[-1] == len(atoms) - 1
    for line in (line for line in atoms if line.startswith("ATOM")):
        assert line[12:16].strip() in ATOM_TYPES
        assert line[12] == " "
        assert line[16] == " "
        assert line[76:78] == f" {line[13]}"
        assert (line[54:60], line[60:66]) == ("  1.00", "  0.00")


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_entities_and_sequences(tmp_path, suffix):
    """Residues without atoms stay in the sequence, equal chains share an entity, and an empty chain is left out."""
    import gemmi

    mask = PEPTIDE.atom37_mask.copy()
    mask[[0, 5, 9, 13]], mask[30:] = False, False
    chains = ["A"] * 10 + ["B"] * 10 + ["C"] * 10 + ["D"] * 12
    path = save(tmp_path / f"x{suffix}", PEPTIDE, atom37_mask=mask, chain_id=chains)
    structure = gemmi.read_structure(str(path))
    if suffix == ".pdb":
        structure.setup_entities()
    assert [chain.name for chain in structure[0]] == ["A", "B", "C"]
    (entity,) = structure.entities
    assert entity.polymer_type == gemmi.PolymerType.PeptideL
    assert entity.full_sequence == ["ALA"] * 10
    back = load_structure(path)
    assert len(back) == 26
    np.testing.assert_array_equal(back.residue_number, PEPTIDE.residue_number[mask.any(-1)])
    if suffix == ".cif":
        label_seq = [residue.label_seq for residue in structure[0]["A"]]
        assert label_seq == [2, 3, 4, 5, 7, 8, 9]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_input_gives_the_same_bytes(tmp_path, suffix):
    first, second = (save(tmp_path / f"{folder}{suffix}", PEPTIDE, name="x").read_bytes() for folder in "aa")
    assert first == second
    assert first.startswith(b"\x1f\x8b") == suffix.endswith(".gz")
    assert not suffix.endswith(".gz") or first[4:8] == bytes(4), "the file contains a time stamp"
    assert b"ALA" in (gzip.decompress(first) if suffix.endswith(".gz") else first)


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
@pytest.mark.parametrize("name", ["data_x ' \" ; y", "; x", "?", ".", "many words " * 30 + ".", "loop_", "END", ""])
def test_titles(tmp_path, suffix, name):
    import gemmi

    path = save(tmp_path / f"x{suffix}", PEPTIDE, name=name)
    assert len(load_structure(path)) == N
    info = gemmi.read_structure(str(path)).info
    title = info["_struct.title"] if "_struct.title" in info else ""
    assert title == (name if suffix == ".cif" else name.upper())


def test_names_by_case(tmp_path):
    assert len(load_structure(save(tmp_path / "Größe.PDB", PEPTIDE))) == N
    assert len(load_structure(save(tmp_path / "Größe.Cif.GZ", PEPTIDE))) == N


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        ("jax.numpy", "float32"),
        ("jax.numpy", "bfloat16"),
        ("torch", "float32"),
        ("torch", "float64"),
        ("torch", "bfloat16"),
    ],
)
def test_arrays_of_other_frameworks(tmp_path, module, dtype):
    xp = pytest.importorskip(module)
    arrays = {"atom37_mask": PEPTIDE.atom37_mask, "b_factor": np.ones(N), "residue_number": PEPTIDE.residue_number}
    arrays = {name: xp.asarray(x) for name, x in arrays.items()}
    atom37 = xp.asarray(PEPTIDE.atom37, dtype=getattr(xp, dtype))
    save_structure(tmp_path / "x.cif", atom37, xp.asarray(PEPTIDE.aatype), **arrays)
    rounding = 2.0**-8 * np.abs(PEPTIDE.atom37) * (dtype == "bfloat16")
    assert (np.abs(load_structure(tmp_path / "x.cif").atom37 - PEPTIDE.atom37) <= 1e-3 + rounding).all()


def test_plain_lists(tmp_path):
    save_structure(tmp_path / "x.cif", PEPTIDE.atom37.tolist(), PEPTIDE.aatype.tolist(), b_factor=[1.0] * N)
    assert_same(load_structure(tmp_path / "x.cif"), PEPTIDE)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_masks_of_any_dtype(tmp_path, dtype):
    """Values where the mask is 0 do not matter."""
    mask = PEPTIDE.atom37_mask.copy()
    mask[4, 3] = False
    atom37 = np.where(mask[..., None], PEPTIDE.atom37, np.nan)
    b_factor = np.where(mask, 1.0, np.inf)
    save_structure(tmp_path / "x.pdb", atom37, PEPTIDE.aatype, atom37_mask=mask.astype(dtype), b_factor=b_factor)
    np.testing.assert_array_equal(load_structure(tmp_path / "x.pdb").atom37_mask, mask)


# Files stay whole


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_existing_file_is_replaced(tmp_path, suffix):
    path = save(tmp_path / f"x{suffix}", PEPTIDE)
    save(path, dataclasses.replace(PEPTIDE, atom37=PEPTIDE.atom37 + 1.0 * PEPTIDE.atom37_mask[..., None]))
    np.testing.assert_allclose(load_structure(path).translation, PEPTIDE.translation + 1.0, rtol=0, atol=1e-3)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file(monkeypatch, tmp_path, suffix, failing):
    path = save(tmp_path / f"x{suffix}", PEPTIDE)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        save(path, of_every_kind())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_refused_input_leaves_the_old_file(tmp_path):
    path = save(tmp_path / "x.pdb", PEPTIDE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="PDB holds"):
        save(path, PEPTIDE, residue_number=np.arange(N) + 9990)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# Bad input


def changed(x: np.ndarray, at: tuple, value: float) -> np.ndarray:
    x = np.array(x)
    x[at] = value
    return x


BAD = {
    "batch": ({"atom37": PEPTIDE.atom37[None]}, r"atom37 must be \(1, 37, 3\); got \(1, 42, 37, 3\)"),
    "atom14": ({"atom37": PEPTIDE.atom37[:, :14]}, r"atom37 must be \(42, 37, 3\); got \(42, 14, 3\)"),
    "scalar": ({"atom37": 1.0}, r"atom37 must be .*got \(\)"),
    "nothing": ({"atom37": np.zeros((0, 37, 3)), "aatype": np.zeros(0, int), "atom37_mask": None}, "at least one atom"),
    "complex": ({"atom37": PEPTIDE.atom37 + 0j}, "atom37 must be real numbers; got complex128"),
    "letters": ({"aatype": list(PEPTIDE.sequence)}, "aatype must be whole numbers"),
    "float types": ({"aatype": PEPTIDE.aatype / 1}, "aatype must be whole numbers; got float64"),
    "short aatype": ({"aatype": PEPTIDE.aatype[:-1]}, r"aatype must be \(42,\); got \(41,\)"),
    "aatype 21": ({"aatype": changed(PEPTIDE.aatype, (3,), 21)}, "aatype must be from 0 to 20; got 0 to 21"),
    "aatype -1": ({"aatype": changed(PEPTIDE.aatype, (3,), -1)}, "aatype must be from 0 to 20; got -1 to 0"),
    "nan": ({"atom37": changed(PEPTIDE.atom37, (3, 4, 1), np.nan)}, "finite position; O of residue A 4 ALA at index 3"),
    "inf": ({"atom37": changed(PEPTIDE.atom37, (3, 0, 1), np.inf)}, "finite position; N of residue A 4 ALA"),
    "mask shape": ({"atom37_mask": PEPTIDE.mask}, r"atom37_mask must be \(42, 37\); got \(42,\)"),
    "mask values": ({"atom37_mask": PEPTIDE.atom37_mask * 0.7}, "atom37_mask must be 0 and 1"),
    "alien atoms": ({"atom37_mask": np.ones((N, 37))}, "that its residue can have.*; CG of residue A 1 ALA"),
    "all masked": ({"atom37_mask": np.zeros((N, 37))}, "at least one atom"),
    "unknown": ({"aatype": np.full(N, UNKNOWN_AATYPE), "atom37_mask": None}, "at least one atom.*unknown"),
    "chain shape": ({"chain_id": "A"}, r"chain_id must be \(42,\)"),
    "chain numbers": ({"chain_id": np.zeros(N, int)}, "chain_id must be strings.*got 0"),
    "chain space": ({"chain_id": ["A B"] * N}, "chain_id must be strings.*got 'A B'"),
    "chain Greek": ({"chain_id": ["α"] * N}, "chain_id must be strings of ASCII"),
    "chain back": ({"chain_id": [*"ABA", *"C" * 39]}, "chain 'A' starts again at 2"),
    "float numbers": ({"residue_number": np.arange(N) / 1}, "residue_number must be whole numbers"),
    "too wide": ({"residue_number": np.arange(N) + 2**31}, "residue_number must fit 32 bits"),
    "twice": ({"residue_number": changed(PEPTIDE.residue_number, (1,), 1)}, "A 1 ALA and A 1 ALA share"),
    "long code": ({"insertion_code": ["AB"] * N}, "insertion_code must be a letter"),
    "odd code": ({"insertion_code": ["?"] * N}, "insertion_code must be a letter"),
    "b shape": ({"b_factor": np.zeros((N, 14))}, r"b_factor must be \(42, 37\); got \(42, 14\)"),
    "b nan": ({"b_factor": changed(np.zeros(N), (5,), np.nan)}, "finite b_factor; N of residue A 6 ALA"),
    "title": ({"name": "two\nlines"}, "name must be one line of ASCII"),
    "Greek title": ({"name": "α-helix"}, "name must be one line of ASCII"),
}


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, arguments, message, suffix):
    given = {"atom37": PEPTIDE.atom37, "aatype": PEPTIDE.aatype, "atom37_mask": PEPTIDE.atom37_mask} | arguments
    with pytest.raises(ValueError, match=message):
        save_structure(tmp_path / f"x{suffix}", **given)
    assert not os.listdir(tmp_path)


MANY = 12_600
BEYOND_PDB = {
    "chains": ({"chain_id": [f"{i}" for i in range(N)]}, "chain names of one character"),
    "chain name": ({"chain_id": ["AB"] * N}, r"chain names of one character; got \['AB'\]"),
    "number": ({"residue_number": np.arange(N) + 9959}, "residue numbers from -999 to 9999; got 9959 to 10000"),
    "negative": ({"residue_number": np.arange(N) - 1000}, "residue numbers .*; got -1000 to -959"),
    "coordinate": ({"atom37": PEPTIDE.atom37 + 9999.9996}, "coordinates from -999.999 to 9999.999"),
    "negative coordinate": ({"atom37": PEPTIDE.atom37 - 1e4}, "coordinates from -999.999 to 9999.999"),
    "B factor": ({"b_factor": np.full(N, 1e3)}, "B factors from -99.99 to 999.99; got 1000.0 to 1000.0"),
    "63 chains": (
        {
            "atom37": np.tile(PEPTIDE.atom37, (2, 1, 1))[:63],
            "aatype": np.zeros(63, int),
            "chain_id": [chr(ord("!") + i) for i in range(63)],
        },
        "at most 62 chains; got 63",
    ),
    "atoms": (
        {
            "atom37": np.tile(PEPTIDE.atom37[:1], (MANY, 1, 1)),
            "aatype": np.full(MANY, 3),
            "residue_number": np.arange(MANY) % 9999,
            "chain_id": ["A"] * 9999 + ["B"] * (MANY - 9999),
        },
        "at most 99,999 atoms and ends of chains; got 100802",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BEYOND_PDB.values(), ids=BEYOND_PDB)
def test_what_pdb_cannot_hold(tmp_path, arguments, message):
    given = {"atom37": PEPTIDE.atom37, "aatype": PEPTIDE.aatype} | arguments
    with pytest.raises(ValueError, match=f"PDB holds {message}.*: write .cif"):
        save_structure(tmp_path / "x.pdb", **given)
    assert not os.listdir(tmp_path)
    if "!" not in given.get("chain_id", ()):
        save_structure(tmp_path / "x.cif", **given)


@pytest.mark.parametrize("chain", ["", "_A", "loop_", "STOP_", "data_x", "A'", '"', "$", "?", ".", ";"])
def test_chain_names_that_would_break_mmcif(tmp_path, chain):
    with pytest.raises(ValueError, match=r"chain names in mmCIF must start with.*rename"):
        save(tmp_path / "x.cif", PEPTIDE, chain_id=[chain] * N)


@pytest.mark.parametrize("name", ["x", "x.npz", "x.ent", "x.mmcif", "x.gz", "x.pdb.bz2", "pdb"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected a name ending in \.pdb, \.cif, \.pdb\.gz, \.cif\.gz"):
        save(tmp_path / name, PEPTIDE)


def test_without_gemmi_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ImportError, match=r"writing structures needs gemmi: pip install 'ipa-twins\[structures\]'"):
        save(tmp_path / "x.pdb", PEPTIDE)
    assert not os.listdir(tmp_path)
