"""Layers with the names and calls of BioEmu, DiG and OmegaFold, written for these tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

from ipa_bridge.config import IPAConfig

torch = pytest.importorskip("torch")
from torch import nn

import ipa_torch


class BioEmu(nn.Module):
    """BioEmu's and DiG's layer; like theirs, it averages points in float32 unless `exact`."""

    dialect = "bioemu"

    def __init__(self, config: IPAConfig, *, dropout: float = 0.1, exact: bool = True) -> None:
        super().__init__()
        width, self.heads, self.exact = config.num_channel, config.num_head, exact
        for name in ("query", "key", "value"):
            self.add_module(f"scalar_{name}", nn.Linear(width, width, bias=False))
            points = 8 if name == "value" else 4
            self.add_module(f"point_{name}", nn.Linear(width, self.heads * points * 3, bias=False))
        self.pair_bias = nn.Linear(config.pair_channel, self.heads, bias=False)
        self.pair_value = nn.Linear(config.pair_channel, width, bias=False)
        self.trained_point_weight = nn.Parameter(torch.rand(self.heads))
        self.fc_out = nn.Linear(2 * width + self.heads * 32, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x1d, x2d, pose, bias):
        translation, rotation = pose[0], pose[1].mT
        heads = lambda x: x.unflatten(-1, (self.heads, -1))  # noqa: E731
        q, k, v = (heads(to(x1d)) for to in (self.scalar_query, self.scalar_key, self.scalar_value))
        q_points, k_points, v_points = (
            torch.einsum("bixy,bihpy->bihpx", rotation, to(x1d).unflatten(-1, (self.heads, -1, 3)))
            + translation[:, :, None, None]
            for to in (self.point_query, self.point_key, self.point_value)
        )
        logits = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(3 * q.shape[-1])
        logits = logits + self.pair_bias(x2d).movedim(-1, 1) / math.sqrt(3)
        logits = logits + self.nearness(q_points[:, :, None] - k_points[:, None]).movedim(-1, 1) + bias
        a = self.weights(logits)
        single = a if self.exact else a.float()
        o_points = torch.einsum("bhij,bjhpx->bihpx", single, v_points.to(single.dtype)) - translation[:, :, None, None]
        o_points = torch.einsum("biyx,bihpy->bihpx", rotation, o_points)
        o_pair = torch.einsum("bhij,bijhc->bihc", a, heads(self.pair_value(x2d)))
        parts = [torch.einsum("bhij,bjhc->bihc", a, v), o_points, o_pair, o_points.norm(dim=-1)]
        return self.out(torch.cat([x.flatten(2) for x in parts], -1))

    def nearness(self, apart):
        weights = nn.functional.softplus(self.trained_point_weight) / math.sqrt(3 * 4 * 4.5)
        return -weights / 2 * apart.norm(dim=-1).sum(-1)

    def weights(self, logits):
        return logits.softmax(-1)

    def out(self, features):
        return self.dropout(self.fc_out(features))


class OmegaFold(nn.Module):
    """OmegaFold's layer, whose softmax writes in place: it raises where gradients are asked for unless `smooth`."""

    dialect = "omegafold"

    def __init__(self, config: IPAConfig, *, smooth: bool = False) -> None:
        super().__init__()
        self.config, self.smooth, h = config, smooth, config.num_head
        scalars, points = (
            {"q": qk, "k": qk, "v": v}
            for qk, v in (
                (config.num_scalar_qk, config.num_scalar_v),
                (3 * config.num_point_qk, 3 * config.num_point_v),
            )
        )
        for x in "qkv":
            self.add_module(f"{x}_scalar", nn.Linear(config.num_channel, h * scalars[x]))
            self.add_module(f"{x}_point", nn.Linear(config.num_channel, h * points[x]))
        self.trainable_point_weights = nn.Parameter(torch.rand(h))
        self.bias_2d = nn.Linear(config.pair_channel, h)
        self.output_projection = nn.Linear(config.num_feature, config.num_channel)
        self.softplus = nn.Softplus()

    def forward(self, node_repr, edge_repr, frames):
        c = self.config
        heads = lambda x: x.unflatten(-1, (c.num_head, -1))  # noqa: E731
        q, k, v = (heads(to(node_repr)) for to in (self.q_scalar, self.k_scalar, self.v_scalar))
        q_points, k_points, v_points = (
            frames.transform(to(node_repr).unflatten(-1, (c.num_head, -1, 3)))
            for to in (self.q_point, self.k_point, self.v_point)
        )
        apart = (q_points[:, None] - k_points[None]).square().sum((-1, -2))
        weights = self.softplus(self.trainable_point_weights) / math.sqrt(4.5 * c.num_point_qk) / 2
        logits = torch.einsum("ihc,jhc->ijh", q, k) / math.sqrt(c.num_scalar_qk) + self.bias_2d(edge_repr)
        logits = (logits - weights * apart) / math.sqrt(3) + 1e9 * (frames.mask.to(logits.dtype) - 1)[None, :, None]
        if self.smooth:
            a = logits.softmax(1)
        else:
            torch.sub(logits, logits.amax(1, keepdim=True), out=logits)
            a = logits.exp_().div_(logits.sum(1, keepdim=True))
        o_points = frames.position_in_frame(torch.einsum("ijh,jhpx->ihpx", a, v_points))
        o_pair = torch.einsum("ijh,ijc->ihc", a, edge_repr)
        parts = [torch.einsum("ijh,jhc->ihc", a, v), o_points, o_points.norm(dim=-1), o_pair]
        return self.output_projection(torch.cat([x.flatten(1) for x in parts], -1))


class Frames(NamedTuple):
    """OmegaFold's frames; it keeps masked ones at the identity."""

    rotation: torch.Tensor
    translation: torch.Tensor
    mask: torch.Tensor

    def transform(self, x):
        return ipa_torch.Rigid(self.rotation, self.translation).apply(x)

    def position_in_frame(self, x):
        return ipa_torch.Rigid(self.rotation, self.translation).apply_inverse(x)
