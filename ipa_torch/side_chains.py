"""Torsion angles to rigid groups to atoms, and back (Jumper et al. 2021, Suppl. 1.8.4 and Alg. 24–25)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ipa_bridge.checks import check_arrays, check_per_atom, check_residue_types, check_shape
from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.parameters import haiku_name
from ipa_bridge.proteins import residues
from ipa_bridge.tuples import by_name
from ipa_torch.dtypes import at_least_float32
from ipa_torch.layers import Initializer, Linear, Module, take
from ipa_torch.rigid import Rigid, normalise
from ipa_torch.values import integers_outside


@by_name
class GroupFrames(NamedTuple):
    """Frames of the rigid groups, (*B, N, 8), computed from known atoms, in the global frame and Å.

    `alternative_frames` use the alternative names of ambiguous atoms (the last χ of ASP, GLU, PHE and TYR turned by π).
    `mask` is True where the residue has the group and the three atoms that define it are known. Elsewhere frames are
    the identity.
    """

    frames: Rigid
    alternative_frames: Rigid
    mask: Shaped[Tensor, "*B N 8"]


@by_name
class TorsionAngles(NamedTuple):
    """(sin, cos) of pre-ω, φ, ψ and χ1–χ4, computed from known atoms.

    `alternative_angles` use the alternative names of ambiguous atoms. `mask` is True where the residue has the torsion
    and the four atoms that define it are known. Elsewhere sine and cosine are zero.
    """

    angles: Float[Tensor, "*B N 7 2"]
    alternative_angles: Float[Tensor, "*B N 7 2"]
    mask: Shaped[Tensor, "*B N 7"]


def lookup(
    table: np.ndarray, aatype: Int[Tensor, "*B N"], dtype: torch.dtype | None = None
) -> Shaped[Tensor, "*B N *T"]:
    """Rows of a table in `residues`, by residue type; types outside 0–20 get the row of the unknown residue."""
    aatype = aatype.long()
    unknown = (aatype < 0) | (aatype > residues.UNKNOWN_AATYPE)
    rows = torch.from_numpy(table.copy())
    return rows.to(aatype.device, dtype)[aatype.masked_fill(unknown, residues.UNKNOWN_AATYPE)]


def check_aatype(aatype: Int[Tensor, "*B N"], mask: Shaped[Tensor, "*B N"] | None = None) -> None:
    """Checks that residue types are 0–20 where the mask is 1.

    Values can be checked only on CPU, outside traces and transforms. Elsewhere `lookup` treats other types as unknown.

    Raises:
        ValueError: residue types are not integers, or not 0–20 at a valid residue.
    """
    check_arrays(Tensor, aatype=aatype, mask=mask)
    check_residue_types(aatype, integers_outside(aatype, residues.UNKNOWN_AATYPE, mask))


class MultiRigidSidechain(Module):
    """Torsion angles from activations, by a small residual network (Suppl. Alg. 20, lines 11–14)."""

    def __init__(self, config: StructureModuleConfig) -> None:
        super().__init__()
        self.config = c = config
        width = c.sidechain_channel
        final: Initializer = "zeros" if c.ipa.zero_init else "linear"
        if c.sidechain_input == "summed":
            self.input_projection = Linear(c.num_channel, width)
            self.input_projection_1 = Linear(c.initial_act_channel, width)
        for i in range(c.num_residual_block):
            if c.num_layer_in_residual_block == 3:
                self.add_module(haiku_name("resblock0", i), Linear(width, width, initializer="relu"))
            self.add_module(haiku_name("resblock1", i), Linear(width, width, initializer="relu"))
            self.add_module(haiku_name("resblock2", i), Linear(width, width, initializer=final))
        self.unnormalized_angles = Linear(width, 14, full_precision=True)

    def forward(
        self, act: Float[Tensor, "*B N c_s"], initial_act: Float[Tensor, "*B N initial"]
    ) -> tuple[Float[Tensor, "*B N 7 2"], Float[Tensor, "*B N 7 2"]]:
        """Unit (sin, cos) of the seven torsions, and the same before normalisation, in at least float32."""
        c = self.config
        if c.sidechain_input == "summed":
            hidden = self.input_projection(F.relu(act)) + self.input_projection_1(F.relu(initial_act))
        else:
            hidden = torch.cat([act, initial_act], -1)
        for i in range(c.num_residual_block):
            update = hidden
            if c.num_layer_in_residual_block == 3:
                update = self.get_submodule(haiku_name("resblock0", i))(F.relu(update))
            update = self.get_submodule(haiku_name("resblock1", i))(F.relu(update))
            hidden = hidden + self.get_submodule(haiku_name("resblock2", i))(F.relu(update))
        unnormalized = self.unnormalized_angles(F.relu(hidden)).unflatten(-1, (7, 2))
        return normalise(unnormalized, c.smallest_angle_length), unnormalized


def torsion_angles_to_frames(
    rigids: Rigid,
    angles: Float[Tensor, "*B N 7 2"],
    aatype: Int[Tensor, "*B N"],
    *,
    mask: Shaped[Tensor, "*B N"] | None = None,
) -> Rigid:
    """Frames of the eight rigid groups of every residue, (*B, N, 8) (Alg. 24, lines 1–10).

    Args:
        rigids: backbone frames, (*B, N), in Å.
        angles: unit (sin, cos) of pre-ω, φ, ψ, χ1–χ4.
        aatype: 0–19, or 20 for an unknown residue, whose groups all have the backbone frame's origin.
        mask: 1 or True where a residue is valid; elsewhere aatype may be any integer. None if all are valid.

    Raises:
        ValueError: residue types that `check_aatype` rejects.
    """
    check_aatype(aatype, mask)
    dtype = at_least_float32(rigids.translation.dtype, angles.dtype)
    rigids, angles = rigids.astype(dtype), angles.to(dtype)
    still = angles.new_tensor([0, 1]).expand(*angles.shape[:-2], 1, 2)
    sine, cosine = torch.cat([still, angles], -2)[..., None, :].unbind(-1)
    at_rest = lookup(residues.GROUP_ROTATION, aatype, dtype)
    x, y, z = at_rest.unbind(-1)
    turned = torch.stack([x.expand_as(cosine * y), cosine * y + sine * z, cosine * z - sine * y], -1)
    groups = Rigid(turned, lookup(residues.GROUP_TRANSLATION, aatype, dtype))  # makeRotX, Alg. 25
    chain = [_group(groups, group) for group in range(residues.NUM_GROUP)]
    for group in (5, 6, 7):  # χ2–χ4 turn with the χ before
        chain[group] = chain[group - 1].compose(chain[group])
    to_backbone = Rigid(torch.stack([g.rotation for g in chain], -3), torch.stack([g.translation for g in chain], -2))
    return Rigid(rigids.rotation[..., None, :, :], rigids.translation[..., None, :]).compose(to_backbone)


def frames_to_atom14(
    frames: Rigid, aatype: Int[Tensor, "*B N"], *, mask: Shaped[Tensor, "*B N"] | None = None
) -> Float[Tensor, "*B N 14 3"]:
    """Atom positions in Å from frames of the rigid groups, (*B, N, 8), in Å (Alg. 24, line 11).

    Slots without an atom are zero. Where the mask is 0, aatype may be any integer; None means a mask of ones.

    Raises:
        ValueError: frames that do not fit aatype, or residue types that `check_aatype` rejects.
    """
    check_shape("frames.translation", frames.translation, (*aatype.shape, residues.NUM_GROUP, 3), "aatype")
    check_aatype(aatype, mask)
    group = lookup(residues.ATOM14_GROUP, aatype)
    of_atom = Rigid(
        take(frames.rotation, group[..., None, None], -3),
        take(frames.translation, group[..., None], -2),
    )
    dtype = frames.translation.dtype
    atoms = of_atom.apply(lookup(residues.ATOM14_POSITIONS, aatype, dtype))
    return atoms * lookup(residues.ATOM14_MASK, aatype, dtype)[..., None]


def atom14_to_atom37(
    atom14: Shaped[Tensor, "*B N 14 *D"], aatype: Int[Tensor, "*B N"], *, mask: Shaped[Tensor, "*B N"] | None = None
) -> Shaped[Tensor, "*B N 37 *D"]:
    """Converts per-atom arrays from 14 slots by residue type to 37 slots by atom name; absent atoms become zero.

    Arrays may be positions or masks. Where the mask of residues is 0, aatype may be any integer; None means a mask of
    ones.

    Raises:
        ValueError: atoms that do not fit aatype, or residue types that `check_aatype` rejects.
    """
    check_arrays(Tensor, atom14=atom14, aatype=aatype)
    check_per_atom("atom14", atom14, 14, aatype)
    check_aatype(aatype, mask)
    return _gather(atom14, residues.ATOM37_TO_ATOM14, residues.ATOM37_MASK, aatype)


def atom37_to_atom14(
    atom37: Shaped[Tensor, "*B N 37 *D"], aatype: Int[Tensor, "*B N"], *, mask: Shaped[Tensor, "*B N"] | None = None
) -> Shaped[Tensor, "*B N 14 *D"]:
    """Inverse of `atom14_to_atom37`. Drops the slots of atoms that the residue type does not have.

    Raises:
        ValueError: atoms that do not fit aatype, or residue types that `check_aatype` rejects.
    """
    check_arrays(Tensor, atom37=atom37, aatype=aatype)
    check_per_atom("atom37", atom37, 37, aatype)
    check_aatype(aatype, mask)
    return _gather(atom37, residues.ATOM14_TO_ATOM37, residues.ATOM14_MASK, aatype)


def atom37_to_frames(
    atom37: Float[Tensor, "*B N 37 3"], atom37_mask: Shaped[Tensor, "*B N 37"], aatype: Int[Tensor, "*B N"]
) -> GroupFrames:
    """Frames of the rigid groups from the atoms that define them (Suppl. 1.8.4, Table 2).

    Args:
        atom37: positions in Å.
        atom37_mask: 1 where an atom is known.
        aatype: 0–19, or 20 for an unknown residue, which has a backbone frame and a ψ frame.

    Raises:
        ValueError: atoms or a mask that do not fit aatype, or residue types that `check_aatype` rejects.
    """
    check_shape("atom37", atom37, (*aatype.shape, 37, 3), "aatype")
    check_shape("atom37_mask", atom37_mask, (*aatype.shape, 37), "aatype")
    check_aatype(aatype, atom37_mask.bool().any(-1))
    dtype = at_least_float32(atom37.dtype)
    index = lookup(residues.GROUP_ATOMS, aatype)
    first, origin, in_plane = _pick(atom37.to(dtype), index)
    backbone = (torch.arange(residues.NUM_GROUP, device=atom37.device) == 0)[:, None]
    on_axis = torch.where(backbone, first, 2 * origin - first)
    known = torch.all(torch.stack(_pick(atom37_mask.bool()[..., None], index)), 0)[..., 0]
    known = known & lookup(residues.GROUP_MASK, aatype)
    frames = Rigid.from_three_points(in_plane, origin, on_axis)
    rotation = torch.where(known[..., None, None], frames.rotation, torch.eye(3, dtype=dtype, device=atom37.device))
    translation = torch.where(known[..., None], frames.translation, 0)
    sign = 1 - 2 * lookup(residues.GROUP_IS_AMBIGUOUS, aatype, dtype)
    by_pi = torch.stack([torch.ones_like(sign), sign, sign], -1)[..., None, :]
    return GroupFrames(Rigid(rotation, translation), Rigid(rotation * by_pi, translation), known)


def atom37_to_torsion_angles(
    atom37: Float[Tensor, "*B N 37 3"],
    atom37_mask: Shaped[Tensor, "*B N 37"],
    aatype: Int[Tensor, "*B N"],
    *,
    bonded: Shaped[Tensor, "*B N"] | None = None,
) -> TorsionAngles:
    """The torsions of residues whose atoms are known (Suppl. 1.8.4, Table 2).

    Args:
        atom37: positions in Å.
        atom37_mask: 1 where an atom is known.
        aatype: 0–19, or 20 for an unknown residue, which has no χ.
        bonded: 1 where a residue is bonded to the previous one in the array; the others have no pre-ω and no φ. None
            if all but the first are bonded, as in AlphaFold.

    Raises:
        ValueError: atoms or masks that do not fit aatype, or residue types that `check_aatype` rejects.
    """
    check_shape("atom37", atom37, (*aatype.shape, 37, 3), "aatype")
    check_shape("atom37_mask", atom37_mask, (*aatype.shape, 37), "aatype")
    check_aatype(aatype, atom37_mask.bool().any(-1))
    if bonded is not None:
        check_shape("bonded", bonded, aatype.shape, "aatype")
    dtype = at_least_float32(atom37.dtype)
    atoms, known = atom37.to(dtype), atom37_mask.bool()
    known_before = _of_residue_before(known[..., :3, None])
    if bonded is not None:
        known_before = known_before & bonded.bool()[..., None, None]
    index = lookup(residues.TORSION_ATOMS, aatype)
    a, b, c, d = _pick(torch.cat([atoms, _of_residue_before(atoms[..., :3, :])], -2), index)
    mask = torch.all(torch.stack(_pick(torch.cat([known[..., None], known_before], -2), index)), 0)[..., 0]
    mask = mask & lookup(residues.TORSION_MASK, aatype)
    _, y, z = Rigid.from_three_points(a, c, 2 * c - b).apply_inverse(d).unbind(-1)
    by_oxygen = atoms.new_tensor([1, 1, -1, 1, 1, 1, 1])
    angles = normalise(torch.stack([z, y], -1)) * (by_oxygen * mask.to(dtype))[..., None]
    other = 1 - 2 * lookup(residues.TORSION_PI_PERIODIC, aatype, dtype)
    return TorsionAngles(angles, angles * other[..., None], mask)


def _group(groups: Rigid, group: int) -> Rigid:
    return Rigid(groups.rotation[..., group, :, :], groups.translation[..., group, :])


def _gather(
    atoms: Shaped[Tensor, "*B N A *D"], slots: np.ndarray, exists: np.ndarray, aatype: Int[Tensor, "*B N"]
) -> Shaped[Tensor, "*B N A2 *D"]:
    index, present = lookup(slots, aatype), lookup(exists, aatype)
    trailing = (1,) * (atoms.ndim - index.ndim)
    found = take(atoms, index.reshape(*index.shape, *trailing), index.ndim - 1)
    return torch.where(present.reshape(*present.shape, *trailing), found, torch.zeros_like(found))


def _pick(atoms: Shaped[Tensor, "*B N A D"], index: Int[Tensor, "*B N G K"]) -> list[Shaped[Tensor, "*B N G D"]]:
    """The K atoms of each group, by index."""
    return [take(atoms, index[..., k, None], -2) for k in range(index.shape[-1])]


def _of_residue_before(atoms: Shaped[Tensor, "*B N A D"]) -> Shaped[Tensor, "*B N A D"]:
    return torch.cat([torch.zeros_like(atoms[..., :1, :, :]), atoms[..., :-1, :, :]], -3)
