"""IgFold's layers: the package `invariant-point-attention`'s, with a mask of padding that no query reads."""

from __future__ import annotations

import copy

import pytest

from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights

torch = pytest.importorskip("torch")
from stand_ins import judge
from torch import nn

import ipa_torch


class Attention(nn.Module):
    """A stand-in with IgFold's names and call; every einsum is a line of the algorithm."""

    def __init__(self, dim=6, heads=3, qk=4, v=5, p_qk=2, p_v=3):
        super().__init__()
        self.heads, self.eps = heads, 1e-8
        self.to_scalar_q, self.to_scalar_k = (nn.Linear(dim, heads * qk, bias=False) for _ in range(2))
        self.to_scalar_v = nn.Linear(dim, heads * v, bias=False)
        self.to_point_q, self.to_point_k = (nn.Linear(dim, heads * p_qk * 3, bias=False) for _ in range(2))
        self.to_point_v = nn.Linear(dim, heads * p_v * 3, bias=False)
        self.to_pairwise_attn_bias = nn.Sequential(nn.Linear(dim, heads), nn.Identity())
        self.point_weights = nn.Parameter(torch.linspace(-1, 1, heads))
        self.to_out = nn.Linear(heads * (v + 4 * p_v + dim), dim)

    def forward(
        self, single_repr, pairwise_repr=None, *, rotations, translations, mask=None, key_padding_mask=None
    ) -> torch.Tensor:
        x, h, origins = single_repr, self.heads, translations[:, :, None, None]
        q, k, v = (to(x).unflatten(-1, (h, -1)) for to in (self.to_scalar_q, self.to_scalar_k, self.to_scalar_v))
        q_points, k_points, v_points = (
            torch.einsum("bihpc,bicd->bihpd", to(x).unflatten(-1, (h, -1, 3)), rotations) + origins
            for to in (self.to_point_q, self.to_point_k, self.to_point_v)
        )
        distances = (q_points[:, :, None] - k_points[:, None]).square().sum((-1, -2))
        scale = (9 / 2 * q_points.shape[-2]) ** -0.5
        logits = torch.einsum("bihc,bjhc->bijh", q, k) * q.shape[-1] ** -0.5
        logits = logits - 0.5 * scale * nn.functional.softplus(self.point_weights) * distances
        logits = (logits + self.to_pairwise_attn_bias(pairwise_repr)) * 3**-0.5
        if mask is not None:
            logits = logits.masked_fill(~(mask[:, :, None] & mask[:, None])[..., None], -torch.finfo(logits.dtype).max)
        if key_padding_mask is not None:
            logits = logits.masked_fill(~key_padding_mask[:, None, :, None], -torch.inf)
        weights = logits.softmax(2)
        o = torch.einsum("bijh,bjhc->bihc", weights, v)
        o_points = torch.einsum("bijh,bjhpc->bihpc", weights, v_points) - origins
        o_points = torch.einsum("bihpd,bicd->bihpc", o_points, rotations)
        norms = (o_points.square().sum(-1) + self.eps).sqrt()
        o_pair = torch.einsum("bijh,bijc->bihc", weights, pairwise_repr)
        return self.to_out(torch.cat([y.flatten(2) for y in (o, o_points, norms, o_pair)], -1))


class Model(nn.Module):
    """Its attention lies where IgFold's does."""

    def __init__(self):
        super().__init__()
        self.structure_ipa = Attention()

    def forward(self, *arguments, **named):
        return self.structure_ipa(*arguments, **named)


def inputs(dtype=torch.float64, *, number=9):
    generator = torch.Generator().manual_seed(1)
    single, pair, translations, quaternions = (
        torch.randn(2, number, *shape, generator=generator, dtype=dtype) for shape in ((6,), (number, 6), (3,), (4,))
    )
    rotations = ipa_torch.Rigid.from_quaternion(quaternions, translations).rotation
    valid, readable = torch.ones(2, number, dtype=torch.bool), torch.ones(2, number, dtype=torch.bool)
    valid[:, [0, 3]], readable[1, -2:] = False, False
    return [x.requires_grad_() for x in (single, pair, rotations, translations)], valid, readable


MASKS = {
    "none": (False, False),
    "mask": (True, False),
    "padding": (False, True),
    "both": (True, True),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_outputs_and_gradients(masks, name):
    """Every row counts, also of masked residues, which IgFold's heads read."""
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    model = Model().to(dtype)
    before = copy.deepcopy(model)
    (row,) = ipa_torch.replace_ipa(model).replaced
    assert (row.path, row.system) == ("structure_ipa", "IgFold")
    (single, pair, rotations, translations), valid, readable = inputs(dtype)
    named = {"mask": valid if masks[0] else None, "key_padding_mask": readable if masks[1] else None}
    cotangent = torch.randn(single.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    results = []
    for x in (before, model):
        out = x(single, pair, rotations=rotations, translations=translations, **named)
        leaves = [single, pair, rotations, translations, *x.parameters()]
        results.append((out, torch.autograd.grad((out * cotangent).sum(), leaves)))
    (expected, to_expected), (actual, to_actual) = results
    judge(actual, expected, None, "out", name)
    names = ["single", "pair", "rotations", "translations", *(x for x, _ in model.named_parameters())]
    for leaf, x, y in zip(names, to_actual, to_expected, strict=True):
        if leaf.endswith("attn_bias.0.bias"):  # cancels in the softmax
            assert not x.any()
        else:
            judge(x, y, None, f"gradient/{leaf}", name)


def test_a_valid_residue_whose_keys_are_all_padding():
    """It reads the mean of all keys that are no padding, as a masked residue does; without any such key, zeros."""
    model = Model().double()
    before = copy.deepcopy(model)
    ipa_torch.replace_ipa(model)
    (single, pair, rotations, translations), valid, readable = inputs()
    valid[0], readable[0] = torch.arange(9) < 4, torch.arange(9) >= 4
    arguments = {"rotations": rotations, "translations": translations, "mask": valid, "key_padding_mask": readable}
    judge(model(single, pair, **arguments), before(single, pair, **arguments), None)
    readable[0] = False
    features = torch.zeros(5 * 3 + 4 * 9 + 18, dtype=torch.float64)
    features[5 * 3 + 3 * 9 : 5 * 3 + 4 * 9] = 1e-4  # √ε, the length of nothing
    judge(model(single, pair, **arguments)[0], before.structure_ipa.to_out(features).expand(9, 6), None)


def test_a_layer_that_reads_padding_is_refused():
    """The comparison passes a mask of padding; a layer that does something else with it is left as it is."""

    class Other(Attention):
        def forward(
            self, single_repr, pairwise_repr=None, *, rotations, translations, mask=None, key_padding_mask=None
        ):
            frames = {"rotations": rotations, "translations": translations}
            return super().forward(single_repr, pairwise_repr, **frames, mask=mask)

    layer = Other()
    with pytest.raises(ValueError, match="computes another function"):
        ipa_torch.replace_ipa(layer)
    assert type(layer) is Other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = Model().to(dtype)
    (row,) = ipa_torch.replace_ipa(model).replaced
    assert row.error <= bound("out", row.dtype)
    leaves, valid, readable = inputs(dtype)
    out = model(*leaves[:2], rotations=leaves[2], translations=leaves[3], mask=valid, key_padding_mask=readable)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_a_checkpoint_and_back():
    model = Model()
    weights = Weights.from_torch(model.state_dict())
    assert weights.config.norm_epsilon == 1e-8
    back = weights.to_torch(dialect="igfold", root="structure_ipa")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(x, back[name]) for name, x in model.state_dict().items())
