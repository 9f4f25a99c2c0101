"""Renames ambiguous true atoms and frames to fit a prediction best (Jumper et al. 2021, Suppl. Alg. 26)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from ipa_bridge.checks import check_shape
from ipa_bridge.config import LossConfig
from ipa_bridge.proteins import residues
from ipa_bridge.tuples import by_name
from ipa_jax.dtypes import at_least_float32
from ipa_jax.losses.chunks import by_rows
from ipa_jax.losses.numerics import distances, merge_axes, norm
from ipa_jax.rigid import Rigid
from ipa_jax.side_chains import check_aatype, lookup


@by_name
class RenamedAtoms(NamedTuple):
    """A true structure with its ambiguous atoms named to fit a prediction better."""

    atom14: Float[Array, "*B N 14 3"]
    mask: Shaped[Array, "*B N 14"]
    alternative_is_better: Bool[Array, "*B N"]


def rename_ambiguous_atoms(
    predicted_atom14: Float[Array, "*B N 14 3"],
    true_atom14: Float[Array, "*B N 14 3"],
    mask: Shaped[Array, "*B N 14"],
    aatype: Int[Array, "*B N"],
    *,
    chunk_size: int | None = None,
) -> RenamedAtoms:
    """Names the true atoms so that distances to unambiguous atoms fit the prediction best (Suppl. Alg. 26).

    No gradient passes through the choice. Memory is 56·N² numbers, or 56·N·chunk_size.

    Args:
        predicted_atom14: Å.
        true_atom14: Å.
        mask: 1 or True where an atom of the true structure is known.
        aatype: residue types, 0 to 20.
        chunk_size: residues computed at a time; None for all at once.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    check_shape("predicted_atom14", predicted_atom14, (*mask.shape, 3), "mask")
    check_shape("true_atom14", true_atom14, (*mask.shape, 3), "mask")
    check_shape("aatype", aatype, mask.shape[:-1], "mask")
    check_aatype(aatype, mask.astype(bool).any(-1))
    dtype = at_least_float32(predicted_atom14.dtype, true_atom14.dtype)
    swap = lookup(residues.ATOM14_SWAP, aatype)
    other_atom14 = jnp.take_along_axis(true_atom14, swap[..., None], -2)
    other_mask = jnp.take_along_axis(mask, swap, -1)

    ambiguous = lookup(residues.ATOM14_IS_AMBIGUOUS, aatype, dtype)
    positions = [jax.lax.stop_gradient(x.astype(dtype)) for x in (predicted_atom14, true_atom14, other_atom14)]
    predicted, true = (merge_axes(x, -3) for x in positions[:2])
    known = mask.astype(dtype)
    weight = merge_axes(known * (1 - ambiguous), -2)
    slots = lookup(residues.ATOM14_AMBIGUOUS_SLOTS, aatype)

    def of_residues(*rows: Array) -> tuple[Array, ...]:
        predicted_row, true_row, other_row, row_weight = rows
        predicted_distance = distances(predicted_row, predicted)  # line 1
        pair_weight = row_weight[..., :, None] * weight[..., None, :]
        errors = (
            norm((predicted_distance - distances(row, true))[..., None], LossConfig.distance_epsilon)  # lines 2–4
            for row in (true_row, other_row)
        )
        return tuple(jnp.sum(pair_weight * error, (-1, -2)) for error in errors)

    rows = [jnp.moveaxis(jnp.take_along_axis(x, slots[..., None], -2), -3, 0) for x in positions]
    rows.append(jnp.moveaxis(jnp.take_along_axis(known * ambiguous, slots, -1), -2, 0))
    error, other_error = by_rows(of_residues, rows, chunk_size)
    better = jnp.moveaxis(other_error < error, 0, -1)
    return RenamedAtoms(
        jnp.where(better[..., None, None], other_atom14, true_atom14),  # lines 5–6
        jnp.where(better[..., None], other_mask, mask),
        better,
    )


def rename_ambiguous_frames(
    frames: Rigid,
    aatype: Int[Array, "*B N"],
    alternative_is_better: Bool[Array, "*B N"],
    *,
    mask: Shaped[Array, "*B N"] | None = None,
) -> Rigid:
    """True frames (*B, N, 8), with alternative names of their atoms where these are better (Suppl. Alg. 26 line 7).

    Where they are, the frame of the last χ is turned by π about its x-axis. Where the mask is 0, aatype may be any
    integer; None means a mask of ones.

    Raises:
        ValueError: residue types outside 0–20 where the mask is 1.
    """
    check_aatype(aatype, mask)
    turned = lookup(residues.GROUP_IS_AMBIGUOUS, aatype) & alternative_is_better.astype(bool)[..., None]
    half_turn = jnp.asarray([1, -1, -1], frames.rotation.dtype)
    return Rigid(jnp.where(turned[..., None, None], frames.rotation * half_turn, frames.rotation), frames.translation)
