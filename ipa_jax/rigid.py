"""Rigid motions as rotation matrices and translations (Jumper et al. 2021, Suppl. 1.1 and 1.8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

SMALLEST_LENGTH = 1e-8
"""Vectors shorter than this (in the coordinates' unit) have no direction; they are divided by it instead."""


class Rigid(NamedTuple):
    """Frames x_global = rotation · x_local + translation, column-vector convention.

    A pytree of two arrays: jit, vmap, scan and grad pass through it. It unpacks into rotation and translation, but
    an index selects frames: `rigids[-1]` is the last frame, or all frames of the last layer. Nothing checks that
    `rotation` is orthogonal: any 3×3 matrix is accepted, and inverses use its transpose, as in AlphaFold.
    """

    rotation: Float[Array, "*B 3 3"]
    translation: Float[Array, "*B 3"]

    def __getitem__(self, index: Any) -> Rigid:  # type: ignore[override]
        """Selected frames; the index applies to the batch axes of both fields.

        Raises:
            IndexError: more indices than batch axes.
        """
        index = index if isinstance(index, tuple) else (index,)
        if not any(i is ... for i in index):
            index = (*index, ...)
        return Rigid(self.rotation[(*index, slice(None), slice(None))], self.translation[(*index, slice(None))])

    @classmethod
    def identity(cls, shape: Sequence[int] = (), *, dtype: DTypeLike = jnp.float32) -> Rigid:
        """Identity frames of the given batch shape."""
        rotation = jnp.broadcast_to(jnp.eye(3, dtype=dtype), (*shape, 3, 3))
        return cls(rotation, jnp.zeros((*shape, 3), dtype))

    @classmethod
    def random(
        cls, key: Array, shape: Sequence[int] = (), *, spread: float = 10.0, dtype: DTypeLike = jnp.float32
    ) -> Rigid:
        """Uniform random rotations; translations uniform in a cube of half-side `spread` about the origin."""
        rotation_key, translation_key = jax.random.split(key)
        quaternion = jax.random.normal(rotation_key, (*shape, 4), dtype)
        translation = jax.random.uniform(translation_key, (*shape, 3), dtype, -spread, spread)
        return cls.from_quaternion(quaternion, translation)

    @classmethod
    def from_quaternion(cls, quaternion: Float[Array, "*B 4"], translation: Float[Array, "*B 3"]) -> Rigid:
        """Frames from quaternions (w, x, y, z) of any length; a zero quaternion gives the identity rotation."""
        w, x, y, z = jnp.moveaxis(normalise(quaternion), -1, 0)
        rotation = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        return cls(jnp.stack([jnp.stack(row, -1) for row in rotation], -2), translation)

    @classmethod
    def from_three_points(cls, x1: Float[Array, "*B 3"], x2: Float[Array, "*B 3"], x3: Float[Array, "*B 3"]) -> Rigid:
        """Frames from three points by Gram–Schmidt (Suppl. Alg. 21, rigidFrom3Points); N, Cα, C for a backbone.

        The origin is x2, the x-axis points to x3, and x1 lies in the xy-plane with y > 0. Collinear points
        define no frame: the result is then finite but not a rotation.
        """
        e1 = normalise(x3 - x2)
        to_x1 = x1 - x2
        e2 = normalise(to_x1 - e1 * jnp.sum(e1 * to_x1, -1, keepdims=True))
        e3 = jnp.cross(e1, e2)
        return cls(jnp.stack([e1, e2, e3], -1), x2)

    @classmethod
    def from_4x4(cls, matrix: Float[Array, "*B 4 4"]) -> Rigid:
        """Frames from homogeneous matrices; the last row is not read."""
        return cls(matrix[..., :3, :3], matrix[..., :3, 3])

    @classmethod
    def from_tensor_7(cls, tensor: Float[Array, "*B 7"]) -> Rigid:
        """Frames from (w, x, y, z, translation); the quaternion may have any length."""
        return cls.from_quaternion(tensor[..., :4], tensor[..., 4:])

    def to_quaternion(self) -> Float[Array, "*B 4"]:
        """Unit quaternions (w, x, y, z) with w ≥ 0.

        Each row of the symmetric matrix 4·q·qᵀ, whose entries are linear in the rotation's, is parallel to q;
        the row with the largest diagonal has length at least 2, so value and gradient are finite everywhere.
        """
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (
            jnp.moveaxis(row, -1, 0) for row in jnp.moveaxis(self.rotation, -2, 0)
        )
        outer = [
            [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
        ]
        rows = jnp.stack([jnp.stack(row, -1) for row in outer], -2)
        largest = jnp.argmax(jnp.diagonal(rows, axis1=-2, axis2=-1), -1)
        row = jnp.take_along_axis(rows, largest[..., None, None], -2)[..., 0, :]
        return normalise(jnp.where(row[..., :1] < 0, -row, row))

    def to_4x4(self) -> Float[Array, "*B 4 4"]:
        """Homogeneous matrices [[R, t], [0, 1]]."""
        top = jnp.concatenate([self.rotation, self.translation[..., None]], -1)
        bottom = jnp.broadcast_to(jnp.array([0, 0, 0, 1], top.dtype), (*top.shape[:-2], 1, 4))
        return jnp.concatenate([top, bottom], -2)

    def to_tensor_7(self) -> Float[Array, "*B 7"]:
        """Unit quaternion (w, x, y, z) with w ≥ 0, then translation."""
        return jnp.concatenate([self.to_quaternion(), self.translation], -1)

    def compose(self, other: Rigid) -> Rigid:
        """The motion that does `other` first, then `self`; batch shapes broadcast."""
        rotation = jnp.sum(self.rotation[..., :, :, None] * other.rotation[..., None, :, :], -2)
        return Rigid(rotation, _rotate(self.rotation, other.translation) + self.translation)

    def invert(self) -> Rigid:
        """The inverse motion: Rᵀ, −Rᵀt."""
        inverse = jnp.swapaxes(self.rotation, -1, -2)
        return Rigid(inverse, -_rotate(inverse, self.translation))

    def apply(self, points: Float[Array, "*B *P 3"]) -> Float[Array, "*B *P 3"]:
        """Local points to the global frame: R·x + t.

        Axes of `points` beyond the frames' batch shape are several points per frame.

        Raises:
            ValueError: `points` has fewer axes than the frames, or its last axis is not 3 long.
        """
        frames = self._over(points)
        return _rotate(frames.rotation, points) + frames.translation

    def apply_inverse(self, points: Float[Array, "*B *P 3"]) -> Float[Array, "*B *P 3"]:
        """Global points to the local frame: Rᵀ·(x − t); axes and errors as in `apply`."""
        frames = self._over(points)
        return _rotate(jnp.swapaxes(frames.rotation, -1, -2), points - frames.translation)

    def scale_translation(self, factor: float | Float[Array, ""]) -> Rigid:
        """The same rotations with translations in another unit."""
        return Rigid(self.rotation, self.translation * factor)

    def stop_rotation_gradient(self) -> Rigid:
        """The same frames; no gradient passes through their rotations (as between layers in Suppl. Alg. 20)."""
        return Rigid(jax.lax.stop_gradient(self.rotation), self.translation)

    def astype(self, dtype: DTypeLike) -> Rigid:
        """The same frames in another dtype."""
        return Rigid(self.rotation.astype(dtype), self.translation.astype(dtype))

    def _over(self, points: Array) -> Rigid:
        """These frames, with one batch axis of length 1 appended per axis of points within a frame."""
        batch = self.translation.shape[:-1]
        extra = points.ndim - 1 - len(batch)
        if points.shape[-1:] != (3,) or extra < 0:
            raise ValueError(
                f"points must be (*batch, …, 3) for frames of batch shape {batch}; got {points.shape}. Put the "
                f"axes of points within a frame after the frames' own axes, or add axes of length 1 to broadcast"
            )
        shape = (*batch, *(1,) * extra)
        return Rigid(self.rotation.reshape(*shape, 3, 3), self.translation.reshape(*shape, 3))


def normalise(vectors: Float[Array, "*B D"], smallest_length: float = SMALLEST_LENGTH) -> Float[Array, "*B D"]:
    """Unit vectors in the same directions; vectors shorter than smallest_length are divided by it instead."""
    length2 = jnp.sum(vectors * vectors, -1, keepdims=True)
    return vectors / jnp.sqrt(jnp.maximum(length2, smallest_length**2))


def _rotate(rotation: Float[Array, "*B 3 3"], vectors: Float[Array, "*B 3"]) -> Float[Array, "*B 3"]:
    """R·x by elementwise products, because matrix units may round coordinates to fewer bits than their dtype has."""
    return jnp.sum(rotation * vectors[..., None, :], -1)
