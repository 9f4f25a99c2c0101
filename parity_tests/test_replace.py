"""Other people's layers computing as ours: the same function, the same parameters, and back again."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ipa_bridge import semantics
from ipa_bridge.config import IPABlockConfig, IPAConfig, StructureModuleConfig
from ipa_bridge.dialects import named
from ipa_bridge.tolerance import bound, epsilon
from ipa_bridge.weights import Weights
from ipa_parity import peers
from ipa_parity.cases import ODD, ODD_NO_BIAS, make_case
from ipa_parity.report import compare

torch = pytest.importorskip("torch")
from torch import nn

import ipa_torch

ONE_WIDTH = replace(ODD, num_scalar_v=ODD.num_scalar_qk)
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()


class Rotation:
    """As OpenFold's, float32 whatever it is given."""

    def __init__(self, rot_mats, quats=None):
        assert quats is None
        self.rot_mats = rot_mats.float()

    def get_rot_mats(self):
        return self.rot_mats


class Rigid:
    """As OpenFold's."""

    def __init__(self, rots, trans):
        self.rots, self.trans = rots, trans.float()

    def get_rots(self):
        return self.rots

    def get_trans(self):
        return self.trans


class Array:
    def __init__(self, x):
        self.x = x

    def to_tensor(self):
        return self.x


class Rigid3Array:
    """As OpenFold's in its multimer models."""

    def __init__(self, rotation, translation):
        self.rotation, self.translation = Array(rotation), Array(translation)

    @classmethod
    def from_tensor_4x4(cls, x):
        return cls(x[..., :3, :3], x[..., :3, 3])


class Projection(nn.Module):
    """OpenFold 2's point projection, whose linear layer lies within."""

    def __init__(self, *widths):
        super().__init__()
        self.linear = nn.Linear(*widths)


class OpenFold(nn.Module):
    """OpenFold's signature and parameters' names; numbers are float64 numpy's, written from its conventions.

    Gradients are our module's, which the rest of the suite holds against numpy's complex steps.
    """

    dialect = "openfold"

    def __init__(self, config: IPAConfig, *, eps: float = 1e-8) -> None:
        super().__init__()
        self.function, self.eps, self.inf = replace(config, norm_epsilon=eps), eps, 1e5
        for name, (theirs, transform) in named(self.dialect).names(config).items():
            if theirs.endswith(".weight"):
                *inner, layer, _ = theirs.split(".")
                bias = name.replace("/weights", "/bias") in named(self.dialect).names(config)
                linear = nn.Linear(*transform.their_shape[::-1], bias=bias)
                parent = self
                for step in inner:
                    parent = parent._modules.setdefault(step, nn.Module())
                parent.add_module(layer, linear)
        self.head_weights = nn.Parameter(torch.zeros(config.num_head))

    def forward(
        self, s, z, r, mask, inplace_safe=False, _offload_inference=False, _z_reference_list=None
    ) -> torch.Tensor:
        if isinstance(r, Rigid3Array):
            rotation, translation = r.rotation.to_tensor(), r.translation.to_tensor()
        else:
            rotation, translation = r.get_rots().get_rot_mats(), r.get_trans()
        state = {name: x for name, x in self.state_dict().items() if not name.startswith("linear_rbf")}
        p = {name: x.double().numpy() for name, x in state.items()}
        arrays = (x.detach().double().numpy()[0] for x in (s, z, rotation, translation, mask))
        out = torch.from_numpy(semantics.attention(self.dialect, p, self.function, *arrays))[None].to(s.dtype)
        ours = ipa_torch.InvariantPointAttention(self.function).to(s.dtype)
        ours.load_state_dict(Weights.from_torch(state, dialect=self.dialect, config=self.function).to_torch())
        linked = ours(s, z, ipa_torch.Rigid(rotation, translation), mask)
        return out + (linked - linked.detach())


class OpenFold1(OpenFold):
    dialect = "openfold_v1"


class FrameFlow(OpenFold):
    dialect = "frameflow"

    def forward(self, s, z, r, mask, _offload_inference=False, _z_reference_list=None) -> torch.Tensor:
        return super().forward(s, z, r, mask)


class FrameDiff(FrameFlow):
    """FrameDiff's and FoldFlow's classes, whose checkpoints hold a layer that no forward calls."""

    dialect = "framediff"

    def __init__(self, config, width=20):
        super().__init__(config)
        self.linear_rbf = nn.Linear(width, 1)


class MultiFlow(FrameFlow):
    """MultiFlow's call; its softmax and its dropout are modules."""

    def __init__(self, config, dropout=0.0):
        super().__init__(config)
        self.softmax, self.dropout, self.dropout_prob = nn.Softmax(-1), nn.Dropout(dropout), dropout

    def forward(self, s, z, r, mask, attention_mask=None, _offload_inference=False, _z_reference_list=None):
        assert attention_mask is None
        return super().forward(s, z, r, mask)


class FlashIPA(FrameFlow):
    """FlashIPA's call, where what only its flash mode takes comes before the frames."""

    def __init__(self, config, use_flash_attn=False):
        super().__init__(config)
        self.use_flash_attn = use_flash_attn

    def forward(self, s, z, z_factor_1, z_factor_2, r, mask, _offload_inference=False, _z_reference_list=None):
        assert z_factor_1 is None
        assert z_factor_2 is None
        return super().forward(s, z, r, mask)


class OpenFoldMultimer(OpenFold):
    """OpenFold 2's monomer class with is_multimer, which takes lengths in another form than its class for multimers."""

    def __init__(self, config):
        super().__init__(replace(config, norm_form="add"))


class TFold(OpenFold1):
    """tFold's call; float32 frames do not multiply float64 points."""

    def forward(self, s, z=None, r=None, mask=None):
        if s.dtype is torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return super().forward(s, z, r, torch.ones(s.shape[:-1]) if mask is None else mask)


class FastFold(OpenFold1):
    """FastFold's call, which takes no batch axis, nor float64."""

    def forward(self, s, z, r, mask):
        if s.ndim != 2 or s.dtype is torch.float64:
            raise RuntimeError("number of dimensions in the tensor input does not match")
        batched = Rigid(Rotation(r.get_rots().get_rot_mats()[None]), r.get_trans()[None])
        return super().forward(s[None], z[None], batched, mask[None])[0]


DOWN_Z = replace(ONE_WIDTH, pair_channel=8, pair_value_channel=2)
MULTIMER = replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp")
STAND_INS = {
    "OpenFold 2": (OpenFold, ONE_WIDTH),
    "OpenFold 2 multimer": (OpenFold, MULTIMER),
    "OpenFold 1": (OpenFold1, ONE_WIDTH),
    "FrameFlow": (FrameFlow, DOWN_Z),
    "FrameDiff": (FrameDiff, DOWN_Z),
    "FrameFlow, MultiFlow": (MultiFlow, DOWN_Z),
    "FrameFlow, FlashIPA": (FlashIPA, DOWN_Z),
    "OpenFold 2 multimer, by the other class": (OpenFoldMultimer, MULTIMER),
}


def rigids(case):
    tensors = [torch.from_numpy(x) for x in (case.rotation, case.translation)]
    return Rigid3Array(*tensors) if case.config.layout == "multimer" else Rigid(Rotation(tensors[0]), tensors[1])


def stand_in(which: str, dtype=np.float32):
    """A layer with weights, its inputs, and our own module with the same."""
    kind, config = STAND_INS[which]
    case = make_case(which, config, (1, 7)).astype(np.dtype(dtype).name)
    layer = kind(config).to(torch.from_numpy(case.single).dtype)
    layer.load_state_dict(case.weights.to_torch(dialect=kind.dialect))
    config = layer.function
    ours = ipa_torch.InvariantPointAttention(config).to(layer.head_weights.dtype)
    ours.load_state_dict(case.weights.to_torch())
    return layer, ours, case


@pytest.mark.covering
@pytest.mark.parametrize("implementation", [None, "streamed", "reference"])
@pytest.mark.parametrize("which", STAND_INS)
def test_layers_of_openfold_and_framediff(which, implementation):
    """Against the oracle by their own forward, and with gradients against our module."""
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
    if case.config.layout == "monomer":  # as theirs
        frames = frames.astype(torch.float32)
    cotangent = torch.from_numpy(case.cotangent)
    # Our own module centres frames in their dtype, the layer those that its inputs have made float64.
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


def judge(actual, expected, mask, stage="out", dtype="float64", **options):
    actual, expected = (x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in (actual, expected))
    meaningful = None if mask is None else np.broadcast_to(mask[..., None], actual.shape)
    names = {"case": "replaced", "stage": stage, "dtype": dtype, "subject": "after", "reference": "before"}
    row = compare(actual, expected, **names, meaningful=meaningful, **options)
    assert row.passed, str(row)


def test_parameters_that_no_forward_reads():
    """The report names them; they stay in the state dict, and get no gradient; one that is read would show."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"ipa_0": FrameDiff(DOWN_Z), "ipa_1": FrameFlow(DOWN_Z)})
    model["ipa_0"].linear_rbf.requires_grad_(False)  # as FoldFlow's
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


@pytest.mark.parametrize(("kind", "names"), [(MultiFlow, ["attention_mask"]), (FlashIPA, ["z_factor_1", "z_factor_2"])])
def test_arguments_that_change_nothing_at_one_value(kind, names):
    """In their order and by name; at another value the call names the argument."""
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


def test_their_flags_are_taken():
    """In their order and by name; the pair in a list, from which nobody else holds it."""
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
    """Its own call, masked rows and gradients included."""
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
    make = getattr(peers, maker)

    def swapped(*arguments):
        module = make(*arguments)
        ipa_torch.replace_ipa(module, **options)
        return module

    with monkeypatch.context() as patch:
        patch.setattr(peers, maker, swapped)
        return run(case)


def assert_same(before, after, dtype):
    assert set(before) == set(after)
    for stage, x in before.items():
        if stage == "gradient/attention_2d/bias":  # zero, or a sum that cancels to rounding
            assert not after[stage].any()
        else:
            judge(after[stage], x, None, stage, dtype)


def test_a_block_keeps_its_call():
    """The attention inside another system's block, by the README's lines, at a length that streams."""
    pytest.importorskip("invariant_point_attention")
    from invariant_point_attention import IPABlock

    torch.manual_seed(0)
    code = readme("IPABlock(dim=64, heads=8)")
    namespace: dict = {}
    exec(code, namespace)
    block = namespace["block"]
    assert [type(x).__name__ for x in block.modules() if "Attention" in type(x).__name__] == [
        "IPATwinsInvariantPointAttention"
    ]
    other = IPABlock(dim=64, heads=8)
    other.load_state_dict(block.state_dict(), strict=True)
    arguments = {"rotations": torch.eye(3).expand(1, 130, 3, 3), "translations": torch.randn(1, 130, 3)}
    x, pair, mask = torch.randn(1, 130, 64), torch.randn(1, 130, 130, 64), torch.arange(130)[None] < 120
    with pytest.warns(FutureWarning):
        before = other(x, pairwise_repr=pair, **arguments, mask=mask)
    judge(block(x, pairwise_repr=pair, **arguments, mask=mask), before, None, "act", "float32")
    assert Weights.from_torch(block.state_dict()).config == IPABlockConfig.lucidrains(64, heads=8)


@pytest.fixture(scope="module")
def esmfold():
    """Hugging Face's model, a small trunk around a whole structure module with weights of the size of trained ones."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(EXAMPLES))
    try:
        model = importlib.import_module("swap_esmfold").small_esmfold()
    finally:
        sys.path.remove(str(EXAMPLES))
    weights = Weights.random(StructureModuleConfig.alphafold2())
    model.trunk.structure_module.load_state_dict(weights.to_torch(dialect="esmfold"))
    return model


@pytest.fixture
def swapped(esmfold, monkeypatch, capsys):
    """By the README's lines, which load a published one; and they print what the README shows."""
    ours = copy.deepcopy(esmfold)
    monkeypatch.setattr(type(esmfold), "from_pretrained", lambda name: ours)
    code, shown = readme("facebook/esmfold_v1", r"```python\n([^`]*)```\n\n```console\n([^`]*)```")
    namespace: dict = {}
    exec(code, namespace)
    monkeypatch.undo()
    distance = r"[\d.]+ eps apart"
    assert re.sub(distance, "", capsys.readouterr().out) == re.sub(distance, "", shown)
    return namespace["model"]


def readme(of: str, pattern: str = r"```python\n([^`]*)```") -> tuple[str, ...] | str:
    """The one block of code in the README that says this."""
    (found,) = (x for x in re.findall(pattern, README) if of in str(x))
    return found


SEQUENCE = torch.arange(110)[None] * 7 % 20
STAGES = {
    "positions": "atom14",
    "sidechain_frames": "atom14",
    "angles": "angles",
    "unnormalized_angles": "unnormalized_angles",
    "states": "act",
    "lddt_head": "act",
    "plddt": "act",
    "frames": "rotation",
}


def test_esmfold_predicts_the_same(esmfold, swapped):
    attention_mask = (torch.arange(110)[None] < 100).long()
    with torch.no_grad():
        before, after = (model(SEQUENCE, attention_mask=attention_mask) for model in (esmfold, swapped))
    assert set(before) == set(after)
    for name in before:
        assert before[name].shape == after[name].shape
        if name in STAGES:
            valid = attention_mask[0].bool().numpy()
            axis = before[name].shape.index(110)
            x, y = (np.moveaxis(z[name].numpy(), axis, 0)[valid] for z in (after, before))
            judge(x, y, None, STAGES[name], "float32")
        else:
            judge(after[name], before[name], None, "act", "float32")


def test_esmfold_learns_the_same(esmfold, swapped):
    """Gradients of a loss on its atoms, to every parameter that has one; in float32 through its ReLUs."""
    from ipa_bridge.tolerance import KINKED

    gradients = []
    for model in (esmfold, swapped):
        model = copy.deepcopy(model)
        positions = model(SEQUENCE).positions
        loss = (positions[-1] ** 2).mean() + positions.abs().mean()
        loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    before, after = gradients
    assert set(before) == set(after)
    assert sum("structure_module.ipa" in name for name in before) == 13
    largest = max(x.norm() for x in before.values())
    nothing = bound("gradient", "float32") * epsilon("float32") * largest
    for name, x in before.items():
        if name.endswith("ipa.linear_b.bias"):
            assert not after[name].any()
        elif x.norm() <= nothing:  # as that of a bias that a softmax removes: rounding
            assert after[name].norm() <= nothing
        else:
            judge(after[name], x, None, f"gradient/{name}", "float32", norm="euclidean", conditioning=KINKED)


def test_a_checkpoint_is_the_same(esmfold, swapped, tmp_path):
    """Saved after the swap, loaded into the class as it is."""
    swapped.save_pretrained(tmp_path)
    loaded = type(esmfold).from_pretrained(tmp_path)
    expected = esmfold.state_dict()
    assert list(loaded.state_dict()) == list(expected) == list(swapped.state_dict())
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    assert type(loaded.trunk.structure_module.ipa) is type(esmfold.trunk.structure_module.ipa)
    swapped.load_state_dict(expected, strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(esmfold, dtype):
    """Ours is nearer to float32 than the bound of half precision, with half weights and under autocast."""
    layer = copy.deepcopy(esmfold.trunk.structure_module.ipa)
    (row,) = ipa_torch.replace_ipa(copy.deepcopy(layer).to(dtype)).replaced
    assert row.dtype == str(dtype).removeprefix("torch.")
    assert row.error <= bound("out", row.dtype)
    swapped = copy.deepcopy(layer)
    ipa_torch.replace_ipa(swapped)
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    case = make_case("half", IPAConfig.alphafold2(), (1, 110)).astype("float32")
    single, pair, rotation, translation, mask = (
        torch.from_numpy(x) for x in (case.single, case.pair, case.rotation, case.translation, case.mask)
    )
    frames = Rigid(Rotation(rot_mats=rotation), translation)
    with torch.no_grad():
        expected = layer(single, pair, frames, mask.float())
        with torch.autocast("cpu", dtype):
            actual = swapped(single.to(dtype), pair.to(dtype), frames, mask.float())
    assert actual.dtype == dtype
    name = str(dtype).removeprefix("torch.")
    judge(actual.float(), expected, case.mask, "out", name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_structure_module_in_half_precision(esmfold, swapped, dtype):
    """Eight layers: atoms are no more than twice as far from float32's as they were before the swap."""
    torch.manual_seed(0)
    single, pair = torch.randn(1, 110, 384), torch.randn(1, 110, 110, 128)
    mask = torch.ones(1, 110)

    def atoms(model, dtype):
        module = copy.deepcopy(model.trunk.structure_module).to(dtype)
        with torch.no_grad():
            return module({"single": single.to(dtype), "pair": pair.to(dtype)}, SEQUENCE, mask)["positions"][-1]

    truth = atoms(esmfold, torch.float32)
    before, after = ((atoms(model, dtype) - truth).square().mean().sqrt() for model in (esmfold, swapped))
    assert 0 < after <= 2 * before


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what ESMFold's own rigids do
def test_it_compiles(esmfold, swapped):
    """The layer as one graph, and the structure module around it, which is not one."""
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    layer = swapped.trunk.structure_module.ipa
    case = make_case("compiled", IPAConfig.alphafold2(), (1, 110)).astype("float32")
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    frames = Rigid(Rotation(rot_mats=torch.from_numpy(case.rotation)), torch.from_numpy(case.translation))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        judge(
            compiled(single, pair, frames, mask.float()),
            layer(single, pair, frames, mask.float()),
            None,
            "out",
            "float32",
        )
        whole = torch.compile(swapped.trunk.structure_module, backend="aot_eager")
        inputs = {"single": single, "pair": pair}
        after = whole(inputs, SEQUENCE)["positions"]
        before = esmfold.trunk.structure_module(inputs, SEQUENCE)["positions"]
    judge(after, before, None, "atom14", "float32")
    torch._dynamo.reset()


def test_everything_of_a_layer_stays(esmfold):
    """The object, its tensors, hooks, an optimiser's state; copies and pickles; and the way back."""
    model = copy.deepcopy(esmfold)
    layer = model.trunk.structure_module.ipa
    kind, tensors, keys = type(layer), dict(layer.named_parameters()), list(model.state_dict())
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    layer.linear_q.register_forward_hook(lambda *_: seen.append("linear_q"))
    optimizer = torch.optim.Adam(model.parameters())
    random_state = torch.random.get_rng_state()
    ipa_torch.replace_ipa(model)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not seen, "comparing must not call hooks"
    assert model.trunk.structure_module.ipa is layer
    assert isinstance(layer, kind)
    assert all(x is tensors[name] for name, x in layer.named_parameters())
    assert list(model.state_dict()) == keys
    model(SEQUENCE).positions.square().mean().backward()
    assert seen == ["linear_q", "layer"] * 8
    before = layer.linear_kv.weight.clone()
    optimizer.step()
    assert not torch.equal(layer.linear_kv.weight, before)
    del layer._forward_hooks, layer.linear_q._forward_hooks
    layer._forward_hooks, layer.linear_q._forward_hooks = {}, {}
    for copied in (copy.deepcopy(model).trunk.structure_module.ipa, pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer)
        assert copied.linear_q.weight is not layer.linear_q.weight
        assert all(torch.equal(x, tensors[name]) for name, x in copied.named_parameters())
        assert copied._ipa_twins == layer._ipa_twins
        assert ipa_torch.restore_ipa(copied) == [""]
        assert type(copied) is kind
    assert ipa_torch.restore_ipa(model) == ["trunk.structure_module.ipa"]
    assert type(layer) is kind
    assert "_ipa_twins" not in vars(layer)
    assert ipa_torch.restore_ipa(model) == []


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


class WithoutPair(OpenFold):
    """OpenFold's parameters, but its bias is dropped."""

    def forward(self, s, z, r, mask) -> torch.Tensor:
        return super().forward(s, 0 * z, r, mask)


class OtherEpsilon(OpenFold):
    """Says one, computes another."""

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
def test_another_function_is_seen_and_nothing_replaced(kind):
    """Also while the output layer is zero, as it starts, or next to it beside a large bias: outputs are equal then."""
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


class OtherCall(OpenFold):
    def forward(self, s, pair, r, mask) -> torch.Tensor:
        return super().forward(s, pair, r, mask)


class SomePointAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(2, 2)


class Unnamed(nn.Module):
    """Some of OpenFold's names."""

    def __init__(self):
        super().__init__()
        self.linear_kv_points = nn.Linear(2, 2)


class Variadic(OpenFold):
    def forward(self, s, z, r, mask, *others) -> torch.Tensor:
        return super().forward(s, z, r, mask)


class OpenFold1WithoutBias(OpenFold1):
    """What has no pair bias, and reads no pair."""

    def __init__(self, config):
        super().__init__(config)
        del self.linear_b
        width = config.num_feature - config.num_head * config.pair_channel
        self.linear_out = nn.Linear(width, config.num_channel)


class OneMoreArgument(OpenFold):
    def forward(self, s, z, r, mask, edge_bias=None) -> torch.Tensor:
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


def without_epsilon(layer):
    del layer.eps
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: OtherCall(ONE_WIDTH),
            "its forward takes s, pair, r, mask, and not s, z, r, mask, beside them at most inplace_safe, _off",
        ),
        (lambda: OneMoreArgument(ONE_WIDTH), "its forward takes s, z, r, mask, edge_bias, and not"),
        (lambda: Variadic(ONE_WIDTH), "its forward takes s, z, r, mask, others, and not"),
        (lambda: MultiFlow(DOWN_Z, dropout=0.1), r"its dropout_prob is 0\.1, and only at 0"),
        (lambda: FlashIPA(DOWN_Z, use_flash_attn=True), "its use_flash_attn is True, and only at False"),
        (lambda: FrameDiff(DOWN_Z, width=19), r"of another are linear_rbf\.weight$"),
        (lambda: with_two_epsilons(OpenFold1(ONE_WIDTH)), r"it tells 2 epsilons, as \.eps or \.config\.epsilon"),
        (
            lambda: with_hook(OpenFold(ONE_WIDTH), "register_full_backward_hook"),
            "its linear_b has backward hooks, which",
        ),
        (lambda: with_hook(MultiFlow(DOWN_Z), of="softmax"), "its softmax has hooks, which would not be seen"),
        (lambda: with_hook(MultiFlow(DOWN_Z), of="down_z"), "its down_z has hooks, which would not be seen"),
        (lambda: OpenFold1WithoutBias(ONE_WIDTH), "it has no linear_b, and OpenFold 1's attention without a pair"),
        (lambda: with_forward(OpenFold(ONE_WIDTH)), "the forward of itself was replaced on that very object"),
        (lambda: with_forward(OpenFold(ONE_WIDTH), "linear_q"), "the forward of linear_q was replaced on that very"),
        (lambda: with_hook(OpenFold(ONE_WIDTH)), "its linear_b has hooks, which would not be seen"),
        (lambda: with_infinity(OpenFold(ONE_WIDTH), 9), "it hides masked keys by 9 only"),
        (lambda: with_infinity(OpenFold(ONE_WIDTH), None), "it hides masked keys by None only"),
        (Unnamed, "its parameters have the names of no system that is known here"),
        (lambda: with_adapters(OpenFold(ONE_WIDTH)), r"missing, misshapen or of another are linear_q\.lora_A"),
        (lambda: without_epsilon(OpenFold(ONE_WIDTH)), "it does not tell its epsilon"),
        (SomePointAttention, "its parameters have the names of no system that is known here"),
        (lambda: ipa_torch.InvariantPointAttention(ODD), "it is this project's own"),
    ],
)
def test_what_is_left_alone_and_why(make, reason):
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


class Wrapper(nn.Module):
    """As adapters are put around a layer."""

    def __init__(self, base):
        super().__init__()
        self.linear, self.weight = base, getattr(base, "weight", None)

    def forward(self, x):
        return 2 * self.linear(x)


def test_what_is_put_around_a_submodule_later_is_called_or_refused():
    """Of the pair's bias, and of OpenFold 2's point projections, only a part is read."""
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


def test_fewer_batch_axes_are_broadcast():
    """As in theirs; and no pair at all is told."""
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


def test_a_class_or_a_forward_on_top_must_go_first():
    """As FSDP, parametrisations and accelerate put there; nothing is restored by halves."""
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
    assert "since it was replaced: Sharded" in ipa_torch.replace_ipa(model, verify=False).left_alone["second"]
    assert isinstance(model["first"], ours)
    layer.__class__ = ours
    torch.nn.utils.parametrize.register_parametrization(layer, "head_weights", nn.Identity())
    with pytest.raises(ValueError, match="undo that first"):
        ipa_torch.restore_ipa(model)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "head_weights")
    assert ipa_torch.restore_ipa(model) == ["first", "second"]
    assert [type(x) for x in model.values()] == [OpenFold, OpenFold]


def test_the_report_is_in_the_models_order():
    """Whosever the layers are; and so is what is left alone."""
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


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_weights_are_no_other_function(dtype):
    """Theirs are off by more then, and ours may be by as much."""
    pytest.importorskip("transformers")
    case = make_case("large", IPAConfig.alphafold2(), (7,)).astype("float32")
    layer = peers.esmfold_module(case)
    with torch.no_grad():
        for x in (layer.linear_q, layer.linear_kv, layer.linear_q_points, layer.linear_kv_points):
            x.weight *= 8
    (row,) = ipa_torch.replace_ipa(layer.to(dtype)).replaced
    assert np.isfinite(row.error)


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
    """A layer of that class at a path, which tells its epsilon as such."""
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
        ("trunk.structure_module.ipa", {"eps": 1e-8}, "ESMFold"),  # the original: OpenFold 1's class
        ("trunk.structure_module.ipa", {"config": SimpleNamespace(epsilon=1e-8)}, "ESMFold"),
        ("ipa", {"config": SimpleNamespace(epsilon=1e-8)}, "ESMFold"),
        ("ipa", {"eps": 1e-8}, "OpenFold 1"),
        ("ipa", {"eps": 1e-8, "config": SimpleNamespace(epsilon=1e-8)}, "OpenFold 1"),
    ],
)
def test_epsilon_is_told_in_either_place(path, told, system):
    (row,) = ipa_torch.replace_ipa(published(OpenFold1, path, **told)).replaced
    assert (row.path, row.system) == (path, system)


class Frames(Rigid):
    """Rigids of another package."""


ru = ModuleType("rigid_utils")
ru.Frames = Frames


class ConfDiff(FrameFlow):
    """ConfDiff's annotation."""

    def forward(self, s, z: torch.Tensor | None, r: ru.Frames, mask, _offload_inference=False, _z_reference_list=None):
        assert type(r) is Frames
        return super().forward(s, z, r, mask)


def elsewhere(monkeypatch, module: str, **contents):
    """A layer whose class stands in a module with these contents, and which takes Frames only."""
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
    """By the annotation, else beside the layer, in what is imported there, or beside those who call it."""
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
    """It is held against itself in float32, with more of a bound only as rounding explains it."""
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
    """What PyTorch's switches say; the older one raises once a newer one was used."""
    matmuls = {name: getattr(getattr(torch.backends, name), "matmul", None) for name in ("cuda", "mkldnn")}
    newer = {name: getattr(matmul, "fp32_precision", None) for name, matmul in matmuls.items()}
    try:
        return {**newer, "older": torch.get_float32_matmul_precision()}
    except RuntimeError:
        return {**newer, "older": "raises"}


NEWER = hasattr(torch.backends.cuda.matmul, "fp32_precision")


@pytest.mark.parametrize("switch", ["none", "older", "cuda", "mkldnn", "all"])
def test_it_leaves_the_precision_of_products_alone(switch):
    """Whichever of PyTorch's switches says it; while comparing none of them rounds."""
    if not NEWER and switch not in ("none", "older"):
        pytest.skip("this version of PyTorch has no such switch")
    start, seen = precisions(), []

    class Looks(OpenFold):
        def forward(self, s, z, r, mask):
            seen.append(precisions())
            return super().forward(s, z, r, mask)

    owner = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul, "all": torch.backends}.get(
        switch
    )
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
    """As lucidrains' does, so that after a newer one was used it cannot run as it is."""
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
    """Layers made before or in it, at a length that streams."""
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


def test_hooks_are_called_or_the_call_raises():
    """Backward hooks as much as forward ones; of modules that are not called, as of those that are read."""
    layer, _, case = stand_in("FrameFlow, MultiFlow")
    ipa_torch.replace_ipa(layer)
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    arguments = (single.requires_grad_(), pair.requires_grad_(), rigids(case), mask.float())
    registers = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    registers += ("register_full_backward_pre_hook",)
    for of in ("linear_b", "down_z", "softmax", "dropout"):
        for register in registers:
            hook = getattr(layer.get_submodule(of), register)(lambda *_: None)
            with pytest.raises(NotImplementedError, match=rf"{of} has (backward )?hooks, which would not be seen"):
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
