"""Layers in plain PyTorch with the names, calls, rigids and masks of OpenFold's kin, to replace."""

from __future__ import annotations

import math

import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.dialects import find_dialect

torch = pytest.importorskip("torch")
from torch import nn


class T:
    """Rigids as in Genie: two tensors."""

    def __init__(self, rots, trans):
        self.rots, self.trans = rots, trans

    def apply(self, points):
        """Moves points (*B, N, P, 3)."""
        return torch.einsum("...nxy,...npy->...npx", self.rots, points) + self.trans[..., None, :]

    def invert_apply(self, points):
        """Moves points back."""
        return torch.einsum("...nyx,...npy->...npx", self.rots, points - self.trans[..., None, :])


class Turn:
    """Rotations as in Uni-Fold: an object around the matrices."""

    def __init__(self, mat):
        self.mat = mat

    @property
    def rot_mat(self):
        return self.mat


class Frame(T):
    """Rigids as in Uni-Fold."""

    def __init__(self, rotation, translation):
        super().__init__(rotation.rot_mat, translation)
        self._rotation = rotation

    def get_rots(self):
        return self._rotation

    def get_trans(self):
        return self.trans


Rotation = Turn


class Plain(nn.Module):
    """Suppl. Alg. 22 line by line, with numbers to add to the logits instead of a mask."""

    dialect = "openfold_v1"
    epsilon: float | None = None
    """A constant instead of the attribute `eps`."""

    def __init__(self, config: IPAConfig) -> None:
        super().__init__()
        self.inf, self.c = 1e5, config
        if self.epsilon is None:
            self.eps = config.norm_epsilon
        names = find_dialect(self.dialect).names(config)
        theirs = {name for name, _ in names.values()}
        for name, transform in names.values():
            layer, _, leaf = name.partition(".")
            if leaf == "weight":
                self.add_module(layer, nn.Linear(*transform.their_shape[::-1], bias=f"{layer}.bias" in theirs))
        self.head_weights = nn.Parameter(torch.zeros(config.num_head))

    def points(self, layer, s):
        """Local points (*B, N, H, P, 3)."""
        x = layer(s)
        if self.c.layout == "multimer":
            return x.unflatten(-1, (self.c.num_head, 3, -1)).transpose(-1, -2)
        return torch.stack(x.chunk(3, -1), -1).unflatten(-2, (self.c.num_head, -1))

    def attend(self, s, z, frames, added):
        c, h = self.c, self.c.num_head
        if c.layout == "multimer":
            q, k, v = (layer(s).unflatten(-1, (h, -1)) for layer in (self.linear_q, self.linear_k, self.linear_v))
            layers = (self.linear_q_points, self.linear_k_points, self.linear_v_points)
            local = [self.points(layer, s) for layer in layers]
        else:
            q, kv = (layer(s).unflatten(-1, (h, -1)) for layer in (self.linear_q, self.linear_kv))
            k, v = kv.split([c.num_scalar_qk, c.num_scalar_v], -1)
            points = self.points(self.linear_kv_points, s)
            local = [self.points(self.linear_q_points, s), *points.split([c.num_point_qk, c.num_point_v], -2)]
        q, k, v, *local = (x.to(frames.trans.dtype) for x in (q, k, v, *local))
        q_points, k_points, v_points = (frames.apply(x.flatten(-3, -2)).unflatten(-2, (h, -1)) for x in local)
        apart = q_points[..., :, None, :, :, :] - k_points[..., None, :, :, :, :]
        squares = self.squares(apart).sum((-1, -2))
        weights = nn.functional.softplus(self.head_weights) * math.sqrt(1 / (13.5 * c.num_point_qk))
        logits = torch.einsum("...ihc,...jhc->...hij", q, k) / math.sqrt(3 * c.num_scalar_qk)
        logits = logits - 0.5 * torch.einsum("...ijh,h->...hij", squares, weights)
        if z is not None:
            logits = logits + self.linear_b(z).to(q).movedim(-1, -3) / math.sqrt(3)
        a = torch.softmax(logits + added, -1)
        o = torch.einsum("...hij,...jhc->...ihc", a, v).flatten(-2)
        o_points = torch.einsum("...hij,...jhpx->...ihpx", a, v_points)
        o_points = frames.invert_apply(o_points.flatten(-3, -2))
        norms = torch.sqrt((o_points**2).sum(-1) + (self.eps if self.epsilon is None else self.epsilon))
        pairs = []
        if z is not None:
            values = self.down_z(z) if hasattr(self, "down_z") else z
            pairs = [torch.einsum("...hij,...ijc->...ihc", a, values.to(a)).flatten(-2)]
        return self.linear_out(torch.cat([o, *o_points.unbind(-1), norms, *pairs], -1).to(s.dtype))

    def squares(self, x):
        return x**2

    def hidden(self, mask):
        """Numbers to add for a residue mask."""
        return self.inf * (mask[..., None, :, None] * mask[..., None, None, :] - 1)


class Genie(Plain):
    def forward(self, s, z, t, mask):
        return self.attend(s, z, t, self.hidden(mask))


class FrameDiPT(Plain):
    dialect = "framediff"

    def __init__(self, config):
        super().__init__(config)
        self.linear_rbf = nn.Linear(20, 1)

    def forward(self, s, z, r, mask, offload_inference=False, z_reference_list=None):
        return self.attend(s, z, r, self.hidden(mask))


class MDGen(Plain):
    dialect = "mdgen"

    def __init__(self, config, dropout=0.0):
        super().__init__(config)
        self.dropout = dropout

    def forward(self, s, r, z=None, frame_mask=None, attn_mask=None):
        added = 0 if frame_mask is None else self.hidden(frame_mask)
        if attn_mask is not None:
            added = added + self.inf * (attn_mask - 1)
        return self.attend(nn.functional.dropout(s, self.dropout, self.training), z, r, added)


class MultiFlow(Plain):
    dialect = "frameflow"

    def forward(self, s, z, r, mask, attention_mask=None, _offload_inference=False, _z_reference_list=None):
        added = self.hidden(mask)
        if attention_mask is not None:
            added = added - (1 - attention_mask[:, None]) * 1e7
        return self.attend(s, z, r, added)


class UniFold(Plain):
    """It has gradients in training mode only."""

    def forward(self, s, z, f: Frame, square_mask):
        return self.attend(s, z, f, square_mask)

    def squares(self, x):
        if self.training:
            return x**2
        x *= x
        return x


class UniFoldMultimer(UniFold):
    dialect = "unifold"


class Constant(Genie):
    """Its epsilon is a constant in its forward."""

    epsilon = 1e-6


class Elsewhere(Genie):
    """Its epsilon is in an attribute with another name."""

    def __init__(self, config):
        super().__init__(config)
        self.norm_eps = self.eps
        self.inf = 3e4

    def forward(self, node, edge, rigids, node_mask):
        return self.attend(node, edge, rigids, self.hidden(node_mask))


class KeysOnly(Genie):
    def forward(self, s, z, r, mask):
        assert mask.dtype is torch.bool
        return self.attend(s, z, r, self.inf * (mask[..., None, None, :].to(s) - 1))


class Matrices(Genie):
    def forward(self, mask, r, s, edges):
        return self.attend(s, edges, T(r[..., :3, :3], r[..., :3, 3]), self.hidden(mask))


class TwoTensors(Genie):
    def forward(self, s, z, r, mask):
        rotation, translation = r
        return self.attend(s, z, T(rotation, translation), self.hidden(mask))


class MoreParameters(Genie):
    def __init__(self, config):
        super().__init__(config)
        self.linear_rbf = nn.Linear(19, 1)
        self.scale = nn.Parameter(torch.ones(2))
        self.linear_q.lora = nn.Parameter(torch.ones(2))


class MoreArguments(Genie):
    def forward(self, s, z, t, mask, edge_bias=None, temperature=1.0, *others, **named):
        return super().forward(s, z, t, mask) * temperature


class NoMask(Genie):
    def forward(self, s, z, t):
        return self.attend(s, z, t, 0)


class Named(Genie):
    """Only one argument has a name of its own."""

    def forward(self, s, representation_of_pairs, t, mask):
        return super().forward(s, representation_of_pairs, t, mask)
