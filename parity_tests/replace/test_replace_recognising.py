"""Layers that are recognised, and those that are left alone with the reason."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ipa_parity.attention.cases import ODD

torch = pytest.importorskip("torch")
from stand_ins import DOWN_Z, ONE_WIDTH, FlashIPA, FrameDiff, FrameFlow, MultiFlow, OpenFold, OpenFold1
from torch import nn

import ipa_torch


def test_parameters_that_no_forward_pass_reads():
    """The report names them; they stay in the state dict without gradients. If one were read, the check would fail."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ipa_0": FrameDiff(DOWN_Z), "ipa_1": FrameFlow(DOWN_Z)})
    model["ipa_0"].linear_rbf.requires_grad_(False)  # as in FoldFlow
    keys = list(model.state_dict())
    report = ipa_torch.replace_ipa(model)
    assert [x.unused for x in report.replaced] == [("linear_rbf.bias", "linear_rbf.weight"), ()]
    assert str(report).splitlines()[-1] == "not read, before or after: ipa_0.linear_rbf.bias, ipa_0.linear_rbf.weight"
    assert list(model.state_dict()) == keys

    class Reads(FrameDiff):
        def forward(self, s, z, r, mask):
            return super().forward(s, z, r, mask) + self.linear_rbf(mask[..., None].expand(*mask.shape, 20))

    layer = Reads(DOWN_Z)
    for x in layer.linear_rbf.parameters():
        x.data.zero_()
    with pytest.raises(ValueError, match="another function"):
        ipa_torch.replace_ipa(layer)


class OtherCall(OpenFold):
    def forward(self, one, two, r, mask) -> torch.Tensor:
        return super().forward(one, two, r, mask)


class SomePointAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(2, 2)


class Unnamed(nn.Module):
    """A module with only some of OpenFold's names."""

    def __init__(self):
        super().__init__()
        self.linear_kv_points = nn.Linear(2, 2)


class Variadic(OpenFold):
    def forward(self, *others) -> torch.Tensor:
        return super().forward(*others)


class OneMoreArgument(OpenFold):
    def forward(self, s, z, r, mask, edge_bias) -> torch.Tensor:
        return super().forward(s, z, r, mask)


def with_forward(layer, of=""):
    layer.get_submodule(of).forward = lambda *arguments: None
    return layer


def with_hook(layer, register="register_forward_hook", of="linear_b"):
    getattr(layer.get_submodule(of), register)(lambda *_: None)
    return layer


def with_two_epsilons(layer):
    layer.config = SimpleNamespace(epsilon=1e-12)
    return layer


def with_infinity(layer, infinity):
    layer.inf = infinity
    return layer


def with_adapters(layer):
    layer.linear_q.lora_A = nn.Linear(2, 2)
    return layer


def with_a_smaller_layer(layer):
    layer.linear_q.weight = nn.Parameter(layer.linear_q.weight[:, :-1])
    return layer


def without_epsilon(layer):
    del layer.eps
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: FrameDiff(DOWN_Z, width=19), r"has no linear_rbf\.weight of this shape: pass verify=True, to replace"),
        (lambda: with_two_epsilons(OpenFold1(ONE_WIDTH)), r"it has 2 epsilons in \.eps, \.config\.epsilon or the like"),
        (lambda: without_epsilon(OpenFold(ONE_WIDTH)), r"it has no epsilons in .*: pass verify=True, to find the one"),
        (
            lambda: with_adapters(OpenFold(ONE_WIDTH)),
            r"has no linear_q\.lora_A\.bias, linear_q\.lora_A\.weight of this",
        ),
    ],
)
def test_layers_that_only_a_comparison_tells(make, reason):
    """They are left alone without a comparison."""
    with pytest.raises(ValueError, match=reason):
        ipa_torch.replace_ipa(make(), verify=False)
    layer = make()
    if hasattr(layer.linear_q, "lora_A"):  # of which the stand-in cannot compute anything
        return
    assert ipa_torch.replace_ipa(layer).replaced
    assert layer._ipa_twins.config.norm_epsilon == 1e-8


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: OtherCall(ONE_WIDTH),
            "its forward takes one, two, r, mask, and none of them is the single representation: its name may be s",
        ),
        (
            lambda: OneMoreArgument(ONE_WIDTH),
            "its forward takes s, z, r, mask, edge_bias, and our attention has nothing like edge_bias: give it",
        ),
        (lambda: Variadic(ONE_WIDTH), "its forward takes others, and none of them is the single representation"),
        (lambda: FlashIPA(DOWN_Z, use_flash_attn=True), "its use_flash_attn is True, and only at False"),
        (
            lambda: with_hook(OpenFold(ONE_WIDTH), "register_full_backward_hook"),
            "its linear_b has backward hooks, which",
        ),
        (lambda: with_hook(MultiFlow(DOWN_Z), of="softmax"), "its softmax has hooks, which would have no effect"),
        (lambda: with_hook(MultiFlow(DOWN_Z), of="down_z"), "its down_z has hooks, which would have no effect"),
        (lambda: with_a_smaller_layer(OpenFold(ONE_WIDTH)), r"missing or of another shape are linear_kv\.weight, "),
        (lambda: with_forward(OpenFold(ONE_WIDTH)), "the layer has a forward set on the object"),
        (lambda: with_forward(OpenFold(ONE_WIDTH), "linear_q"), "linear_q has a forward set on the object"),
        (lambda: with_hook(OpenFold(ONE_WIDTH)), "its linear_b has hooks, which would have no effect"),
        (lambda: with_infinity(OpenFold(ONE_WIDTH), 9), "it subtracts only 9 from the logits of masked keys"),
        (lambda: with_infinity(OpenFold(ONE_WIDTH), None), "it subtracts only None from the logits of masked keys"),
        (Unnamed, "its parameters do not have the names of any supported system"),
        (SomePointAttention, "its parameters do not have the names of any supported system"),
        (lambda: ipa_torch.InvariantPointAttention(ODD), "it is this project's own"),
    ],
)
def test_layers_left_alone_are_listed_with_the_reason(make, reason):
    model = nn.ModuleDict({"known": OpenFold(ONE_WIDTH), "other": make()})
    report = ipa_torch.replace_ipa(model, verify=False)
    assert [x.path for x in report.replaced] == ["known"]
    assert list(report.left_alone) == ["other"]
    assert re.search(reason, report.left_alone["other"])
    assert report.left_alone["other"] in str(report)
    with pytest.raises(ValueError, match=rf"was expected somewhere.*(?s:.)*other: .*{reason}"):
        ipa_torch.replace_ipa(nn.ModuleDict({"other": make()}))


def test_a_model_without_one():
    with pytest.raises(ValueError, match=r"was expected somewhere in this Linear; there is none$"):
        ipa_torch.replace_ipa(nn.Linear(2, 2))


def test_the_report_is_in_the_models_order():
    """Layers of all systems, and those left alone, are in the model's order."""
    kinds = {"b": OpenFold1, "a": OpenFold, "d": OpenFold1, "c": FrameFlow}
    model = nn.ModuleDict({name: kind(DOWN_Z if kind is FrameFlow else ONE_WIDTH) for name, kind in kinds.items()})
    model.update({"z": SomePointAttention(), "y": Unnamed(), "x": OtherCall(ONE_WIDTH)})
    report = ipa_torch.replace_ipa(model, verify=False)
    assert [x.path for x in report.replaced] == ["b", "a", "d", "c"]
    assert list(report.left_alone) == ["z", "y", "x"]


def test_a_layer_in_two_places_is_one():
    layer = OpenFold(ONE_WIDTH)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer})})
    assert [x.path for x in ipa_torch.replace_ipa(model).replaced] == ["a"]
    assert ipa_torch.restore_ipa(model) == ["a"]


def test_no_other_package_is_imported():
    code = """
import sys, torch, ipa_torch, ipa_bridge
from ipa_bridge import IPAConfig
try: ipa_torch.replace_ipa(torch.nn.Linear(1, 1))
except ValueError: pass
foreign = {"transformers", "alphafold", "openfold", "invariant_point_attention", "jax", "haiku"} & set(sys.modules)
assert not foreign, foreign
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def published(kind, path="", **attributes):
    """A layer of the given class at a path, with its ε in the class's own attribute."""
    layer = kind(ONE_WIDTH)
    del layer.eps
    for name, value in attributes.items():
        setattr(layer, name, value)
    for step in reversed([x for x in path.split(".") if x]):
        layer = nn.ModuleDict({step: layer})
    return layer


@pytest.mark.parametrize(
    ("path", "told", "system"),
    [
        ("trunk.structure_module.ipa", {"eps": 1e-8}, "ESMFold"),  # the original ESMFold uses OpenFold 1's class
        ("trunk.structure_module.ipa", {"config": SimpleNamespace(epsilon=1e-8)}, "ESMFold"),
        ("ipa", {"config": SimpleNamespace(epsilon=1e-8)}, "ESMFold"),
        ("ipa", {"eps": 1e-8}, "OpenFold 1"),
        ("ipa", {"eps": 1e-8, "config": SimpleNamespace(epsilon=1e-8)}, "OpenFold 1"),
    ],
)
def test_epsilon_is_read_from_either_attribute(path, told, system):
    (row,) = ipa_torch.replace_ipa(published(OpenFold1, path, **told)).replaced
    assert (row.path, row.system) == (path, system)
