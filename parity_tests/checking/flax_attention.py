"""Invariant point attention in Flax NNX, with OpenFold's names, and mistakes to plant in it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class Frames(NamedTuple):
    rotations: jax.Array
    origins: jax.Array

    def __matmul__(self, points):
        """Points (*B, N, …, 3) in the global frame."""
        n = self.origins.ndim
        shape = points.shape
        points = points.reshape(*shape[: n - 1], -1, 3)
        return (jnp.einsum("...ij,...pj->...pi", self.rotations, points) + self.origins[..., None, :]).reshape(shape)

    def inverse(self):
        rotations = self.rotations.swapaxes(-1, -2)
        return Frames(rotations, -jnp.einsum("...ij,...j->...i", rotations, self.origins))


class FlaxAttention(nnx.Module):
    def __init__(self, channels, pair_channels, *, heads=3, width=4, query_points=5, points=7, mistake="", rngs):
        self.heads, self.width, self.query_points, self.points = heads, width, query_points, points
        self.mistake = mistake
        linear = lambda i, o: nnx.Linear(i, o, rngs=rngs)  # noqa: E731
        self.linear_q = linear(channels, heads * width)
        self.linear_kv = linear(channels, heads * 2 * width)
        self.linear_q_points = linear(channels, heads * 3 * query_points)
        self.linear_kv_points = linear(channels, heads * 3 * (query_points + points))
        self.linear_b = linear(pair_channels, heads)
        self.head_weights = nnx.Param(jnp.full(heads, 0.5413))
        self.linear_out = linear(heads * (width + 4 * points + pair_channels), channels)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, s, z, frames: Frames, mask):
        if self.mistake == "rotations":
            frames = frames._replace(rotations=frames.rotations.swapaxes(-1, -2))
        leading = s.shape[:-1]
        q = self.linear_q(s).reshape(*leading, self.heads, self.width)
        kv = self.linear_kv(s).reshape(*leading, self.heads, 2 * self.width)
        k, v = jnp.split(kv, 2, -1)
        if self.mistake == "keys and values":
            k, v = v, k
        q_points = frames @ self._points(self.linear_q_points(s))
        k_points, v_points = jnp.split(frames @ self._points(self.linear_kv_points(s)), [self.query_points], -2)

        gamma = jax.nn.softplus(self.head_weights[...])
        distance = ((q_points[..., :, None, :, :, :] - k_points[..., None, :, :, :, :]) ** 2).sum((-1, -2))
        logits = jnp.einsum("...ihc,...jhc->...ijh", q, k) / self.width**0.5 + self.linear_b(z)
        logits -= 0.5 * gamma * (2 / (9 * self.query_points)) ** 0.5 * distance
        if self.mistake != "thirds":
            logits *= 3**-0.5
        logits = jnp.where(mask.astype(bool)[..., None, :, None], logits, -1e9)
        a = self.dropout(jax.nn.softmax(logits, axis=-2))

        o = jnp.einsum("...ijh,...jhc->...ihc", a, v)
        o_points = frames.inverse() @ jnp.einsum("...ijh,...jhpx->...ihpx", a, v_points)
        norms = jnp.sqrt((o_points**2).sum(-1) + 1e-8)
        o_pair = jnp.einsum("...ijh,...ijc->...ihc", a, z)
        parts = [o, o_points[..., 0], o_points[..., 1], o_points[..., 2], norms, o_pair]
        return self.linear_out(jnp.concatenate([x.reshape(*leading, -1) for x in parts], -1))

    def _points(self, x):
        """(*B, N, 3·H·P) as points (*B, N, H, P, 3)."""
        by_coordinate = jnp.split(x, 3, -1)
        return jnp.stack([y.reshape(*x.shape[:-1], self.heads, -1) for y in by_coordinate], -1)


class RowVectorAttention(nnx.Module):
    """One with the names of the package invariant-point-attention, whose frames act on row vectors."""

    def __init__(self, dim, pair_dim, *, heads=3, width=4, points=5, value_points=7, value_width=2, rngs):
        self.heads, self.points = heads, points
        for letter, n in {"q": width, "k": width, "v": value_width}.items():
            setattr(self, f"to_scalar_{letter}", nnx.LinearGeneral(dim, (heads, n), use_bias=False, rngs=rngs))
        for letter, n in {"q": points, "k": points, "v": value_points}.items():
            setattr(self, f"to_point_{letter}", nnx.LinearGeneral(dim, (heads, n, 3), use_bias=False, rngs=rngs))
        self.to_pairwise_attn_bias = nnx.List([nnx.Linear(pair_dim, heads, rngs=rngs)])
        self.point_weights = nnx.Param(jnp.ones(heads))
        self.to_out = nnx.Linear(heads * (value_width + 4 * value_points + pair_dim), dim, rngs=rngs)
        self.eps = 1e-6

    def __call__(self, single_repr, pairwise_repr, *, rotations, translations, mask):
        x, z = single_repr, pairwise_repr
        q, k, v = (getattr(self, f"to_scalar_{letter}")(x) for letter in "qkv")
        local = (getattr(self, f"to_point_{letter}")(x) for letter in "qkv")
        origins = translations[..., None, None, :]
        q_points, k_points, v_points = (y @ rotations[..., None, :, :] + origins for y in local)
        offset = q_points[..., :, None, :, :, :] - k_points[..., None, :, :, :, :]
        weights = jax.nn.softplus(self.point_weights[...]) / (18 * self.points) ** 0.5
        logits = jnp.einsum("...ihc,...jhc->...ijh", q, k) / q.shape[-1] ** 0.5
        logits = (logits + self.to_pairwise_attn_bias[0](z) - weights * (offset**2).sum((-1, -2))) / 3**0.5
        logits = jnp.where(mask[..., None, :, None] & mask[..., :, None, None], logits, -1e30)
        a = jax.nn.softmax(logits, -2)
        o_points = (jnp.einsum("...ijh,...jhpx->...ihpx", a, v_points) - origins) @ rotations.mT[..., None, :, :]
        parts = [
            jnp.einsum("...ijh,...jhc->...ihc", a, v),
            o_points,
            jnp.sqrt((o_points**2).sum(-1) + self.eps),
            jnp.einsum("...ijh,...ijc->...ihc", a, z),
        ]
        return self.to_out(jnp.concatenate([y.reshape(*x.shape[:-1], -1) for y in parts], -1))
