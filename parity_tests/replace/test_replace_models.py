"""Whole models replaced by the README's lines compute and learn the same and keep their state."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.config import IPABlockConfig, IPAConfig, StructureModuleConfig
from ipa_bridge.tolerance import bound, epsilon
from ipa_bridge.weights import Weights
from ipa_parity.attention.cases import make_case

torch = pytest.importorskip("torch")
from stand_ins import judge

import ipa_torch

ROOT = Path(__file__).resolve().parents[2]


EXAMPLES = ROOT / "examples"


README = (ROOT / "README.md").read_text()


def test_a_block_keeps_its_call():
    """The README's lines replace the attention inside another system's block, at a length that streams."""
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
    """Hugging Face's ESMFold: a small trunk and a whole structure module, with weights as large as trained ones."""
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
    """A model replaced by the README's lines, which must print what the README shows."""
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
    """The one code block in the README that contains the text `of`."""
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
    """Gradients of a loss on the atoms agree for every parameter; they are float32 gradients through ReLUs."""
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
        elif x.norm() <= nothing:  # only rounding, as for a bias that a softmax removes
            assert after[name].norm() <= nothing
        else:
            judge(after[name], x, None, f"gradient/{name}", "float32", norm="euclidean", conditioning=KINKED)


def test_a_checkpoint_is_the_same(esmfold, swapped, tmp_path):
    """A checkpoint saved after the swap loads into the original class."""
    swapped.save_pretrained(tmp_path)
    loaded = type(esmfold).from_pretrained(tmp_path)
    expected = esmfold.state_dict()
    assert list(loaded.state_dict()) == list(expected) == list(swapped.state_dict())
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    assert type(loaded.trunk.structure_module.ipa) is type(esmfold.trunk.structure_module.ipa)
    swapped.load_state_dict(expected, strict=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(esmfold, dtype):
    """Our result is within the half-precision bound of float32, with half-precision weights and under autocast."""
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
    """After eight layers, atoms are at most twice as far from float32 as before the swap."""
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
    """The layer compiles as one graph; the structure module around it compiles with graph breaks."""
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


NAMES_IN_OLD_PICKLES = {
    b"empty_layer": b"_new",
    b"OpenFoldAdapter": b"_OpenFold",
    b"Settings": b"_Settings",
    b"Argument": b"_Argument",
}


def pickled_formerly(layer) -> bytes:
    """A layer as `ipa_torch.replace` pickled it when it was a single file."""

    def formerly(now: re.Match) -> bytes:
        return b"cipa_torch.replace\n" + NAMES_IN_OLD_PICKLES[now[1]] + b"\n"

    return re.sub(rb"cipa_torch\.replace\.[\w.]+\n(\w+)\n", formerly, pickle.dumps(layer, protocol=2))


def test_a_layer_keeps_everything(esmfold):
    """It keeps the object, tensors, hooks and optimiser state; it copies and pickles; and it can be restored."""
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
    assert b"ipa_torch.replace." not in pickled_formerly(layer)
    for copied in (
        copy.deepcopy(model).trunk.structure_module.ipa,
        pickle.loads(pickle.dumps(layer)),
        pickle.loads(pickled_formerly(layer)),
    ):
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
