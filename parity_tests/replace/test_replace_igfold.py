"""IgFold's layers: the package `invariant-point-attention`'s, with a mask of padding that no query reads."""

from __future__ import annotations

import copy

import pytest

from ipa_bridge.config import IPATransformerConfig
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


class Block(nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.attn, self.attn_norm, self.ff_norm = Attention(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ff = nn.Sequential(*(nn.Linear(dim, dim) if i % 2 == 0 else nn.ReLU() for i in range(5)))

    def forward(self, x, **frames):
        x = self.attn_norm(x + self.attn(x, **frames))
        return self.ff_norm(x + self.ff(x))


def product(a, b):
    """Hamilton's product of quaternions, real parts first, whose lengths are never made 1."""
    a, u, b, v = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    return torch.cat([a * b - (u * v).sum(-1, keepdim=True), a * v + b * u + torch.linalg.cross(u, v)], -1)


def row_rotations(quaternions):
    """Matrices that turn row vectors; they do not depend on the quaternions' lengths."""
    return ipa_torch.Rigid.from_quaternion(quaternions, quaternions[..., 1:]).rotation


class Transformer(nn.Module):
    """A stand-in for IgFold's transformer up to its frames."""

    def __init__(self, dim=6, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Block(dim), nn.Linear(dim, 6)]) for _ in range(depth))

    def forward(self, x, *, translations, quaternions, **others):
        for block, update in self.layers:
            rotations = row_rotations(quaternions)
            x = block(x, rotations=rotations, translations=translations, **others)
            turn, step = update(x).chunk(2, -1)
            quaternions = product(quaternions, nn.functional.pad(turn, (1, 0), value=1.0))
            translations = translations + torch.einsum("bic,bicd->bid", step, rotations)
        return translations, quaternions


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


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_the_transformer_converts(name):
    """Our transformer gives valid residues IgFold's frames, with the same gradients, also through the rotations."""
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    model = nn.ModuleDict({"structure_ipa": Transformer()}).to(dtype)
    weights = Weights.from_torch(model.state_dict())
    assert weights.config == IPATransformerConfig.igfold(
        6, depth=3, heads=3, scalar_key_dim=4, scalar_value_dim=5, point_key_dim=2, point_value_dim=3
    )
    assert not weights.assumed
    ours = ipa_torch.IPATransformer(weights.config).to(dtype)
    ours.load_state_dict(weights.to_torch(), strict=True)
    (single, pair, _, translations), _, readable = inputs(dtype)
    quaternions = 2 * torch.randn(2, 9, 4, dtype=dtype)
    leaves, valid = [single, pair, translations], readable[..., None]
    ends, turns = model["structure_ipa"](
        single,
        pairwise_repr=pair,
        translations=translations,
        quaternions=quaternions,
        mask=readable,
        key_padding_mask=readable,
    )
    rotations = row_rotations(turns).transpose(-1, -2)
    frames = ipa_torch.Rigid(row_rotations(quaternions).transpose(-1, -2), translations)
    found = ours(single, pair, frames, readable).rigids
    judge(found.translation, ends, readable.numpy(), "translation", name)
    judge(found.rotation.flatten(-2), rotations.flatten(-2), readable.numpy(), "rotation", name)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in (ends, rotations)]
    gradients = [
        torch.autograd.grad(
            (x * cotangents[0] * valid).sum() + (y * cotangents[1] * valid[..., None]).sum(), [*leaves, *m.parameters()]
        )
        for x, y, m in ((ends, rotations, model), (found.translation, found.rotation, ours))
    ]
    for leaf, x, y in zip(("single", "pair", "translations"), gradients[1], gradients[0], strict=False):
        judge(x, y, None, f"gradient/{leaf}", name)
    named = dict(zip(dict(ours.named_parameters()), gradients[1][3:], strict=True))
    ported = Weights.from_torch(named, dialect="ipa_torch", config=weights.config)
    ported = ported.to_torch(dialect="igfold", root="structure_ipa")
    for (leaf, _), y in zip(model.named_parameters(), gradients[0][3:], strict=True):
        if not leaf.endswith("attn_bias.0.bias"):
            judge(ported[leaf], y, None, f"gradient/{leaf}", name)
