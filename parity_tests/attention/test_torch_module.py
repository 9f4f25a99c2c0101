"""The torch IPA as an ordinary module: initial values, state, changed projections, compilation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from frameworks import needs_torch

torch = pytest.importorskip("torch")

from torch_module_cases import arguments, judge, model

import ipa_torch
from ipa_bridge.config import (
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.parameters import ipa_parameters
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.attention.cases import CATALOGUE, ODD, ODD_MULTIMER, ODD_NO_PAIR


@pytest.mark.parametrize(
    "config", [IPAConfig.alphafold2(), IPAConfig.alphafold_multimer(), ODD, ODD_MULTIMER, ODD_NO_PAIR]
)
def test_init_has_the_canonical_parameters(config):
    weights = Weights.from_torch(ipa_torch.InvariantPointAttention(config).state_dict(), config=config)
    assert {name: x.shape for name, x in weights.arrays.items()} == ipa_parameters(config)


@pytest.mark.parametrize("zero_init", [True, False])
def test_initial_values(zero_init):
    module = ipa_torch.InvariantPointAttention(replace(IPAConfig.esmfold(), zero_init=zero_init))
    assert (module.trainable_point_weights == 0).all()
    assert (module.output_projection.weight == 0).all() == zero_init
    assert (module.q_scalar.weight != 0).all()
    assert all((x == 0).all() for name, x in module.named_parameters() if name.endswith("bias"))


def test_state_dict_round_trip_and_deepcopy():
    case = CATALOGUE["monomer"]()
    module, inputs = model(case), arguments(case)
    fresh = ipa_torch.InvariantPointAttention(case.config)
    fresh.load_state_dict(module.state_dict(), strict=True)
    for twin in (fresh, copy.deepcopy(module)):
        assert torch.equal(twin(*inputs), module(*inputs))


SMALL_MODULE = StructureModuleConfig(ipa=ODD, num_layer=2, tied_layers=False, sidechain_channel=8)
MODULES = {
    "attention": lambda: ipa_torch.InvariantPointAttention(ODD),
    "attention, multimer": lambda: ipa_torch.InvariantPointAttention(replace(ODD_MULTIMER, zero_init=False)),
    "structure module": lambda: ipa_torch.StructureModule(SMALL_MODULE),
    "structure module, multimer": lambda: ipa_torch.StructureModule(replace(SMALL_MODULE, ipa=ODD_MULTIMER)),
    "transformer": lambda: ipa_torch.IPATransformer(
        IPATransformerConfig.lucidrains(8, depth=2, heads=2, num_tokens=5, predict_points=True)
    ),
    "confidence head": lambda: ipa_torch.PredictedLDDT(PredictedLDDTConfig()),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_reset_parameters_initialises_everything(make):
    """A module built without memory is initialised at once, or submodule by submodule as in FSDP."""
    torch.manual_seed(0)
    expected = make().state_dict()
    with torch.device("meta"):
        empty = make()

    def spoiled():
        module = copy.deepcopy(empty).to_empty(device="cpu")
        return module.apply(lambda m: [x.data.fill_(torch.nan) for x in m.parameters(recurse=False)])

    module = spoiled()
    torch.manual_seed(0)
    module.reset_parameters()
    assert all(torch.equal(x, expected[name]) for name, x in module.state_dict().items())
    module = spoiled()
    for each in module.modules():
        if any(True for _ in each.parameters(recurse=False)):
            each.reset_parameters()
    assert all(x.isfinite().all() for x in module.parameters())
    assert all(hasattr(each, "reset_parameters") for each in module.modules())


def test_layers_print_their_sizes():
    shown = str(MODULES["structure module"]())
    assert "(q_scalar): Linear(in_features=11, out_features=12, bias=True)" in shown
    assert "(q_point_local): Linear(in_features=11, out_features=45, bias=True, full_precision=True)" in shown
    assert "(attention_layer_norm): LayerNorm(11, epsilon=1e-05)" in shown


class Adapter(torch.nn.Module):
    """A wrapper like the adapters of parameter-efficient training."""

    def __init__(self, base, delta):
        super().__init__()
        self.base, self.delta = base, delta

    def forward(self, x):
        return self.base(x) + torch.nn.functional.linear(x, self.delta)


class Plus(torch.nn.Module):
    """A parametrisation that adds to the weight."""

    def __init__(self, delta):
        super().__init__()
        self.delta = delta

    def forward(self, weight):
        return weight + self.delta


def wrapped(parent, name, delta):
    setattr(parent, name, Adapter(getattr(parent, name), delta))


def parametrised(parent, name, delta):
    torch.nn.utils.parametrize.register_parametrization(getattr(parent, name), "weight", Plus(delta))


def hooked(parent, name, delta):
    add = lambda _, inputs, output: output + torch.nn.functional.linear(inputs[0], delta)  # noqa: E731
    getattr(parent, name).register_forward_hook(add)


def given_a_forward(parent, name, delta):
    linear = getattr(parent, name)
    linear.forward = Adapter(copy.deepcopy(linear), delta).forward


CHANGES = (wrapped, parametrised, hooked, given_a_forward)
PROJECTIONS = [
    (config, name)
    for config in ("monomer", "multimer")
    for name, x in ipa_torch.InvariantPointAttention(CATALOGUE[config]().config).named_modules()
    if isinstance(x, ipa_torch.Linear)
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("case", "projection"), PROJECTIONS)
def test_changed_projections_take_effect(change, case, projection):
    """Outputs and gradients are as if the weight itself had changed, also for the pair bias."""
    case = CATALOGUE[case]()
    module, merged, inputs = model(case), model(case), arguments(case)
    path, _, name = projection.rpartition(".")
    weight = merged.get_submodule(projection).weight
    delta = torch.nn.Parameter(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    weight.data += delta.data
    change(module.get_submodule(path), name, delta)
    out, expected = module(*inputs), merged(*inputs)
    judge(out, expected)
    assert (out - model(case)(*inputs)).abs().max() > 1e-3
    cotangent = torch_tensor(case.cotangent).float()
    (gradient,) = torch.autograd.grad((out * cotangent).sum(), delta)
    judge(gradient, torch.autograd.grad((expected * cotangent).sum(), weight)[0], "gradient")


def test_a_wrapped_pair_bias_compiles():
    case = CATALOGUE["monomer"]()
    module, inputs = model(case), arguments(case)
    wrapped(module, "attention_2d", torch.nn.Parameter(torch.ones_like(module.attention_2d.weight)))
    judge(torch.compile(module, fullgraph=True, backend="eager")(*inputs), module(*inputs))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("projection", ["q_scalar", "q_point_local", "attention_2d", "output_projection"])
def test_quantised_projections_take_effect(projection):
    """Results equal those of torch.ao's quantised nn.Linear with the same weight."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantised products")
    case = CATALOGUE["monomer"]()
    module, inputs = model(case), arguments(case)
    exact = module(*inputs)
    linear = module.get_submodule(projection)
    plain = torch.nn.Linear(linear.in_features, linear.out_features)
    plain.load_state_dict(linear.state_dict())
    quantise = torch.ao.quantization.quantize_dynamic
    (quantised,) = quantise(torch.nn.Sequential(plain), {torch.nn.Linear})
    assert type(quantised) is not torch.nn.Linear
    setattr(module, projection, quantised)
    with torch.no_grad():
        error = (module(*inputs) - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.2


@needs_torch("2.8")
@pytest.mark.covering
@pytest.mark.parametrize("name", ["monomer", "multimer", "no-pair"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(name, backend, compiler):
    case = CATALOGUE[name]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    compiler(backend)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    judge(compiled(single, pair, rigids, mask), module(single, pair, rigids, mask))
    leaves = [x.requires_grad_() for x in (single, *rigids)]
    for actual, expected in zip(
        *(torch.autograd.grad(f(single, pair, rigids, mask).square().sum(), leaves) for f in (compiled, module)),
        strict=True,
    ):
        judge(actual, expected, "gradient")


@pytest.mark.covering
@pytest.mark.parametrize("name", ["monomer", "no-pair"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compiles_for_inference(context, name):
    """It compiles where nothing needs a gradient; Dynamo cannot trace an autograd function there."""
    case = CATALOGUE[name]()
    module, inputs = model(case).requires_grad_(False), arguments(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with context():
        judge(compiled(*inputs), module(*inputs))
    torch.compiler.reset()


@needs_torch("2.11")
def test_compiles_a_functions_gradient():
    case = CATALOGUE["monomer"]()
    module, (single, *others) = model(case).requires_grad_(False), arguments(case)
    gradient = torch.func.grad(lambda x: module(x, *others).square().sum())
    judge(torch.compile(gradient, backend="aot_eager")(single), gradient(single), "gradient")
    torch.compiler.reset()


@pytest.fixture
def compiler():
    """Skips a test of inductor if there is no C++ compiler."""

    def need(backend):
        if backend == "inductor":
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler

            try:
                get_cpp_compiler()
            except InvalidCxxCompiler:
                pytest.skip("inductor needs a C++ compiler, and there is none")

    yield need
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["monomer", "multimer", "no-pair"])
def test_exports(name):
    case = CATALOGUE[name]()
    module, inputs = model(case), arguments(case)
    exported = torch.export.export(module, inputs).module()
    judge(exported(*inputs), module(*inputs))
