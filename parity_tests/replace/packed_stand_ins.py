"""Layers with the parameters and calls of ABodyBuilder2 and FlashABB, written from their conventions in float torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from ipa_bridge.config import IPAConfig

torch = pytest.importorskip("torch")
import stand_ins
from torch import Tensor, nn
from torch.nn.functional import softplus


@dataclass
class Vector:
    x: Tensor
    y: Tensor
    z: Tensor


@dataclass
class Rot:
    xx: Tensor
    xy: Tensor
    xz: Tensor
    yx: Tensor
    yy: Tensor
    yz: Tensor
    zx: Tensor
    zy: Tensor
    zz: Tensor


@dataclass
class Rigid:
    """ABodyBuilder2's frames: one array for each coordinate."""

    origin: Vector
    rot: Rot


class ABodyBuilder2(nn.Module):
    """ABodyBuilder2's layer. Distances are not squared, and the input is added to the update."""

    dialect, power = "abodybuilder2", 0.5

    def __init__(self, c: IPAConfig) -> None:
        super().__init__()
        self.heads, width = c.num_head, c.num_head * c.num_scalar_qk
        self.point_weight = nn.Parameter(torch.zeros(c.num_head))
        self.to_scalar_qkv = nn.Linear(c.num_channel, 3 * width, bias=False)
        self.to_vector_qk = nn.Linear(c.num_channel, 6 * c.num_head * c.num_point_qk, bias=False)
        self.to_vector_v = nn.Linear(c.num_channel, 3 * c.num_head * c.num_point_v, bias=False)
        self.to_scalar_edge_attention_bias = nn.Linear(c.pair_channel, c.num_head, bias=False)
        self.final_linear = nn.Linear(c.num_feature, c.num_channel)

    def point_weights(self):
        return self.point_weight

    def forward(self, node_features, edge_features, rigid):
        if node_features.ndim != 2:
            raise RuntimeError("one chain without a batch axis was expected")
        n, h = len(node_features), self.heads
        rotation = torch.stack([*vars(rigid.rot).values()], -1).reshape(n, 3, 3)
        origin = torch.stack([*vars(rigid.origin).values()], -1)[:, None, None]
        q, k, v = (x.reshape(n, h, -1) for x in self.to_scalar_qkv(node_features).chunk(3, -1))
        vectors = [*self.to_vector_qk(node_features).chunk(2, -1), self.to_vector_v(node_features)]
        placed = [torch.einsum("nxy,nhpy->nhpx", rotation, x.reshape(n, h, -1, 3)) + origin for x in vectors]
        q_points, k_points, v_points = placed
        distances = ((q_points[:, None] - k_points) ** 2).sum(-1).add(1e-8).pow(self.power).sum(-1)
        logits = torch.einsum("ihd,jhd->ijh", q, k) * q.shape[-1] ** -0.5
        logits = logits + self.to_scalar_edge_attention_bias(edge_features)
        logits = logits - math.sqrt(2 / q_points.shape[2]) / 6 * self.point_weights() * distances
        weights = torch.softmax(3**-0.5 * logits, 1)
        points = torch.einsum("ijh,jhpx->ihpx", weights, v_points) - origin
        points = torch.einsum("nyx,nhpy->nhpx", rotation, points)
        lengths = ((points**2).sum(-1, keepdim=True) + 1e-8).sqrt()
        edges, scalars = torch.einsum("ijh,ijz->ihz", weights, edge_features), torch.einsum("ijh,jhd->ihd", weights, v)
        read = [edges, scalars, torch.cat([lengths, points], -1)]
        return node_features + self.final_linear(torch.cat([x.reshape(n, -1) for x in read], -1))


class Rotary(nn.Module):
    """A rotary embedding: residue n's channels 2i and 2i + 1, as a complex number, are turned by n · freqs[i]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10000.0 ** (-torch.arange(0, width, 2) / width), requires_grad=False)

    def forward(self, x):
        """Turns (B, N, H, C)."""
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * self.freqs
        cos, sin = angle.cos(), angle.sin()
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


class FlashABB(nn.Module):
    """FlashABB's layer. It reads residue indices instead of a pair, and its mask hides keys only."""

    dialect, modulus = "flashabb", 128

    def __init__(self, c: IPAConfig, *, eps: float = 1e-7) -> None:
        super().__init__()
        self.config_of_test, self.eps, self.inf, width = c, eps, 1e5, c.num_head * c.num_scalar_qk
        self.head_weights = nn.Parameter(torch.zeros(c.num_head))
        self.linear_q = nn.Linear(c.num_channel, width)
        self.linear_kv = nn.Linear(c.num_channel, 2 * width)
        self.linear_points = nn.Linear(c.num_channel, 3 * c.num_head * (2 * c.num_point_qk + c.num_point_v))
        self.rotary_emb = Rotary(c.num_scalar_qk)
        self.linear_out = nn.Linear(c.num_feature, c.num_channel)
        self.softmax, self.softplus = nn.Softmax(-1), nn.Softplus()

    def forward(
        self,
        s,
        res_idx,
        r: stand_ins.Rigid,
        mask,
        inplace_safe=False,
        _offload_inference=False,
        _z_reference_list=None,
    ):
        return self.run(s, res_idx, r, mask)[0]

    def run(self, s, res_idx, r, mask):
        c, (b, n, _) = self.config_of_test, s.shape
        rotation, translation = r.get_rots().get_rot_mats(), r.get_trans()[:, :, None, None]
        q = self.rotary_emb(self.linear_q(s).reshape(b, n, c.num_head, -1))
        k, v = self.linear_kv(s).reshape(b, n, c.num_head, -1).chunk(2, -1)
        points = torch.stack(self.linear_points(s).chunk(3, -1), -1).reshape(b, n, c.num_head, -1, 3)
        points = torch.einsum("bnxy,bnhpy->bnhpx", rotation.to(points.dtype), points) + translation
        q_points, k_points, v_points = points.split([c.num_point_qk, c.num_point_qk, c.num_point_v], -2)
        distances = ((q_points[:, :, None] - k_points[:, None]) ** 2).sum((-1, -2))
        logits = torch.einsum("bihd,bjhd->bijh", q, self.rotary_emb(k)) / math.sqrt(3 * c.num_scalar_qk)
        logits = logits - 0.5 * softplus(self.head_weights) * distances / math.sqrt(13.5 * c.num_point_qk)
        weights = torch.softmax(logits + self.inf * (mask - 1)[:, None, :, None].to(s.dtype), 2)
        read = [torch.einsum("bijh,bjhd->bihd", weights, v)]
        local = torch.einsum("bijh,bjhpx->bihpx", weights, v_points) - translation
        local = torch.einsum("bnyx,bnhpy->bnhpx", rotation.to(local.dtype), local)
        read += [*local.unbind(-1), ((local**2).sum(-1) + self.eps).sqrt()]
        if c.pair_channel is not None:
            apart = (res_idx[:, None, :] - res_idx[:, :, None]) % self.modulus
            known = nn.functional.one_hot(apart, c.pair_channel).to(s.dtype)
            read.append(torch.einsum("bijh,bijz->bihz", weights, known))
        out = self.linear_out(torch.cat([x.flatten(2) for x in read], -1).to(s.dtype))
        return out, weights.permute(0, 3, 1, 2)


class FlashABBWithWeights(FlashABB):
    """The layer of FlashABB's structure-aware encoder, which also returns the attention weights."""

    def forward(
        self,
        s,
        res_idx,
        r: stand_ins.Rigid,
        mask,
        inplace_safe=False,
        _offload_inference=False,
        _z_reference_list=None,
        return_attn_weights=False,
    ):
        indices = torch.arange(s.shape[1]).expand(s.shape[:2]) if res_idx is None else res_idx
        return self.run(s, indices, r, mask)
