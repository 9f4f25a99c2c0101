"""Rigid motions as rotation matrices and translations (Jumper et al. 2021, Suppl. 1.1 and 1.8)."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.fx._pytree import register_pytree_flatten_spec

from ipa_torch.layers import take

SMALLEST_LENGTH = 1e-8
"""Vectors shorter than this (in the coordinates' unit) have no direction; they are divided by it instead."""

# torch.export reads the fields of a named tuple as x[0], x[1], …, but an index of a Rigid selects frames. Iteration
# gives the fields of any named tuple.
register_pytree_flatten_spec(namedtuple, lambda x, _: list(x), lambda x, spec: len(x) == spec.num_children)  # type: ignore[arg-type]


class Rigid(NamedTuple):
    """Frames x_global = rotation · x_local + translation, column-vector convention.

    A pytree of two tensors: torch.compile, torch.export and torch.func pass through it. It unpacks into rotation and
    translation, but an index selects frames: `rigids[-1]` is the last frame, or all frames of the last layer. Nothing
    checks that `rotation` is orthogonal: any 3×3 matrix is accepted, and inverses use its transpose, as in AlphaFold.
    """

    rotation: Float[Tensor, "*B 3 3"]
    translation: Float[Tensor, "*B 3"]

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
    def identity(
        cls,
        shape: Sequence[int] = (),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Rigid:
        """Identity frames of the given batch shape."""
        rotation = torch.eye(3, dtype=dtype, device=device).expand(*shape, 3, 3)
        return cls(rotation, torch.zeros((*shape, 3), dtype=dtype, device=device))

    @classmethod
    def random(
        cls,
        shape: Sequence[int] = (),
        *,
        spread: float = 10.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Rigid:
        """Uniform random rotations; translations uniform in a cube of half-side `spread` about the origin."""
        quaternion = torch.randn((*shape, 4), generator=generator, dtype=dtype, device=device)
        unit = torch.rand((*shape, 3), generator=generator, dtype=dtype, device=device)
        return cls.from_quaternion(quaternion, spread * (2 * unit - 1))

    @classmethod
    def from_quaternion(cls, quaternion: Float[Tensor, "*B 4"], translation: Float[Tensor, "*B 3"]) -> Rigid:
        """Frames from quaternions (w, x, y, z) of any length; a zero quaternion gives the identity rotation."""
        w, x, y, z = normalise(quaternion).unbind(-1)
        rotation = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
        return cls(torch.stack([torch.stack(row, -1) for row in rotation], -2), translation)

    @classmethod
    def from_three_points(
        cls, x1: Float[Tensor, "*B 3"], x2: Float[Tensor, "*B 3"], x3: Float[Tensor, "*B 3"]
    ) -> Rigid:
        """Frames from three points by Gram–Schmidt (Suppl. Alg. 21, rigidFrom3Points); N, Cα, C for a backbone.

        The origin is x2, the x-axis points to x3, and x1 lies in the xy-plane with y > 0. Collinear points
        define no frame: the result is then finite but not a rotation.
        """
        e1 = normalise(x3 - x2)
        to_x1 = x1 - x2
        e2 = normalise(to_x1 - e1 * torch.sum(e1 * to_x1, -1, keepdim=True))
        e3 = torch.linalg.cross(e1, e2)
        return cls(torch.stack([e1, e2, e3], -1), x2)

    @classmethod
    def from_4x4(cls, matrix: Float[Tensor, "*B 4 4"]) -> Rigid:
        """Frames from homogeneous matrices; the last row is not read."""
        return cls(matrix[..., :3, :3], matrix[..., :3, 3])

    @classmethod
    def from_tensor_7(cls, tensor: Float[Tensor, "*B 7"]) -> Rigid:
        """Frames from (w, x, y, z, translation); the quaternion may have any length."""
        return cls.from_quaternion(tensor[..., :4], tensor[..., 4:])

    def to_quaternion(self) -> Float[Tensor, "*B 4"]:
        """Unit quaternions (w, x, y, z) with w ≥ 0.

        Each row of the symmetric matrix 4·q·qᵀ, whose entries are linear in the rotation's, is parallel to q;
        the row with the largest diagonal has length at least 2, so value and gradient are finite everywhere.
        """
        (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in self.rotation.unbind(-2))
        outer = [
            [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
        ]
        rows = torch.stack([torch.stack(row, -1) for row in outer], -2)
        largest = torch.argmax(torch.diagonal(rows, dim1=-2, dim2=-1), -1)
        row = take(rows, largest[..., None, None], -2)[..., 0, :]
        return normalise(torch.where(row[..., :1] < 0, -row, row))

    def to_4x4(self) -> Float[Tensor, "*B 4 4"]:
        """Homogeneous matrices [[R, t], [0, 1]]."""
        top = torch.cat([self.rotation, self.translation[..., None]], -1)
        bottom = top.new_tensor([0, 0, 0, 1]).expand(*top.shape[:-2], 1, 4)
        return torch.cat([top, bottom], -2)

    def to_tensor_7(self) -> Float[Tensor, "*B 7"]:
        """Unit quaternion (w, x, y, z) with w ≥ 0, then translation."""
        return torch.cat([self.to_quaternion(), self.translation], -1)

    def compose(self, other: Rigid) -> Rigid:
        """The motion that does `other` first, then `self`; batch shapes broadcast."""
        rotation = torch.sum(self.rotation[..., :, :, None] * other.rotation[..., None, :, :], -2)
        return Rigid(rotation, _rotate(self.rotation, other.translation) + self.translation)

    def invert(self) -> Rigid:
        """The inverse motion: Rᵀ, −Rᵀt."""
        inverse = self.rotation.transpose(-1, -2)
        return Rigid(inverse, -_rotate(inverse, self.translation))

    def apply(self, points: Float[Tensor, "*B *P 3"]) -> Float[Tensor, "*B *P 3"]:
        """Local points to the global frame: R·x + t.

        Axes of `points` beyond the frames' batch shape are several points per frame.

        Raises:
            ValueError: `points` has fewer axes than the frames, or its last axis is not 3 long.
        """
        frames = self._over(points)
        return _rotate(frames.rotation, points) + frames.translation

    def apply_inverse(self, points: Float[Tensor, "*B *P 3"]) -> Float[Tensor, "*B *P 3"]:
        """Global points to the local frame: Rᵀ·(x − t); axes and errors as in `apply`."""
        frames = self._over(points)
        return _rotate(frames.rotation.transpose(-1, -2), points - frames.translation)

    def scale_translation(self, factor: float | Float[Tensor, ""]) -> Rigid:
        """The same rotations with translations in another unit."""
        return Rigid(self.rotation, self.translation * factor)

    def stop_rotation_gradient(self) -> Rigid:
        """The same frames; no gradient passes through their rotations (as between layers in Suppl. Alg. 20)."""
        return Rigid(self.rotation.detach(), self.translation)

    def astype(self, dtype: torch.dtype) -> Rigid:
        """The same frames in another dtype."""
        return Rigid(self.rotation.to(dtype), self.translation.to(dtype))

    def to(self, device: torch.device | str | int) -> Rigid:
        """The same frames on another device."""
        return Rigid(self.rotation.to(device), self.translation.to(device))

    def _over(self, points: Tensor) -> Rigid:
        """These frames, with one batch axis of length 1 appended per axis of points within a frame."""
        batch = tuple(self.translation.shape[:-1])
        extra = points.ndim - 1 - len(batch)
        if points.shape[-1:] != (3,) or extra < 0:
            raise ValueError(
                f"points must be (*batch, …, 3) for frames of batch shape {batch}; got {tuple(points.shape)}. Put "
                f"the axes of points within a frame after the frames' own axes, or add axes of length 1 to broadcast"
            )
        shape = (*batch, *(1,) * extra)
        return Rigid(self.rotation.reshape(*shape, 3, 3), self.translation.reshape(*shape, 3))


def normalise(vectors: Float[Tensor, "*B D"], smallest_length: float = SMALLEST_LENGTH) -> Float[Tensor, "*B D"]:
    """Unit vectors in the same directions; vectors shorter than smallest_length are divided by it instead."""
    length2 = torch.sum(vectors * vectors, -1, keepdim=True)
    return vectors / torch.sqrt(torch.clamp(length2, min=smallest_length**2))


def _rotate(rotation: Float[Tensor, "*B 3 3"], vectors: Float[Tensor, "*B 3"]) -> Float[Tensor, "*B 3"]:
    """R·x by elementwise products, because matrix units may round coordinates to fewer bits than their dtype has.

    Products are added one by one: `torch.sum` over an axis of three takes twice as long.
    """
    x_axis, y_axis, z_axis = rotation.unbind(-1)
    x, y, z = vectors[..., None].unbind(-2)
    return x_axis * x + y_axis * y + z_axis * z
