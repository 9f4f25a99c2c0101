"""Bonds, clashes and distances within residues that chemistry does not allow (Jumper et al. 2021, Suppl. 1.9.11)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from ipa_bridge.checks import check_shape
from ipa_bridge.config import LossConfig
from ipa_bridge.proteins import residues
from ipa_bridge.proteins.residues import C_SLOT, CA_SLOT, N_SLOT, SG_SLOT
from ipa_bridge.tuples import by_name
from ipa_jax.dtypes import at_least_float32
from ipa_jax.losses.chunks import by_rows
from ipa_jax.losses.numerics import distances, masked_mean, merge_axes, norm
from ipa_jax.losses.target import Comparison
from ipa_jax.side_chains import check_aatype, lookup


@by_name
class BondViolations(NamedTuple):
    """Violations of peptide bonds.

    `c_n_loss` is the mean deviation of C–N lengths beyond the tolerance, in Å. `ca_c_n_loss` and `c_n_ca_loss` are
    those of the cosines of the angles CA–C–N and C–N–CA. The other two fields combine all three by residue.
    """

    c_n_loss: Float[Array, "*B"]
    ca_c_n_loss: Float[Array, "*B"]
    c_n_ca_loss: Float[Array, "*B"]
    loss_per_residue: Float[Array, "*B N"]
    violation_per_residue: Bool[Array, "*B N"]


@by_name
class ClashViolations(NamedTuple):
    """Overlaps between residues: their mean over pairs of atoms (Å), their sum by atom (Å), and which atoms overlap."""

    loss: Float[Array, "*B"]
    loss_per_atom: Float[Array, "*B N 14"]
    violation_per_atom: Bool[Array, "*B N 14"]


@by_name
class WithinResidueViolations(NamedTuple):
    """Distances within residues outside their bounds: their excess summed by atom (Å), and which atoms violate them."""

    loss_per_atom: Float[Array, "*B N 14"]
    violation_per_atom: Bool[Array, "*B N 14"]


@by_name
class StructuralViolations(NamedTuple):
    """All violations of a structure; `per_residue` is True for residues with any."""

    bonds: BondViolations
    clashes: ClashViolations
    within_residues: WithinResidueViolations
    per_residue: Bool[Array, "*B N"]


@by_name
class ViolationMetrics(NamedTuple):
    """Fraction of sequence neighbours with Cα too far apart, and fractions of residues with each kind of violation."""

    extreme_ca_ca_distance: Float[Array, "*B"]
    between_residue_bond: Float[Array, "*B"]
    between_residue_clash: Float[Array, "*B"]
    within_residue: Float[Array, "*B"]
    per_residue: Float[Array, "*B"]


def between_residue_bond_loss(
    atom14: Float[Array, "*B N 14 3"],
    mask: Shaped[Array, "*B N 14"],
    residue_index: Shaped[Array, "*B N"],
    aatype: Int[Array, "*B N"],
    *,
    chain_id: Shaped[Array, "*B N"] | None = None,
    tolerance_factor: float = LossConfig.tolerance_factor,
) -> BondViolations:
    """Violations of lengths and angles of the bonds between sequence neighbours (Suppl. 1.9.11, eq. 44–45).

    As in AlphaFold, `loss_per_residue` is not masked: it includes gaps and padding.

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        residue_index: consecutive residues are bonded where this increases by 1.
        aatype: residue types, 0 to 20; the bond to proline is longer.
        chain_id: equal numbers for residues of one chain; there are no bonds between chains.
        tolerance_factor: number of standard deviations allowed.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_structure(atom14, mask, residue_index, aatype, chain_id)
    check_aatype(aatype, mask.astype(bool).any(-1))
    dtype = at_least_float32(atom14.dtype)
    atom14, mask = atom14.astype(dtype), mask.astype(dtype)
    this_ca, this_c = (atom14[..., :-1, slot, :] for slot in (CA_SLOT, C_SLOT))
    next_n, next_ca = (atom14[..., 1:, slot, :] for slot in (N_SLOT, CA_SLOT))
    bonded = _follows(residue_index, chain_id).astype(dtype) * mask[..., :-1, C_SLOT] * mask[..., 1:, N_SLOT]
    c_n = norm(next_n - this_c, LossConfig.violation_epsilon)
    to_ca, to_n, from_n = (
        (this_ca - this_c) / norm(this_ca - this_c, LossConfig.violation_epsilon)[..., None],
        (next_n - this_c) / c_n[..., None],
        (next_ca - next_n) / norm(next_ca - next_n, LossConfig.violation_epsilon)[..., None],
    )
    to_proline = aatype[..., 1:] == residues.PROLINE_AATYPE
    length, length_stddev = (
        jnp.where(to_proline, jnp.asarray(proline, dtype), jnp.asarray(other, dtype))
        for other, proline in (residues.PEPTIDE_BOND_LENGTH[key] for key in ("mean", "stddev"))
    )
    (ca_c_n_mean, _), (c_n_ca_mean, c_n_ca_stddev) = (
        residues.PEPTIDE_BOND_COSINES[name] for name in ("CA-C-N", "C-N-CA")
    )
    ca_c_n_stddev = residues.TOLERATED_CA_C_N_STDDEV

    def judge(value: Array, mean: Array | float, stddev: Array | float, weight: Array) -> tuple[Array, Array, Array]:
        error = norm((value - mean)[..., None], LossConfig.violation_epsilon)
        tolerance = tolerance_factor * stddev
        loss = jax.nn.relu(error - tolerance)
        return (
            jnp.sum(weight * loss, -1) / (jnp.sum(weight, -1) + LossConfig.violation_epsilon),
            loss,
            (weight > 0) & (error > tolerance),
        )

    judged = (
        judge(c_n, length, length_stddev, bonded),
        judge(jnp.sum(to_ca * to_n, -1), ca_c_n_mean, ca_c_n_stddev, bonded * mask[..., :-1, CA_SLOT]),
        judge(-jnp.sum(to_n * from_n, -1), c_n_ca_mean, c_n_ca_stddev, bonded * mask[..., 1:, CA_SLOT]),
    )
    means, losses, violations = zip(*judged, strict=True)
    before, after = _to_both_neighbours(0.5 * sum(losses[1:], losses[0]))
    violated_before, violated_after = _to_both_neighbours(violations[0] | violations[1] | violations[2])
    return BondViolations(*means, before + after, violated_before | violated_after)


def between_residue_clash_loss(
    atom14: Float[Array, "*B N 14 3"],
    mask: Shaped[Array, "*B N 14"],
    residue_index: Shaped[Array, "*B N"],
    aatype: Int[Array, "*B N"],
    *,
    chain_id: Shaped[Array, "*B N"] | None = None,
    overlap_tolerance: float = LossConfig.overlap_tolerance,
    chunk_size: int | None = None,
) -> ClashViolations:
    """Overlaps of van der Waals spheres of atoms in different residues (Suppl. 1.9.11, eq. 46).

    Peptide bonds and disulfide bridges do not count. As in AlphaFold, residues with equal residue_index count as one
    residue, even in different chains. Two atoms in cysteine's slot for sulfur never clash, whatever the residue types.

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        residue_index: residues are bonded where this differs by 1.
        aatype: residue types, 0 to 20.
        chain_id: equal numbers for residues of one chain; there are no bonds between chains.
        overlap_tolerance: allowed overlap, Å.
        chunk_size: residues computed at a time; memory is then linear in atoms × chunk_size, also in backward. None for
            all at once.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    _check_structure(atom14, mask, residue_index, aatype, chain_id)
    check_aatype(aatype, mask.astype(bool).any(-1))
    dtype = at_least_float32(atom14.dtype)
    atom14, mask = atom14.astype(dtype), mask.astype(dtype)
    radius = lookup(residues.ATOM14_RADIUS, aatype, dtype)
    atoms = merge_axes(atom14, -3)
    slot = jnp.arange(14)
    c_to_n = (slot == C_SLOT)[:, None, None] & (slot == N_SLOT)
    n_to_c = (slot == N_SLOT)[:, None, None] & (slot == C_SLOT)
    disulfide = (slot == SG_SLOT)[:, None, None] & (slot == SG_SLOT)

    def of_residues(*rows: Array) -> tuple[Array, ...]:
        row_atom14, row_mask, row_radius, index, *chain = rows
        index = index[..., None]
        same_chain = chain[0][..., None] == chain_id if chain else True
        before, after = index + 1 == residue_index, residue_index + 1 == index
        bond = (before & same_chain)[..., None, :, None] & c_to_n | (after & same_chain)[..., None, :, None] & n_to_c
        apart = (index != residue_index)[..., None, :, None] & ~bond & ~disulfide
        weight = apart.astype(dtype) * row_mask[..., None, None] * mask[..., None, :, :]
        distance = distances(row_atom14, atoms).reshape(weight.shape)
        least = row_radius[..., None, None] + radius[..., None, :, :] - overlap_tolerance
        loss = jnp.sum(weight * jax.nn.relu(least - distance), (-1, -2))
        return loss, jnp.sum(weight, (-1, -2)), jnp.any((weight > 0) & (distance < least), (-1, -2))

    ranks = {-3: [atom14], -2: [mask, radius], -1: [residue_index] if chain_id is None else [residue_index, chain_id]}
    rows = [jnp.moveaxis(x, axis, 0) for axis, arrays in ranks.items() for x in arrays]
    loss, weight, violation = (jnp.moveaxis(x, 0, -2) for x in by_rows(of_residues, rows, chunk_size))
    # Each pair of atoms was counted twice, once for either atom.
    mean = 0.5 * jnp.sum(loss, (-1, -2)) / (LossConfig.violation_epsilon + 0.5 * jnp.sum(weight, (-1, -2)))
    return ClashViolations(mean, loss, violation)


def within_residue_violations(
    atom14: Float[Array, "*B N 14 3"],
    mask: Shaped[Array, "*B N 14"],
    aatype: Int[Array, "*B N"],
    *,
    tolerance_factor: float = LossConfig.tolerance_factor,
    overlap_tolerance: float = LossConfig.overlap_tolerance,
) -> WithinResidueViolations:
    """Distances between atoms of one residue outside the bounds from the literature (Suppl. 1.9.11, eq. 46).

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        aatype: residue types, 0 to 20.
        tolerance_factor: number of standard deviations allowed, for atoms one or two bonds apart.
        overlap_tolerance: allowed overlap of van der Waals spheres, Å, for the others.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_structure(atom14, mask, aatype, aatype, None)
    check_aatype(aatype, mask.astype(bool).any(-1))
    dtype = at_least_float32(atom14.dtype)
    atom14, mask = atom14.astype(dtype), mask.astype(dtype)
    bounds = residues.atom14_distance_bounds(
        bond_length_tolerance=tolerance_factor, overlap_tolerance=overlap_tolerance
    )
    lower, upper = (lookup(x, aatype, dtype) for x in bounds)
    weight = mask[..., :, None] * mask[..., None, :] * (1 - jnp.eye(14, dtype=dtype))
    distance = distances(atom14, atom14)
    loss = weight * (jax.nn.relu(lower - distance) + jax.nn.relu(distance - upper))
    violation = (weight > 0) & ((distance < lower) | (distance > upper))
    return WithinResidueViolations(jnp.sum(loss, -1) + jnp.sum(loss, -2), jnp.any(violation, -1))


def extreme_ca_ca_distance_violations(
    atom14: Float[Array, "*B N 14 3"],
    mask: Shaped[Array, "*B N 14"],
    residue_index: Shaped[Array, "*B N"],
    *,
    chain_id: Shaped[Array, "*B N"] | None = None,
    tolerance: float = LossConfig.ca_ca_tolerance,
) -> Float[Array, "*B"]:
    """Fraction of sequence neighbours whose Cα are farther apart than a trans peptide bond allows.

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists.
        residue_index: consecutive residues are neighbours where this increases by 1.
        chain_id: equal numbers for residues of one chain; there are no neighbours between chains.
        tolerance: Å.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_structure(atom14, mask, residue_index, residue_index, chain_id)
    dtype = at_least_float32(atom14.dtype)
    ca, mask = atom14[..., CA_SLOT, :].astype(dtype), mask[..., CA_SLOT].astype(dtype)
    distance = norm(ca[..., 1:, :] - ca[..., :-1, :], LossConfig.violation_epsilon)
    violation = distance - residues.CA_CA_DISTANCE > tolerance
    weight = _follows(residue_index, chain_id).astype(dtype) * mask[..., :-1] * mask[..., 1:]
    return masked_mean(violation.astype(dtype), weight, -1)


def find_structural_violations(
    atom14: Float[Array, "*B N 14 3"],
    mask: Shaped[Array, "*B N 14"],
    residue_index: Shaped[Array, "*B N"],
    aatype: Int[Array, "*B N"],
    *,
    chain_id: Shaped[Array, "*B N"] | None = None,
    tolerance_factor: float = LossConfig.tolerance_factor,
    overlap_tolerance: float = LossConfig.overlap_tolerance,
    chunk_size: int | None = None,
) -> StructuralViolations:
    """All violations: of bonds, by clashes, and of distances within residues (Suppl. 1.9.11).

    Args:
        atom14: Å.
        mask: 1 or True where an atom exists (in a prediction: where the residue type has it).
        residue_index: as in `between_residue_bond_loss`.
        aatype: residue types, 0 to 20.
        chain_id: equal numbers for residues of one chain; None for a single chain.
        tolerance_factor: number of standard deviations allowed.
        overlap_tolerance: allowed overlap of van der Waals spheres, Å.
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
    of_atoms = jnp.any(clashes.violation_per_atom | within.violation_per_atom, -1)
    return StructuralViolations(bonds, clashes, within, bonds.violation_per_residue | of_atoms)


def structural_violation_loss(violations: StructuralViolations, mask: Shaped[Array, "*B N 14"]) -> Float[Array, "*B"]:
    """Losses on bonds and angles, plus all other losses divided by the number of atoms (Suppl. eq. 47).

    Args:
        violations: violations of the prediction.
        mask: 1 or True where an atom exists; the mask with which the violations were found.
    """
    bonds, clashes, within, _ = violations
    of_atoms = jnp.sum(clashes.loss_per_atom + within.loss_per_atom, (-1, -2))
    number = jnp.sum(mask.astype(of_atoms.dtype), (-1, -2))
    return bonds.c_n_loss + bonds.ca_c_n_loss + bonds.c_n_ca_loss + of_atoms / (LossConfig.violation_epsilon + number)


def violation_metrics(
    violations: StructuralViolations,
    atom14: Float[Array, "*B N 14 3"],
    atom14_mask: Shaped[Array, "*B N 14"],
    residue_index: Shaped[Array, "*B N"],
    mask: Shaped[Array, "*B N"],
    *,
    chain_id: Shaped[Array, "*B N"] | None = None,
) -> ViolationMetrics:
    """Fractions of a structure that have violations.

    Args:
        violations: violations of the prediction.
        atom14: Å.
        atom14_mask: 1 or True where an atom exists.
        residue_index: as in `between_residue_bond_loss`.
        mask: 1 or True where a residue is valid.
        chain_id: equal numbers for residues of one chain.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shape("mask", mask, atom14_mask.shape[:-1], "atom14_mask")
    dtype = at_least_float32(atom14.dtype)
    of_residues = (
        violations.bonds.violation_per_residue,
        jnp.any(violations.clashes.violation_per_atom, -1),
        jnp.any(violations.within_residues.violation_per_atom, -1),
        violations.per_residue,
    )
    return ViolationMetrics(
        extreme_ca_ca_distance_violations(atom14, atom14_mask, residue_index, chain_id=chain_id),
        *(masked_mean(x.astype(dtype), mask.astype(dtype), -1) for x in of_residues),
    )


def violation_term(compared: Comparison) -> dict[str, Array]:
    """`structural_violation_loss` of the last layer."""
    output, target, _, chunk_size = compared
    exists = lookup(residues.ATOM14_MASK, target.aatype) & target.mask.astype(bool)[..., None]
    violations = find_structural_violations(
        output.atom14[-1],
        exists,
        target.residue_index,
        target.aatype,
        chain_id=target.chain_id,
        chunk_size=chunk_size,
    )
    return {"violation": structural_violation_loss(violations, exists)}


def _follows(residue_index: Shaped[Array, "*B N"], chain_id: Shaped[Array, "*B N"] | None) -> Bool[Array, "*B N-1"]:
    """True for each residue but the first that is bonded to the previous one."""
    follows = residue_index[..., 1:] == residue_index[..., :-1] + 1
    return follows if chain_id is None else follows & (chain_id[..., 1:] == chain_id[..., :-1])


def _to_both_neighbours(x: Shaped[Array, "*B N-1"]) -> tuple[Shaped[Array, "*B N"], Shaped[Array, "*B N"]]:
    """Assigns values of neighbouring pairs to the first and to the second residue of each pair."""
    none = jnp.zeros_like(x, shape=(*x.shape[:-1], 1))
    return jnp.concatenate([x, none], -1), jnp.concatenate([none, x], -1)


def _check_structure(atom14: Array, mask: Array, residue_index: Array, aatype: Array, chain_id: Array | None) -> None:
    check_shape("atom14", atom14, (*mask.shape, 3), "mask")
    check_shape("mask", mask, (*mask.shape[:-1], 14), "itself")
    check_shape("residue_index", residue_index, mask.shape[:-1], "mask")
    check_shape("aatype", aatype, mask.shape[:-1], "mask")
    if chain_id is not None:
        check_shape("chain_id", chain_id, mask.shape[:-1], "mask")
