"""Replaced layers of ABodyBuilder2 and FlashABB, whose parameters pack several of ours."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights

torch = pytest.importorskip("torch")
import stand_ins
from packed_stand_ins import ABodyBuilder2, FlashABB, FlashABBWithWeights, Rigid, Rot, Vector
from stand_ins import judge
from torch import nn

import ipa_torch

ABB2 = replace(IPAConfig.abodybuilder2(), num_channel=10, pair_channel=6, num_head=3, num_scalar_qk=4, num_scalar_v=4)
FLASH = replace(IPAConfig.flashabb(), num_channel=10, num_head=3, num_scalar_qk=6, num_scalar_v=6, num_point_v=7)
LAYERS = {
    "ABodyBuilder2": (ABodyBuilder2, ABB2),
    "FlashABB": (FlashABB, FLASH),
    "FlashABB without spectra": (FlashABB, replace(FLASH, pair_channel=None, pair_bias=True)),
    "FlashABB with weights": (FlashABBWithWeights, FLASH),
}
NUMBER = 11


def make(which: str, dtype=torch.float64, kind=None):
    made, config = LAYERS[which]
    layer = (kind or made)(config)
    state = Weights.random(config, dtype=np.float64).to_torch(dialect=layer.dialect)
    layer.load_state_dict(state, strict=True)
    return layer.to(dtype)


def inputs(which: str, dtype=torch.float64, number: int = NUMBER):
    """Single, pair, rotations, translations, residue indices and a mask."""
    kind, config = LAYERS[which]
    rng = np.random.default_rng(3)
    batch = () if kind is ABodyBuilder2 else (2,)
    frames = random_frames(rng, (*batch, number), spread=2.0)
    single = rng.standard_normal((*batch, number, config.num_channel))
    pair = rng.standard_normal((number, number, config.pair_channel or 1))
    tensors = [torch.tensor(x, dtype=dtype).requires_grad_() for x in (single, pair, *frames)]
    mask = torch.ones(*batch, number, dtype=dtype)
    if batch:
        mask[0, 2:5], mask[1, 0] = 0, 0
    indices = torch.cat([torch.arange(number // 2), 500 + torch.arange(number - number // 2)])
    return (*tensors, indices.expand(*batch, number), mask)


def call(layer, given, **options):
    """The layer's outputs: the update, and the attention weights if it returns them."""
    single, pair, rotation, translation, indices, mask = given
    if isinstance(layer, ABodyBuilder2):
        rigid = Rigid(Vector(*translation.unbind(-1)), Rot(*rotation.flatten(-2).unbind(-1)))
        return layer(single, pair, rigid), None
    out = layer(single, indices, stand_ins.Rigid(stand_ins.Rotation(rotation), translation), mask, **options)
    return out if isinstance(out, tuple) else (out, None)


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "streamed", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", LAYERS)
def test_outputs_and_gradients_stay(which, dtype, implementation):
    """Also for masked residues, and for a chain whose residues are all masked, each of which attends to all."""
    layer = make(which, dtype)
    before = copy.deepcopy(layer).double()
    (row,) = ipa_torch.replace_ipa(layer, implementation=implementation).replaced
    assert (row.path, row.system) == ("", which.partition(" ")[0])
    name = str(dtype).removeprefix("torch.")
    assert row.error <= bound("out", name)
    given = inputs(which, dtype)
    if layer.dialect == "flashabb":
        given[5][1] = 0
    twin = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in given]
    twin[5][(twin[5] == 0).all(-1)] = 1  # the same in exact arithmetic, without rounding logits to 1e5 eps
    results = []
    for module, arguments in ((layer, given), (before, twin)):
        out, weights = call(module, arguments)
        cotangent = torch.tensor(np.random.default_rng(4).standard_normal(out.shape), dtype=out.dtype)
        read = {"single": arguments[0], "rotation": arguments[2], "translation": arguments[3]}
        read |= {"pair": arguments[1]} if module.dialect == "abodybuilder2" else {}
        read |= {x: parameter for x, parameter in module.named_parameters() if parameter.requires_grad}
        gradients = torch.autograd.grad((out * cotangent).sum(), [*read.values()])
        results.append((out, weights, dict(zip(read, gradients, strict=True))))
    (out, weights, gradients), (true_out, true_weights, true_gradients) = results
    judge(out, true_out, None, dtype=name)
    returned = which == "FlashABB with weights"
    assert (weights is not None, true_weights is not None) == (returned, returned)
    if weights is not None:
        judge(weights, true_weights, None, "attention", name)
    assert gradients.keys() == true_gradients.keys()
    for what, x in gradients.items():
        frames = what in ("rotation", "translation") and layer.dialect == "flashabb"  # its rigids are in float32
        judge(x, true_gradients[what], None, f"gradient/{what}", "float32" if frames else name)


@pytest.mark.parametrize("which", LAYERS)
def test_converted_weights_give_the_same_outputs_in_our_module(which):
    layer = make(which)
    config = LAYERS[which][1]
    weights = Weights.from_torch(nn.ModuleDict({"a": layer}).state_dict())
    assert weights.config == config
    ours = ipa_torch.InvariantPointAttention(config).double()
    ours.load_state_dict(weights.to_torch())
    single, pair, rotation, translation, indices, mask = inputs(which)
    masks = {}
    if layer.dialect == "flashabb":
        pair, masks = None, {"key_mask": mask}
        rotation, translation = rotation.float().double(), translation.float().double()
        if config.pair_channel:
            apart = (indices[:, None, :] - indices[:, :, None]) % 128
            pair = nn.functional.one_hot(apart, 128).double()
    out = ours(single, pair, ipa_torch.Rigid(rotation, translation), **masks)
    expected, _ = call(layer, (single, inputs(which)[1], rotation, translation, indices, mask))
    judge(out + (single if layer.dialect == "abodybuilder2" else 0), expected, None)


@pytest.mark.parametrize("which", LAYERS)
def test_checkpoints_copies_and_restoring(which):
    layer = make(which)
    kind, state = type(layer), layer.state_dict()
    ipa_torch.replace_ipa(layer)
    given = inputs(which)
    expected, _ = call(layer, given)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(call(copied, given)[0], expected)
    assert list(layer.state_dict()) == list(state)
    kind(LAYERS[which][1]).load_state_dict(layer.state_dict(), strict=True)
    assert ipa_torch.restore_ipa(layer) == [""]
    assert type(layer) is kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", LAYERS)
def test_half_precision(which, dtype):
    """FlashABB's own layers cannot run with parameters in half precision, as their rigids are in float32."""
    layer = make(which, dtype)
    exact = copy.deepcopy(layer).double()
    if layer.dialect == "flashabb":
        with pytest.raises(RuntimeError, match="same dtype"):
            call(layer, inputs(which, dtype))
    (row,) = ipa_torch.replace_ipa(layer, verify=layer.dialect != "flashabb").replaced
    assert row.error is None or row.error <= bound("out", row.dtype)
    given = inputs(which, dtype)
    out, _ = call(layer, given)
    assert out.dtype == dtype
    judge(
        out.float(), call(exact, [x.double() if x.is_floating_point() else x for x in given])[0], None, dtype=row.dtype
    )


@pytest.mark.parametrize("number", [NUMBER, 120])
def test_attention_weights_are_returned_as_before(number):
    """If they are asked for, and unasked where the class returns them, too; at lengths that stream or do not."""
    layer = make("FlashABB with weights")
    before = copy.deepcopy(layer)
    ipa_torch.replace_ipa(layer)
    given = inputs("FlashABB with weights", number=number)
    for options in ({}, {"return_attn_weights": True}):
        judge(call(layer, given, **options)[1], call(before, given)[1], None, "attention")
    narrow = replace(FLASH, num_point_qk=4, num_point_v=12, pair_channel=None, pair_bias=True)
    layer = FlashABBWithWeights(narrow).double()  # values as wide as queries
    ipa_torch.replace_ipa(layer)
    assert call(layer, given)[1] is None
    assert call(layer, given, return_attn_weights=True)[1] is not None


def test_residue_indices():
    """Indices below zero, and none where the class counts residues."""
    layer, with_weights = make("FlashABB"), make("FlashABB with weights")
    before = copy.deepcopy(layer)
    for module in (layer, with_weights):
        ipa_torch.replace_ipa(module)
    given = inputs("FlashABB")
    below = (*given[:4], given[4] - 1000, given[5])
    judge(call(layer, below)[0], call(before, below)[0], None)
    counted = (*given[:4], torch.arange(NUMBER).expand(2, NUMBER), given[5])
    none = (*given[:4], None, given[5])
    judge(call(with_weights, none)[0], call(before, counted)[0], None)
    with pytest.raises(ValueError, match="residue indices were expected as res_idx; got None"):
        call(layer, none)


class Squared(ABodyBuilder2):
    power = 1.0


class Softplus(ABodyBuilder2):
    def point_weights(self):
        return nn.functional.softplus(self.point_weight)


class WithoutInput(ABodyBuilder2):
    def forward(self, node_features, edge_features, rigid):
        return super().forward(node_features, edge_features, rigid) - node_features


class OtherModulus(FlashABB):
    modulus = 64


class WithoutMask(FlashABB):
    def run(self, s, res_idx, r, mask):
        return super().run(s, res_idx, r, torch.ones_like(mask))


class WithoutRotation(FlashABB):
    def __init__(self, config):
        super().__init__(config)
        self.rotary_emb.forward_ = None
        self.rotary_emb.__class__ = type("Identity", (nn.Module,), {"forward": lambda self, x: x})


@pytest.mark.parametrize("kind", [Squared, Softplus, WithoutInput, OtherModulus, WithoutMask, WithoutRotation])
def test_another_function_is_detected(kind):
    layer = make("ABodyBuilder2" if issubclass(kind, ABodyBuilder2) else "FlashABB", kind=kind)
    with pytest.raises(ValueError, match=rf"this {kind.__name__} .* another function"):
        ipa_torch.replace_ipa(layer)
    assert type(layer) is kind


def test_what_is_refused(monkeypatch):
    hooked = make("FlashABB")
    hooked.rotary_emb.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="its rotary_emb has hooks, which would have no effect"):
        ipa_torch.replace_ipa(hooked)
    layer = make("FlashABB")
    ipa_torch.replace_ipa(layer)
    layer.rotary_emb = nn.Identity()
    with pytest.raises(NotImplementedError, match="rotary_emb is a Identity where a Rotary was"):
        call(layer, inputs("FlashABB"))
    layer = make("ABodyBuilder2")
    monkeypatch.delattr(sys.modules[ABodyBuilder2.__module__], "Rot")
    with pytest.raises(ValueError, match=r"a class Rigid was expected in the module that defines ABodyBuilder2"):
        ipa_torch.replace_ipa(layer)
