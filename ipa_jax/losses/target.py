"""The true structure as the losses need it, and a prediction to compare with it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from ipa_bridge.checks import check_shape
from ipa_bridge.tuples import by_name
from ipa_jax.rigid import Rigid
from ipa_jax.side_chains import atom37_to_atom14, atom37_to_frames, atom37_to_torsion_angles, check_aatype
from ipa_jax.structure_module import StructureModuleOutput


@by_name
class StructureTarget(NamedTuple):
    """A true structure; positions in Å, masks 1 or True where an atom, frame or torsion is known."""

    aatype: Int[Array, "*B N"]
    mask: Shaped[Array, "*B N"]
    """1 or True where the residue is part of the sequence, resolved or not; 0 for padding."""
    residue_index: Shaped[Array, "*B N"]
    group_frames: Rigid
    """(*B, N, 8); the first is the backbone's."""
    group_mask: Shaped[Array, "*B N 8"]
    atom14: Float[Array, "*B N 14 3"]
    atom14_mask: Shaped[Array, "*B N 14"]
    chi: Float[Array, "*B N 4 2"]
    """(sin, cos)."""
    chi_mask: Shaped[Array, "*B N 4"]
    chain_id: Shaped[Array, "*B N"] | None = None


def structure_target(
    atom37: Float[Array, "*B N 37 3"],
    atom37_mask: Shaped[Array, "*B N 37"],
    aatype: Int[Array, "*B N"],
    mask: Shaped[Array, "*B N"],
    residue_index: Shaped[Array, "*B N"],
    *,
    chain_id: Shaped[Array, "*B N"] | None = None,
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
    # A `Structure` holds numpy arrays, whose dtypes may be wider than JAX's.
    atom37, atom37_mask, aatype, mask, residue_index = (
        jnp.asarray(x) for x in (atom37, atom37_mask, aatype, mask, residue_index)
    )
    chain_id = None if chain_id is None else jnp.asarray(chain_id)
    known = atom37_mask.astype(bool) & mask.astype(bool)[..., None]
    atom37 = jnp.where(known[..., None], atom37, jnp.zeros((), atom37.dtype))
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
    use_clamped_fape: float | Float[Array, "*B"]
    chunk_size: int | None
