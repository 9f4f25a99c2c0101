"""The structure module's losses: FAPE, torsions, violations and lDDT (Jumper et al. 2021, Suppl. 1.9 and 1.11.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from ipa_bridge.checks import check_shape
from ipa_bridge.proteins import residues
from ipa_bridge.tuples import by_name
from ipa_torch.dtypes import at_least_float32
from ipa_torch.layers import take
from ipa_torch.rigid import Rigid
from ipa_torch.side_chains import atom37_to_atom14, atom37_to_frames, atom37_to_torsion_angles, check_aatype, lookup
from ipa_torch.structure_module import StructureModuleOutput

_N, _CA, _C, _SG = (residues.ATOM14_NAMES[residues.RESTYPES.index("C")].index(name) for name in ("N", "CA", "C", "SG"))
_PROLINE = residues.RESTYPES.index("P")
_AMBIGUOUS_SLOTS = np.argsort(~residues.ATOM14_IS_AMBIGUOUS, axis=-1, kind="stable")[
    :, : residues.ATOM14_IS_AMBIGUOUS.sum(-1).max()
]
"""The slots of a residue's ambiguous atoms, four at the most; other slots where there are fewer."""


@by_name
class RenamedAtoms(NamedTuple):
    """A true structure under the atom names that fit a prediction better."""

    atom14: Float[Tensor, "*B N 14 3"]
    mask: Shaped[Tensor, "*B N 14"]
    alternative_is_better: Bool[Tensor, "*B N"]


@by_name
class BondViolations(NamedTuple):
    """Peptide bonds: mean losses of C–N (Å) and of the cosines of CA–C–N and C–N–CA; each residue's own."""

    c_n_loss: Float[Tensor, "*B"]
    ca_c_n_loss: Float[Tensor, "*B"]
    c_n_ca_loss: Float[Tensor, "*B"]
    loss_per_residue: Float[Tensor, "*B N"]
    violation_per_residue: Bool[Tensor, "*B N"]


@by_name
class ClashViolations(NamedTuple):
    """Overlaps between residues: the mean over pairs of atoms, each atom's sum (Å), and whether it has any."""

    loss: Float[Tensor, "*B"]
    loss_per_atom: Float[Tensor, "*B N 14"]
    violation_per_atom: Bool[Tensor, "*B N 14"]


@by_name
class WithinResidueViolations(NamedTuple):
    """Distances within residues out of their bounds: each atom's sum (Å), and whether it has any."""

    loss_per_atom: Float[Tensor, "*B N 14"]
    violation_per_atom: Bool[Tensor, "*B N 14"]


@by_name
class StructuralViolations(NamedTuple):
    """All violations of a structure, and which residues have any."""

    bonds: BondViolations
    clashes: ClashViolations
    within_residues: WithinResidueViolations
    per_residue: Bool[Tensor, "*B N"]


@by_name
class ViolationMetrics(NamedTuple):
    """Fractions of neighbours whose Cα lie too far apart, and of residues with a violation of each kind."""

    extreme_ca_ca_distance: Float[Tensor, "*B"]
    between_residue_bond: Float[Tensor, "*B"]
    between_residue_clash: Float[Tensor, "*B"]
    within_residue: Float[Tensor, "*B"]
    per_residue: Float[Tensor, "*B"]


@by_name
class StructureTarget(NamedTuple):
    """A true structure; positions in Å, masks 1 or True where an atom, frame or torsion is known."""

    aatype: Int[Tensor, "*B N"]
    mask: Shaped[Tensor, "*B N"]
    """The residue is part of the sequence and not padding, be it resolved or not."""
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


@by_name
class StructureModuleLoss(NamedTuple):
    """The weighted sum, and its terms before weighting; `fape` is the last layer's."""

    loss: Float[Tensor, "*B"]
    backbone: Float[Tensor, "*B"]
    fape: Float[Tensor, "*B"]
    sidechain_fape: Float[Tensor, "*B"]
    chi: Float[Tensor, "*B"]
    angle_norm: Float[Tensor, "*B"]
    violation: Float[Tensor, "*B"]


def structure_target(
    atom37: Float[Tensor, "*B N 37 3"],
    atom37_mask: Shaped[Tensor, "*B N 37"],
    aatype: Int[Tensor, "*B N"],
    mask: Shaped[Tensor, "*B N"],
    residue_index: Shaped[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
) -> StructureTarget:
    """The true structure as the losses need it, from its atoms (`ipa_bridge.Structure` has them).

    Args:
        atom37: positions in Å; anything where an atom is missing.
        atom37_mask: 1 or True where an atom is known.
        aatype: residue types, 0 to 20.
        mask: 1 or True where a residue is part of the sequence and not padding, be it resolved or not.
        residue_index: residues next to each other are bonded where it grows by 1.
        chain_id: numbers, equal where residues lie in one chain, for AlphaFold-Multimer's losses; None for one chain.

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


def frame_aligned_point_error(
    predicted_frames: Rigid,
    target_frames: Rigid,
    frames_mask: Shaped[Tensor, "*B F"],
    predicted_points: Float[Tensor, "*B P 3"],
    target_points: Float[Tensor, "*B P 3"],
    points_mask: Shaped[Tensor, "*B P"],
    *,
    length_scale: float = 10.0,
    clamp_distance: float | None = None,
    pair_mask: Shaped[Tensor, "*B F P"] | None = None,
    epsilon: float = 1e-4,
    chunk_size: int | None = None,
) -> Float[Tensor, "*B"]:
    """Mean distance between the points as each pair of frames sees them (Suppl. Alg. 28, computeFAPE).

    Args:
        predicted_frames: (*B, F), Å.
        target_frames: (*B, F), Å.
        frames_mask: 1 or True where a frame counts.
        predicted_points: global frame, Å.
        target_points: global frame, Å.
        points_mask: 1 or True where a point counts.
        length_scale: Å, the unit of the result.
        clamp_distance: Å, beyond which errors count as this much and pass no gradient; None for no clamp.
        pair_mask: 1 or True where a point counts in a frame.
        epsilon: added to squared distances in Å² and to the number of pairs.
        chunk_size: frames at a time; memory is then linear in points × chunk_size, backward as well. None under
            `torch.func.grad`, which has no checkpoints.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    frames, points = frames_mask.shape, points_mask.shape
    for name, rigid in (("predicted", predicted_frames), ("target", target_frames)):
        check_shape(f"{name}_frames.rotation", rigid.rotation, (*frames, 3, 3), "frames_mask")
        check_shape(f"{name}_frames.translation", rigid.translation, (*frames, 3), "frames_mask")
    check_shape("predicted_points", predicted_points, (*points, 3), "points_mask")
    check_shape("target_points", target_points, (*points, 3), "points_mask")
    check_shape("points_mask", points_mask, (*frames[:-1], points[-1]), "frames_mask")
    if pair_mask is not None:
        check_shape("pair_mask", pair_mask, (*frames, points[-1]), "frames_mask")
    dtype = at_least_float32(*(x.dtype for x in (*predicted_frames, *target_frames, predicted_points, target_points)))
    predicted_points, target_points, points_mask = (x.to(dtype) for x in (predicted_points, target_points, points_mask))

    def of_frames(*rows: Tensor) -> tuple[Tensor, ...]:
        predicted_rotation, predicted_translation, target_rotation, target_translation, weight, *pair = rows
        predicted = _local(predicted_rotation, predicted_translation, predicted_points)  # line 1
        target = _local(target_rotation, target_translation, target_points)  # line 2
        error = _norm(predicted - target, epsilon)  # line 3
        if clamp_distance is not None:
            error = torch.clamp(error, max=clamp_distance)
        weight = weight[..., None] * points_mask
        weight = weight * pair[0] if pair else weight
        return torch.sum(weight * error, -1) / length_scale, torch.sum(weight, -1)

    arrays = (*predicted_frames, *target_frames, frames_mask)
    rows = [torch.movedim(x.to(dtype), axis, 0) for x, axis in zip(arrays, (-3, -2, -3, -2, -1), strict=True)]
    if pair_mask is not None:
        rows.append(torch.movedim(pair_mask.to(dtype), -2, 0))
    error, weight = _by_rows(of_frames, rows, chunk_size)
    return torch.sum(error, 0) / (epsilon + torch.sum(weight, 0))  # line 4


def backbone_loss(
    predicted_frames: Rigid,
    target_frames: Rigid,
    mask: Shaped[Tensor, "*B N"],
    *,
    use_clamped_fape: float | Float[Tensor, "*B"] = 1.0,
    clamp_distance: float = 10.0,
    length_scale: float = 10.0,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
    interface_clamp_distance: float = 1000.0,
    interface_length_scale: float = 20.0,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """FAPE of each layer's backbone frames and their Cα (Suppl. Alg. 20 line 17, and 1.11.5).

    With `chain_id`, the error within chains plus the error between them, as in AlphaFold-Multimer, whose paper clamps
    the latter at 30 Å and whose published configuration at 1000 Å.

    Args:
        predicted_frames: (L, *B, N), the trajectory, Å.
        target_frames: (*B, N), Å.
        mask: 1 or True where the target's backbone is known.
        use_clamped_fape: weight of the clamped error, 1 minus it of the unclamped one; within chains if there are some.
        clamp_distance: Å.
        length_scale: Å, the unit of the result.
        chain_id: equal where residues lie in one chain.
        interface_clamp_distance: Å, between chains.
        interface_length_scale: Å, the unit between chains.
        chunk_size: frames at a time, as in `frame_aligned_point_error`.

    Returns:
        The mean over layers, which is the loss, and the last layer's error.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    layers = predicted_frames.translation.shape[:1]
    target = Rigid(*(_over_layers(x, layers) for x in target_frames))
    weight = _over_layers(mask, layers)

    def fape(clamp: float | None, scale: float, pair_mask: Tensor | None) -> Tensor:
        return frame_aligned_point_error(
            predicted_frames,
            target,
            weight,
            predicted_frames.translation,
            target.translation,
            weight,
            length_scale=scale,
            clamp_distance=clamp,
            pair_mask=None if pair_mask is None else _over_layers(pair_mask, layers),
            chunk_size=chunk_size,
        )

    same_chain = None if chain_id is None else chain_id[..., :, None] == chain_id[..., None, :]
    error = fape(clamp_distance, length_scale, same_chain)
    if not (isinstance(use_clamped_fape, int | float) and use_clamped_fape == 1):
        clamped = torch.as_tensor(use_clamped_fape, dtype=error.dtype, device=error.device)
        error = clamped * error + (1 - clamped) * fape(None, length_scale, same_chain)
    if same_chain is not None:
        error = error + fape(interface_clamp_distance, interface_length_scale, ~same_chain)
    return torch.mean(error, 0), error[-1]


def sidechain_loss(
    predicted_frames: Rigid,
    target_frames: Rigid,
    frames_mask: Shaped[Tensor, "*B N 8"],
    predicted_atom14: Float[Tensor, "*B N 14 3"],
    target_atom14: Float[Tensor, "*B N 14 3"],
    atom14_mask: Shaped[Tensor, "*B N 14"],
    *,
    clamp_distance: float = 10.0,
    length_scale: float = 10.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*B"]:
    """FAPE of all atoms in all rigid groups of the last layer (Suppl. Alg. 20 line 28).

    The target's ambiguous atoms and frames should be renamed before: `rename_ambiguous_atoms`,
    `rename_ambiguous_frames`.

    Unknown residues (aatype 20) whose backbone is known count with the frame that `torsion_angles_to_frames` gives
    their backbone. AlphaFold differs there: its frames of unknown residues have rotations of zeros.

    Args:
        predicted_frames: (*B, N, 8), Å.
        target_frames: (*B, N, 8), Å.
        frames_mask: 1 or True where a frame of the target is known.
        predicted_atom14: Å.
        target_atom14: Å.
        atom14_mask: 1 or True where an atom of the target is known.
        clamp_distance: Å.
        length_scale: Å, the unit of the result.
        chunk_size: frames at a time, as in `frame_aligned_point_error`.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    predicted, target = (
        Rigid(_flatten(rigid.rotation, -4), _flatten(rigid.translation, -3))
        for rigid in (predicted_frames, target_frames)
    )
    return frame_aligned_point_error(
        predicted,
        target,
        _flatten(frames_mask, -2),
        _flatten(predicted_atom14, -3),
        _flatten(target_atom14, -3),
        _flatten(atom14_mask, -2),
        length_scale=length_scale,
        clamp_distance=clamp_distance,
        chunk_size=chunk_size,
    )


def rename_ambiguous_atoms(
    predicted_atom14: Float[Tensor, "*B N 14 3"],
    true_atom14: Float[Tensor, "*B N 14 3"],
    mask: Shaped[Tensor, "*B N 14"],
    aatype: Int[Tensor, "*B N"],
    *,
    chunk_size: int | None = None,
) -> RenamedAtoms:
    """Names the true atoms so that distances to unambiguous atoms fit the prediction best (Suppl. Alg. 26).

    The choice passes no gradient. Memory is 56·N² numbers, or 56·N·chunk_size.

    Args:
        predicted_atom14: Å.
        true_atom14: Å.
        mask: 1 or True where an atom of the true structure is known.
        aatype: residue types, 0 to 20.
        chunk_size: residues at a time.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    check_shape("predicted_atom14", predicted_atom14, (*mask.shape, 3), "mask")
    check_shape("true_atom14", true_atom14, (*mask.shape, 3), "mask")
    check_shape("aatype", aatype, mask.shape[:-1], "mask")
    check_aatype(aatype, mask.bool().any(-1))
    dtype = at_least_float32(predicted_atom14.dtype, true_atom14.dtype)
    swap = lookup(residues.ATOM14_SWAP, aatype)
    other_atom14 = take(true_atom14, swap[..., None], -2)
    other_mask = take(mask, swap, -1)

    ambiguous = lookup(residues.ATOM14_IS_AMBIGUOUS, aatype, dtype)
    positions = [x.detach().to(dtype) for x in (predicted_atom14, true_atom14, other_atom14)]
    predicted, true = (_flatten(x, -3) for x in positions[:2])
    known = mask.to(dtype)
    weight = _flatten(known * (1 - ambiguous), -2)
    slots = lookup(_AMBIGUOUS_SLOTS, aatype)

    def of_residues(*rows: Tensor) -> tuple[Tensor, ...]:
        predicted_row, true_row, other_row, row_weight = rows
        predicted_distance = _distances(predicted_row, predicted)  # line 1
        pair_weight = row_weight[..., :, None] * weight[..., None, :]
        errors = (
            _norm((predicted_distance - _distances(row, true))[..., None], 1e-10)  # lines 2–4
            for row in (true_row, other_row)
        )
        return tuple(torch.sum(pair_weight * error, (-1, -2)) for error in errors)

    rows = [torch.movedim(take(x, slots[..., None], -2), -3, 0) for x in positions]
    rows.append(torch.movedim(take(known * ambiguous, slots, -1), -2, 0))
    error, other_error = _by_rows(of_residues, rows, chunk_size)
    better = torch.movedim(other_error < error, 0, -1)
    return RenamedAtoms(
        torch.where(better[..., None, None], other_atom14, true_atom14),  # lines 5–6
        torch.where(better[..., None], other_mask, mask),
        better,
    )


def rename_ambiguous_frames(
    frames: Rigid,
    aatype: Int[Tensor, "*B N"],
    alternative_is_better: Bool[Tensor, "*B N"],
    *,
    mask: Shaped[Tensor, "*B N"] | None = None,
) -> Rigid:
    """True frames (*B, N, 8) under the other naming of their atoms, where it is better (Suppl. Alg. 26 line 7).

    The frame of the last χ of such a residue then points the other way round its x-axis. Where the mask is 0, aatype
    may hold anything; None for a mask of ones.

    Raises:
        ValueError: residue types that are none of 0–20.
    """
    check_aatype(aatype, mask)
    turned = lookup(residues.GROUP_IS_AMBIGUOUS, aatype) & alternative_is_better.to(torch.bool)[..., None]
    half_turn = frames.rotation.new_tensor([1, -1, -1])
    return Rigid(torch.where(turned[..., None, None], frames.rotation * half_turn, frames.rotation), frames.translation)


def supervised_chi_loss(
    angles: Float[Tensor, "L *B N 7 2"],
    true_chi: Float[Tensor, "*B N 4 2"],
    chi_mask: Shaped[Tensor, "*B N 4"],
    aatype: Int[Tensor, "*B N"],
) -> Float[Tensor, "*B"]:
    """Mean squared error of side-chain torsions under the better of their names (Suppl. Alg. 27, lines 1–3).

    Args:
        angles: every layer's torsions as unit vectors (sin, cos), pre-ω, φ, ψ, χ1–χ4.
        true_chi: (sin, cos) of χ1–χ4.
        chi_mask: 1 or True where a torsion exists and is known.
        aatype: residue types, 0 to 20.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("true_chi", true_chi, (*chi_mask.shape, 2), "chi_mask")
    check_shape("aatype", aatype, chi_mask.shape[:-1], "chi_mask")
    check_aatype(aatype, chi_mask.bool().any(-1))
    check_shape("angles", angles, (*angles.shape[:1], *chi_mask.shape[:-1], 7, 2), "chi_mask")
    dtype = at_least_float32(angles.dtype, true_chi.dtype)
    chi, true_chi, weight = angles[..., 3:, :].to(dtype), true_chi.to(dtype), chi_mask.to(dtype)
    sign = 1 - 2 * lookup(residues.CHI_PI_PERIODIC, aatype, dtype)
    errors = (torch.sum((chi - name) ** 2, -1) for name in (true_chi, sign[..., None] * true_chi))
    return _masked_mean(torch.sum(torch.minimum(*errors), 0), weight, (-1, -2), repeats=angles.shape[0])


def angle_norm_loss(
    unnormalized_angles: Float[Tensor, "L *B N 7 2"], mask: Shaped[Tensor, "*B N"], *, epsilon: float = 1e-6
) -> Float[Tensor, "*B"]:
    """How far the torsions' vectors are from length 1 before they are made so (Suppl. Alg. 27, line 4).

    Args:
        unnormalized_angles: every layer's.
        mask: 1 or True where a residue is valid.
        epsilon: added to squared lengths.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("unnormalized_angles", unnormalized_angles, (*unnormalized_angles.shape[:1], *mask.shape, 7, 2), "mask")
    dtype = at_least_float32(unnormalized_angles.dtype)
    error = torch.abs(_norm(unnormalized_angles.to(dtype), epsilon) - 1)
    repeats = error.shape[0] * error.shape[-1]
    return _masked_mean(torch.sum(error, (0, -1)), mask.to(dtype), -1, repeats=repeats)


def between_residue_bond_loss(
    atom14: Float[Tensor, "*B N 14 3"],
    mask: Shaped[Tensor, "*B N 14"],
    residue_index: Shaped[Tensor, "*B N"],
    aatype: Int[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
    tolerance_factor: float = 12.0,
) -> BondViolations:
    """Lengths and angles of the bonds between neighbours (Suppl. 1.9.11, eq. 44–45).

    As in AlphaFold, `loss_per_residue` is not masked: it counts gaps and padding as well.

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        residue_index: residues next to each other are bonded where it grows by 1.
        aatype: residue types, 0 to 20; the bond to proline is longer.
        chain_id: equal where residues lie in one chain; there are no bonds between chains.
        tolerance_factor: standard deviations that are no violation.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_structure(atom14, mask, residue_index, aatype, chain_id)
    check_aatype(aatype, mask.bool().any(-1))
    dtype = at_least_float32(atom14.dtype)
    atom14, mask = atom14.to(dtype), mask.to(dtype)
    this_ca, this_c = (atom14[..., :-1, slot, :] for slot in (_CA, _C))
    next_n, next_ca = (atom14[..., 1:, slot, :] for slot in (_N, _CA))
    bonded = _follows(residue_index, chain_id).to(dtype) * mask[..., :-1, _C] * mask[..., 1:, _N]
    c_n = _norm(next_n - this_c, 1e-6)
    to_ca, to_n, from_n = (
        (this_ca - this_c) / _norm(this_ca - this_c, 1e-6)[..., None],
        (next_n - this_c) / c_n[..., None],
        (next_ca - next_n) / _norm(next_ca - next_n, 1e-6)[..., None],
    )
    to_proline = aatype[..., 1:] == _PROLINE
    length, length_stddev = (
        torch.where(to_proline, atom14.new_tensor(proline), atom14.new_tensor(other))
        for other, proline in (residues.PEPTIDE_BOND_LENGTH[key] for key in ("mean", "stddev"))
    )
    (ca_c_n_mean, _), (c_n_ca_mean, c_n_ca_stddev) = (
        residues.PEPTIDE_BOND_COSINES[name] for name in ("CA-C-N", "C-N-CA")
    )
    # AlphaFold's code tolerates CA-C-N by the deviation of the C–N length; the weights were trained so.
    ca_c_n_stddev = residues.PEPTIDE_BOND_LENGTH["stddev"][0]

    def judge(
        value: Tensor, mean: Tensor | float, stddev: Tensor | float, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        error = _norm((value - mean)[..., None], 1e-6)
        tolerance = tolerance_factor * stddev
        loss = torch.relu(error - tolerance)
        return torch.sum(weight * loss, -1) / (torch.sum(weight, -1) + 1e-6), loss, (weight > 0) & (error > tolerance)

    judged = (
        judge(c_n, length, length_stddev, bonded),
        judge(torch.sum(to_ca * to_n, -1), ca_c_n_mean, ca_c_n_stddev, bonded * mask[..., :-1, _CA]),
        judge(-torch.sum(to_n * from_n, -1), c_n_ca_mean, c_n_ca_stddev, bonded * mask[..., 1:, _CA]),
    )
    means, losses, violations = zip(*judged, strict=True)
    before, after = _to_both_neighbours(0.5 * sum(losses[1:], losses[0]))
    violated_before, violated_after = _to_both_neighbours(violations[0] | violations[1] | violations[2])
    return BondViolations(*means, before + after, violated_before | violated_after)


def between_residue_clash_loss(
    atom14: Float[Tensor, "*B N 14 3"],
    mask: Shaped[Tensor, "*B N 14"],
    residue_index: Shaped[Tensor, "*B N"],
    aatype: Int[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
    overlap_tolerance: float = 1.5,
    chunk_size: int | None = None,
) -> ClashViolations:
    """Overlaps of van der Waals spheres of atoms in different residues (Suppl. 1.9.11, eq. 46).

    The peptide bond is none, nor is a disulfide bridge. As in AlphaFold, residues differ where their index does,
    also between chains, and the slot of cysteine's sulfur is excused with itself whatever the residue types.

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        residue_index: bonded residues differ by 1.
        aatype: residue types, 0 to 20.
        chain_id: equal where residues lie in one chain; there are no bonds between chains.
        overlap_tolerance: Å.
        chunk_size: residues at a time; memory is then linear in atoms × chunk_size, backward as well.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    _check_structure(atom14, mask, residue_index, aatype, chain_id)
    check_aatype(aatype, mask.bool().any(-1))
    dtype = at_least_float32(atom14.dtype)
    atom14, mask = atom14.to(dtype), mask.to(dtype)
    radius = lookup(residues.ATOM14_RADIUS, aatype, dtype)
    atoms = _flatten(atom14, -3)
    slot = torch.arange(14, device=atom14.device)
    c_to_n = (slot == _C)[:, None, None] & (slot == _N)
    n_to_c = (slot == _N)[:, None, None] & (slot == _C)
    disulfide = (slot == _SG)[:, None, None] & (slot == _SG)

    def of_residues(*rows: Tensor) -> tuple[Tensor, ...]:
        row_atom14, row_mask, row_radius, index, *chain = rows
        index = index[..., None]
        same_chain = chain[0][..., None] == chain_id if chain else True
        before, after = index + 1 == residue_index, residue_index + 1 == index
        bond = (before & same_chain)[..., None, :, None] & c_to_n | (after & same_chain)[..., None, :, None] & n_to_c
        apart = (index != residue_index)[..., None, :, None] & ~bond & ~disulfide
        weight = apart.to(dtype) * row_mask[..., None, None] * mask[..., None, :, :]
        distance = _distances(row_atom14, atoms).reshape(weight.shape)
        least = row_radius[..., None, None] + radius[..., None, :, :] - overlap_tolerance
        loss = torch.sum(weight * torch.relu(least - distance), (-1, -2))
        return loss, torch.sum(weight, (-1, -2)), torch.any((weight > 0) & (distance < least), (-1, -2))

    ranks = {-3: [atom14], -2: [mask, radius], -1: [residue_index] if chain_id is None else [residue_index, chain_id]}
    rows = [torch.movedim(x, axis, 0) for axis, arrays in ranks.items() for x in arrays]
    loss, weight, violation = (torch.movedim(x, 0, -2) for x in _by_rows(of_residues, rows, chunk_size))
    # Each pair of atoms was met twice, once from either side.
    mean = 0.5 * torch.sum(loss, (-1, -2)) / (1e-6 + 0.5 * torch.sum(weight, (-1, -2)))
    return ClashViolations(mean, loss, violation)


def within_residue_violations(
    atom14: Float[Tensor, "*B N 14 3"],
    mask: Shaped[Tensor, "*B N 14"],
    aatype: Int[Tensor, "*B N"],
    *,
    tolerance_factor: float = 12.0,
    overlap_tolerance: float = 1.5,
) -> WithinResidueViolations:
    """Distances between atoms of one residue against the literature's (Suppl. 1.9.11, eq. 46).

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        aatype: residue types, 0 to 20.
        tolerance_factor: standard deviations that are no violation, for atoms one or two bonds apart.
        overlap_tolerance: of van der Waals spheres, Å, for the others.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_structure(atom14, mask, aatype, aatype, None)
    check_aatype(aatype, mask.bool().any(-1))
    dtype = at_least_float32(atom14.dtype)
    atom14, mask = atom14.to(dtype), mask.to(dtype)
    lower, upper = (lookup(x, aatype, dtype) for x in _distance_bounds(tolerance_factor, overlap_tolerance))
    weight = mask[..., :, None] * mask[..., None, :] * (1 - torch.eye(14, dtype=dtype, device=atom14.device))
    distance = _distances(atom14, atom14)
    loss = weight * (torch.relu(lower - distance) + torch.relu(distance - upper))
    violation = (weight > 0) & ((distance < lower) | (distance > upper))
    return WithinResidueViolations(torch.sum(loss, -1) + torch.sum(loss, -2), torch.any(violation, -1))


def extreme_ca_ca_distance_violations(
    atom14: Float[Tensor, "*B N 14 3"],
    mask: Shaped[Tensor, "*B N 14"],
    residue_index: Shaped[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
    tolerance: float = 1.5,
) -> Float[Tensor, "*B"]:
    """The fraction of neighbours whose Cα lie farther apart than a trans peptide bond allows.

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        residue_index: residues next to each other are neighbours where it grows by 1.
        chain_id: equal where residues lie in one chain; there are no neighbours between chains.
        tolerance: Å.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_structure(atom14, mask, residue_index, residue_index, chain_id)
    dtype = at_least_float32(atom14.dtype)
    ca, mask = atom14[..., _CA, :].to(dtype), mask[..., _CA].to(dtype)
    distance = _norm(ca[..., 1:, :] - ca[..., :-1, :], 1e-6)
    violation = distance - residues.CA_CA_DISTANCE > tolerance
    weight = _follows(residue_index, chain_id).to(dtype) * mask[..., :-1] * mask[..., 1:]
    return _masked_mean(violation.to(dtype), weight, -1)


def find_structural_violations(
    atom14: Float[Tensor, "*B N 14 3"],
    mask: Shaped[Tensor, "*B N 14"],
    residue_index: Shaped[Tensor, "*B N"],
    aatype: Int[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
    tolerance_factor: float = 12.0,
    overlap_tolerance: float = 1.5,
    chunk_size: int | None = None,
) -> StructuralViolations:
    """Bonds, clashes and distances within residues together (Suppl. 1.9.11).

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists (of the prediction: where the residue type has it).
        residue_index: as in `between_residue_bond_loss`.
        aatype: residue types, 0 to 20.
        chain_id: equal where residues lie in one chain; None for a single one.
        tolerance_factor: standard deviations that are no violation.
        overlap_tolerance: of van der Waals spheres, Å.
        chunk_size: as in `between_residue_clash_loss`.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    bonds = between_residue_bond_loss(
        atom14, mask, residue_index, aatype, chain_id=chain_id, tolerance_factor=tolerance_factor
    )
    clashes = between_residue_clash_loss(
        atom14,
        mask,
        residue_index,
        aatype,
        chain_id=chain_id,
        overlap_tolerance=overlap_tolerance,
        chunk_size=chunk_size,
    )
    within = within_residue_violations(
        atom14, mask, aatype, tolerance_factor=tolerance_factor, overlap_tolerance=overlap_tolerance
    )
    of_atoms = torch.any(clashes.violation_per_atom | within.violation_per_atom, -1)
    return StructuralViolations(bonds, clashes, within, bonds.violation_per_residue | of_atoms)


def structural_violation_loss(violations: StructuralViolations, mask: Shaped[Tensor, "*B N 14"]) -> Float[Tensor, "*B"]:
    """The sum of the losses on bonds and angles and, per existing atom, of all others (Suppl. eq. 47).

    Args:
        violations: of the prediction.
        mask: 1 or True where an atom exists, as it was when they were found.
    """
    bonds, clashes, within, _ = violations
    of_atoms = torch.sum(clashes.loss_per_atom + within.loss_per_atom, (-1, -2))
    number = torch.sum(mask.to(of_atoms.dtype), (-1, -2))
    return bonds.c_n_loss + bonds.ca_c_n_loss + bonds.c_n_ca_loss + of_atoms / (1e-6 + number)


def violation_metrics(
    violations: StructuralViolations,
    atom14: Float[Tensor, "*B N 14 3"],
    atom14_mask: Shaped[Tensor, "*B N 14"],
    residue_index: Shaped[Tensor, "*B N"],
    mask: Shaped[Tensor, "*B N"],
    *,
    chain_id: Shaped[Tensor, "*B N"] | None = None,
) -> ViolationMetrics:
    """How much of a structure is violated.

    Args:
        violations: of the prediction.
        atom14: Å.
        atom14_mask: 1 or True where an atom exists.
        residue_index: as in `between_residue_bond_loss`.
        mask: 1 or True where a residue is valid.
        chain_id: equal where residues lie in one chain.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("mask", mask, atom14_mask.shape[:-1], "atom14_mask")
    dtype = at_least_float32(atom14.dtype)
    of_residues = (
        violations.bonds.violation_per_residue,
        torch.any(violations.clashes.violation_per_atom, -1),
        torch.any(violations.within_residues.violation_per_atom, -1),
        violations.per_residue,
    )
    return ViolationMetrics(
        extreme_ca_ca_distance_violations(atom14, atom14_mask, residue_index, chain_id=chain_id),
        *(_masked_mean(x.to(dtype), mask.to(dtype), -1) for x in of_residues),
    )


def lddt(
    predicted: Float[Tensor, "*B N 3"],
    true: Float[Tensor, "*B N 3"],
    mask: Shaped[Tensor, "*B N"],
    *,
    cutoff: float = 15.0,
    per_residue: bool = False,
) -> Float[Tensor, "*B"] | Float[Tensor, "*B N"]:
    """Local distance difference test of one point per residue, without its checks of stereochemistry; 0 to 1.

    A residue without neighbours, masked ones too, scores 1. There is no gradient.

    Args:
        predicted: Å, as a rule Cα.
        true: Å.
        mask: 1 or True where the true point is known.
        cutoff: Å, how far apart the true points of a pair may lie to count.
        per_residue: each residue's score instead of all pairs' together.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("predicted", predicted, (*mask.shape, 3), "mask")
    check_shape("true", true, (*mask.shape, 3), "mask")
    dtype = at_least_float32(predicted.dtype, true.dtype)
    predicted, true = (x.detach().to(dtype) for x in (predicted, true))
    mask = mask.to(dtype)
    true_distance = _distances(true, true)
    weight = (true_distance < cutoff).to(dtype) * mask[..., :, None] * mask[..., None, :]
    weight = weight * (1 - torch.eye(mask.shape[-1], dtype=dtype, device=true.device))
    error = torch.abs(true_distance - _distances(predicted, predicted))
    score = 0.25 * sum((error < limit).to(dtype) for limit in (0.5, 1.0, 2.0, 4.0))
    axes = (-1,) if per_residue else (-1, -2)
    # In AlphaFold's order: pLDDT's bins are so narrow that the last bit decides.
    return 1 / (1e-10 + torch.sum(weight, axes)) * (1e-10 + torch.sum(weight * score, axes))


def plddt_loss(
    logits: Float[Tensor, "*B N bins"],
    predicted_ca: Float[Tensor, "*B N 3"],
    true_ca: Float[Tensor, "*B N 3"],
    mask: Shaped[Tensor, "*B N"],
    *,
    resolution: Float[Tensor, "*B"] | None = None,
    min_resolution: float = 0.1,
    max_resolution: float = 3.0,
) -> Float[Tensor, "*B"]:
    """Cross entropy of the predicted against the actual Cα lDDT (Suppl. 1.9.6, eq. 40–41, and Alg. 29).

    Args:
        logits: of equal bins between 0 and 1; AlphaFold has 50.
        predicted_ca: Å.
        true_ca: Å.
        mask: 1 or True where the true Cα is known.
        resolution: of the experiment, Å; the loss is 0 out of the limits (NMR and distillation count as 0 Å).
        min_resolution: Å.
        max_resolution: Å.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    num_bin = logits.shape[-1]
    check_shape("logits", logits, (*mask.shape, num_bin), "mask")
    score = lddt(predicted_ca, true_ca, mask, per_residue=True)
    index = torch.clamp(torch.floor(score * num_bin).to(torch.int64), max=num_bin - 1)
    log_probability = torch.log_softmax(logits.to(at_least_float32(logits.dtype)), -1)
    error = -take(log_probability, index[..., None], -1)[..., 0]
    weight = mask.to(error.dtype)
    loss = torch.sum(weight * error, -1) / (torch.sum(weight, -1) + 1e-8)
    if resolution is None:
        return loss
    return torch.where((resolution >= min_resolution) & (resolution <= max_resolution), loss, 0)


def structure_module_loss(
    output: StructureModuleOutput,
    target: StructureTarget,
    *,
    use_clamped_fape: float | Float[Tensor, "*B"] = 1.0,
    sidechain_weight: float = 0.5,
    chi_weight: float = 0.5,
    angle_norm_weight: float = 0.01,
    violation_weight: float = 1.0,
    chunk_size: int | None = None,
) -> StructureModuleLoss:
    """All losses on the structure module, weighted as in AlphaFold (Suppl. eq. 7; without pLDDT).

    Args:
        output: of the structure module.
        target: the true structure, see `structure_target`, taken in the prediction's dtype; its ambiguous atoms are
            renamed here.
        use_clamped_fape: as in `backbone_loss`.
        sidechain_weight: of the side chains' FAPE, 1 minus it of the backbone's.
        chi_weight: of the torsions' error.
        angle_norm_weight: of their vectors' lengths.
        violation_weight: of structural violations; AlphaFold's is 0 in initial training and 1 in fine-tuning.
        chunk_size: frames or residues at a time, in every quadratic term.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    check_aatype(target.aatype, target.mask)
    atom14 = output.atom14[-1]
    target = target._replace(
        group_frames=target.group_frames.astype(atom14.dtype),
        atom14=target.atom14.to(atom14.dtype),
        chi=target.chi.to(atom14.dtype),
    )
    renamed = rename_ambiguous_atoms(atom14, target.atom14, target.atom14_mask, target.aatype, chunk_size=chunk_size)
    true_frames = rename_ambiguous_frames(
        target.group_frames, target.aatype, renamed.alternative_is_better, mask=target.mask
    )
    backbone, fape = backbone_loss(
        output.rigids,
        Rigid(target.group_frames.rotation[..., 0, :, :], target.group_frames.translation[..., 0, :]),
        target.group_mask[..., 0],
        use_clamped_fape=use_clamped_fape,
        chain_id=target.chain_id,
        chunk_size=chunk_size,
    )
    sidechain_fape = sidechain_loss(
        Rigid(output.frames.rotation[-1], output.frames.translation[-1]),
        true_frames,
        target.group_mask,
        atom14,
        renamed.atom14,
        renamed.mask,
        chunk_size=chunk_size,
    )
    chi = supervised_chi_loss(output.angles, target.chi, target.chi_mask, target.aatype)
    angle_norm = angle_norm_loss(output.unnormalized_angles, target.mask)
    exists = lookup(residues.ATOM14_MASK, target.aatype) & target.mask.to(torch.bool)[..., None]
    violations = find_structural_violations(
        atom14, exists, target.residue_index, target.aatype, chain_id=target.chain_id, chunk_size=chunk_size
    )
    violation = structural_violation_loss(violations, exists)
    loss = (
        (1 - sidechain_weight) * backbone
        + sidechain_weight * sidechain_fape
        + chi_weight * chi
        + angle_norm_weight * angle_norm
        + violation_weight * violation
    )
    return StructureModuleLoss(loss, backbone, fape, sidechain_fape, chi, angle_norm, violation)


def _collate(batch: Sequence[StructureTarget], *, collate_fn_map: Any = None) -> StructureTarget:
    """Targets of one length as a batch, where all have a chain_id or none has."""
    without_chains = [target.chain_id is None for target in batch]
    if any(without_chains) and not all(without_chains):
        raise ValueError(
            f"chain_id must be given in all targets of a batch or in none; {sum(without_chains)} of {len(batch)} have "
            "none: pass structure_target(…, chain_id=) equal numbers for a single chain"
        )
    fields = (
        None if each[0] is None else collate(each, collate_fn_map=collate_fn_map) for each in zip(*batch, strict=True)
    )
    return StructureTarget._make(fields)


# torch.utils.data.default_collate, and with it DataLoader, refuses None, which chain_id may be.
default_collate_fn_map[StructureTarget] = _collate


def _by_rows(
    function: Callable[..., tuple[Tensor, ...]], rows: Sequence[Tensor], chunk_size: int | None
) -> tuple[Tensor, ...]:
    """function(*rows), arrays with their rows first, on chunks of rows whose intermediates backward computes anew."""
    if chunk_size is None:
        return function(*rows)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for all at once; got {chunk_size}")
    if chunk_size >= len(rows[0]):
        return function(*rows)
    chunks = zip(*(x.split(chunk_size) for x in rows), strict=True)
    outputs = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def _local(
    rotation: Float[Tensor, "F *B 3 3"], translation: Float[Tensor, "F *B 3"], points: Float[Tensor, "*B P 3"]
) -> Float[Tensor, "F *B P 3"]:
    """Every point in every frame."""
    return Rigid(rotation[..., None, :, :], translation[..., None, :]).apply_inverse(points[None])


def _norm(vectors: Float[Tensor, "*B D"], epsilon: float) -> Float[Tensor, "*B"]:
    """√(|x|² + ε), whose gradient at zero is zero."""
    return torch.sqrt(torch.sum(vectors * vectors, -1) + epsilon)


def _distances(ones: Float[Tensor, "*B A 3"], others: Float[Tensor, "*B C 3"]) -> Float[Tensor, "*B A C"]:
    return _norm(ones[..., :, None, :] - others[..., None, :, :], 1e-10)


def _masked_mean(
    value: Float[Tensor, "*B *N"], weight: Float[Tensor, "*B *N"], axes: int | tuple[int, ...], *, repeats: int = 1
) -> Float[Tensor, "*B"]:
    """The mean of what was summed `repeats` times under the same weights."""
    return torch.sum(weight * value, axes) / (repeats * torch.sum(weight, axes) + 1e-10)


def _follows(residue_index: Shaped[Tensor, "*B N"], chain_id: Shaped[Tensor, "*B N"] | None) -> Bool[Tensor, "*B N-1"]:
    """Each residue but the first continues the one before."""
    follows = residue_index[..., 1:] == residue_index[..., :-1] + 1
    return follows if chain_id is None else follows & (chain_id[..., 1:] == chain_id[..., :-1])


def _to_both_neighbours(x: Shaped[Tensor, "*B N-1"]) -> tuple[Shaped[Tensor, "*B N"], Shaped[Tensor, "*B N"]]:
    """What lies between neighbours, at the one before and at the one after."""
    none = x.new_zeros((*x.shape[:-1], 1))
    return torch.cat([x, none], -1), torch.cat([none, x], -1)


def _over_layers(x: Shaped[Tensor, "*B"], layers: tuple[int, ...]) -> Shaped[Tensor, " L *B"]:
    return torch.broadcast_to(x, (*layers, *x.shape))


def _flatten(x: Shaped[Tensor, "*B N A *C"], axis: int) -> Shaped[Tensor, "*B N*A *C"]:
    """The axis, counted from the end, and the next one as one."""
    return x.flatten(axis, axis + 1)


def _distance_bounds(tolerance_factor: float, overlap_tolerance: float) -> tuple[Tensor, Tensor]:
    """`residues.atom14_distance_bounds`, in operations that `torch.compile` follows."""
    distance, stddev, pair, radius = (
        torch.from_numpy(table.copy())
        for table in (
            residues.ATOM14_DISTANCE,
            residues.ATOM14_DISTANCE_STDDEV,
            residues.ATOM14_PAIR_MASK,
            residues.ATOM14_PAIR_RADIUS,
        )
    )
    known, slack = distance > 0, tolerance_factor * stddev
    lower, upper = (radius - overlap_tolerance) * pair, 1e10 * pair
    return torch.where(known, distance - slack, lower), torch.where(known, distance + slack, upper)


def _check_structure(
    atom14: Tensor, mask: Tensor, residue_index: Tensor, aatype: Tensor, chain_id: Tensor | None
) -> None:
    check_shape("atom14", atom14, (*mask.shape, 3), "mask")
    check_shape("mask", mask, (*mask.shape[:-1], 14), "itself")
    check_shape("residue_index", residue_index, mask.shape[:-1], "mask")
    check_shape("aatype", aatype, mask.shape[:-1], "mask")
    if chain_id is not None:
        check_shape("chain_id", chain_id, mask.shape[:-1], "mask")
