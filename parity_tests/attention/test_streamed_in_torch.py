"""The streamed attention under PyTorch's transformations, and its memory."""

from __future__ import annotations

import importlib
from functools import partial
from typing import ClassVar

import pytest
from frameworks import Torch, needs_torch
from streamed_cases import core_arrays, first, judge, rest

from ipa_bridge import tiling
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import ODD, make_case

# torch.


def torch_inputs(shape=(2, 9), **options):
    framework = Torch()
    arrays, _ = core_arrays(shape, mask=False, **options)
    arrays = {name: None if x is None else torch_tensor(x) for name, x in arrays.items()}
    shared = rest(arrays)

    def attend(implementation, *inputs):
        return framework.attend(*inputs, **shared, implementation=implementation)[:3]

    return framework.torch, attend, first(arrays)


def test_torch_func_transforms():
    torch, attend, inputs = torch_inputs()
    scalar = lambda name, *xs: sum(x.square().sum() for x in attend(name, *xs))  # noqa: E731
    streamed, reference = (partial(scalar, name) for name in ("streamed", "reference"))
    judge(torch.func.vmap(streamed)(*inputs), torch.func.vmap(reference)(*inputs), "out", "float64")
    for argument in (0, 3, 6):
        derivatives = [torch.func.grad(f, argument) for f in (streamed, reference)]
        judge(*(f(*inputs) for f in derivatives), f"gradient/{argument}", "float64")
        judge(*(torch.func.vmap(f)(*inputs) for f in derivatives), f"gradient/{argument}", "float64")


def test_torch_forward_mode_and_second_derivatives_name_the_reference():
    torch, attend, inputs = torch_inputs()
    scalar = lambda q: attend("streamed", q, *inputs[1:])[0].sum()  # noqa: E731
    message = "implementation='reference' has all others"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(scalar, (inputs[0],), (inputs[0],))
    leaf = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(leaf) ** 2, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(gradient.sum(), leaf)


@needs_torch("2.8")
@pytest.mark.parametrize("pair", [True, False])
def test_torch_compiles_whole_and_exports(pair):
    torch, attend, inputs = torch_inputs(pair=pair)
    compiled = torch.compile(partial(attend, "streamed"), fullgraph=True, backend="aot_eager")
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    present = [x for x in leaves if x is not None]
    gradients = [
        torch.autograd.grad(sum(x.square().sum() for x in f(*leaves) if x is not None), present)
        for f in (compiled, partial(attend, "streamed"))
    ]
    for x, e in zip(*gradients, strict=True):
        judge(x, e, "gradient", "float64")
    torch.compiler.reset()
    if not pair:
        return

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return attend("streamed", *inputs)

    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(
        Module(), tuple(inputs), dynamic_shapes=((*[{1: length}] * 6, {1: length, 2: length}),)
    ).module()
    shorter = [*(x[:, :5] for x in inputs[:6]), inputs[6][:, :5, :5]]
    for x, e in zip(exported(*shorter), attend("streamed", *shorter), strict=True):
        judge(x, e, "out", "float64")


@pytest.mark.parametrize(("with_attention", "epsilon"), [(True, None), (False, 1e-3)])
def test_torch_operators_pass_opcheck(with_attention, epsilon):
    torch = pytest.importorskip("torch")
    from ipa_torch.attention import streamed

    torch.manual_seed(0)
    shapes = [(2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 6), (2, 3, 5, 9), (2, 3, 5, 9), (3,), (2, 5, 5, 7), (7, 3)]
    inputs = [torch.rand(shape) for shape in shapes]
    inputs += [torch.ones(2, 5), None if epsilon is None else torch.ones(2, 1, 5)]
    torch.library.opcheck(streamed._attend, (*inputs, epsilon, 2, with_attention))
    d_attention = torch.rand(2, 3, 5, 5) if with_attention else torch.empty(0)
    cotangents = (torch.rand(2, 3, 5, 6), torch.rand(2, 5, 3, 7), d_attention)
    torch.library.opcheck(streamed._attend_backward, (*cotangents, *inputs, epsilon, 2, with_attention, True))


def test_torch_keeps_nothing_of_pairs_but_the_pair_and_a_block():
    """No tensor of forward and backward is larger than the pair; a frozen pair has no gradient."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            leaves = [x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
            self.seen += [x.numel() for x in leaves if not is_of(x, inputs[6])]  # what is not a view of the pair
            return output

    _, attend, inputs = torch_inputs((40,))

    def is_of(x, whole):
        return x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

    def largest(implementation, **wanted):
        leaves = [x.detach().requires_grad_(i in wanted["to"]) for i, x in enumerate(inputs)]
        with Sizes() as sizes:
            sum(x.sum() for x in attend(implementation, *leaves)).backward()
        return max(sizes.seen), [leaf.grad is not None for leaf in leaves]

    pair = inputs[6].numel()
    assert largest("reference", to={0, 6})[0] > pair
    size, wanted = largest("streamed", to={0, 6})
    assert (size, wanted[6]) == (pair, True)
    size, wanted = largest("streamed", to={0})
    assert size < pair / 2
    assert not wanted[6]


def test_torch_autocast_and_inference_mode_change_nothing():
    torch, attend, inputs = torch_inputs(dtype="float32")
    expected = attend("streamed", *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x, e in zip(attend("streamed", *inputs), expected, strict=True):
            assert torch.equal(x, e)
    with torch.inference_mode():
        for x, e in zip(attend("streamed", *inputs), expected, strict=True):
            assert torch.equal(x, e)


def test_torch_module_takes_it():
    torch = pytest.importorskip("torch")
    import ipa_torch

    case = make_case("", ODD, (7,)).astype("float64")
    module = ipa_torch.InvariantPointAttention(case.config, implementation="streamed").double()
    module.load_state_dict(case.weights.to_torch())
    other = ipa_torch.InvariantPointAttention(case.config).double()
    other.load_state_dict(case.weights.to_torch())
    rigids = ipa_torch.Rigid(torch_tensor(case.rotation), torch_tensor(case.translation))
    arguments = (torch_tensor(case.single), torch_tensor(case.pair), rigids, torch_tensor(case.mask))
    with torch.no_grad():
        judge(module(*arguments), other(*arguments), "out", "float64")


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_waits_for_a_gpu(backward):
    """Nothing is copied to or from the device, so a CUDA graph can capture it."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    from ipa_torch.attention import streamed
    from ipa_torch.attention.operands import Operands

    waits = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_to_copy", "lift_fresh")

    class Watched(TorchDispatchMode):
        seen: ClassVar[set] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    arrays, _ = core_arrays((2, 9))
    tensors = {name: torch_tensor(x).to(torch.float64) for name, x in arrays.items()}
    inputs = Operands.from_inputs(*first(tensors), *rest(tensors).values(), tensors["mask"], None, 3)
    outputs = streamed._attend(*inputs, None, 4, False)
    with Watched() as watched:
        Operands.from_inputs(*first(tensors), *rest(tensors).values(), tensors["mask"], None, 3)
        if backward:
            streamed._attend_backward._init_fn(*outputs, *inputs, None, 4, False, True)
        else:
            streamed._attend._init_fn(*inputs, None, 4, False)
    assert "bmm" in watched.seen
    assert not watched.seen & set(waits)


def test_blocks_on_a_gpu():
    """Blocks are as large as cached logits and an eighth of the pair allow, and at least one row."""
    for package in ("jax", "torch"):
        block_bytes = importlib.import_module(f"ipa_{package}.attention.rows").BLOCK_BYTES
        size = partial(tiling.default_block_size, block_bytes=block_bytes)
        assert [size(n, 12, 128, on_gpu=True) for n in (1, 50, 256, 1024, 2048, 8192)] == [1, 50, 64, 128, 170, 42]
        assert size(10**6, 12, 128, on_gpu=True) == 1
