"""The true structure as the losses need it, and a prediction to compare with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from ipa_bridge.checks import check_shape
from ipa_bridge.tuples import by_name
from ipa_torch.rigid import Rigid
from ipa_torch.side_chains import atom37_to_atom14, atom37_to_frames, atom37_to_torsion_angles, check_aatype
from ipa_torch.structure_module import StructureModuleOutput


@by_name
class StructureTarget(NamedTuple):
    """A true structure; positions in Å, masks 1 or True where an atom, frame or torsion is known."""

    aatype: Int[Tensor, "*B N"]
    mask: Shaped[Tensor, "*B N"]
    """1 or True where the residue is part of the sequence, resolved or not; 0 for padding."""
    residue_index: Shaped[Tensor, "*B N"]
    group_frames: Rigid
    """(*B, N, 8); the first is the backbone's."""
    group_mask: Shaped[Tensor, "*B N 8"]
    atom14: Float[Tensor, "*B N 14 3"]
    atom14_mask: Shaped[Tensor, "*B N 14"]
    chi: Float[Tensor, "*B N 4 2"]
    """(sin, cos)."""
    chi_mask: Shaped[Tensor, "*B N 4"]
    chain_id: Shaped[Tensor, "*B N"] | None = None


def structure_target(
    atom37: Float[Tensor, "*B N 37 3"],
    atom37_mask: Shaped[Tensor, "*B N 37"],
    aatype: Int[Tensor, "*B N"],
    mask: Shaped[Tensor, "*B N"],
    residue_index: Shaped[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
) -> StructureTarget:
    """Computes what the losses need from the atoms of the true structure (`ipa_bridge.Structure` has them).

    Args:
        atom37: positions in Å; any value where an atom is missing.
        atom37_mask: 1 or True where an atom is known.
        aatype: residue types, 0 to 20.
        mask: 1 or True where a residue is part of the sequence, resolved or not; 0 for padding.
        residue_index: consecutive residues are bonded where this increases by 1.
        chain_id: equal numbers for residues of one chain, for AlphaFold-Multimer's losses; None for one chain.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    residue = tuple(mask.shape)
    check_shape("atom37", atom37, (*residue, 37, 3), "mask")
    check_shape("atom37_mask", atom37_mask, (*residue, 37), "mask")
    check_shape("aatype", aatype, residue, "mask")
    check_shape("residue_index", residue_index, residue, "mask")
    if chain_id is not None:
        check_shape("chain_id", chain_id, residue, "mask")
    check_aatype(aatype, mask)
    known = atom37_mask.to(torch.bool) & mask.to(torch.bool)[..., None]
    atom37 = torch.where(known[..., None], atom37, 0)
    groups, torsions = atom37_to_frames(atom37, known, aatype), atom37_to_torsion_angles(atom37, known, aatype)
    return StructureTarget(
        aatype=aatype,
        mask=mask,
        residue_index=residue_index,
        group_frames=groups.frames,
        group_mask=groups.mask,
        atom14=atom37_to_atom14(atom37, aatype, mask=mask),
        atom14_mask=atom37_to_atom14(known, aatype, mask=mask),
        chi=torsions.angles[..., 3:, :],
        chi_mask=torsions.mask[..., 3:],
        chain_id=chain_id,
    )


class Comparison(NamedTuple):
    """A prediction and its target, the input of every term of the loss.

    Attributes:
        output: predictions of the structure module.
        target: true structure, in the prediction's dtype, with ambiguous atoms and frames renamed to fit it best.
        use_clamped_fape: as in `backbone_loss`.
        chunk_size: frames or residues computed at a time in every quadratic term; None for all at once.
    """

    output: StructureModuleOutput
    target: StructureTarget
    use_clamped_fape: float | Float[Tensor, "*B"]
    chunk_size: int | None


def _collate(batch: Sequence[StructureTarget], *, collate_fn_map: Any = None) -> StructureTarget:
    """Batch of targets of one length, of which all have a chain_id or none has."""
    without_chains = [target.chain_id is None for target in batch]
    if any(without_chains) and not all(without_chains):
        raise ValueError(
            f"chain_id must be given in all targets of a batch or in none; {sum(without_chains)} of {len(batch)} have "
            "none: for targets of a single chain, pass structure_target a chain_id of equal numbers"
        )
    fields = (
        None if each[0] is None else collate(each, collate_fn_map=collate_fn_map) for each in zip(*batch, strict=True)
    )
    return StructureTarget._make(fields)


# torch.utils.data.default_collate, and so DataLoader, does not accept None, which chain_id may be.
default_collate_fn_map[StructureTarget] = _collate
