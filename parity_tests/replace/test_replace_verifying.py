"""Layers are compared before and after: a different function is detected, and failed comparisons are reported."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest

from ipa_bridge.config import IPAConfig
from ipa_bridge.tolerance import bound
from ipa_parity import peers
from ipa_parity.attention.cases import ODD_NO_BIAS, make_case

torch = pytest.importorskip("torch")
from stand_ins import DOWN_Z, ONE_WIDTH, FastFold, FrameFlow, OpenFold, OpenFold1, Rigid, Rotation, TFold, judge
from torch import nn

import ipa_torch
from ipa_torch.attention import IMPLEMENTATIONS


class WithoutPair(OpenFold):
    """A layer with OpenFold's parameters that ignores the pair bias."""

    def forward(self, s, z, r, mask) -> torch.Tensor:
        return super().forward(s, 0 * z, r, mask)


class OtherEpsilon(OpenFold):
    """A layer that computes with another ε than its attribute."""

    def __init__(self, config):
        super().__init__(config, eps=1.0)
        self.eps = 1e-8


class MaskedToZero(OpenFold):
    def forward(self, s, z, r, mask) -> torch.Tensor:
        return super().forward(s, z, r, mask) * mask[..., None]


class DropsInTraining(OpenFold):
    def forward(self, s, z, r, mask) -> torch.Tensor:
        return nn.functional.dropout(super().forward(s, z, r, mask), 0.5, self.training)


class DetachesThePair(OpenFold):
    def forward(self, s, z, r, mask) -> torch.Tensor:
        return super().forward(s, z.detach(), r, mask)


@pytest.mark.parametrize("kind", [WithoutPair, OtherEpsilon, MaskedToZero, DropsInTraining, DetachesThePair])
def test_a_different_function_is_detected_and_nothing_is_replaced(kind):
    """It is detected even if the output layer is zero, or tiny beside a large bias, so that outputs are equal."""
    torch.manual_seed(0)
    for factor in (0, 1e-7, 1):
        model = nn.ModuleDict({"right": OpenFold(ONE_WIDTH), "wrong": kind(ONE_WIDTH)})
        for layer in model.values():
            layer.linear_out.weight.data *= factor
        with pytest.raises(ValueError, match=rf"wrong: this {kind.__name__} .* another function.*nothing was replaced"):
            ipa_torch.replace_ipa(model)
        assert [type(x) for x in model.values()] == [OpenFold, kind]
        assert len(ipa_torch.replace_ipa(model, verify=False).replaced) == 2
        assert all(x.error is None for x in ipa_torch.replace_ipa(model, verify=False).replaced)


def test_a_layer_without_numbers_cannot_be_compared():
    layer = OpenFold(ONE_WIDTH).to("meta")
    with pytest.raises(ValueError, match=r"float32 on meta: pass verify=False"):
        ipa_torch.replace_ipa(layer)
    assert type(layer) is OpenFold
    ipa_torch.replace_ipa(layer, verify=False)


class Unrunnable(OpenFold):
    def forward(self, s, z, r, mask) -> torch.Tensor:
        raise RuntimeError("not today")


def test_a_layer_that_does_not_run_cannot_be_compared():
    with pytest.raises(ValueError, match=r"RuntimeError: not today; pass verify=False"):
        ipa_torch.replace_ipa(Unrunnable(ONE_WIDTH))


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_weights_are_not_a_different_function(dtype):
    """The original layer has larger errors then, and ours may have the same."""
    pytest.importorskip("transformers")
    case = make_case("large", IPAConfig.alphafold2(), (7,)).astype("float32")
    layer = peers.esmfold_module(case)
    with torch.no_grad():
        for x in (layer.linear_q, layer.linear_kv, layer.linear_q_points, layer.linear_kv_points):
            x.weight *= 8
    (row,) = ipa_torch.replace_ipa(layer.to(dtype)).replaced
    assert np.isfinite(row.error)


class Frames(Rigid):
    """Another package's rigids."""


ru = ModuleType("rigid_utils")
ru.Frames = Frames


class ConfDiff(FrameFlow):
    """A layer whose forward annotates its rigids, as in ConfDiff."""

    def forward(self, s, z: torch.Tensor | None, r: ru.Frames, mask, _offload_inference=False, _z_reference_list=None):
        assert type(r) is Frames
        return super().forward(s, z, r, mask)


def elsewhere(monkeypatch, module: str, **contents):
    """A layer that takes only Frames, and whose class is in a module with the given contents."""
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    vars(sys.modules[module]).update(contents)

    def forward(self, s, z, r, mask):
        assert type(r) is Frames
        return OpenFold.forward(self, s, z, r, mask)

    kind = type("Attention", (nn.Module,), {"__module__": module, "forward": forward, "dialect": "openfold_v1"})
    layer = kind()
    vars(layer).update(vars(OpenFold1(ONE_WIDTH)))
    return layer


def test_the_class_of_the_rigids(monkeypatch):
    """It is found by annotation, else in the layer's module or its imports, or in a module that calls it."""
    assert ipa_torch.replace_ipa(ConfDiff(DOWN_Z)).replaced[0].error <= bound("out", "float32")
    monkeypatch.setattr(ru, "Rigid", Frames, raising=False)
    assert ipa_torch.replace_ipa(elsewhere(monkeypatch, "layers", Rigid=Frames)).replaced
    assert ipa_torch.replace_ipa(elsewhere(monkeypatch, "layers", ru=ru)).replaced
    caller = type("Caller", (nn.ModuleDict,), {"__module__": type(elsewhere(monkeypatch, "callers", ru=ru)).__module__})
    model = caller({"inner": nn.ModuleDict({"ipa": elsewhere(monkeypatch, "layers")})})
    assert [x.path for x in ipa_torch.replace_ipa(model).replaced] == ["inner.ipa"]
    with pytest.raises(ValueError, match=r"Rigid3Array in the module that defines Attention.* verify=False"):
        ipa_torch.replace_ipa(elsewhere(monkeypatch, "layers"))


class OddWithoutPair(TFold):
    def forward(self, s, z=None, r=None, mask=None):
        return super().forward(s, 0 * z, r, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [TFold, FastFold])
def test_a_layer_that_runs_neither_in_float64_nor_with_a_batch(kind, dtype):
    """It is compared in float32, with a bound that is wider only by what rounding explains."""
    torch.manual_seed(0)
    case = make_case("float32", ONE_WIDTH, (7,)).astype("float32")
    layer = kind(ONE_WIDTH)
    layer.load_state_dict(case.weights.to_torch(dialect="openfold_v1"))
    before = copy.deepcopy(layer)
    for factor in (1, 8) if dtype is torch.float32 else (1,):
        large = copy.deepcopy(layer).to(dtype)
        for x in (large.linear_q, large.linear_kv, large.linear_q_points, large.linear_kv_points):
            x.weight.data *= factor
        (row,) = ipa_torch.replace_ipa(large).replaced
        assert np.isfinite(row.error)
    with pytest.raises(ValueError, match="another function"):
        ipa_torch.replace_ipa(OddWithoutPair(ONE_WIDTH).to(dtype))
    with pytest.raises(ValueError, match=r"RuntimeError: .*; pass verify=False"):
        ipa_torch.replace_ipa(kind(ONE_WIDTH).double())
    ipa_torch.replace_ipa(layer)
    axes = (1,) * (kind is TFold)
    inputs = [torch.from_numpy(x).reshape(*axes, *x.shape) for x in (case.single, case.pair, case.mask)]
    frames = Rigid(*(torch.from_numpy(x).reshape(*axes, *x.shape) for x in (case.rotation, case.translation)))
    frames.rots = Rotation(frames.rots)
    single, pair, mask = inputs
    judge(
        layer(single, pair, frames, mask.float()),
        before(single, pair, frames, mask.float()),
        inputs[2].numpy(),
        dtype="float32",
    )
    if kind is TFold:
        judge(layer(single, z=pair, r=frames), before(single, z=pair, r=frames), None, dtype="float32")


def precisions() -> Mapping[str, object]:
    """The state of PyTorch's precision switches; the older one raises once a newer one was used."""
    matmuls = {name: getattr(getattr(torch.backends, name), "matmul", None) for name in ("cuda", "mkldnn")}
    newer = {name: getattr(matmul, "fp32_precision", None) for name, matmul in matmuls.items()}
    try:
        return {**newer, "older": torch.get_float32_matmul_precision()}
    except RuntimeError:
        return {**newer, "older": "raises"}


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.parametrize("switch", ["none", "older", "cuda", "mkldnn", "all"])
def test_it_leaves_the_precision_of_products_alone(switch):
    """All of PyTorch's switches keep their state; during the comparison none of them allows rounding."""
    if not NEWER and switch not in ("none", "older"):
        pytest.skip("this version of PyTorch has no such switch")
    start, seen = precisions(), []

    class Looks(OpenFold):
        def forward(self, s, z, r, mask):
            seen.append(precisions())
            return super().forward(s, z, r, mask)

    owners = {"cuda": lambda: torch.backends.cuda.matmul, "mkldnn": lambda: torch.backends.mkldnn.matmul}
    owner = {**owners, "all": lambda: torch.backends}.get(switch, lambda: None)()
    try:
        if owner is not None:
            owner.fp32_precision = "tf32"
        if switch == "older":
            torch.set_float32_matmul_precision("high")
        before = precisions()
        assert before != start or switch == "none"
        ipa_torch.replace_ipa(Looks(ONE_WIDTH))
        assert precisions() == before
        assert seen
        assert all(x["older"] == "highest" and {x["cuda"], x["mkldnn"]} <= {"ieee", None} for x in seen)
        if switch == "all":  # the others still follow it
            owner.fp32_precision = "ieee"
            assert precisions() == start | {"cuda": "ieee", "mkldnn": "ieee"}
    finally:
        if owner is not None:
            owner.fp32_precision = "none"
        if switch == "older":
            torch.set_float32_matmul_precision(start["older"])
        for name in ("cuda", "mkldnn") if NEWER else ():
            getattr(torch.backends, name).matmul.fp32_precision = start[name]
    assert precisions() == start


@pytest.mark.skipif(not NEWER, reason="this version of PyTorch has no such switch")
def test_a_layer_that_reads_the_older_switch():
    """The layer of lucidrains reads it, so it cannot run unchanged after a newer switch was used."""
    pytest.importorskip("invariant_point_attention")
    matmul, layer = torch.backends.cuda.matmul, peers.lucidrains_module(ODD_NO_BIAS)
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        (row,) = ipa_torch.replace_ipa(layer).replaced
        assert row.error <= bound("out", "float32")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("made_there", [False, True])
def test_in_inference_mode(made_there):
    """Layers made before it or in it work, at a length that streams."""
    pytest.importorskip("transformers")
    case = make_case("inference", IPAConfig.alphafold2(), (1, 100)).astype("float32")
    with torch.inference_mode() if made_there else nullcontext():
        layer = peers.esmfold_module(case)
        before = copy.deepcopy(layer)
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    with torch.inference_mode():
        (row,) = ipa_torch.replace_ipa(layer).replaced
        assert row.error <= bound("out", "float32")
        single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
        frames = Rigid(Rotation(rot_mats=torch.from_numpy(case.rotation)), torch.from_numpy(case.translation))
        after = layer(single, pair, frames, mask.float())
        judge(after.clone(), before(single, pair, frames, mask.float()).clone(), case.mask, dtype="float32")
    assert layer.linear_q.weight.is_inference() == made_there


def test_an_implementation_in_float32_alone_can_be_compared(monkeypatch):
    """The fused kernels have no float64, in which the epsilon and the norm are found."""

    def fused(q, *others, **named):
        if q.dtype is not torch.float32:
            raise NotImplementedError(f"float32 was expected; got {q.dtype}")
        return IMPLEMENTATIONS["reference"](q, *others, **named)

    monkeypatch.setitem(IMPLEMENTATIONS, "fused", fused)
    layer = OpenFold(ONE_WIDTH)
    (row,) = ipa_torch.replace_ipa(layer, implementation="fused").replaced
    assert row.error <= bound("out", "float32")
    assert layer._ipa_twins.implementation == "fused"
