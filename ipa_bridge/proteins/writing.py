"""Writing of proteins to PDB and mmCIF files."""

from __future__ import annotations

import gzip
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipa_bridge.destinations import replacing
from ipa_bridge.proteins.residues import ATOM37_MASK, ATOM_TYPES, RESTYPE_NAMES, UNKNOWN_AATYPE, may_have
from ipa_bridge.proteins.structure import import_gemmi

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
    from numpy import ndarray
    from numpy.typing import ArrayLike

MMCIF_GROUPS = (
    *("atoms", "group_pdb", "auth_all", "atom_type", "block_name", "entry", "entity", "entity_poly"),
    *("entity_poly_seq", "struct_asym", "title_keywords"),
)
"""mmCIF categories that are written, by gemmi's names."""

WRITTEN = (".pdb", ".cif", ".pdb.gz", ".cif.gz")


def save_structure(
    path: str | os.PathLike[str],
    atom37: Float[ArrayLike, "N 37 3"],
    aatype: Int[ArrayLike, " N"],
    *,
    atom37_mask: Shaped[ArrayLike, "N 37"] | None = None,
    chain_id: Shaped[ArrayLike, " N"] | None = None,
    residue_number: Int[ArrayLike, " N"] | None = None,
    insertion_code: Shaped[ArrayLike, " N"] | None = None,
    b_factor: Float[ArrayLike, " N"] | Float[ArrayLike, "N 37"] | None = None,
    name: str | None = None,
) -> None:
    """Writes a protein as PDB or mmCIF: to a temporary file first, which then replaces the destination in one step.

    Arrays may be numpy's, JAX's or detached CPU tensors. Every residue, even one without atoms, is part of its chain's
    sequence (SEQRES, entity_poly_seq). A chain without atoms is left out. Unknown residues are written as UNK.

    Args:
        path: the destination, .pdb, .cif or either with .gz; an existing file is left as it was if anything fails.
        atom37: positions in Å, in the order of `residues.ATOM_TYPES`; any values where the mask is 0.
        aatype: index into `residues.RESTYPES`, or `UNKNOWN_AATYPE`.
        atom37_mask: 1 or True where the atom is present; None for all heavy atoms of the residue's type, which are none
            for an unknown residue.
        chain_id: chain names; the residues of a chain must be contiguous. None for one chain A. PDB holds at most 62
            chains, with names of one character.
        residue_number: None to count from 1 in every chain.
        insertion_code: a letter or digit, or "" for none.
        b_factor: per residue, or per atom (N, 37), such as pLDDT; None for 0.
        name: the title, one line of ASCII; PDB has it in capitals.

    Raises:
        ValueError: the suffix is unknown, arrays do not fit each other or hold invalid values, or the format cannot
            hold the protein.
        ImportError: gemmi, which writes the files, is not installed.
    """
    path = Path(path)
    suffix = next((suffix for suffix in WRITTEN if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"{path}: expected a name ending in {', '.join(WRITTEN)}")
    if name is not None and not (name.isascii() and name.isprintable()):
        raise ValueError(f"name must be one line of ASCII; got {name!r}")
    positions = np.asarray(_without_bfloat16(atom37))
    n = len(positions) if positions.ndim else 0
    positions = _numbers("atom37", positions, (n, len(ATOM_TYPES), 3), np.float64)
    types = _numbers("aatype", aatype, (n,), np.int64)
    if not ((types >= 0) & (types <= UNKNOWN_AATYPE)).all():
        raise ValueError(f"aatype must be from 0 to {UNKNOWN_AATYPE}; got {types.min()} to {types.max()}")
    chains = _texts("chain_id", ["A"] * n if chain_id is None else chain_id, n)
    by_atom = np.zeros((n, len(ATOM_TYPES))) if b_factor is None else np.asarray(_without_bfloat16(b_factor))
    if by_atom.shape == (n,):
        by_atom = np.tile(by_atom[:, None], len(ATOM_TYPES))
    residues = _Residues(
        atom37=positions,
        mask=ATOM37_MASK[types] if atom37_mask is None else _truths("atom37_mask", atom37_mask, positions.shape[:2]),
        aatype=types,
        chain_id=chains,
        number=_count(chains) if residue_number is None else _numbers("residue_number", residue_number, (n,), np.int64),
        insertion_code=_texts("insertion_code", [""] * n if insertion_code is None else insertion_code, n),
        b_factor=_numbers("b_factor", by_atom, positions.shape[:2], np.float64),
    )
    _check_residues(residues)
    _check_atoms(residues)
    if suffix.startswith(".pdb"):
        _check_pdb_limits(path, residues)
    else:
        _check_mmcif_names(path, residues)
    content = _text(residues, suffix, name, path.name[: -len(suffix)]).encode()
    with replacing(path) as handle:
        handle.write(gzip.compress(content, mtime=0) if suffix.endswith(".gz") else content)


def _without_bfloat16(array: Any) -> Any:
    """Casts tensors of torch's bfloat16 to float32, because numpy has no bfloat16."""
    return array.float() if str(getattr(array, "dtype", "")) == "torch.bfloat16" else array


@dataclass(frozen=True, kw_only=True, eq=False)
class _Residues:
    """The residues to write; b_factor is per atom."""

    atom37: ndarray
    mask: ndarray
    aatype: ndarray
    chain_id: ndarray
    number: ndarray
    insertion_code: ndarray
    b_factor: ndarray

    def label(self, i: int) -> str:
        return f"{self.chain_id[i]} {self.number[i]}{self.insertion_code[i]} {RESTYPE_NAMES[self.aatype[i]]}"


def _numbers(name: str, x: ArrayLike, shape: tuple[int, ...], dtype: type) -> ndarray:
    array = np.asarray(x)
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}; got {array.shape}")
    if array.dtype == bool or not np.can_cast(array.dtype, dtype, "same_kind"):
        kind = "whole numbers" if dtype is np.int64 else "real numbers"
        raise ValueError(f"{name} must be {kind}; got {array.dtype}: cast it if the values are right")
    return array.astype(dtype)


def _truths(name: str, x: ArrayLike, shape: tuple[int, ...]) -> ndarray:
    array = np.asarray(x)
    if array.shape != shape:
        raise ValueError(f"{name} must be {shape}; got {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be 0 and 1, or bool; it has other values: compare it with a threshold first")
    return array.astype(bool)


def _texts(name: str, x: ArrayLike, n: int) -> ndarray:
    array = np.asarray(x)
    if array.shape != (n,):
        raise ValueError(f"{name} must be ({n},), one for every residue; got {array.shape}")
    for text in array.tolist():
        if not isinstance(text, str) or not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"{name} must be strings of ASCII without spaces; got {text!r}")
    return array.astype(str)


def _count(chain_id: ndarray) -> ndarray:
    """Numbers from 1 in every chain."""
    _, start, chain = np.unique(chain_id, return_index=True, return_inverse=True)
    return np.arange(len(chain_id)) - start[chain] + 1


def _check_residues(residues: _Residues) -> None:
    seen: dict[tuple[str, int, str], int] = {}
    for i, (chain, number, code) in enumerate(
        zip(residues.chain_id.tolist(), residues.number.tolist(), residues.insertion_code.tolist(), strict=True)
    ):
        if i and chain != residues.chain_id[i - 1] and chain in residues.chain_id[:i]:
            raise ValueError(f"chain_id: each chain's residues must be contiguous; chain {chain!r} starts again at {i}")
        if len(code) > 1 or not (code.isalnum() or not code):
            raise ValueError(f'insertion_code must be a letter, a digit or ""; got {code!r} at residue {i}')
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"residue_number must fit 32 bits; got {number} at residue {i}")
        first = seen.setdefault((chain, number, code), i)
        if first != i:
            raise ValueError(
                f"expected one residue per position; {residues.label(first)} and {residues.label(i)} share chain, "
                "number and insertion code: give every chain a name of its own, or renumber"
            )


def _check_atoms(residues: _Residues) -> None:
    if not residues.mask.any():
        raise ValueError("expected at least one atom; atom37_mask has none (by default, unknown residues have none)")
    for what, wrong in {
        "of a finite position": ~np.isfinite(residues.atom37).all(-1),
        "with a finite b_factor": ~np.isfinite(residues.b_factor),
        "that its residue can have (residues.ATOM37_MASK, OXT)": ~np.array([may_have(t) for t in residues.aatype]),
    }.items():
        for i, slot in np.argwhere(residues.mask & wrong):
            raise ValueError(
                f"expected every atom {what}; {ATOM_TYPES[slot]} of residue {residues.label(i)} at index {i} is at "
                f"{residues.atom37[i, slot].tolist()}, b_factor {residues.b_factor[i, slot]}: correct it, or take it "
                "out of atom37_mask"
            )


def _check_pdb_limits(path: Path, residues: _Residues) -> None:
    """Raises if the residues do not fit the columns of a PDB file; the TER after a chain takes a serial number too."""
    chains = set(residues.chain_id.tolist())
    serials = int(residues.mask.sum()) + len(chains)
    positions, b_factors = residues.atom37[residues.mask].round(3), residues.b_factor[residues.mask].round(2)
    for fits, limit, got in (
        (len(chains) <= 62, "at most 62 chains", len(chains)),
        (max(map(len, chains)) <= 1, "chain names of one character", sorted(chains)),
        (serials <= 99_999, "at most 99,999 atoms and ends of chains", serials),
        _between(residues.number, "residue numbers", -999, 9999),
        _between(positions, "coordinates", -999.999, 9999.999),
        _between(b_factors, "B factors", -99.99, 999.99),
    ):
        if not fits:
            raise ValueError(f"{path}: PDB holds {limit}; got {got}: write .cif")


def _check_mmcif_names(path: Path, residues: _Residues) -> None:
    """Raises for chain names that mmCIF would misread, because gemmi writes label_asym_id without quotes."""
    for chain in residues.chain_id.tolist():
        if not re.fullmatch(r"(?!(data|save|loop|stop|global)_)[a-z0-9][\w.+-]*", chain, re.ASCII | re.IGNORECASE):
            raise ValueError(
                f"{path}: chain names in mmCIF must start with a letter or digit, hold only these and _ . + -, and not "
                f"start with one of its keywords, such as data_; got {chain!r}: rename the chain"
            )


def _between(x: ndarray, what: str, low: float, high: float) -> tuple[bool, str, str]:
    return bool(x.min() >= low and x.max() <= high), f"{what} from {low} to {high}", f"{x.min()} to {x.max()}"


def _text(residues: _Residues, suffix: str, name: str | None, stem: str) -> str:
    """The contents of the file, not compressed."""
    gemmi = import_gemmi("writing")
    structure = gemmi.Structure()
    structure.name = re.sub(r"[^\w.-]", "_", name or stem, flags=re.ASCII) or "protein"
    if name:
        structure.info["_struct.title"] = name
    model = gemmi.Model(1)
    entities: dict[tuple[str, ...], Any] = {}
    for chain in dict.fromkeys(residues.chain_id.tolist()):
        (members,) = np.nonzero(residues.chain_id == chain)
        if not residues.mask[members].any():
            continue
        sequence = tuple(RESTYPE_NAMES[aatype] for aatype in residues.aatype[members])
        entity = entities.setdefault(sequence, gemmi.Entity(str(len(entities) + 1)))
        entity.entity_type, entity.polymer_type = gemmi.EntityType.Polymer, gemmi.PolymerType.PeptideL
        entity.full_sequence, entity.subchains = list(sequence), [*entity.subchains, chain]
        model.add_chain(_chain(residues, chain, members, entity.name))
    structure.add_model(model)
    structure.entities = gemmi.EntityList(list(entities.values()))
    structure.assign_serial_numbers()
    if suffix.startswith(".pdb"):
        # No CRYST1 record: readers would take its default cell for a periodic box of 1 Å.
        return structure.make_pdb_string(gemmi.PdbWriteOptions(cryst1_record=False))
    return structure.make_mmcif_document(
        gemmi.MmcifOutputGroups(False, **dict.fromkeys(MMCIF_GROUPS, True))
    ).as_string()


def _chain(residues: _Residues, name: str, members: ndarray, entity: str) -> Any:
    import gemmi

    chain = gemmi.Chain(name)
    for label_seq, i in enumerate(members, 1):
        residue = gemmi.Residue()
        residue.name = RESTYPE_NAMES[residues.aatype[i]]
        residue.seqid = gemmi.SeqId(int(residues.number[i]), residues.insertion_code[i] or " ")
        residue.het_flag, residue.entity_type = "A", gemmi.EntityType.Polymer
        residue.subchain, residue.entity_id, residue.label_seq = name, entity, label_seq
        for slot in np.flatnonzero(residues.mask[i]):
            atom = gemmi.Atom()
            atom.name, atom.element = ATOM_TYPES[slot], gemmi.Element(ATOM_TYPES[slot][0])
            atom.pos, atom.b_iso = gemmi.Position(*residues.atom37[i, slot]), residues.b_factor[i, slot]
            residue.add_atom(atom)
        if len(residue):
            chain.add_residue(residue)
    return chain
