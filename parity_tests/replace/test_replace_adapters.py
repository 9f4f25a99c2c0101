"""Replaced layers keep their calls, and compute the same function with the same gradients."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights
from ipa_parity import peers
from ipa_parity.attention.cases import ODD_NO_BIAS, make_case

torch = pytest.importorskip("torch")
from stand_ins import ONE_WIDTH, STAND_INS, FlashIPA, MultiFlow, judge, rigids, stand_in

import ipa_torch


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "streamed", "reference"])
@pytest.mark.parametrize("which", STAND_INS)
def test_layers_of_openfold_and_framediff(which, implementation):
    """Outputs agree with the oracle, and gradients with our module."""
    layer, ours, case = stand_in(which, np.float64)
    before = copy.deepcopy(layer)
    report = ipa_torch.replace_ipa(layer, implementation=implementation)
    assert [(x.path, x.system) for x in report.replaced] == [("", which.partition(",")[0].removesuffix(" multimer"))]
    assert report.replaced[0].error <= bound("out", "float64")
    assert not report.left_alone
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    arguments = {"s": single, "z": pair, "r": rigids(case), "mask": mask.double()}
    if isinstance(before, FlashIPA):
        arguments |= {"z_factor_1": None, "z_factor_2": None}
    judge(layer(**arguments), before(**arguments), case.mask)

    inputs = [single.requires_grad_(), pair.requires_grad_()]
    frames = ipa_torch.Rigid(*(torch.from_numpy(x) for x in (case.rotation, case.translation)))
    if case.config.layout == "monomer":  # as the original layer does
        frames = frames.astype(torch.float32)
    cotangent = torch.from_numpy(case.cotangent)
    # Our module centres frames in their dtype; the layer centres them in float64, its inputs' dtype.
    expected = torch.autograd.grad(
        (ours(*inputs, frames.astype(torch.float64), mask) * cotangent).sum(), [*inputs, *ours.parameters()]
    )
    read = {name: x for name, x in layer.named_parameters() if not name.startswith("linear_rbf")}
    actual = torch.autograd.grad((layer(**arguments) * cotangent).sum(), [*inputs, *read.values()])
    canonical = {name: x.numpy() for (name, _), x in zip(ours.named_parameters(), expected[2:], strict=True)}
    theirs = {name: x.numpy() for name, x in zip(read, actual[2:], strict=True)}
    ported = Weights.from_torch(
        {name: torch.from_numpy(x) for name, x in canonical.items()}, dialect="ipa_torch", config=case.config
    ).to_torch(dialect=layer.dialect)
    for x, y in zip(actual[:2], expected[:2], strict=True):
        judge(x, y, None, "gradient/input")
    assert {name for name in ported if not name.startswith("linear_rbf")} == set(theirs)
    for name, x in theirs.items():
        if name == "linear_b.bias":
            assert not x.any()
        else:
            judge(x, ported[name], None, f"gradient/{name}")


@pytest.mark.parametrize(("kind", "names"), [(MultiFlow, ["attention_mask"]), (FlashIPA, ["z_factor_1", "z_factor_2"])])
def test_arguments_accepted_at_one_value_only(kind, names):
    """They are accepted by position and by name; another value raises an error that names the argument."""
    layer, _, case = stand_in(f"FrameFlow, {kind.__name__}")
    before = copy.deepcopy(layer)
    ipa_torch.replace_ipa(layer)
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    nothing = dict.fromkeys(names)
    in_order = [single, pair, rigids(case), mask.float()]
    in_order[len(in_order) if kind is MultiFlow else 2 : 2] = [None] * len(names) if kind is FlashIPA else []
    by_name = {"s": single, "z": pair, "r": rigids(case), "mask": mask.float()}
    expected = before(**by_name, **nothing)
    judge(layer(*in_order), expected, case.mask, dtype="float32")
    judge(layer(**by_name, **nothing), expected, case.mask, dtype="float32")
    if kind is MultiFlow:
        judge(layer(*in_order, None, False, None), expected, case.mask, dtype="float32")
        judge(layer(**by_name), expected, case.mask, dtype="float32")
    for name in names:
        with pytest.raises(ValueError, match=rf"{name}=None was expected.*got a Tensor: call restore_ipa"):
            layer(**by_name, **(nothing | {name: torch.ones(7, 7)}))
    with pytest.raises(TypeError, match="mask was given twice"):
        layer(*in_order, mask=mask)
    with pytest.raises(TypeError, match="arguments by position"):
        layer(*in_order, *[None] * 4)
    with pytest.raises(TypeError, match="mask is missing"):
        layer(s=single, z=pair, r=rigids(case), **nothing)


def test_their_flags_are_accepted():
    """Flags are accepted by position and by name; the pair comes in a list that holds the only reference to it."""
    layer, _, case = stand_in("OpenFold 2")
    ipa_torch.replace_ipa(layer)
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    plain = layer(single, pair, rigids(case), mask)
    for flags, options in (
        ((True,), {}),
        ((), {"inplace_safe": True}),
        ((), {"_offload_inference": True, "_z_reference_list": None}),
    ):
        assert torch.equal(layer(single, pair, rigids(case), mask, *flags, **options), plain)
    assert torch.equal(layer(single, None, rigids(case), mask, True, True, [pair]), plain)
    assert torch.equal(layer(s=single, z=None, r=rigids(case), mask=mask, _z_reference_list=[pair]), plain)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("pair", [True, False])
def test_lucidrains_attention(pair, dtype, monkeypatch):
    """The package's own call gives the same result, including masked rows and gradients."""
    pytest.importorskip("invariant_point_attention")
    config = ODD_NO_BIAS if pair else replace(ODD_NO_BIAS, pair_channel=None)
    case = make_case("lucidrains", config, (2, 7)).astype(dtype)
    assert not case.mask.all()
    everywhere = replace(case, cotangent=np.random.default_rng(1).standard_normal(case.single.shape).astype(dtype))
    before = peers.run_lucidrains(everywhere)
    after = with_swapped(monkeypatch, "lucidrains_module", peers.run_lucidrains, everywhere)
    assert_same(before, after, dtype)


@pytest.mark.parametrize("implementation", ["streamed", "reference"])
def test_esmfolds_attention(implementation, monkeypatch):
    pytest.importorskip("transformers")
    case = make_case("ESMFold", ONE_WIDTH, (2, 7)).astype("float32")
    case = replace(case, cotangent=case.cotangent * case.mask[..., None])
    before = peers.run_esmfold(case)
    after = with_swapped(monkeypatch, "esmfold_module", peers.run_esmfold, case, implementation=implementation)
    after["out"] = np.where(case.mask[..., None], after["out"], before["out"])  # there they differ by rounding of 1e5
    assert_same(before, after, "float32")


def with_swapped(monkeypatch, maker: str, run, case, **options):
    where = sys.modules[run.__module__]
    make = getattr(where, maker)

    def swapped(*arguments):
        module = make(*arguments)
        ipa_torch.replace_ipa(module, **options)
        return module

    with monkeypatch.context() as patch:
        patch.setattr(where, maker, swapped)
        return run(case)


def assert_same(before, after, dtype):
    assert set(before) == set(after)
    for stage, x in before.items():
        if stage == "gradient/attention_2d/bias":  # zero, or a sum that cancels except for rounding
            assert not after[stage].any()
        else:
            judge(after[stage], x, None, stage, dtype)


def test_again_changes_the_implementation():
    layer, _, _ = stand_in("OpenFold 2")
    kind = type(layer)
    for implementation in ("reference", "streamed", None):
        ipa_torch.replace_ipa(layer, implementation=implementation)
        assert layer._ipa_twins.implementation == implementation
        assert type(layer).__bases__[1] is kind
    ipa_torch.restore_ipa(layer)
    assert type(layer) is kind
    with pytest.raises(ValueError, match="implementation"):
        ipa_torch.replace_ipa(layer, implementation="fastest")


def test_fewer_batch_axes_are_broadcast():
    """The original layer broadcasts them too; a missing pair raises."""
    layer, _, case = stand_in("OpenFold 2", np.float32)
    ipa_torch.replace_ipa(layer)
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    frames = rigids(case)
    twice = torch.cat([single, 2 * single])
    expected = [layer(x, pair, frames, mask) for x in (single, 2 * single)]
    for shared_mask in (mask, mask[0]):
        judge(layer(twice, pair, frames, shared_mask), torch.cat(expected), None, "out", "float32")
    with pytest.raises(ValueError, match="a pair representation was expected"):
        layer(single, None, frames, mask)
    with pytest.raises(TypeError, match="nonsense"):
        layer(single, pair, frames, mask, nonsense=1)
