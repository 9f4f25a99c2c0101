"""A lab's own class: its names and its call are registered, and everything that reads dialects then knows them."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ipa_bridge
from ipa_bridge.config import IPAConfig
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.cli import main
from ipa_bridge.weights.dialects import DIALECTS, Form, find_dialect
from ipa_bridge.weights.semantics.system import torch_linear

torch = pytest.importorskip("torch")
from stand_ins import judge

import ipa_torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIG = IPAConfig(
    num_channel=6,
    pair_channel=5,
    num_head=2,
    num_scalar_qk=3,
    num_scalar_v=3,
    num_point_qk=4,
    num_point_v=4,
    layout="multimer",
    scalar_bias=False,
    norm_epsilon=1e-6,
    frame_unit=1.0,
)


def forget():
    """Undoes the example's registration."""
    if "loom" in DIALECTS:
        ipa_bridge.unregister_dialect("loom")
        ipa_torch.unregister_adapter("loom")
    sys.modules.pop("custom_layer", None)


@pytest.fixture
def elsewhere(monkeypatch):
    """A folder where the example can be imported, and no registration yet."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    forget()
    yield
    forget()


@pytest.fixture
def example(elsewhere):
    return importlib.import_module("custom_layer")


def layer_and_inputs(example, dtype=torch.float64):
    torch.manual_seed(0)
    layer = example.LoomAttention(6, 5, heads=2, channels=3).to(dtype)
    nodes, edges, origins, quaternions = (
        torch.randn(2, 9, *shape, dtype=torch.float64) for shape in ((6,), (9, 5), (3,), (4,))
    )
    rotations = ipa_torch.Rigid.from_quaternion(quaternions, origins).rotation
    keep = torch.arange(9) % 4 != 1
    leaves = [x.to(dtype).requires_grad_() for x in (nodes, edges, rotations, origins)]
    return layer, leaves, keep.expand(2, 9)


def call(layer, leaves, keep):
    nodes, edges, rotations, origins = leaves
    return layer(nodes, (rotations, origins), edges, keep=keep)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_outputs_and_gradients(name, masked, implementation, example):
    """The layer's own call gives the same output, and the same gradients to inputs, frames and parameters."""
    layer, leaves, keep = layer_and_inputs(example, getattr(torch, name))
    before = copy.deepcopy(layer)
    (row,) = ipa_torch.replace_ipa(layer, implementation=implementation).replaced
    assert (row.system, row.layer) == ("Loom", "LoomAttention")
    assert row.error <= bound("out", name)
    results = []
    for x in (before, layer):
        out = call(x, leaves, keep if masked else None)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append((out, torch.autograd.grad((out * cotangent).sum(), [*leaves, *x.parameters()])))
    (expected, to_expected), (actual, to_actual) = results
    judge(actual, expected, None, "act", name)
    names = ["nodes", "edges", "rotations", "origins", *dict(layer.named_parameters())]
    for leaf, x, y in zip(names, to_actual, to_expected, strict=True):
        if leaf == "edge.bias":  # cancels in the softmax
            assert not x.any()
        else:
            judge(x, y, None, f"gradient/{leaf}", name)


def test_a_replaced_layer_stays_itself(example):
    layer, leaves, keep = layer_and_inputs(example)
    kind, state = type(layer), copy.deepcopy(layer.state_dict())
    ipa_torch.replace_ipa(layer)
    layer.load_state_dict(state, strict=True)
    expected = call(layer, leaves, keep)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(call(copied, leaves, keep), expected)
    layer.norm.register_forward_hook(lambda *_: None)  # its own module beside the attention
    assert torch.equal(call(layer, leaves, keep), expected)
    layer.query.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="query has hooks"):
        call(layer, leaves, keep)
    layer.query._forward_hooks.clear()
    with pytest.raises(TypeError, match="edges is missing"):
        layer(leaves[0], (leaves[2], leaves[3]))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert call(half, [x.detach().bfloat16() for x in leaves], keep).dtype == torch.bfloat16
    ipa_torch.unregister_adapter("loom")
    with pytest.raises(ValueError, match=r"adapter for the dialect 'loom' was expected.*ipa_torch\.register_adapter"):
        call(layer, leaves, keep)
    ipa_torch.register_adapter("loom", to_ours=example.to_ours, to_theirs=example.to_theirs, result=example.result)
    assert torch.equal(call(layer, leaves, keep), expected)
    assert ipa_torch.restore_ipa(layer) == [""]
    assert type(layer) is kind
    ipa_torch.unregister_adapter("loom")
    with pytest.raises(ValueError, match=r"Loom has no adapter: see ipa_torch\.register_adapter"):
        ipa_torch.replace_ipa(layer)
    ipa_torch.register_adapter("loom", to_ours=example.to_ours, to_theirs=example.to_theirs, result=example.result)


def test_another_function_under_the_same_names_is_refused(example):
    """The comparison before and after does not trust the registration."""

    class Other(example.LoomAttention):
        def forward(self, nodes, frames, edges, keep=None):
            return super().forward(nodes, frames, 2 * edges, keep)

    class Extra(example.LoomAttention):
        def forward(self, nodes, frames, edges, keep=None, scale=1.0):
            return scale * super().forward(nodes, frames, edges, keep)

    layer = Other(6, 5)
    with pytest.raises(ValueError, match="this Other has the parameters of Loom's attention but computes another"):
        ipa_torch.replace_ipa(layer)
    assert type(layer) is Other
    _, (nodes, edges, *frames), keep = layer_and_inputs(example)
    extra = Extra(6, 5, heads=2, channels=3).double()
    expected = extra(nodes, frames, edges, keep=keep)
    ipa_torch.replace_ipa(extra)
    judge(extra(nodes, frames, edges, keep=keep, scale=1.0), expected, None, "act", "float64")
    with pytest.raises(ValueError, match=r"scale=1\.0 was expected, since our attention has no such argument"):
        extra(nodes, frames, edges, keep=keep, scale=2.0)


def test_weights_convert_both_ways(example, tmp_path):
    layer, leaves, keep = layer_and_inputs(example)
    weights = Weights.from_torch(layer.state_dict())
    assert replace(weights.config, zero_init=True) == CONFIG
    assert weights.assumed == {"norm_epsilon"}
    back = weights.to_torch(dialect="loom")
    assert all(torch.equal(x, layer.state_dict()[name]) for name, x in back.items())
    with pytest.warns(UserWarning, match="neither names nor shapes determine them: norm_epsilon=1e-06"):
        weights.save(tmp_path / "loom.safetensors", dialect="loom")
    again = Weights.load(tmp_path / "loom.safetensors", dialect="loom", config=weights.config)
    assert all(again.arrays[name].tobytes() == x.tobytes() for name, x in weights.arrays.items())
    ours = ipa_torch.InvariantPointAttention(weights.config).double()
    ours.load_state_dict(weights.to_torch(), strict=True)
    nodes, edges, rotations, origins = leaves
    update = ours(nodes, edges, ipa_torch.Rigid(rotations, origins), key_mask=keep)
    judge(layer.norm(nodes + update), call(layer, leaves, keep), None, "act")


def test_the_command_imports_the_registration(elsewhere, tmp_path, capsys, monkeypatch):
    """--import makes the dialect known to the command; without semantics, a conversion cannot be verified."""
    monkeypatch.chdir(EXAMPLES)
    named = ["--import", "custom_layer"]
    source, target = tmp_path / "loom.pt", tmp_path / "ours.safetensors"
    with pytest.raises(SystemExit):
        main(["inspect", str(source), "--dialect", "loom"])
    assert main(["inspect", str(source), "--import", "no_such_module"]) == 2
    assert "--import: No module named 'no_such_module'" in capsys.readouterr().err
    forget()
    module = importlib.import_module("custom_layer")
    torch.save(module.LoomAttention(6, 5).state_dict(), source)
    forget()
    assert main(["inspect", str(source), "--json", *named]) == 0
    assert json.loads(capsys.readouterr().out)["dialect"] == "loom"
    assert main(["convert", str(source), str(target), "--from", "loom", "--verify", *named]) == 2
    problem = capsys.readouterr().err
    assert "cannot verify: what Loom computes is unknown; pass semantics= where register_dialect adds 'loom'" in problem
    assert main(["convert", str(source), str(target), "--from", "loom", *named]) == 0
    assert main(["convert", str(target), str(tmp_path / "back.pt"), "--to", "loom", *named]) == 0
    assert torch.load(tmp_path / "back.pt").keys() == {x for x in torch.load(source) if not x.startswith("norm.")}


def semantics_of_loom(p, c, single, pair, rotation, translation, mask, *, wrong: bool = False):
    """The function of a Loom layer's attention in numpy, with loops over heads."""
    n, h = len(single), c.num_head
    q, k, v = (torch_linear(p, x, single).reshape(n, h, -1) for x in ("query", "key", "value"))
    local = [torch_linear(p, f"{x}_xyz", single).reshape(n, h, -1, 3) for x in ("query", "key", "value")]
    q_xyz, k_xyz, v_xyz = (np.einsum("icd,ihpd->ihpc", rotation, x) + translation[:, None, None] for x in local)
    bias, parts = torch_linear(p, "edge", pair), [[], [], [], []]
    for i in range(h):
        squares = ((q_xyz[:, None, i] - k_xyz[None, :, i]) ** 2).sum((-1, -2))
        gamma = np.logaddexp(0, p["sharpness"][i]) * (c.num_point_qk * 9 / 2) ** -0.5
        logits = q[:, i] @ k[:, i].T * c.num_scalar_qk**-0.5 + bias[..., i] - gamma * squares / (3 if wrong else 2)
        weights = np.exp(logits * 3**-0.5) * mask
        weights = weights / weights.sum(-1, keepdims=True)
        read = np.einsum("ij,jpc->ipc", weights, v_xyz[:, i]) - translation[:, None]
        read = np.einsum("icd,ipc->ipd", rotation, read)
        lengths = np.sqrt((read**2).sum(-1) + c.norm_epsilon)
        found = (weights @ v[:, i], read.reshape(n, -1), lengths, np.einsum("ij,ijc->ic", weights, pair))
        for part, x in zip(parts, found, strict=True):
            part.append(x)
    return torch_linear(p, "mix", np.concatenate([x for part in parts for x in part], -1))


@pytest.mark.parametrize("wrong", [False, True])
def test_a_conversion_is_verified_with_semantics(wrong, example, tmp_path, capsys):
    """The registered function is compared with ours: a wrong one fails."""
    ipa_bridge.unregister_dialect("loom")

    def computed(*arguments):
        return semantics_of_loom(*arguments, wrong=wrong)

    ipa_bridge.register_dialect(example.LOOM, semantics=computed)
    source = tmp_path / "ours.safetensors"
    Weights.random(CONFIG).save(source)
    code = main(["convert", str(source), str(tmp_path / "loom.pt"), "--to", "loom", "--verify"])
    assert code == int(wrong)
    assert ("NOT THE SAME FUNCTION" if wrong else "the same function") in capsys.readouterr().out


def test_registrations_are_checked_and_undone(example):
    with pytest.raises(ValueError, match=r"there is a dialect 'loom' already \(Loom\)"):
        ipa_bridge.register_dialect(example.LOOM)
    with pytest.raises(ValueError, match="there is a dialect 'openfold' already"):
        ipa_bridge.register_dialect(replace(example.LOOM, name="openfold"))
    with pytest.raises(ValueError, match=r"landmarks\[IPAConfig\] must hold names"):
        ipa_bridge.register_dialect(replace(example.LOOM, name="other", landmarks={}))
    with pytest.raises(ValueError, match="a Dialect was expected; got a str"):
        ipa_bridge.register_dialect("loom")
    with pytest.raises(ValueError, match=r"a dialect that register_dialect added was expected .loom.; got 'openfold'"):
        ipa_bridge.unregister_dialect("openfold")
    functions = {"to_ours": example.to_ours, "to_theirs": example.to_theirs}
    for name in ("loom", "openfold"):
        with pytest.raises(ValueError, match="can be replaced already"):
            ipa_torch.register_adapter(name, **functions)
    with pytest.raises(ValueError, match=r"dialect must be one of .*loom; got 'nobody'"):
        ipa_torch.register_adapter("nobody", **functions)
    with pytest.raises(ValueError, match=r"to_ours must name .* it has \* or \*\*"):
        ipa_torch.register_adapter("loom", to_ours=lambda layer, **others: {}, to_theirs=example.to_theirs)
    with pytest.raises(ValueError, match=r"a dialect with a registered adapter was expected .loom.; got 'openfold'"):
        ipa_torch.unregister_adapter("openfold")
    forget()
    assert "loom" not in semantics.SYSTEMS
    with pytest.raises(ValueError, match="dialect must be one of"):
        find_dialect("loom")
    with pytest.raises(ValueError, match="an invariant point attention"):
        ipa_torch.replace_ipa(example.LoomAttention(6, 5))


def test_a_form_gives_the_norm(example):
    """Names and shapes do not tell the form of a norm; the dialect's form does."""
    assert example.LOOM.forms["multimer"] == Form(
        scalar_bias=False, point_bias=True, norm_form="add", norm_epsilon=1e-6
    )
    shapes = {name: tuple(x.shape) for name, x in example.LoomAttention(6, 5).state_dict().items()}
    assert example.LOOM.infer(shapes, IPAConfig).norm_form == "add"


def test_a_method_of_a_layer_without_batch_axis(example):
    """The layer's own forward stays and calls the method; the layer takes one protein, and its ε is a constant."""

    class One(example.LoomAttention):
        def __init__(self):
            super().__init__(6, 5)
            self.eps, self.scale = torch.tensor(1e-6, dtype=torch.float64), 2.0

        def attend(self, nodes, frames, edges):
            return super().forward(nodes[None], tuple(x[None] for x in frames), edges[None])[0]

        def forward(self, nodes, frames, edges):
            return self.scale * self.attend(nodes, frames, edges)

    ipa_torch.unregister_adapter("loom")
    ipa_bridge.unregister_dialect("loom")
    form = replace(example.LOOM.forms["multimer"], epsilon_is_fixed=True)
    ipa_bridge.register_dialect(replace(example.LOOM, forms={"multimer": form}))
    ipa_torch.register_adapter(
        "loom",
        to_ours=lambda layer, nodes, frames, edges: {
            "single": nodes,
            "pair": edges,
            "rigids": ipa_torch.Rigid(*frames),
        },
        to_theirs=lambda single, pair, rotation, translation, mask: {
            "nodes": single,
            "frames": (rotation, translation),
            "edges": pair,
        },
        result=example.result,
        method="attend",
    )
    layer = One().double()
    _, (nodes, edges, rotations, origins), _ = layer_and_inputs(example)
    arguments = (nodes[0], (rotations[0], origins[0]), edges[0])
    expected = layer(*arguments)
    (row,) = ipa_torch.replace_ipa(layer).replaced
    assert row.error <= bound("out", "float64")
    assert type(layer).forward is One.forward
    assert type(layer).attend is not One.attend
    judge(layer(*arguments), expected, None, "act")
