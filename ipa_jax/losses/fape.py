"""The frame aligned point error, of backbones and of side chains (Jumper et al. 2021, Suppl. 1.9.2, Alg. 28)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from ipa_bridge.checks import check_shape
from ipa_bridge.config import LossConfig
from ipa_jax.dtypes import at_least_float32
from ipa_jax.losses.chunks import by_rows
from ipa_jax.losses.numerics import merge_axes, norm
from ipa_jax.losses.target import Comparison
from ipa_jax.rigid import Rigid


def frame_aligned_point_error(
    predicted_frames: Rigid,
    target_frames: Rigid,
    frames_mask: Shaped[Array, "*B F"],
    predicted_points: Float[Array, "*B P 3"],
    target_points: Float[Array, "*B P 3"],
    points_mask: Shaped[Array, "*B P"],
    *,
    length_scale: float = LossConfig.length_scale,
    clamp_distance: float | None = None,
    pair_mask: Shaped[Array, "*B F P"] | None = None,
    epsilon: float = LossConfig.fape_epsilon,
    chunk_size: int | None = None,
) -> Float[Array, "*B"]:
    """Mean error of points, in the local coordinates of every frame (Suppl. Alg. 28, computeFAPE).

    Args:
        predicted_frames: (*B, F), Å.
        target_frames: (*B, F), Å.
        frames_mask: 1 or True where a frame counts.
        predicted_points: global frame, Å.
        target_points: global frame, Å.
        points_mask: 1 or True where a point counts.
        length_scale: Å, the unit of the result.
        clamp_distance: Å; larger errors count as this much and pass no gradient. None for no clamp.
        pair_mask: 1 or True where a point counts in a frame.
        epsilon: added to squared distances in Å² and to the number of pairs.
        chunk_size: frames computed at a time; memory is then linear in points × chunk_size, also in backward. None for
            all at once.

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
    predicted_points, target_points, points_mask = (
        x.astype(dtype) for x in (predicted_points, target_points, points_mask)
    )

    def of_frames(*rows: Array) -> tuple[Array, ...]:
        predicted_rotation, predicted_translation, target_rotation, target_translation, weight, *pair = rows
        predicted = _local(predicted_rotation, predicted_translation, predicted_points)  # line 1
        target = _local(target_rotation, target_translation, target_points)  # line 2
        error = norm(predicted - target, epsilon)  # line 3
        if clamp_distance is not None:
            error = jnp.minimum(error, clamp_distance)
        weight = weight[..., None] * points_mask
        weight = weight * pair[0] if pair else weight
        return jnp.sum(weight * error, -1) / length_scale, jnp.sum(weight, -1)

    arrays = (*predicted_frames, *target_frames, frames_mask)
    rows = [jnp.moveaxis(x.astype(dtype), axis, 0) for x, axis in zip(arrays, (-3, -2, -3, -2, -1), strict=True)]
    if pair_mask is not None:
        rows.append(jnp.moveaxis(pair_mask.astype(dtype), -2, 0))
    error, weight = by_rows(of_frames, rows, chunk_size)
    return jnp.sum(error, 0) / (epsilon + jnp.sum(weight, 0))  # line 4


def backbone_loss(
    predicted_frames: Rigid,
    target_frames: Rigid,
    mask: Shaped[Array, "*B N"],
    *,
    use_clamped_fape: float | Float[Array, "*B"] = LossConfig.use_clamped_fape,
    clamp_distance: float = LossConfig.clamp_distance,
    length_scale: float = LossConfig.length_scale,
    chain_id: Shaped[Array, "*B N"] | None = None,
    interface_clamp_distance: float = LossConfig.interface_clamp_distance,
    interface_length_scale: float = LossConfig.interface_length_scale,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
    """FAPE of each layer's backbone frames and their Cα (Suppl. Alg. 20 line 17, and 1.11.5).

    With `chain_id`, the error within chains plus the error between chains, as in AlphaFold-Multimer. Its paper clamps
    the latter at 30 Å, its published configuration at 1000 Å.

    Args:
        predicted_frames: (L, *B, N), the trajectory, Å.
        target_frames: (*B, N), Å.
        mask: 1 or True where the target's backbone is known.
        use_clamped_fape: weight of the clamped error; the unclamped error's weight is 1 minus this. With chain_id, it
            applies within chains only.
        clamp_distance: Å.
        length_scale: Å, the unit of the result.
        chain_id: equal numbers for residues of one chain.
        interface_clamp_distance: Å, between chains.
        interface_length_scale: Å, the unit between chains.
        chunk_size: as in `frame_aligned_point_error`.

    Returns:
        The mean over layers, which is the loss, and the last layer's error.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    layers = predicted_frames.translation.shape[:1]
    target = Rigid(*(_over_layers(x, layers) for x in target_frames))
    weight = _over_layers(mask, layers)

    def fape(clamp: float | None, scale: float, pair_mask: Array | None) -> Array:
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
        clamped = jnp.asarray(use_clamped_fape, error.dtype)
        error = clamped * error + (1 - clamped) * fape(None, length_scale, same_chain)
    if same_chain is not None:
        error = error + fape(interface_clamp_distance, interface_length_scale, ~same_chain)
    return jnp.mean(error, 0), error[-1]


def sidechain_loss(
    predicted_frames: Rigid,
    target_frames: Rigid,
    frames_mask: Shaped[Array, "*B N 8"],
    predicted_atom14: Float[Array, "*B N 14 3"],
    target_atom14: Float[Array, "*B N 14 3"],
    atom14_mask: Shaped[Array, "*B N 14"],
    *,
    clamp_distance: float = LossConfig.clamp_distance,
    length_scale: float = LossConfig.length_scale,
    chunk_size: int | None = None,
) -> Float[Array, "*B"]:
    """FAPE of all atoms in all rigid groups of the last layer (Suppl. Alg. 20 line 28).

    Rename the target's ambiguous atoms and frames first, with `rename_ambiguous_atoms` and `rename_ambiguous_frames`.

    An unknown residue (aatype 20) with a known backbone counts with its backbone frame, as `torsion_angles_to_frames`
    returns it. AlphaFold differs: its frames of unknown residues have rotation matrices of zeros.

    Args:
        predicted_frames: (*B, N, 8), Å.
        target_frames: (*B, N, 8), Å.
        frames_mask: 1 or True where a frame of the target is known.
        predicted_atom14: Å.
        target_atom14: Å.
        atom14_mask: 1 or True where an atom of the target is known.
        clamp_distance: Å.
        length_scale: Å, the unit of the result.
        chunk_size: as in `frame_aligned_point_error`.

    Raises:
        ValueError: shapes that do not fit each other, or a chunk_size below 1.
    """
    predicted, target = (
        Rigid(merge_axes(rigid.rotation, -4), merge_axes(rigid.translation, -3))
        for rigid in (predicted_frames, target_frames)
    )
    return frame_aligned_point_error(
        predicted,
        target,
        merge_axes(frames_mask, -2),
        merge_axes(predicted_atom14, -3),
        merge_axes(target_atom14, -3),
        merge_axes(atom14_mask, -2),
        length_scale=length_scale,
        clamp_distance=clamp_distance,
        chunk_size=chunk_size,
    )


def backbone_term(compared: Comparison) -> dict[str, Array]:
    """`backbone_loss` of every layer's backbone, and the last layer's error."""
    output, target, use_clamped_fape, chunk_size = compared
    backbone, fape = backbone_loss(
        output.rigids,
        Rigid(target.group_frames.rotation[..., 0, :, :], target.group_frames.translation[..., 0, :]),
        target.group_mask[..., 0],
        use_clamped_fape=use_clamped_fape,
        chain_id=target.chain_id,
        chunk_size=chunk_size,
    )
    return {"backbone": backbone, "fape": fape}


def sidechain_term(compared: Comparison) -> dict[str, Array]:
    """`sidechain_loss` of the last layer."""
    output, target, _, chunk_size = compared
    sidechain_fape = sidechain_loss(
        Rigid(output.frames.rotation[-1], output.frames.translation[-1]),
        target.group_frames,
        target.group_mask,
        output.atom14[-1],
        target.atom14,
        target.atom14_mask,
        chunk_size=chunk_size,
    )
    return {"sidechain_fape": sidechain_fape}


def _local(
    rotation: Float[Array, "F *B 3 3"], translation: Float[Array, "F *B 3"], points: Float[Array, "*B P 3"]
) -> Float[Array, "F *B P 3"]:
    """Every point in the local coordinates of every frame."""
    return Rigid(rotation[..., None, :, :], translation[..., None, :]).apply_inverse(points[None])


def _over_layers(x: Shaped[Array, "*B"], layers: tuple[int, ...]) -> Shaped[Array, " L *B"]:
    return jnp.broadcast_to(x, (*layers, *x.shape))
