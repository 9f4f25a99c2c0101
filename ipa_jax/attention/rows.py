"""Blocks of query rows: their rows of the pair, their logits and attention, and gradients summed over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from ipa_jax.attention.masks import HIDDEN, hides
from ipa_jax.attention.operands import Operands
from ipa_jax.numerics import safe_sqrt

BLOCK_BYTES = 4 << 20
"""Bytes of the pair in one block. All sizes from 2 to 8 MB are about as fast, since a block stays in cache."""

LANES = 8
"""Matrix products of XLA on CPU reach full speed if the last axis of their output is a multiple of this."""


class Blocks:
    """One example's operands as its blocks need them: arrays of keys are transposed once, with residues last."""

    def __init__(self, operands: Operands, distance_epsilon: float | None) -> None:
        self.operands = operands
        self.distance_epsilon = distance_epsilon
        self.keys, self.values = _turned(operands.keys), _turned(operands.values)
        self.key_points = _turned(operands.key_points)

    def rows(self, block_size: int) -> Array:
        """First rows of the blocks, all of block_size rows.

        If block_size does not divide N, the last block starts early enough to be whole, and is computed first.
        """
        number = self.operands.queries.shape[1]
        starts = list(range(0, number - block_size + 1, block_size))
        return jnp.asarray(([number - block_size] if number % block_size else []) + starts)

    def pair_rows(self, rows: Rows) -> Float[Array, "b N c_z"] | None:
        """These rows of the pair, in the dtype of the arithmetic."""
        pair = self.operands.pair
        return None if pair is None else rows.read(pair, 0).astype(self.operands.queries.dtype)

    def bias_logits(self, pair_rows: Float[Array, "b N c_z"] | None) -> Float[Array, "H b N"] | None:
        """The pair's part of the rows' logits."""
        bias = self.operands.bias
        if bias is None or pair_rows is None:
            return None
        heads = bias.shape[-1]
        padded = jnp.pad(bias.T, ((0, -heads % LANES), (0, 0)))
        padded = jnp.broadcast_to(padded, (pair_rows.shape[0], *padded.shape))
        return jnp.transpose(einsum("ihc,ijc->ijh", padded, pair_rows)[..., :heads], (2, 0, 1))

    def beside_bias(self, rows: Float[Array, "b H c_z"]) -> Float[Array, "b 2H c_z"]:
        """[W_bᵀ; rows] of each query, or rows alone without a bias."""
        if self.operands.bias is None:
            return rows
        return jnp.concatenate([jnp.broadcast_to(self.operands.bias.T, rows.shape), rows], 1)

    def logits(
        self, rows: Rows, bias_logits: Float[Array, "H b N"] | None
    ) -> tuple[Float[Array, "H b N"], Float[Array, "H b N"]]:
        """The rows' logits, and the sums of their distances, squared or not."""
        operands = self.operands
        logits = einsum("hic,hcj->hij", rows.read(operands.queries, 1), self.keys)
        distance = self.distances(rows)
        logits -= 0.5 * operands.weights[:, None, None] * distance
        if bias_logits is not None:
            logits += bias_logits
        valid = rows.read(operands.mask, 0)
        logits -= 1e5 * valid[:, None] * (1 - operands.mask)
        if operands.allowed is not None:
            allowed = operands.allowed if len(operands.allowed) == 1 else rows.read(operands.allowed, 0)
            logits = jnp.where(hides(allowed, valid, operands.mask), HIDDEN, logits)
        return logits, distance

    def distances(self, rows: Rows) -> Any:
        """Sums over points of the squared distances, or of the distances, (H, b, N)."""
        if self.distance_epsilon is None:
            return sum(offset * offset for offset in self.offsets(rows))
        return sum(length for _, length in self.points(rows))

    def attention(
        self, rows: Rows, bias_logits: Float[Array, "H b N"] | None
    ) -> tuple[Float[Array, "H b N"], Float[Array, "H b N"]]:
        """Softmax of the rows' logits, and sums over points of their distances."""
        logits, distance = self.logits(rows, bias_logits)
        return jax.nn.softmax(logits, -1), distance

    def points(self, rows: Rows) -> list[tuple[list[Float[Array, "H b N"]], Float[Array, "H b N"]]]:
        """Differences q − k of every point in x, y and z, and their length √(|q − k|² + ε)."""
        offsets = self.offsets(rows)
        points = [offsets[i : i + 3] for i in range(0, len(offsets), 3)]
        return [(xyz, safe_sqrt(_length2(*xyz) + (self.distance_epsilon or 0.0))) for xyz in points]

    def offsets(self, rows: Rows) -> list[Float[Array, "H b N"]]:
        """Differences q − k, one array per coordinate of each point."""
        points = rows.read(self.operands.query_points, 1)
        return [points[..., i, None] - self.key_points[:, i, None] for i in range(points.shape[-1])]


class Rows(NamedTuple):
    """A block of query rows."""

    start: Array
    size: int

    def read(self, x: Array, axis: int) -> Array:
        """These rows of an array."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def write(self, x: Array, rows: Array, axis: int) -> Array:
        """The array with these rows replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, rows, self.start, axis)

    def fresh(self, number: int, dtype: Any) -> Float[Array, " b"]:
        """0 for rows that a later block computes again, else 1 (see `Blocks.rows`)."""
        whole = number // self.size * self.size
        again = (self.start % self.size != 0) & (self.start + jnp.arange(self.size) < whole)
        return 1 - again.astype(dtype)


class RowGradients(NamedTuple):
    """Results for one block of rows, from which `gradients_by_rows` sums the gradients to all operands."""

    weight: Float[Array, "H b N"]
    d_logits: Float[Array, "H b N"]
    distance: Float[Array, "H b N"]
    d_o: Float[Array, "H b Cv"]
    d_pair: Float[Array, "N N c_z"] | None
    """Gradient to the pair from all rows up to and including these; None if it is not needed."""
    d_bias: Float[Array, "H c_z"] | None
    """Gradient to the bias from all rows up to and including these."""


def gradients_by_rows(
    blocks: Blocks, size: int, wanted: Any, block: Callable[[Rows, Operands], RowGradients]
) -> tuple[Operands]:
    """Gradients to all operands, computed in blocks of `size` rows. If `wanted` is None, that to the pair is zero."""
    operands = blocks.operands
    room = jax.tree.map(jnp.zeros_like, operands)
    # These sums over blocks have residues last, as the products that are added to them.
    room = room._replace(
        keys=_turned(room.keys),
        values=_turned(room.values),
        key_points=_turned(room.key_points),
        pair=None if wanted is None else room.pair,
        bias=None if operands.bias is None else room.bias.T,
    )

    def add(gradients: Operands, start: Array) -> tuple[Operands, None]:
        rows = Rows(start, size)
        weight, d_logits, distance, rows_d_o, d_pair, d_bias = block(rows, gradients)
        d_query_points, d_key_points = _point_gradients(blocks, rows, d_logits)
        return Operands(
            queries=rows.write(gradients.queries, einsum("hij,hjc->hic", d_logits, operands.keys), 1),
            keys=gradients.keys + einsum("hij,hic->hcj", d_logits, rows.read(operands.queries, 1)),
            values=gradients.values + einsum("hij,hic->hcj", weight, rows_d_o),
            query_points=rows.write(gradients.query_points, d_query_points, 1),
            key_points=gradients.key_points + d_key_points,
            weights=gradients.weights - 0.5 * jnp.sum(d_logits * distance, (1, 2)),
            pair=d_pair,
            bias=d_bias,
            mask=gradients.mask,
            allowed=gradients.allowed,
        ), None

    gradients = jax.lax.scan(add, room, blocks.rows(size))[0]
    return (
        gradients._replace(
            keys=_turned(gradients.keys),
            values=_turned(gradients.values),
            key_points=_turned(gradients.key_points),
            pair=None if operands.pair is None else jnp.zeros_like(operands.pair) if wanted is None else gradients.pair,
            bias=None if operands.bias is None else gradients.bias.T,
        ),
    )


def _point_gradients(
    blocks: Blocks, rows: Rows, d_logits: Float[Array, "H b N"]
) -> tuple[Float[Array, "H b 3P"], Float[Array, "H 3P N"]]:
    """Gradients to query points and key points, by ∂L/∂q = −w·(q − k), or −½ w·(q − k)/√(|q − k|² + ε)."""
    if blocks.distance_epsilon is None:
        moved = [d_logits * offset for offset in blocks.offsets(rows)]
    else:
        moved = []
        for offsets, length in blocks.points(rows):
            pull = jnp.where(length > 0, 0.5 * d_logits / jnp.where(length > 0, length, 1.0), 0.0)
            moved += [pull * offset for offset in offsets]
    weights = blocks.operands.weights[:, None, None]
    d_queries = jnp.stack([jnp.sum(x, -1) for x in moved], -1)
    d_keys = jnp.stack([jnp.sum(x, -2) for x in moved], -2)
    return -weights * d_queries, weights * d_keys


def einsum(subscripts: str, *arrays: Array) -> Array:
    """`jnp.einsum` in full precision, whatever JAX's default is."""
    return jnp.einsum(subscripts, *arrays, precision=Precision.HIGHEST)


def _length2(x: Array, y: Array, z: Array) -> Array:
    return x * x + y * y + z * z


def _turned(x: Float[Array, "H N D"]) -> Float[Array, "H D N"]:
    """The array with the residues last."""
    return jnp.swapaxes(x, -1, -2)
