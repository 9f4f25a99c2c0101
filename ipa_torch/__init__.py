"""Invariant point attention in PyTorch; the twin of ipa_jax."""

from ipa_torch.attention import point_attention
from ipa_torch.invariant_point_attention import InvariantPointAttention
from ipa_torch.layers import LayerNorm, Linear
from ipa_torch.rigid import Rigid

__all__ = ["InvariantPointAttention", "LayerNorm", "Linear", "Rigid", "point_attention"]
