"""Hooks, modules, classes and forwards that others put on a replaced layer are called or raise."""

from __future__ import annotations

import pytest

from ipa_parity import peers
from ipa_parity.attention.cases import ODD_NO_BIAS, make_case

torch = pytest.importorskip("torch")
from stand_ins import ONE_WIDTH, OpenFold, OpenFold1, rigids, stand_in
from torch import nn

import ipa_torch


class Wrapper(nn.Module):
    """A wrapper such as adapters use."""

    def __init__(self, base):
        super().__init__()
        self.linear, self.weight = base, getattr(base, "weight", None)

    def forward(self, x):
        return 2 * self.linear(x)


def test_wrappers_of_submodules_are_called_or_raise():
    """Only a part of the pair bias and of OpenFold 2's point projections is read, so wrappers around them raise."""
    for name, kind in (("linear_b", OpenFold), ("linear_q_points", OpenFold), ("linear_b", OpenFold1)):
        layer = kind(ONE_WIDTH)
        ipa_torch.replace_ipa(layer)
        case = make_case("wrapped", ONE_WIDTH, (1, 7)).astype("float32")
        arguments = (torch.from_numpy(case.single), torch.from_numpy(case.pair), rigids(case))
        mask = torch.from_numpy(case.mask).float()
        hook = getattr(layer, name).register_forward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match=f"{name} has hooks"):
            layer(*arguments, mask)
        hook.remove()
        before = layer(*arguments, mask)
        setattr(layer, name, Wrapper(getattr(layer, name)))
        with pytest.raises(NotImplementedError, match=f"{name} is a Wrapper where a .* was"):
            layer(*arguments, mask)
    layer = OpenFold1(ONE_WIDTH)
    ipa_torch.replace_ipa(layer)
    before = layer(*arguments, mask)
    for name in ("linear_q", "linear_q_points"):
        setattr(layer, name, Wrapper(getattr(layer, name)))
        after = layer(*arguments, mask)
        assert not torch.allclose(before, after)
        before = after


def test_a_class_or_a_forward_on_top_must_go_first():
    """FSDP, parametrisations and accelerate add such classes; restoring is all or nothing."""
    model = nn.ModuleDict({"first": OpenFold(ONE_WIDTH), "second": OpenFold(ONE_WIDTH)})
    ipa_torch.replace_ipa(model)
    layer = model["second"]
    ours = type(layer)
    layer.forward = layer.forward
    with pytest.raises(ValueError, match=r"second: .* undo that first"):
        ipa_torch.restore_ipa(model)
    del layer.forward
    layer.__class__ = type("Sharded", (ours,), {})
    with pytest.raises(ValueError, match=r"second: .* it is a Sharded"):
        ipa_torch.restore_ipa(model)
    assert "changed to Sharded after it was replaced" in ipa_torch.replace_ipa(model, verify=False).left_alone["second"]
    assert isinstance(model["first"], ours)
    layer.__class__ = ours
    torch.nn.utils.parametrize.register_parametrization(layer, "head_weights", nn.Identity())
    with pytest.raises(ValueError, match="undo that first"):
        ipa_torch.restore_ipa(model)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "head_weights")
    assert ipa_torch.restore_ipa(model) == ["first", "second"]
    assert [type(x) for x in model.values()] == [OpenFold, OpenFold]


def test_hooks_are_called_or_the_call_raises():
    """This holds for forward and backward hooks, on modules that are called, read or neither."""
    layer, _, case = stand_in("FrameFlow, MultiFlow")
    ipa_torch.replace_ipa(layer)
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    arguments = (single.requires_grad_(), pair.requires_grad_(), rigids(case), mask.float())
    registers = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    registers += ("register_full_backward_pre_hook",)
    for of in ("linear_b", "down_z", "softmax", "dropout"):
        for register in registers:
            hook = getattr(layer.get_submodule(of), register)(lambda *_: None)
            with pytest.raises(NotImplementedError, match=rf"{of} has (backward )?hooks, which would have no effect"):
                layer(*arguments)
            hook.remove()
        whole, part = layer.get_submodule(of), nn.Identity()
        setattr(layer, of, part)
        with pytest.raises(NotImplementedError, match=f"{of} is a Identity where a {type(whole).__name__} was"):
            layer(*arguments)
        setattr(layer, of, whole)
    seen = []
    for of in ("", "linear_q", "linear_kv_points", "linear_out"):
        for register in registers:
            getattr(layer.get_submodule(of), register)(lambda *_, what=(of, register): seen.append(what))
    for name, x in layer.named_parameters():
        x.register_hook(lambda _, what=name: seen.append(what))
    layer(*arguments).sum().backward()
    assert sorted(seen, key=str) == sorted(
        [*((of, x) for of in ("", "linear_q", "linear_kv_points", "linear_out") for x in registers)]
        + [name for name, _ in layer.named_parameters()],
        key=str,
    )


def test_hooks_on_lucidrains_bias():
    pytest.importorskip("invariant_point_attention")
    for of in ("to_pairwise_attn_bias", "to_pairwise_attn_bias.0", "to_pairwise_attn_bias.1"):
        layer = peers.lucidrains_module(ODD_NO_BIAS)
        ipa_torch.replace_ipa(layer, verify=False)
        layer.get_submodule(of).register_full_backward_hook(lambda *_: None)
        with pytest.raises(NotImplementedError, match=f"{of} has backward hooks"):
            layer(
                torch.zeros(1, 7, ODD_NO_BIAS.num_channel),
                rotations=torch.eye(3).expand(1, 7, 3, 3),
                translations=torch.zeros(1, 7, 3),
            )
