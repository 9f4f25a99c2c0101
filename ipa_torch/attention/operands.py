"""Operands of the implementations that work in blocks: scaled, with heads first, and points joined to values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Operands(NamedTuple):
    """Operands of all examples, with the batch axes flattened into one.

    Logits are queries·keys − ½ weights·|query_points − key_points|² + pair·bias, or have unsquared distances.
    """

    queries: Float[Tensor, "B H N C"]
    keys: Float[Tensor, "B H N C"]
    values: Float[Tensor, "B H N Cv"]
    query_points: Float[Tensor, "B H N 3P"]
    key_points: Float[Tensor, "B H N 3P"]
    weights: Float[Tensor, " H"]
    pair: Float[Tensor, "B N N c_z"] | None
    """May have another dtype than the other fields."""
    bias: Float[Tensor, "c_z H"] | None
    mask: Float[Tensor, "B N"] | None
    allowed: Float[Tensor, "B Q N"] | None = None
    """0 where a key mask or a pair mask hides a key from a query, else 1; see `ipa_torch.attention.masks`."""

    @classmethod
    def from_inputs(
        cls,
        q: Float[Tensor, "*B N H C"],
        k: Float[Tensor, "*B N H C"],
        v: Float[Tensor, "*B N H Cv"],
        q_points: Float[Tensor, "*B N H P 3"],
        k_points: Float[Tensor, "*B N H P 3"],
        v_points: Float[Tensor, "*B N H Pv 3"],
        pair: Float[Tensor, "*B N N c_z"] | None,
        pair_bias_weight: Float[Tensor, "c_z H"] | None,
        point_weights: Float[Tensor, " H"],
        mask: Float[Tensor, "*B N"] | None,
        allowed: Float[Tensor, "*B Q N"] | None,
        logit_terms: int,
    ) -> Operands:
        """Converts the arguments of `point_attention`."""
        *batch, number, _, _ = q.shape
        temperature = math.sqrt(1 / logit_terms)
        queries = _heads_first(q * (temperature / math.sqrt(q.shape[-1])))
        examples = queries.shape[0]
        return cls(
            queries=queries,
            keys=_heads_first(k),
            values=_heads_first(torch.cat([v, v_points.flatten(-2)], -1)),
            query_points=_heads_first(q_points.flatten(-2)),
            key_points=_heads_first(k_points.flatten(-2)),
            weights=point_weights * (temperature * math.sqrt(2 / (9 * q_points.shape[-2]))),
            pair=None if pair is None else pair.reshape(examples, *pair.shape[-3:]),
            bias=None if pair is None or pair_bias_weight is None else pair_bias_weight * temperature,
            mask=None if mask is None else mask.expand(*batch, number).reshape(examples, number),
            allowed=None if allowed is None else allowed.reshape(examples, *allowed.shape[-2:]),
        )

    def example(self, index: int) -> Operands:
        """The operands of one example, without a batch axis."""
        return Operands(
            queries=self.queries[index],
            keys=self.keys[index],
            values=self.values[index],
            query_points=self.query_points[index],
            key_points=self.key_points[index],
            weights=self.weights,
            pair=None if self.pair is None else self.pair[index],
            bias=self.bias,
            mask=None if self.mask is None else self.mask[index],
            allowed=None if self.allowed is None else self.allowed[index],
        )


def unpack(
    o: Float[Tensor, "B H N C"], v: Float[Tensor, "*B N H Cv"], v_points: Float[Tensor, "*B N H Pv 3"]
) -> tuple[Float[Tensor, "*B N H Cv"], Float[Tensor, "*B N H Pv 3"]]:
    """Splits an output into o and o_points, in the shapes of v and v_points."""
    o = o.transpose(1, 2).reshape(*v.shape[:-1], o.shape[-1])
    return o[..., : v.shape[-1]], o[..., v.shape[-1] :].unflatten(-1, v_points.shape[-2:])


def _heads_first(x: Float[Tensor, "*B N H D"]) -> Float[Tensor, "B H N D"]:
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]).transpose(1, 2).contiguous()
