"""The torch IPA warns of coordinates in Å where it expects units of 10 Å."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch_module_cases import arguments, judge, model

import ipa_torch
from ipa_bridge.config import (
    IPABlockConfig,
    StructureModuleConfig,
)
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_parity.attention.cases import CATALOGUE, ODD, ODD_DOWN_Z, ODD_NO_BIAS, make_case


def in_angstroms(config=ODD):
    """A peptide's frames in Å, whatever the config's unit is; and a module of it."""
    case = make_case("", config, structure=idealised_peptide())
    single, pair, rigids, mask = arguments(case)
    rigids = rigids.scale_translation(3.8 / (rigids.translation[1:] - rigids.translation[:-1]).norm(dim=-1).median())
    return model(case), (single, pair, rigids, mask)


IN_ANGSTROMS = r"in units of 10 Å.*median of 3\.8 units apart"


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "parameter", "inference", "no mask", "batch", "block"])
def test_angstroms_are_warned_of_where_ten_are_a_unit(kind):
    module, (single, pair, rigids, mask) = in_angstroms()
    if kind == "bfloat16":
        rigids = rigids.astype(torch.bfloat16)
    elif kind == "parameter":
        rigids = ipa_torch.Rigid(rigids.rotation, torch.nn.Parameter(rigids.translation))
    elif kind == "no mask":
        mask = None
    elif kind == "batch":
        single, pair, mask = (torch.stack([x, x]) for x in (single, pair, mask))
        rigids = ipa_torch.Rigid(*(torch.stack([x, x]) for x in rigids))
    elif kind == "block":
        module = ipa_torch.IPABlock(IPABlockConfig(ipa=ODD))
    with torch.inference_mode(kind == "inference"), pytest.warns(UserWarning, match=IN_ANGSTROMS):
        module(single, pair, rigids, mask)


def test_angstroms_are_warned_of_once():
    module, inputs = in_angstroms()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            module(*inputs)
    assert [x.category for x in caught] == [UserWarning]


@pytest.mark.parametrize(
    "config",
    [replace(ODD, frame_unit=None), ODD_NO_BIAS, ODD_DOWN_Z, replace(ODD, position_scale=10.0)],
    ids=["unknown", "lucidrains", "framediff", "divides itself"],
)
def test_angstroms_are_not_warned_of_where_they_are_meant_or_may_be(config):
    module, inputs = in_angstroms(config)
    module(*inputs)


def test_angstroms_are_not_warned_of_within_a_structure_module():
    config = StructureModuleConfig(ipa=ODD, num_layer=1, sidechain_channel=5)
    _, (single, pair, rigids, mask) = in_angstroms()
    in_its_unit = rigids.scale_translation(config.position_scale)
    ipa_torch.StructureModule(config)(single, pair, mask.long(), mask, rigids=in_its_unit)


def test_angstroms_are_not_warned_of_in_replaced_layers():
    pytest.importorskip("transformers")
    from transformers.models.esm.modeling_esmfold import EsmFoldInvariantPointAttention
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    layer = EsmFoldInvariantPointAttention(
        SimpleNamespace(
            sequence_dim=11,
            pairwise_dim=6,
            ipa_dim=4,
            num_heads_ipa=3,
            num_qk_points=5,
            num_v_points=7,
            epsilon=1e-8,
            inf=1e5,
        )
    )
    ipa_torch.replace_ipa(layer)
    _, (single, pair, rigids, mask) = in_angstroms()
    frames = Rigid(Rotation(rot_mats=rigids.rotation), rigids.translation)
    layer(single, pair, frames, mask.float())


def test_angstroms_are_not_warned_of_under_traces_and_transforms():
    """The check breaks none of these transformations."""
    module, (single, pair, rigids, mask) = in_angstroms()
    module.requires_grad_(False)
    call = lambda t: module(single, pair, ipa_torch.Rigid(rigids.rotation, t), mask)  # noqa: E731
    with pytest.warns(UserWarning, match=IN_ANGSTROMS):
        expected = call(rigids.translation)
    batch = torch.stack([rigids.translation, rigids.translation])
    torch.func.vmap(call)(batch)
    torch.func.vmap(lambda s: module(s, pair, rigids, mask))(torch.stack([single, single]))
    torch.func.grad(lambda t: call(t).sum())(rigids.translation)
    torch.func.vmap(torch.func.grad(lambda t: call(t).sum()))(batch)
    torch.func.jvp(call, (rigids.translation,), (rigids.translation,))
    torch.func.functionalize(call)(rigids.translation)
    make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(rigids.translation)
    judge(torch.compile(call, fullgraph=True, backend="eager")(rigids.translation), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        call(fake.from_tensor(rigids.translation))
    elsewhere = [x.to("meta") for x in (single, pair, *rigids, mask)]
    module.to("meta")(*elsewhere[:2], ipa_torch.Rigid(*elsewhere[2:4]), elsewhere[4])
    torch.compiler.reset()


def test_a_compiled_graph_holds_nothing_of_the_check():
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    for unit in (10.0, None):
        module, inputs = in_angstroms(replace(ODD, frame_unit=unit))
        torch.compile(module, fullgraph=True, backend=backend)(*inputs)
        torch.compiler.reset()
    assert sizes[0] == sizes[1]


def test_moves_between_devices_and_dtypes():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    expected = module(single, pair, rigids, mask)
    doubled = module.to(torch.float64)(single.double(), pair.double(), rigids.astype(torch.float64), mask)
    judge(doubled.float(), expected)
    elsewhere = [x.to("meta") for x in (single, pair, *rigids, mask)]
    out = module.to("meta")(*elsewhere[:2], ipa_torch.Rigid(*elsewhere[2:4]), elsewhere[4])
    assert (out.device.type, out.shape) == ("meta", expected.shape)
