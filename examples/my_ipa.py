"""Invariant point attention as people write it for themselves, in plain PyTorch; docs/check.md breaks it on purpose.

ipa-parity check examples/my_ipa.py:MyIPA --preset alphafold2
"""

import math

import torch
from torch import nn


class MyIPA(nn.Module):
    """Algorithm 22 with the names of OpenFold 1. It takes frames as rotations and translations."""

    def __init__(self, c_s=384, c_z=128, c_hidden=16, no_heads=12, no_qk_points=4, no_v_points=8):
        super().__init__()
        self.c, self.h, self.p, self.pv = c_hidden, no_heads, no_qk_points, no_v_points
        self.linear_q = nn.Linear(c_s, no_heads * c_hidden)
        self.linear_kv = nn.Linear(c_s, 2 * no_heads * c_hidden)
        self.linear_q_points = nn.Linear(c_s, 3 * no_heads * no_qk_points)
        self.linear_kv_points = nn.Linear(c_s, 3 * no_heads * (no_qk_points + no_v_points))
        self.linear_b = nn.Linear(c_z, no_heads)
        self.head_weights = nn.Parameter(torch.full((no_heads,), math.log(math.e - 1)))
        self.linear_out = nn.Linear(no_heads * (c_hidden + 4 * no_v_points + c_z), c_s)

    def forward(self, s, z, rotation, translation, mask):
        """The update of s (N, c_s), from z (N, N, c_z), frames in units of 10 Å, and a mask with 1 for residues."""
        q = self.linear_q(s).unflatten(-1, (self.h, self.c))
        k, v = self.linear_kv(s).unflatten(-1, (self.h, 2 * self.c)).split(self.c, -1)
        q_points = self.points(self.linear_q_points(s), rotation, translation)
        kv_points = self.points(self.linear_kv_points(s), rotation, translation)
        k_points, v_points = kv_points.split([self.p, self.pv], -2)

        logits = torch.einsum("...ihc,...jhc->...hij", q, k)
        logits = logits * math.sqrt(1 / (3 * self.c))
        logits = logits + math.sqrt(1 / 3) * self.linear_b(z).movedim(-1, -3)
        offset = q_points.unsqueeze(-4) - k_points.unsqueeze(-5)
        distance = offset.square().sum(-1)
        distance = distance.sum(-1).movedim(-1, -3)
        weight = nn.functional.softplus(self.head_weights)[:, None, None]
        weight = weight * math.sqrt(1 / 3) * math.sqrt(2 / (9 * self.p))
        logits = logits - 0.5 * weight * distance
        logits = logits + 1e5 * (mask[..., None, None, :] - 1)
        a = logits.softmax(-1)

        o = torch.einsum("...hij,...jhc->...ihc", a, v)
        o_points = torch.einsum("...hij,...jhpx->...ihpx", a, v_points)
        o_points = o_points - translation[..., None, None, :]
        o_points = torch.einsum("...iyx,...ihpy->...ihpx", rotation, o_points)
        norms = o_points.square().sum(-1)
        norms = (norms + 1e-8).sqrt()
        o_pair = torch.einsum("...hij,...ijc->...ihc", a, z)
        x, y, z = o_points.unbind(-1)
        return self.linear_out(torch.cat([f.flatten(-2) for f in (o, x, y, z, norms, o_pair)], -1))

    def points(self, x, rotation, translation):
        """Points (N, H, P, 3) in the global frame."""
        local = x.unflatten(-1, (3, self.h, -1)).movedim(-3, -1)
        return torch.einsum("...ixy,...ihpy->...ihpx", rotation, local) + translation[..., None, None, :]
