"""Names, compression and damage of structure files."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.proteins import Structure, load_structure

pytest.importorskip("gemmi", reason="structures are read by gemmi")
from small_files import POSITIONS, Atom, mmcif, pdb, residue, written


@pytest.mark.parametrize("name", ["a.pdb", "a.ent", "A.PDB", "a.pdb.gz", "a.ent.gz", "a", "a.txt", "a.gz"])
def test_pdb_by_name_or_contents(tmp_path, name):
    content = pdb([*residue("ALA", 1), *residue("TYR", 2)]).encode()
    structure = load_structure(written(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name))
    assert (structure.sequence, structure.name) == ("AY", name)


@pytest.mark.parametrize("name", ["a.cif", "a.mmcif", "A.CIF", "a.cif.gz", "a", "a.gz"])
def test_mmcif_by_name_or_contents(tmp_path, name):
    content = mmcif([*residue("ALA", 1), *residue("TYR", 2)]).encode()
    path = written(tmp_path, gzip.compress(content) if name.endswith("gz") else content, name)
    assert load_structure(str(path)).sequence == "AY"


WHOLE = [*residue("ALA", 1), *residue("TYR", 2)]
DNA = [Atom(x, "DA", i, (4.0 * i, y, 0.0)) for i in (1, 2) for y, x in enumerate(("P", "C3'", "O3'"))]
WATER = [Atom("O", "HOH", 1, (0.0, 0.0, 0.0), het=True)]
CUT_PDB = pdb(WHOLE)[: 5 * 79 + 50]
CUT_MMCIF = mmcif(WHOLE)[:-40]
BINARY = bytes(range(256)) * 16

DAMAGED = {
    "empty": (b"", "a.pdb", "is empty"),
    "empty cif": (b"", "a.cif", "is empty"),
    "empty gz": (gzip.compress(b""), "a.pdb.gz", "is empty"),
    "blank": (b" \n\n", "a.pdb", "is empty"),
    "cut pdb": (CUT_PDB, "a.pdb", "cut or damaged.*line 6"),
    "cut mmcif": (CUT_MMCIF, "a.cif", "cut or damaged.*loop"),
    "cut gz": (gzip.compress(pdb(WHOLE).encode())[:-30], "a.pdb.gz", "unzipped"),
    "no gz": (b"\x1f\x8bnonsense", "a.pdb.gz", "unzipped"),
    "binary pdb": (BINARY, "a.pdb", "no chain at all"),
    "binary cif": (BINARY, "a.cif", "cannot be read"),
    "binary": (BINARY, "a.bin", "no chain at all"),
    "web page": (b"<html>not found</html>\n", "a.pdb", "no chain at all"),
    "web page cif": (b"<html>not found</html>\n", "a.cif", "cannot be read"),
    "header alone": (b"HEADER    HORMONE\nEND\n", "a.pdb", "no chain at all"),
    "cif without atoms": (b"data_x\n_entry.id x\n", "a.cif", "no chain at all"),
    "mmcif named pdb": (mmcif(WHOLE), "a.pdb", "rename"),
    "pdb named mmcif": (pdb(WHOLE), "a.cif", "rename"),
    "dna": (pdb(DNA), "a.pdb", "expected a protein.*Dna"),
    "dna cif": (mmcif(DNA), "a.cif", "expected a protein.*Dna"),
    "water": (pdb(WATER), "a.pdb", "expected a protein.*no polymer"),
    "bytes in a name": (pdb(WHOLE).encode().replace(b"TYR", b"T\xffR"), "a.pdb", "damaged"),
    "nan": (mmcif(WHOLE).replace(f"{WHOLE[4].xyz[1]:.3f}", "?"), "a.cif", "finite.* CA of residue A 2 TYR"),
}


@pytest.mark.parametrize(("content", "name", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_raise(tmp_path, content, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_structure(written(tmp_path, content, name))
    assert type(caught.value) is ValueError
    assert name in str(caught.value)


@pytest.mark.parametrize("write", [pdb, mmcif])
def test_a_truncated_file_raises_or_is_read_up_to_the_cut(tmp_path, write):
    content = write(WHOLE)
    outcomes = [
        _load_or_refuse(written(tmp_path, content[:length], f"cut.{write.__name__[-3:]}"))
        for length in range(0, len(content), 7)
    ]
    assert {type(outcome) for outcome in outcomes} == {Structure, ValueError}
    for structure in (outcome for outcome in outcomes if isinstance(outcome, Structure)):
        present = structure.translation[structure.mask]
        np.testing.assert_array_equal(present, POSITIONS[1:3, 1][: len(present)])


def _load_or_refuse(path: Path) -> Structure | ValueError:
    try:
        return load_structure(path)
    except ValueError as error:
        return error


def test_folder_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        load_structure(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pdb"):
        load_structure(tmp_path / "nowhere.pdb")


def test_without_gemmi_the_message_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(ImportError, match=r"pip install 'ipa-twins\[structures\]'"):
        load_structure(written(tmp_path, pdb(WHOLE)))


def test_import_loads_no_third_party_module_but_numpy():
    code = (
        "import sys; before = set(sys.modules); import ipa_bridge.proteins, ipa_bridge.proteins.frames; "
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "assert loaded == {'ipa_bridge', 'numpy'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
