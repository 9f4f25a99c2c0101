"""The PyTorch IPA as torch users call it: compile, export, func, autocast, dtypes, degenerate and bad inputs."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import ipa_torch
from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.parameters import ipa_parameters
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.weights import Weights
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.cases import CATALOGUE, ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR, make_case
from ipa_parity.report import compare


def arguments(case, dtype="float32"):
    case = case.astype(dtype)
    single, rotation, translation, mask = map(torch_tensor, (case.single, case.rotation, case.translation, case.mask))
    pair = None if case.pair is None else torch_tensor(case.pair)
    return single, pair, ipa_torch.Rigid(rotation, translation), mask


def model(case, dtype="float32"):
    module = ipa_torch.InvariantPointAttention(case.config).to(getattr(torch, dtype))
    module.load_state_dict(case.weights.astype(dtype).to_torch())
    return module


def judge(actual, expected, stage="out", dtype="float32"):
    row = compare(
        actual.detach().double().numpy(),
        expected.detach().double().numpy(),
        case="",
        stage=stage,
        dtype=dtype,
        subject="transformed",
        reference="plain",
    )
    assert row.passed, str(row)


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
    """What was built without memory: at once by the module, or one by one as FSDP does."""
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
    """As adapters of parameter-efficient training wrap a layer."""

    def __init__(self, base, delta):
        super().__init__()
        self.base, self.delta = base, delta

    def forward(self, x):
        return self.base(x) + torch.nn.functional.linear(x, self.delta)


class Plus(torch.nn.Module):
    """A parametrisation."""

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
    """As if the change were in the weight, forward and gradient, the pair's bias included."""
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
    """As torch.ao makes them of an nn.Linear with the same weight."""
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
    """Where nothing wants a gradient, with which Dynamo has no place for an autograd function."""
    case = CATALOGUE[name]()
    module, inputs = model(case).requires_grad_(False), arguments(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with context():
        judge(compiled(*inputs), module(*inputs))
    torch.compiler.reset()


def test_compiles_a_functions_gradient():
    case = CATALOGUE["monomer"]()
    module, (single, *others) = model(case).requires_grad_(False), arguments(case)
    gradient = torch.func.grad(lambda x: module(x, *others).square().sum())
    judge(torch.compile(gradient, backend="aot_eager")(single), gradient(single), "gradient")
    torch.compiler.reset()


@pytest.fixture
def compiler():
    """Skips a test of inductor where there is no C++ compiler."""

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


def test_func_vmap_and_grad():
    case = CATALOGUE["batch"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    state = dict(module.named_parameters())
    call = lambda p, *xs: torch.func.functional_call(module, p, xs)  # noqa: E731
    expected = module(single, pair, rigids, mask)
    judge(torch.func.vmap(call, (None, 0, 0, 0, 0))(state, single, pair, rigids, mask), expected)

    loss = lambda s, *xs: call(state, s, *xs).square().sum()  # noqa: E731
    leaf = single.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(loss(leaf, pair, rigids, mask), leaf)
    judge(torch.func.grad(loss)(single, pair, rigids, mask), by_autograd, "gradient")
    judge(torch.func.vmap(torch.func.grad(loss))(single, pair, rigids, mask), by_autograd, "gradient")


def test_forward_mode_agrees_with_reverse_mode():
    case = CATALOGUE["monomer"]()
    module, (single, *inputs) = model(case, "float64"), arguments(case, "float64")
    direction = torch.from_numpy(np.random.default_rng(0).standard_normal(single.shape))
    loss = lambda s: module(s, *inputs).square().sum()  # noqa: E731
    _, forward = torch.func.jvp(loss, (single,), (direction,))
    judge(forward[None], (torch.func.grad(loss)(single) * direction).sum()[None], "gradient", "float64")


def test_second_derivatives_pass_gradgradcheck():
    case = make_case("", replace(ODD, num_channel=3, num_head=2, pair_channel=2), (3,))
    module, (single, *inputs) = model(case, "float64"), arguments(case, "float64")
    assert torch.autograd.gradgradcheck(lambda s: module(s, *inputs), single.requires_grad_())


def test_inference_mode():
    case = CATALOGUE["monomer"]()
    module, inputs = model(case), arguments(case)
    with torch.inference_mode():
        out = module(*inputs)
    judge(out, module(*inputs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_output_has_the_inputs_dtype_and_attention_at_least_float32(dtype):
    case = CATALOGUE["monomer"]()
    module, inputs = model(case, dtype), arguments(case, dtype)
    out, attention = module(*inputs, return_attention=True)
    assert out.dtype == getattr(torch, dtype)
    assert attention.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    judge(attention.sum(-1), torch.ones(attention.shape[:-1]), "attention", "float32")


def test_half_precision_activations_with_float32_parameters():
    case = CATALOGUE["spread-50"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case, "bfloat16")
    out = module(single, pair, rigids, mask)
    exact = module(single.float(), pair.float(), rigids.astype(torch.float32), mask)
    assert out.dtype == torch.bfloat16
    judge(out, exact, "out", "bfloat16")


@pytest.mark.parametrize("activations", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("frames", ["float16", "float32", "float64"])
def test_frames_do_not_decide_the_dtype(activations, frames):
    """The activations do, at least float32: a protein's frames come in float64."""
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case, activations), arguments(case, activations)
    rigids = rigids.astype(getattr(torch, frames))
    seen = []
    module.output_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    out, attention = module(single, pair, rigids, mask, return_attention=True)
    at_least_float32 = torch.float64 if activations == "float64" else torch.float32
    assert (out.dtype, attention.dtype, *seen) == (single.dtype, at_least_float32, at_least_float32)


def test_far_frames_keep_their_bits_until_they_are_centred():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    near = rigids.astype(torch.float64)
    far = near._replace(translation=near.translation + 1e6)
    judge(module(single, pair, far, mask), module(single, pair, near, mask))


def test_frames_of_a_transformer_have_its_activations_dtype():
    config = IPATransformerConfig.lucidrains(8, depth=1, heads=2, require_pairwise_repr=False)
    act, rigids = torch.randn(5, 8), ipa_torch.Rigid.random((5,), dtype=torch.float64)
    moved = ipa_torch.IPATransformer(config)(act, None, rigids).rigids
    assert {x.dtype for x in moved} == {torch.float32}


@pytest.mark.parametrize("name", ["alphafold2", "spread-50", "offset-1000", "multimer"])
def test_autocast_keeps_geometry_in_float32(name):
    """CPU autocast turns float32 matrix products into bfloat16; of coordinates ±50 nothing would be left."""
    case = CATALOGUE[name]()
    module, inputs = model(case), arguments(case)
    cotangent, parameters = torch_tensor(case.cotangent).float(), list(module.parameters())
    exact, exact_attention = module(*inputs, return_attention=True)
    exact_gradients = torch.autograd.grad((exact * cotangent).sum(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, attention = module(*inputs, return_attention=True)
        gradients = torch.autograd.grad((module(*inputs) * cotangent).sum(), parameters)
    assert out.dtype == torch.float32
    assert attention.dtype == torch.float32
    judge(out, exact, "out", "bfloat16")
    judge(attention, exact_attention, "attention", "bfloat16")
    for actual, expected in zip(gradients, exact_gradients, strict=True):
        assert actual.isfinite().all()
        if expected.any() and name != "spread-50":  # attention_2d's bias has none; far apart, queries' bits decide
            judge(actual, expected, "gradient", "bfloat16")


def test_core_ignores_autocast():
    case = CATALOGUE["spread-50"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    pair_bias_weight, point_weights = module.logit_weights()
    projections = module.project(single, rigids)

    def attend():
        return ipa_torch.point_attention(
            *projections, pair, pair_bias_weight=pair_bias_weight, point_weights=point_weights, mask=mask
        )

    expected = attend()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attend()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.float16])
def test_masks_of_any_dtype(kind):
    case = CATALOGUE["monomer"]()
    module, (*inputs, mask) = model(case), arguments(case)
    assert torch.equal(module(*inputs, mask.to(kind)), module(*inputs, mask))


def test_masked_residues_are_ignored_by_valid_ones():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    hidden = (~mask[:, None]).float()
    moved = ipa_torch.Rigid(rigids.rotation, rigids.translation + 5 * hidden)
    changed, out = module(single + 3 * hidden, pair, moved, mask), module(single, pair, rigids, mask)
    judge(changed[mask], out[mask])
    assert ((changed - out).abs()[~mask] > 1e-3).any()


@pytest.mark.parametrize("config", [ODD, ODD_MULTIMER, ODD_NO_PAIR])
@pytest.mark.parametrize("residues", [0, 1])
def test_no_residue_and_one_residue(config, residues):
    case = make_case("", config, (residues,))
    module, (single, *inputs) = model(case), arguments(case)
    out = module(single.requires_grad_(), *inputs)
    (gradient,) = torch.autograd.grad(out.sum(), single)
    assert out.shape == gradient.shape == (residues, config.num_channel)
    assert out.isfinite().all()
    assert gradient.isfinite().all()


def test_everything_masked_is_finite():
    case = CATALOGUE["monomer"]()
    module, (single, pair, rigids, mask) = model(case), arguments(case)
    leaves = [x.requires_grad_() for x in (single, pair, *rigids)]
    out = module(single, pair, rigids, torch.zeros_like(mask))
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [*leaves, *module.parameters()]))


def test_coincident_frames_have_finite_gradients():
    """Every local point at its frame's origin: the norms' gradients are finite in both forms."""
    for config in (ODD, ODD_MULTIMER):
        case = make_case("", config, (5,))
        module, (single, pair, rigids, mask) = model(case), arguments(case)
        still = ipa_torch.Rigid(rigids.rotation, torch.zeros_like(rigids.translation).requires_grad_())
        for name, x in module.named_parameters():
            if "point" in name:
                torch.nn.init.zeros_(x)
        out = module(single.requires_grad_(), pair, still, mask)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [single, still.translation]))


def test_every_parameter_has_a_gradient():
    """None would trip DistributedDataParallel; the pair bias's own bias has a gradient of exactly zero."""
    case = CATALOGUE["multimer"]()
    module = model(case)
    module(*arguments(case)).sum().backward()
    assert all(x.grad is not None for x in module.parameters())
    assert (module.attention_2d.bias.grad == 0).all()


def test_nan_is_never_hidden():
    case = CATALOGUE["monomer"]()
    single, *inputs = arguments(case)
    single[0, 0] = torch.nan
    assert model(case)(single, *inputs)[0].isnan().all()


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
    """And the check is no obstacle to any of them."""
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
