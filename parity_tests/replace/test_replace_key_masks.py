"""Layers of BioEmu, DiG and OmegaFold, whose masks hide keys, compute the same after they are replaced."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import ODD

torch = pytest.importorskip("torch")
from key_mask_layers import BioEmu, Frames, OmegaFold
from stand_ins import judge
from torch import nn

import ipa_torch

CONFIGS = {BioEmu: IPAConfig.bioemu(12, d_pair=5, n_head=3), OmegaFold: replace(ODD, layout="multimer", norm_epsilon=0)}
N = 9


def made(kind, dtype=torch.float64, **options):
    """A layer with weights as large as trained ones, in evaluation mode."""
    layer = kind(CONFIGS[kind], **options).to(dtype).eval()
    weights = Weights.random(CONFIGS[kind], dtype=np.float64).to_torch(dialect=kind.dialect)
    layer.load_state_dict({name: x.to(dtype) for name, x in weights.items()})
    return layer


def tensors(kind, dtype=torch.float64, number=N):
    """Single, pair, rotation, translation and key mask. Padded residues of BioEmu have frames of zeros, as theirs."""
    rng, batch, c = np.random.default_rng(0), (2,) * (kind is BioEmu), CONFIGS[kind]
    single = rng.standard_normal((*batch, number, c.num_channel))
    pair = rng.standard_normal((*batch, number, number, c.pair_channel))
    rotation, translation = random_frames(rng, (*batch, number), spread=2.0)
    mask = rng.random((*batch, number)) > 0.2
    mask[..., -2:] = False
    rotation = np.where(mask[..., None, None], rotation, 0 if kind is BioEmu else np.eye(3))
    translation = np.where(mask[..., None], translation, 0)
    return *(torch.from_numpy(x).to(dtype) for x in (single, pair, rotation, translation)), torch.from_numpy(mask)


def arguments(kind, single, pair, rotation, translation, mask):
    if kind is OmegaFold:
        return single, pair, Frames(rotation, translation, mask)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return single, pair, (translation, rotation.mT), bias[:, None, None]


def run(layer, kind, inputs, parameters=True):
    """Outputs, and gradients to inputs, frames and parameters."""
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    out = layer(*arguments(kind, *leaves, inputs[4]))
    cotangent = torch.from_numpy(np.random.default_rng(1).standard_normal(out.shape)).to(out.dtype)
    names = ["single", "pair", "rotation", "translation", *(name for name, _ in layer.named_parameters())]
    gradients = torch.autograd.grad((out * cotangent).sum(), [*leaves, *layer.parameters()])
    return out, dict(zip(names, gradients, strict=True))


WITHOUT_EFFECT = {"bias_2d.bias": "bias_2d.weight", "k_scalar.bias": "k_scalar.weight"}
"""Parameters that cancel in the softmax, and those whose gradients have the size of their terms."""


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "streamed", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_gradients_stay_the_same(kind, dtype, implementation):
    layer = made(kind, getattr(torch, dtype), **({"smooth": True} if kind is OmegaFold else {}))
    before, inputs = copy.deepcopy(layer), tensors(kind, getattr(torch, dtype))
    report = ipa_torch.replace_ipa(layer, implementation=implementation)
    assert [x.system for x in report.replaced] == [kind.__name__]
    (out, gradients), (expected, of_before) = run(layer, kind, inputs), run(before, kind, inputs)
    judge(out, expected, None, dtype=dtype)
    for name, x in of_before.items():
        scale = of_before[WITHOUT_EFFECT.get(name, name)].abs().max().item()
        judge(gradients[name], x, None, f"gradient/{name}", dtype, scale=scale)
    assert ipa_torch.restore_ipa(layer) == [""]
    assert torch.equal(run(layer, kind, inputs)[0], expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_keep_their_names_and_convert(kind):
    """A replaced layer's parameters load into the original class, and into our module, which computes the same."""
    layer = made(kind)
    before, inputs = copy.deepcopy(layer), tensors(kind)
    ipa_torch.replace_ipa(layer)
    kind(CONFIGS[kind]).double().load_state_dict(layer.state_dict(), strict=True)
    weights = Weights.from_torch({f"model.{name}": x for name, x in layer.state_dict().items()})
    assert (weights.assumed_function, weights.config.norm_epsilon) == ({}, 0)
    ours = ipa_torch.InvariantPointAttention(weights.config).double()
    ours.load_state_dict(weights.to_torch())
    single, pair, rotation, translation, mask = inputs
    with torch.no_grad():
        expected = before(*arguments(kind, *inputs))
        judge(ours(single, pair, ipa_torch.Rigid(rotation, translation), key_mask=mask), expected, None)
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(again) is type(layer)
            judge(again(*arguments(kind, *inputs)), expected, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision(kind, dtype):
    """Our layer is within the bound of half precision, with parameters in it and under autocast."""
    layer, name = made(kind, torch.float32), str(dtype).removeprefix("torch.")
    inputs = tensors(kind, torch.float32)
    with torch.no_grad():
        expected = layer(*arguments(kind, *inputs))
        (row,) = ipa_torch.replace_ipa(copy.deepcopy(layer).to(dtype)).replaced
        assert row.error <= bound("out", name)
        ipa_torch.replace_ipa(layer)
        with torch.autocast("cpu", dtype):
            half = [*(x.to(dtype) for x in inputs[:2]), *inputs[2:]]
            actual = layer(*arguments(kind, *half))
    assert actual.dtype == dtype
    judge(actual.float(), expected, None, "out", name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_compiles_as_one_graph(kind):
    layer, inputs = made(kind), tensors(kind)
    ipa_torch.replace_ipa(layer)
    with torch.no_grad():
        expected = layer(*arguments(kind, *inputs))
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        judge(compiled(*arguments(kind, *inputs)), expected, None)
    torch._dynamo.reset()


# --- BioEmu


def test_a_layer_that_rounds_to_float32_is_compared_as_such():
    """In float64 it averages points in float32; ours does not, and the report gives the difference as it is."""
    layer = made(BioEmu, exact=False)
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert 1e6 < row.error < bound("out", "float32") * 2.0**29
    assert f"{row.error:.1e} eps apart" in str(ipa_torch.replace_ipa(layer, verify=True))


def test_dropout_is_the_layers_own():
    """Outputs in training are the same for the same random numbers; the module may be changed and have hooks."""
    layer, inputs = made(BioEmu, dropout=0.5), tensors(BioEmu)
    before = copy.deepcopy(layer).train()
    ipa_torch.replace_ipa(layer)
    layer.train()
    for p in (0.5, 0.2):
        layer.dropout.p = before.dropout.p = p
        after, expected = (seeded(x, inputs) for x in (layer, before))
        assert (after == 0).any()
        judge(after, expected, None)
    seen = []
    layer.dropout.register_forward_hook(lambda *_: seen.append("dropout"))
    seeded(layer, inputs)
    assert seen == ["dropout"]


def seeded(layer, inputs):
    torch.manual_seed(3)
    with torch.no_grad():
        return layer(*arguments(BioEmu, *inputs))


def test_a_bias_of_the_keys_is_added():
    """It may be finite and have fewer axes; at -inf its value and gradient have no effect."""
    layer, (single, pair, rotation, translation, mask) = made(BioEmu), tensors(BioEmu)
    before, pose = copy.deepcopy(layer), (translation, rotation.mT)
    ipa_torch.replace_ipa(layer)
    bias = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 1, 1, N)))
    bias = bias.masked_fill(~mask[:, None, None], -math.inf).requires_grad_()
    outputs = [x(single, pair, pose, bias) for x in (layer, before)]
    judge(*outputs, None)
    judge(*(torch.autograd.grad(x.square().sum(), bias)[0] for x in outputs), None, "gradient/bias")
    for same in (0, torch.tensor(0.0), bias[1, 0, 0], bias[:1]):
        judge(layer(single, pair, pose, same), before(single, pair, pose, same), None)


@pytest.mark.parametrize("shape", [(2, 1, N, N), (2, 3, 1, N), (N, N), (1, 2, 1, 1, N)])
def test_another_bias_raises(shape):
    layer, (single, pair, rotation, translation, _) = made(BioEmu), tensors(BioEmu)
    ipa_torch.replace_ipa(layer)
    with pytest.raises(ValueError, match=r"a bias of the keys alone was expected, \(B, 1, 1, N\).*call restore_ipa"):
        layer(single, pair, (translation, rotation.mT), torch.zeros(shape))


def test_residues_without_keys_read_zeros():
    """The layer itself gives NaN there, as a softmax over nothing does."""
    layer, inputs = made(BioEmu), tensors(BioEmu)
    before = copy.deepcopy(layer)
    ipa_torch.replace_ipa(layer)
    inputs[4][0] = False
    out, gradients = run(layer, BioEmu, inputs)
    expected, _ = run(before, BioEmu, inputs)
    assert expected[0].isnan().all()
    assert torch.equal(out[0], layer.fc_out.bias.expand_as(out[0]))
    judge(out[1], expected[1], None)
    assert all(x.isfinite().all() for x in gradients.values())


# --- OmegaFold


def test_a_layer_without_gradients_gets_them():
    """Its outputs are compared alone; ours have the gradients of the same function."""
    layer, inputs = made(OmegaFold), tensors(OmegaFold)
    smooth = made(OmegaFold, smooth=True)
    with pytest.raises(RuntimeError, match="out="):
        run(layer, OmegaFold, inputs)
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert row.error <= bound("out", "float64")
    for name, x in run(smooth, OmegaFold, inputs)[1].items():
        if name not in WITHOUT_EFFECT:
            judge(run(layer, OmegaFold, inputs)[1][name], x, None, f"gradient/{name}")


def test_a_mask_that_hides_all_hides_none():
    """The same number is then subtracted from all logits. In float64 it leaves their differences, rounded to 1e-7."""
    layer, inputs = made(OmegaFold, smooth=True), tensors(OmegaFold)
    before = copy.deepcopy(layer)
    ipa_torch.replace_ipa(layer)
    inputs[4][:] = False
    out, expected = (run(x, OmegaFold, inputs)[0] for x in (layer, before))
    judge(out.float(), expected.float(), None, dtype="float32")


# --- Refusals


class SquaresDistances(BioEmu):
    def nearness(self, apart):
        weights = nn.functional.softplus(self.trained_point_weight) / math.sqrt(3 * 4 * 4.5)
        return -weights / 2 * apart.square().sum((-1, -2))


class DropsAttention(BioEmu):
    """A layer that drops attention weights instead of outputs."""

    def weights(self, logits):
        return self.dropout(super().weights(logits))

    def out(self, features):
        return self.fc_out(features)


class OtherOrder(BioEmu):
    def out(self, features):
        return super().out(features.roll(1, -1))


class HidesQueries(OmegaFold):
    def forward(self, node_repr, edge_repr, frames):
        return super().forward(node_repr, edge_repr, frames) * frames.mask[:, None]


@pytest.mark.parametrize("kind", [SquaresDistances, DropsAttention, OtherOrder, HidesQueries])
def test_a_different_function_is_detected(kind):
    layer = kind(CONFIGS[kind.__base__])
    with pytest.raises(ValueError, match=f"this {kind.__name__} .* computes another function"):
        ipa_torch.replace_ipa(layer)


class OtherCall(BioEmu):
    def forward(self, x1d, x2d, pose, bias, edges):
        return super().forward(x1d, x2d, pose, bias)


def hooked(kind, path):
    layer = kind(CONFIGS[kind])
    layer.get_submodule(path).register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hooked(BioEmu, "pair_value"), "its pair_value has hooks, which would have no effect"),
        (lambda: hooked(OmegaFold, "softplus"), "its softplus has hooks, which would have no effect"),
        (
            lambda: OtherCall(CONFIGS[BioEmu]),
            "its forward takes x1d, x2d, pose, bias, edges, and our attention has nothing like edges",
        ),
    ],
)
def test_layers_left_alone(make, reason):
    with pytest.raises(ValueError, match=reason):
        ipa_torch.replace_ipa(make())


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_missing_pair_raises(kind):
    layer, (single, _, *others) = made(kind), tensors(kind)
    ipa_torch.replace_ipa(layer)
    with pytest.raises(ValueError, match=r"a pair representation was expected as (x2d|edge_repr); got None"):
        layer(*arguments(kind, single, None, *others))
