"""Other people's layers computing as ours: the same function, the same parameters, and back again."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge import semantics
from ipa_bridge.config import IPABlockConfig, IPAConfig, StructureModuleConfig
from ipa_bridge.dialects import named
from ipa_bridge.weights import Weights
from ipa_parity import peers
from ipa_parity.cases import ODD, ODD_NO_BIAS, make_case
from ipa_parity.report import compare
from ipa_parity.tolerance import bound, epsilon

torch = pytest.importorskip("torch")
from torch import nn

import ipa_torch
from ipa_bridge.replacement import WITHIN

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
        p = {name: x.detach().double().numpy() for name, x in self.named_parameters()}
        arrays = (x.detach().double().numpy()[0] for x in (s, z, rotation, translation, mask))
        out = torch.from_numpy(semantics.attention(self.dialect, p, self.function, *arrays))[None].to(s.dtype)
        ours = ipa_torch.InvariantPointAttention(self.function).to(s.dtype)
        ours.load_state_dict(
            Weights.from_torch(self.state_dict(), dialect=self.dialect, config=self.function).to_torch()
        )
        linked = ours(s, z, ipa_torch.Rigid(rotation, translation), mask)
        return out + (linked - linked.detach())


class OpenFold1(OpenFold):
    dialect = "openfold_v1"


class FrameDiff(OpenFold):
    dialect = "frameflow"

    def forward(self, s, z, r, mask, _offload_inference=False, _z_reference_list=None) -> torch.Tensor:
        return super().forward(s, z, r, mask)


DOWN_Z = replace(ONE_WIDTH, pair_channel=8, pair_value_channel=2)
MULTIMER = replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp")
STAND_INS = {
    "OpenFold 2": (OpenFold, ONE_WIDTH),
    "OpenFold 2 multimer": (OpenFold, MULTIMER),
    "OpenFold 1": (OpenFold1, ONE_WIDTH),
    "FrameDiff": (FrameDiff, DOWN_Z),
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
    ours = ipa_torch.InvariantPointAttention(config).to(layer.head_weights.dtype)
    ours.load_state_dict(case.weights.to_torch())
    return layer, ours, case


@pytest.mark.parametrize("implementation", [None, "streamed", "reference"])
@pytest.mark.parametrize("which", STAND_INS)
def test_layers_of_openfold_and_framediff(which, implementation):
    """Against the oracle by their own forward, and with gradients against our module."""
    layer, ours, case = stand_in(which, np.float64)
    before = copy.deepcopy(layer)
    report = ipa_torch.replace_ipa(layer, implementation=implementation)
    assert [(x.path, x.system) for x in report.replaced] == [("", which.removesuffix(" multimer"))]
    assert report.replaced[0].error <= bound("out", "float64")
    assert not report.left_alone
    single, pair, mask = (torch.from_numpy(x) for x in (case.single, case.pair, case.mask))
    arguments = (single, pair, rigids(case), mask.double())
    judge(layer(*arguments), before(*arguments), case.mask)

    inputs = [single.requires_grad_(), pair.requires_grad_()]
    frames = ipa_torch.Rigid(*(torch.from_numpy(x) for x in (case.rotation, case.translation)))
    if case.config.layout == "monomer":  # as theirs
        frames = frames.astype(torch.float32)
    cotangent = torch.from_numpy(case.cotangent)
    # Our own module centres frames in their dtype, the layer those that its inputs have made float64.
    expected = torch.autograd.grad(
        (ours(*inputs, frames.astype(torch.float64), mask) * cotangent).sum(), [*inputs, *ours.parameters()]
    )
    actual = torch.autograd.grad(
        (layer(single, pair, *arguments[2:]) * cotangent).sum(), [*inputs, *layer.parameters()]
    )
    canonical = {name: x.numpy() for (name, _), x in zip(ours.named_parameters(), expected[2:], strict=True)}
    theirs = {name: x.numpy() for (name, _), x in zip(layer.named_parameters(), actual[2:], strict=True)}
    ported = Weights.from_torch(
        {name: torch.from_numpy(x) for name, x in canonical.items()}, dialect="ipa_torch", config=case.config
    ).to_torch(dialect=layer.dialect)
    for x, y in zip(actual[:2], expected[:2], strict=True):
        judge(x, y, None, "gradient/input")
    assert set(ported) == set(theirs)
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
    from ipa_parity.tolerance import KINKED

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


class OneMoreArgument(OpenFold):
    def forward(self, s, z, r, mask, edge_bias=None) -> torch.Tensor:
        return super().forward(s, z, r, mask)


def with_forward(layer, of=""):
    layer.get_submodule(of).forward = lambda *arguments: None
    return layer


def with_hook(layer):
    layer.linear_b.register_forward_hook(lambda *_: None)
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
            "its forward takes s, pair, r, mask, and not s, z, r, mask; or s, z, r, mask, _off",
        ),
        (lambda: OneMoreArgument(ONE_WIDTH), "its forward takes s, z, r, mask, edge_bias, and not"),
        (lambda: with_forward(OpenFold(ONE_WIDTH)), "the forward of itself was replaced on that very object"),
        (lambda: with_forward(OpenFold(ONE_WIDTH), "linear_q"), "the forward of linear_q was replaced on that very"),
        (lambda: with_hook(OpenFold(ONE_WIDTH)), "its linear_b has hooks, and only the weight of it would be read"),
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


def test_the_bounds_are_the_one_tables():
    assert WITHIN == {dtype: {stage: bound(stage, dtype) for stage in x} for dtype, x in WITHIN.items()}


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


def test_a_layer_in_two_places_is_one():
    layer = OpenFold(ONE_WIDTH)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer})})
    assert [x.path for x in ipa_torch.replace_ipa(model).replaced] == ["a"]
    assert ipa_torch.restore_ipa(model) == ["a"]


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
