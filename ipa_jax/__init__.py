"""Invariant point attention in JAX and Haiku; the twin of ipa_torch."""

from ipa_jax.attention import point_attention
from ipa_jax.invariant_point_attention import InvariantPointAttention, transform_ipa
from ipa_jax.layers import LayerNorm, Linear
from ipa_jax.rigid import Rigid

__all__ = ["InvariantPointAttention", "LayerNorm", "Linear", "Rigid", "point_attention", "transform_ipa"]
