"""Small structure files, written atom by atom in PDB and mmCIF."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ipa_bridge.proteins import Structure
from ipa_bridge.proteins.frames import (
    build_backbone,
)

pytest.importorskip("gemmi", reason="structures are read by gemmi")

POSITIONS = np.round(np.stack(build_backbone([(-60.0, -45.0)] * 12), 1), 3)
"""(12, 3, 3): N, CA and C of a helix, rounded to a PDB file's decimals."""


class Atom(NamedTuple):
    name: str
    residue: str
    number: int
    xyz: tuple[float, float, float]
    chain: str = "A"
    icode: str = ""
    altloc: str = ""
    occupancy: float = 1.0
    het: bool = False
    model: int = 1


def residue(name: str, number: int, *, place: int | None = None, shift: float = 0.0, **fields) -> list[Atom]:
    """Backbone atoms of a residue at position `place` of the helix (`number` by default)."""
    atoms = zip(("N", "CA", "C"), POSITIONS[number if place is None else place] + shift, strict=True)
    return [Atom(atom, name, number, tuple(xyz), **fields) for atom, xyz in atoms]


def pdb(atoms: list[Atom], *, after: dict[int, str] | None = None) -> str:
    """The atoms as a PDB file; `after` adds a line after the atom with that index."""
    lines: list[str] = []
    for i, a in enumerate(atoms):
        if a.model != (atoms[i - 1].model if i else 1):
            lines.append("ENDMDL")
        if a.model > 1 and lines[-1] == "ENDMDL":
            lines.append(f"MODEL     {a.model:4d}")
        name = a.name if len(a.name) == 4 else f" {a.name:<3}"
        x, y, z = a.xyz
        lines.append(
            f"{'HETATM' if a.het else 'ATOM  '}{i + 1:5d} {name}{a.altloc or ' '}{a.residue:>3} {a.chain:1}"
            f"{a.number:4d}{a.icode or ' '}   {x:8.3f}{y:8.3f}{z:8.3f}{a.occupancy:6.2f}{10.0:6.2f}"
            f"          {a.name[0]:>2}"
        )
        lines += [after[i]] if after and i in after else []
    return "\n".join([*lines, "END", ""])


def mmcif(atoms: list[Atom]) -> str:
    """The atoms as mmCIF, without a list of entities."""
    items = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_seq_id Cartn_x Cartn_y "
        "Cartn_z occupancy auth_seq_id auth_asym_id pdbx_PDB_ins_code pdbx_PDB_model_num"
    )
    rows = [
        f"{'HETATM' if a.het else 'ATOM'} {i + 1} {a.name[0]} {a.name} {a.altloc or '.'} {a.residue} {a.chain} . "
        f"{a.xyz[0]:.3f} {a.xyz[1]:.3f} {a.xyz[2]:.3f} {a.occupancy:.2f} {a.number} {a.chain} {a.icode or '?'} "
        f"{a.model}"
        for i, a in enumerate(atoms)
    ]
    return "\n".join(["data_test", "loop_", *(f"_atom_site.{item}" for item in items.split()), *rows, ""])


def written(tmp_path: Path, content: str | bytes, name: str = "small.pdb") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def assert_same(left: Structure, right: Structure) -> None:
    for field in (field.name for field in dataclasses.fields(Structure) if field.name != "name"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field), err_msg=field, strict=True)
