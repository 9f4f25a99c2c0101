"""Layers of OpenFold's kin: other names of arguments, other rigids and masks, unused parameters and arguments."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import make_case

torch = pytest.importorskip("torch")
import plain
from plain import T
from stand_ins import DOWN_Z, ONE_WIDTH, judge
from torch import nn

import ipa_torch
from ipa_torch.replace.rigids import rotation_and_translation

NO_PAIR = replace(ONE_WIDTH, pair_channel=None, logit_terms=3)
NO_BIAS = replace(ONE_WIDTH, scalar_bias=False, point_bias=False, attention_2d_bias=False, norm_epsilon=1e-7)
MULTIMER = replace(ONE_WIDTH, layout="multimer", scalar_bias=False)
STREAMED = 97
"""Enough residues to stream."""


def genie(s, z, frames, mask):
    return {"s": s, "z": z, "t": frames, "mask": mask}


def openfold(s, z, frames, mask):
    return {"s": s, "z": z, "r": frames, "mask": mask}


def with_pairs(name, heads):
    """A call with a pair mask under that name; row 1 hides everybody, and row 0 all residues that the mask shows."""

    def call(s, z, frames, mask):
        who = torch.from_numpy(np.random.default_rng(5).random((*mask.shape, mask.shape[-1])) > 0.3).to(s)
        who[:, 1] = 0
        who[:, 0] = 1 - mask
        given = {"s": s, "r": frames, "z": z, name: who.unsqueeze(1) if heads else who}
        return given | {"frame_mask" if name == "attn_mask" else "mask": mask}

    return call


def unifold(s, z, frames, mask):
    added = 1e5 * (mask[:, None, :, None] * mask[:, None, None, :] - 1)
    return {"s": s, "z": z, "f": frames, "square_mask": added}


def matrices(s, z, frames, mask):
    top = torch.cat([frames.rots, frames.trans[..., None]], -1)
    last = torch.tensor([0.0, 0, 0, 1]).to(top).expand(*top.shape[:-2], 1, 4)
    return {"mask": mask, "r": torch.cat([top, last], -2), "s": s, "edges": z}


CASES = {
    "Genie": (plain.Genie, ONE_WIDTH, "OpenFold 1", genie),
    "without biases": (plain.Genie, NO_BIAS, "OpenFold 1", genie),
    "FrameDiPT": (plain.FrameDiPT, DOWN_Z, "FrameDiff", openfold),
    "MDGen": (plain.MDGen, NO_PAIR, "MDGen", lambda s, z, r, mask: {"s": s, "r": r, "frame_mask": mask}),
    "MDGen, no mask": (plain.MDGen, NO_PAIR, "MDGen", lambda s, z, r, mask: {"s": s, "r": r}),
    "MDGen, pair mask": (plain.MDGen, NO_PAIR, "MDGen", with_pairs("attn_mask", heads=True)),
    "MultiFlow, pair mask": (plain.MultiFlow, DOWN_Z, "FrameFlow", with_pairs("attention_mask", heads=False)),
    "Uni-Fold": (plain.UniFold, ONE_WIDTH, "OpenFold 1", unifold),
    "Uni-Fold Multimer": (plain.UniFoldMultimer, MULTIMER, "Uni-Fold Multimer", unifold),
    "constant epsilon": (plain.Constant, ONE_WIDTH, "OpenFold 1", genie),
    "epsilon elsewhere": (
        plain.Elsewhere,
        ONE_WIDTH,
        "OpenFold 1",
        lambda s, z, r, mask: {"node": s, "edge": z, "rigids": r, "node_mask": mask},
    ),
    "mask of keys": (plain.KeysOnly, ONE_WIDTH, "OpenFold 1", lambda s, z, r, mask: openfold(s, z, r, mask.bool())),
    "4x4 matrices": (plain.Matrices, ONE_WIDTH, "OpenFold 1", matrices),
    "two tensors": (
        plain.TwoTensors,
        ONE_WIDTH,
        "OpenFold 1",
        lambda s, z, r, mask: openfold(s, z, (r.rots, r.trans), mask),
    ),
    "more parameters": (plain.MoreParameters, ONE_WIDTH, "OpenFold 1", genie),
    "more arguments": (plain.MoreArguments, ONE_WIDTH, "OpenFold 1", genie),
    "no mask": (plain.NoMask, ONE_WIDTH, "OpenFold 1", lambda s, z, r, mask: {"s": s, "z": z, "t": r}),
    "one other name": (
        plain.Named,
        ONE_WIDTH,
        "OpenFold 1",
        lambda s, z, r, mask: {"s": s, "representation_of_pairs": z, "t": r, "mask": mask},
    ),
}


def made(kind, config, dtype=torch.float64):
    torch.manual_seed(0)
    layer = kind(config).to(dtype).train()
    for x in layer.parameters():
        x.data.copy_(torch.randn(x.shape) / max(1, x.shape[-1] if x.ndim > 1 else 1) ** 0.5)
    return layer


def run(layer, name, dtype=torch.float64, residues=9):
    """Outputs, and gradients of the valid ones to inputs and parameters; None where there is no gradient."""
    kind, config, _, call = CASES[name]
    case = make_case(name, replace(config, logit_terms=None), (2, residues))
    arrays = (case.single, case.pair, case.rotation, case.translation, case.mask)
    s, z, rotation, translation, mask = (None if x is None else torch.tensor(x).to(dtype) for x in arrays)
    inputs = [x.requires_grad_() for x in (s, z, rotation, translation) if x is not None]
    rotations = plain.Turn(rotation) if issubclass(kind, plain.UniFold) else rotation
    frames = (plain.Frame if issubclass(kind, plain.UniFold) else T)(rotations, translation)
    out = layer(**call(s, z, frames, mask))
    named = dict(layer.named_parameters())
    loss = (out * torch.tensor(case.cotangent).to(dtype) * mask[..., None]).sum()
    gradients = torch.autograd.grad(loss, [*inputs, *named.values()], allow_unused=True)
    names = [*("single", "pair", "rotation", "translation")[: len(inputs)], *named]
    if z is None:
        names[:3] = ["single", "rotation", "translation"]
    return out, dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_before_and_after(name):
    """They agree, also at masked residues; parameters that get no gradient before get none after."""
    kind, config, system, _ = CASES[name]
    layer = made(kind, config)
    (before, gradients), keys = run(layer, name), list(layer.state_dict())
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert row.system == system
    assert row.error <= bound("out", "float64")
    after, now = run(layer, name)
    valid = torch.tensor(make_case(name, replace(config, logit_terms=None), (2, 9)).mask)
    assert torch.allclose(after, before, rtol=0, atol=1e-9 * before.detach().abs().max().item())
    if "pair mask" in name:
        valid[:, :2] = False  # from all of these logits, a large number was subtracted, which rounded them
    judge(after[valid], before[valid], None)
    for parameter, expected in gradients.items():
        actual = now[parameter]
        assert (actual is None) == (expected is None), parameter
        if parameter == "linear_b.bias":
            assert not actual.any()
        elif "pair mask" in name and expected is not None:
            assert torch.allclose(actual, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
        elif expected is not None:
            judge(actual, expected, None, f"gradient/{parameter}")
    assert list(layer.state_dict()) == keys
    assert ipa_torch.restore_ipa(layer) == [""]
    assert torch.equal(run(layer, name)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["MDGen, pair mask", "Uni-Fold Multimer", "MultiFlow, pair mask"])
def test_pair_masks_in_lower_precision(name, dtype):
    kind, config, _, _ = CASES[name]
    layer = made(kind, config, dtype)
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert np.isfinite(row.error)
    before, after = run(made(kind, config), name, residues=STREAMED)[0], run(layer, name, dtype, STREAMED)[0]
    valid = torch.tensor(make_case(name, replace(config, logit_terms=None), (2, STREAMED)).mask)
    valid[:, :2] = False
    if dtype is torch.float32:
        judge(after[valid], before[valid].float(), None, dtype="float32")
    assert after.dtype is dtype
    assert torch.isfinite(after).all()


def test_parameters_that_nobody_reads_are_listed():
    report = ipa_torch.replace_ipa(made(plain.MoreParameters, ONE_WIDTH))
    assert report.replaced[0].unused == ("linear_q.lora", "linear_rbf.bias", "linear_rbf.weight", "scale")
    with pytest.raises(
        ValueError, match=r"has no linear_q\.lora, linear_rbf\.bias, .* scale of this shape: pass verify"
    ):
        ipa_torch.replace_ipa(made(plain.MoreParameters, ONE_WIDTH), verify=False)


class Reads(plain.MoreParameters):
    """A parameter of its own changes nothing but gradients."""

    def forward(self, s, z, t, mask):
        return super().forward(s, z, t, mask) + 0 * self.scale.sum()


class Scales(plain.MoreParameters):
    def forward(self, s, z, t, mask):
        return super().forward(s, z, t, mask) * self.scale[0]


@pytest.mark.parametrize("kind", [Reads, Scales])
def test_a_parameter_that_only_the_original_reads(kind):
    with pytest.raises(ValueError, match=r"another function: only one of its forward and ours reads scale; nothing"):
        ipa_torch.replace_ipa(made(kind, ONE_WIDTH))


class Lora(nn.Linear):
    """A linear layer with one more parameter, which its own forward reads."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, x):
        return super().forward(x) * self.more


def test_a_parameter_that_both_read():
    """Ours calls the projections too, so a parameter inside one of them is neither unused nor a reason to refuse."""
    layer = made(plain.Genie, ONE_WIDTH)
    layer.linear_q = Lora(*layer.linear_q.weight.shape[::-1]).double()
    before = run(layer, "Genie")[0]
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert row.unused == ()
    layer.linear_q.more.data *= 2
    assert not torch.allclose(run(layer, "Genie")[0], before)


def test_arguments_with_a_default_are_accepted_at_it():
    layer = made(plain.MoreArguments, ONE_WIDTH)
    ipa_torch.replace_ipa(layer)
    case = make_case("call", ONE_WIDTH, (2, 9))
    s, z, rotation, translation, mask = (
        torch.tensor(x).double() for x in (case.single, case.pair, case.rotation, case.translation, case.mask)
    )
    plainly = layer(s, z, T(rotation, translation), mask)
    assert torch.equal(layer(s, z, T(rotation, translation), mask, None, temperature=1), plainly)
    with pytest.raises(ValueError, match=r"temperature=1\.0 was expected, .* got a float: call restore_ipa to use it"):
        layer(s, z, T(rotation, translation), mask, None, 2.0)
    with pytest.raises(ValueError, match=r"edge_bias=None was expected, .* got a Tensor"):
        layer(s, z, T(rotation, translation), mask, edge_bias=z)
    with pytest.raises(TypeError, match="at most 6 arguments"):
        layer(s, z, T(rotation, translation), mask, None, 1.0, 2)
    with pytest.raises(TypeError, match="more was not expected"):
        layer(s, z, T(rotation, translation), mask, more=2)


def test_soft_pair_masks():
    """Numbers between 0 and −1e4 are added as they are; a mask of 0 and 1 must have no other values."""
    layer = made(plain.UniFold, ONE_WIDTH)
    case = make_case("soft", ONE_WIDTH, (2, 9))
    s, z, rotation, translation, mask = (
        torch.tensor(x).double() for x in (case.single, case.pair, case.rotation, case.translation, case.mask)
    )
    added = torch.randn(2, 1, 9, 9, dtype=torch.float64) + 1e5 * (mask[:, None, None] - 1)
    frames = plain.Frame(plain.Turn(rotation), translation)
    before = layer(s, z, frames, added)
    ipa_torch.replace_ipa(layer)
    judge(layer(s, z, frames, added), before, None)
    added.requires_grad_()
    after = layer(s, z, frames, added)
    judge(after, before, None)
    assert torch.autograd.grad(after.square().sum(), added)[0].abs().sum() > 0
    with pytest.raises(ValueError, match=r"square_mask must have one mask for all heads.*\(2, 2, 9, 9\)"):
        layer(s, z, frames, added.expand(2, 2, 9, 9))
    flow = made(plain.MultiFlow, DOWN_Z)
    ipa_torch.replace_ipa(flow)
    z = z.new_zeros(2, 9, 9, 8)
    with pytest.raises(ValueError, match="attention_mask must hold 1 where a residue may attend to another and 0"):
        flow(s, z, T(rotation, translation), mask, 1 - 1e-4 * torch.rand(2, 9, 9, dtype=torch.float64))


def test_pair_masks_compile():
    layer = made(plain.MultiFlow, DOWN_Z, torch.float32)
    ipa_torch.replace_ipa(layer)
    expected = run(layer, "MultiFlow, pair mask", torch.float32)[0]
    actual = run(torch.compile(layer, backend="eager"), "MultiFlow, pair mask", torch.float32)[0]
    judge(actual, expected, None, dtype="float32")


class OtherMask(plain.MultiFlow):
    """Its attention_mask is something else."""

    def forward(self, s, z, r, mask, attention_mask=None):
        return self.attend(s if attention_mask is None else 2 * s, z, r, self.hidden(mask))


def test_a_pair_mask_with_another_meaning_is_refused_when_it_is_given():
    layer = made(OtherMask, DOWN_Z)
    ipa_torch.replace_ipa(layer)
    with pytest.raises(
        ValueError, match="attention_mask=None was expected, since it is no mask that our attention has"
    ):
        run(layer, "MultiFlow, pair mask")


def test_dropout_is_refused_in_training_only():
    layer = made(plain.MDGen, NO_PAIR).eval()
    layer.dropout = 0.5
    before = run(layer, "MDGen")[0]
    ipa_torch.replace_ipa(layer)
    valid = torch.tensor(make_case("MDGen", replace(NO_PAIR, logit_terms=None), (2, 9)).mask)
    judge(run(layer, "MDGen")[0][valid], before[valid], None)
    layer.train()
    with pytest.raises(
        NotImplementedError, match=r"dropout is 0\.5, .* set it to 0, call eval\(\), or call restore_ipa"
    ):
        run(layer, "MDGen")
    layer.dropout = 0.0
    judge(run(layer, "MDGen")[0][valid], before[valid], None)


class Unknown(plain.Genie):
    def forward(self, one, other, t, mask):
        return super().forward(one, other, t, mask)


class Needs(plain.Genie):
    def forward(self, s, z, t, mask, time):
        return super().forward(s, z, t, mask)


class TwoScales(plain.MDGen):
    """A pair-free attention with the scale of two terms."""

    def forward(self, s, r, z=None, frame_mask=None, attn_mask=None):
        self.c = replace(self.c, num_scalar_qk=self.c.num_scalar_qk)
        return super().forward(1.1 * s, r, z, frame_mask, attn_mask)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (
            Unknown,
            ONE_WIDTH,
            r"takes one, other, t, mask, and none of them is the single representation: its name may be s, single",
        ),
        (Needs, ONE_WIDTH, "takes s, z, t, mask, time, and our attention has nothing like time: give it a default at"),
        (TwoScales, NO_PAIR, "this TwoScales has the parameters of MDGen's attention but computes another function"),
    ],
)
def test_refusals_name_argument_and_remedy(kind, config, reason):
    with pytest.raises(ValueError, match=reason):
        ipa_torch.replace_ipa(made(kind, config))


class Held:
    def __init__(self, **parts):
        vars(self).update(parts)


@pytest.mark.parametrize("names", [("rots", "trans"), ("rot", "trans"), ("rotation", "translation"), ("R", "t")])
@pytest.mark.parametrize("wrap", [lambda x: x, plain.Turn])
def test_rigids_of_any_class(names, wrap):
    rotation, translation = torch.eye(3).expand(2, 5, 3, 3), torch.randn(2, 5, 3)
    for held in (Held(**dict(zip(names, (wrap(rotation), translation), strict=True))), (wrap(rotation), translation)):
        found = rotation_and_translation(held)
        assert torch.equal(found[0], rotation)
        assert torch.equal(found[1], translation)
    with pytest.raises(ValueError, match=r"rigids were expected: an object with get_rots/get_trans.*got a Held"):
        rotation_and_translation(Held(angle=1))
    with pytest.raises(ValueError, match="rotation matrices were expected"):
        rotation_and_translation(Held(**dict(zip(names, (Held(), translation), strict=True))))


def test_its_weights_convert():
    """Parameters of MDGen's and Uni-Fold's layers in our modules give the layers' outputs, and go back bit for bit."""
    for name in ("MDGen", "Uni-Fold Multimer", "without biases"):
        kind, config, _, _ = CASES[name]
        layer = made(kind, config, torch.float32)
        dialect = kind.dialect if name != "MDGen" else None
        weights = Weights.from_torch(layer.state_dict(), dialect=dialect)
        assert weights.config.num_logit_terms == 3
        again = weights.to_torch(dialect=kind.dialect)
        assert all(torch.equal(x, again[key]) for key, x in layer.state_dict().items())
        copy.deepcopy(layer).load_state_dict(again, strict=True)
        assert replace(weights.config, frame_unit=None, norm_epsilon=config.norm_epsilon) == replace(
            config, frame_unit=None, point_weight_init=weights.config.point_weight_init
        )
