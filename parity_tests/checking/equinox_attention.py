"""Invariant point attention in Equinox for one protein, with names of its own, and mistakes to plant in it."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

TABLE = {
    **{
        f"{theirs}.{leaf}": f"{ours}/{our_leaf}"
        for theirs, ours in {
            **{f"scalars.{x}": f"{x}_scalar_projection" for x in "qkv"},
            **{f"vectors.{x}": f"{x}_point_projection/point_projection" for x in "qkv"},
            "pair_bias": "attention_2d",
            "out": "output_projection",
        }.items()
        for leaf, our_leaf in (("weight", "weights.T"), ("bias", "bias"))
        if leaf == "weight" or not theirs.startswith("scalars")
    },
    "gamma": "trainable_point_weights",
}
"""Its names to ours."""


class EquinoxAttention(eqx.Module):
    scalars: dict[str, eqx.nn.Linear]
    vectors: dict[str, eqx.nn.Linear]
    pair_bias: eqx.nn.Linear
    gamma: jax.Array
    out: eqx.nn.Linear
    num_heads: int = eqx.field(static=True)
    mistake: str = eqx.field(static=True)

    def __init__(self, config, mistake="", *, key):
        keys = iter(jax.random.split(key, 8))
        heads, channels = config.num_head, config.num_channel
        widths = {"q": config.num_scalar_qk, "k": config.num_scalar_qk, "v": config.num_scalar_v}
        points = {"q": config.num_point_qk, "k": config.num_point_qk, "v": config.num_point_v}
        self.scalars = {
            x: eqx.nn.Linear(channels, heads * n, use_bias=False, key=next(keys)) for x, n in widths.items()
        }
        self.vectors = {x: eqx.nn.Linear(channels, heads * 3 * n, key=next(keys)) for x, n in points.items()}
        self.pair_bias = eqx.nn.Linear(config.pair_channel, heads, key=next(keys))
        features = heads * (config.num_scalar_v + 4 * config.num_point_v + config.pair_channel)
        self.out = eqx.nn.Linear(features, channels, key=next(keys))
        self.gamma = jnp.full(heads, 0.54)
        self.num_heads, self.mistake = heads, mistake

    def __call__(self, single, pair, rotation, translation, mask, *, key=None):
        n, h = len(single), self.num_heads
        scalars = {name: jax.vmap(layer)(single).reshape(n, h, -1) for name, layer in self.scalars.items()}
        points = {
            name: jnp.einsum("nxy,nhyp->nhpx", rotation, jax.vmap(layer)(single).reshape(n, h, 3, -1))
            + translation[:, None, None]
            for name, layer in self.vectors.items()
        }
        difference = points["q"][:, None] - points["k"][None]
        number = points["q"].shape[2]
        weight = self.gamma if self.mistake == "softplus" else jax.nn.softplus(self.gamma)
        logits = jnp.einsum("ihc,jhc->hij", scalars["q"], scalars["k"]) * lax.rsqrt(1.0 * scalars["q"].shape[-1])
        logits = logits + jax.vmap(jax.vmap(self.pair_bias))(pair).transpose(2, 0, 1)
        logits = logits - jnp.einsum("h,ijhpx->hij", weight, difference**2) / (18.0 * number) ** 0.5
        logits = logits / 3**0.5 if self.mistake != "thirds" else logits
        attention = jax.nn.softmax(jnp.where(mask[None, None, :], logits, -jnp.inf))

        gathered = jnp.einsum("hij,jhpx->ihpx", attention, points["v"]) - translation[:, None, None]
        axes = "nxy,nhpy->nhpx" if self.mistake == "back" else "nxy,nhpx->nhpy"
        local = jnp.einsum(axes, rotation, gathered)
        if self.mistake == "gradient":
            local = lax.stop_gradient(rotation[:, None]).swapaxes(-1, -2) @ gathered.swapaxes(-1, -2)
            local = local.swapaxes(-1, -2)
        features = [
            jnp.einsum("hij,jhc->ihc", attention, scalars["v"]),
            *jnp.moveaxis(local, -1, 0),
            jnp.sqrt(jnp.maximum((local**2).sum(-1), 1e-16)),
            jnp.einsum("hij,ijc->ihc", attention, pair),
        ]
        return jax.vmap(self.out)(jnp.concatenate([x.reshape(n, -1) for x in features], -1))
