"""lociPARSE's layers: a method of the layer computes the attention, over a list of neighbours of each residue."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights

torch = pytest.importorskip("torch")
from stand_ins import Rigid, Rotation, judge
from torch import nn

import ipa_torch

NODE, EDGE, HEADS, QUERY_POINTS, VALUE_POINTS = 6, 5, 3, 2, 4
RESIDUES = 9


def at(x, neighbours):
    """Values (B, N, …) of each residue's neighbours, (B, N, k, …)."""
    return x[torch.arange(len(x))[:, None, None], neighbours]


class NeighbourAttention(nn.Module):
    """A stand-in with lociPARSE's names and calls."""

    def __init__(self):
        super().__init__()
        self.linear_q, self.linear_kv = nn.Linear(NODE, HEADS * NODE), nn.Linear(NODE, 2 * HEADS * NODE)
        self.linear_q_points = nn.Linear(NODE, HEADS * QUERY_POINTS * 3)
        self.linear_kv_points = nn.Linear(NODE, HEADS * (QUERY_POINTS + VALUE_POINTS) * 3)
        self.linear_b, self.head_weights = nn.Linear(EDGE, HEADS), nn.Parameter(torch.linspace(-1, 1, HEADS))
        self.linear_out = nn.Linear(HEADS * (EDGE + NODE + VALUE_POINTS * 4), NODE)
        self.dropout = nn.ModuleList([nn.Dropout(0.1)])
        self.norm = nn.ModuleList([nn.LayerNorm(NODE)])
        self.node_dense = nn.Linear(NODE, NODE)

    def _get_node_update(self, h_V, h_E, E_idx, bb_to_global, mask_attend=None):
        rotations = bb_to_global.get_rots().get_rot_mats().to(h_V.dtype)
        origins = bb_to_global.get_trans().to(h_V.dtype)[:, :, None, None]

        def points(to):
            local = torch.stack(to(h_V).unflatten(-1, (3, HEADS, -1)).unbind(-3), -1)
            return torch.einsum("bicd,bihpd->bihpc", rotations, local) + origins

        q = self.linear_q(h_V).unflatten(-1, (HEADS, -1))
        k, v = self.linear_kv(h_V).unflatten(-1, (HEADS, -1)).chunk(2, -1)
        q_points = points(self.linear_q_points)
        k_points, v_points = points(self.linear_kv_points).split([QUERY_POINTS, VALUE_POINTS], -2)
        squares = (q_points[:, :, None] - at(k_points, E_idx)).square().sum((-1, -2))
        gamma = nn.functional.softplus(self.head_weights) * (QUERY_POINTS * 9 / 2) ** -0.5
        logits = torch.einsum("bihc,bikhc->bikh", q, at(k, E_idx)) * NODE**-0.5 + self.linear_b(h_E)
        logits = (logits - gamma * squares / 2) * 3**-0.5
        if mask_attend is not None:
            logits = logits + 1e5 * (mask_attend - 1)[..., None]
        weights = logits.softmax(2)
        o = torch.einsum("bikh,bikhc->bihc", weights, at(v, E_idx))
        o_points = torch.einsum("bikh,bikhpc->bihpc", weights, at(v_points, E_idx)) - origins
        o_points = torch.einsum("bicd,bihpc->bihpd", rotations, o_points)
        norms = (o_points.square().sum(-1) + 1e-8).sqrt()
        o_pair = torch.einsum("bikh,bikc->bihc", weights, h_E)
        parts = (o, *o_points.unbind(-1), norms, o_pair)
        return self.linear_out(torch.cat([x.flatten(2) for x in parts], -1))

    def forward(self, h_V, h_E, E_idx, bb_to_global, mask_V=None, mask_attend=None):
        h_V = self.norm[0](h_V + self.dropout[0](self._get_node_update(h_V, h_E, E_idx, bb_to_global, mask_attend)))
        h_V = h_V + self.node_dense(h_V)
        return h_V if mask_V is None else h_V * mask_V[..., None]


def inputs(number: int, dtype=torch.float64):
    rng = np.random.default_rng(0)
    rotation, translation = (torch.from_numpy(x).float() for x in random_frames(rng, (2, RESIDUES), spread=2.0))
    nodes = torch.from_numpy(rng.standard_normal((2, RESIDUES, NODE))).to(dtype).requires_grad_()
    edges = torch.from_numpy(rng.standard_normal((2, RESIDUES, number, EDGE))).to(dtype).requires_grad_()
    neighbours = torch.from_numpy(rng.random((2, RESIDUES, RESIDUES)).argsort(-1)[..., :number].copy())
    mask = torch.from_numpy(rng.random((2, RESIDUES, number)) > 0.3).to(dtype)
    mask[..., 0] = 1
    return nodes, edges, neighbours, Rigid(Rotation(rotation), translation), mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("number", [RESIDUES, 4])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_outputs_and_gradients(name, number, masked):
    """All residues in any order, or some of them as neighbours."""
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    layer = NeighbourAttention().to(dtype).eval()
    before = copy.deepcopy(layer)
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert (row.system, row.layer) == ("lociPARSE", "NeighbourAttention")
    nodes, edges, neighbours, frames, mask = inputs(number, dtype)
    results = []
    for x in (before, layer):
        out = x(nodes, edges, neighbours, frames, mask_attend=mask if masked else None)
        cotangent = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
        results.append((out, torch.autograd.grad((out * cotangent).sum(), [nodes, edges, *x.parameters()])))
    (expected, to_expected), (actual, to_actual) = results
    judge(actual, expected, None, "act", name)
    for leaf, x, y in zip(["nodes", "edges", *dict(layer.named_parameters())], to_actual, to_expected, strict=True):
        if leaf == "linear_b.bias":
            assert not x.any()
        else:
            judge(x, y, None, f"gradient/{leaf}", name)


def test_a_row_without_neighbours_reads_them_all():
    """The layer subtracts the same number from all its logits, which has no effect but rounding."""
    layer = NeighbourAttention().double().eval()
    before = copy.deepcopy(layer)
    ipa_torch.replace_ipa(layer)
    *arguments, mask = inputs(4)
    mask[0, 2] = 0
    actual, expected = (x._get_node_update(*arguments, mask) for x in (layer, before))
    assert (actual - expected).abs().max() < 1e5 * bound("out", "float64") * torch.finfo(torch.float64).eps


def test_what_our_attention_cannot_compute_is_refused():
    layer = NeighbourAttention().double()
    ipa_torch.replace_ipa(layer)
    nodes, edges, neighbours, frames, mask = inputs(4)
    with pytest.raises(ValueError, match=r"mask_attend was expected to be 0 or 1.*call restore_ipa"):
        layer(nodes, edges, neighbours, frames, mask_attend=0.5 * mask)
    neighbours[0, 1, 2] = neighbours[0, 1, 0]
    with pytest.raises(ValueError, match=r"E_idx was expected to name each neighbour.* once.*call restore_ipa"):
        layer(nodes, edges, neighbours, frames)


def test_its_own_forward_stays():
    """Dropout, norm and hooks beside the attention are the layer's own; copies and pickles keep the method."""
    layer = NeighbourAttention().double()
    ipa_torch.replace_ipa(layer)
    kind = type(layer)
    assert kind.forward is NeighbourAttention.forward
    *arguments, _ = inputs(4)
    seen = []
    layer.dropout[0].register_forward_hook(lambda *_: seen.append("dropout"))
    assert not torch.equal(layer(*arguments), layer(*arguments))  # training
    assert seen == ["dropout"] * 2
    layer.dropout[0]._forward_hooks.clear()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is kind
        assert torch.equal(copied.eval()(*arguments), layer.eval()(*arguments))
    layer.linear_b.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="linear_b has hooks"):
        layer(*arguments)
    layer.linear_b._forward_hooks.clear()
    assert ipa_torch.restore_ipa(layer) == [""]
    assert type(layer) is NeighbourAttention


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_and_back():
    """The layers beside the attention are known, and need no warning."""
    state = nn.ModuleDict({"layers": nn.ModuleList([NeighbourAttention()])}).state_dict()
    weights = Weights.from_torch(state)
    assert not weights.assumed
    assert weights.config == Weights.from_torch(state, dialect="lociparse").config
    back = weights.to_torch(dialect="lociparse", root="layers.0")
    assert all(torch.equal(x, state[name]) for name, x in back.items())
    assert {name.split(".")[2] for name in state.keys() - back.keys()} == {"norm", "node_dense"}
