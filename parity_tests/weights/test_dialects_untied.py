"""Structure modules of ABodyBuilder3 and Ibex: untied layers, embedded inputs, distances in the pair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from dialect_cases import ABODYBUILDER3, SMALL_MODULE, WITHOUT_BIASES, assert_same_bits, convert, state_of
from frameworks import Torch

from ipa_bridge.config import IPAConfig, PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.kinds import infer_config, parameter_shapes
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.assumptions import is_functional, told_by_shapes
from ipa_bridge.weights.finding import find_module
from ipa_bridge.weights.porting import verify
from ipa_parity.structure_module.cases import make_case
from ipa_parity.structure_module.judge import compare_stage
from ipa_parity.structure_module.stages import RUNNERS

IBEX = replace(ABODYBUILDER3, skip_connection=True)
LAYER = "fold_iteration_1/invariant_point_attention"


def a_checkpoint(torch, *heads: str) -> dict:
    """ABodyBuilder3's parameters with those of other modules at the same path."""
    state = Weights.random(ABODYBUILDER3).to_torch(dialect="abodybuilder3", root="model")
    if "plddt" in heads:
        head = PredictedLDDTConfig(num_channel=ABODYBUILDER3.num_channel, hidden_channel=4, num_bin=3)
        state |= Weights.random(head).to_torch(dialect="openfold_v1", root="model.plddt")
    if "plm_in" in heads:
        state |= {"model.plm_in.0.weight": torch.ones(4, 5), "model.plm_in.0.bias": torch.ones(4)}
    return state


# --- Recognition


def test_a_whole_checkpoint_is_read_without_its_other_heads():
    torch = pytest.importorskip("torch")
    state = a_checkpoint(torch, "plddt")
    with pytest.warns(UserWarning, match=r"plddt at model: ignored, as the confidence head, which `root=` reads"):
        found = Weights.from_torch(state, dialect="abodybuilder3")
    assert (found.config, found.assumed) == (ABODYBUILDER3, frozenset())
    assert_same_bits(found.arrays, Weights.random(ABODYBUILDER3).arrays)
    head = Weights.from_torch(state, root="model.plddt")
    assert head.config == PredictedLDDTConfig(num_channel=ABODYBUILDER3.num_channel, hidden_channel=4, num_bin=3)
    with pytest.raises(ValueError, match=r"unexpected plddt_2\.bias"):
        Weights.from_torch(state | {"model.plddt_2.bias": torch.ones(2)}, root="model", config=ABODYBUILDER3)


def test_an_embedding_of_a_language_model_is_ibexs():
    torch = pytest.importorskip("torch")
    state = a_checkpoint(torch, "plm_in")
    with pytest.warns(UserWarning, match=r"plm_in at model: ignored, as the embedding of a language model's output"):
        found = Weights.from_torch(state)
    assert set(found.assumed_function) == {"skip_connection"}
    with pytest.raises(ValueError, match=r"no .* with the names of ABodyBuilder3"):
        Weights.from_torch(state, dialect="abodybuilder3", config=ABODYBUILDER3)


@pytest.mark.parametrize(
    ("dialect", "assumed"), [(None, {"skip_connection"}), ("abodybuilder3", set()), ("ibex", {"skip_connection"})]
)
def test_a_skip_connection_is_not_in_names_and_shapes(dialect, assumed):
    """Ibex may have one, so only the name of ABodyBuilder3 settles that there is none."""
    state = {f"a.{x}": y.shape for x, y in state_of(Weights.random(IBEX), "ibex").items()}
    _, config, found = find_module(state, dialect=dialect)
    assert (config, {path for path in found if is_functional(path)}) == (ABODYBUILDER3, assumed)


@pytest.mark.parametrize("config", [ABODYBUILDER3, WITHOUT_BIASES])
@pytest.mark.parametrize("layers", [1, 2, 8])
def test_the_number_of_layers_is_counted(config, layers):
    config = replace(config, num_layer=layers)
    shapes = {name: x.shape for name, x in state_of(Weights.random(config), "abodybuilder3").items()}
    assert find_module(shapes, dialect="abodybuilder3")[1] == config


def test_a_damaged_file_names_the_parameters_of_the_layer():
    torch = pytest.importorskip("torch")
    state = a_checkpoint(torch)
    del state["model.transition_layers.2.layers.0.linear_2.weight"]
    state["model.transition_layers.2.layers.1.linear_1.weight"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="do not fit") as raised:
        Weights.from_torch(state, dialect="abodybuilder3")
    assert "missing fold_iteration_2/transition_1/weights" in str(raised.value)
    assert "unexpected transition_layers.2.layers.1.linear_1.weight (2, 2)" in str(raised.value)


# --- Configs and names


VARIANTS = {
    "abodybuilder3": StructureModuleConfig.abodybuilder3(),
    "without biases": StructureModuleConfig.abodybuilder3(use_original_sm=False),
    "with a language model": StructureModuleConfig.abodybuilder3(c_s=1024),
    "ibex": StructureModuleConfig.ibex(use_skip_connection=True),
    "input as wide as the layers": StructureModuleConfig.ibex(c_s=128),
    "norms": replace(StructureModuleConfig.abodybuilder3(), input_norm=True),
    "distances beside the pair as it is": replace(SMALL_MODULE, distance_channel=True),
    "wider transition": replace(SMALL_MODULE, transition_factor=3),
    "narrow input": replace(SMALL_MODULE, single_input_channel=2),
    "narrow input, concatenated": replace(
        SMALL_MODULE,
        single_input_channel=2,
        sidechain_input="concatenated",
        sidechain_channel=SMALL_MODULE.num_channel + 2,
    ),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_names_and_shapes_determine_what_they_are_said_to(config):
    inferred = infer_config(parameter_shapes(config))
    for path in told_by_shapes(config):
        ours, theirs = config, inferred
        for name in path.split("."):
            ours, theirs = getattr(ours, name), getattr(theirs, name)
        assert ours == theirs, path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition_factor": 0}, "transition_factor must be a positive integer; got 0"),
        ({"single_input_channel": 0}, "single_input_channel must be .*; pass None for c_s"),
        ({"pair_input_channel": 1.5}, "pair_input_channel must be .*; pass None for no projection"),
        ({"input_norm": 1}, "input_norm must be True or False; got 1"),
        ({"sidechain_input": "added"}, "sidechain_input must be one of summed, concatenated; got 'added'"),
        ({"sidechain_input": "concatenated"}, "sidechain_channel must be 22 if sidechain_input is 'concatenated'"),
        ({"num_layer_in_residual_block": 4}, "num_layer_in_residual_block must be 2 or 3; got 4"),
        ({"skip_connection": True}, "skip_connection needs tied_layers=False"),
        (
            {"skip_connection": True, "tied_layers": False, "single_input_channel": 2},
            "whose width must be 11; it is 2: set project_initial_act=True",
        ),
        ({"smallest_angle_length": 0.0}, "smallest_angle_length must be at least 1.1e-19, for float32"),
        ({"distance_channel": True, "ipa": replace(SMALL_MODULE.ipa, pair_channel=1)}, "pair_channel of 2 or more"),
    ],
)
def test_impossible_configs_raise(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL_MODULE, **change)


# --- Conversion


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (
            ABODYBUILDER3,
            "openfold",
            "tied_layers must be True\n.*has transition_factor=1, not 2\n.*channel=None, not 7",
        ),
        (ABODYBUILDER3, "alphafold", "AlphaFold cannot represent this:"),
        (SMALL_MODULE, "abodybuilder3", "each of its layers has its own weights: tied_layers must be False"),
        (IBEX, "abodybuilder3", "has skip_connection=False, not True"),
        (replace(ABODYBUILDER3, pair_input_channel=None), "ibex", "pair_input_channel must be its width"),
        (replace(ABODYBUILDER3, smallest_angle_length=1e-6), "ibex", "must be equal; got 1e-07 and 1e-06²"),
        (replace(ABODYBUILDER3, num_layer_in_residual_block=3), "abodybuilder3", "its use_original_sm is one switch"),
        (replace(ABODYBUILDER3, ipa=replace(ABODYBUILDER3.ipa, scalar_bias=False)), "ibex", "use_original_sm"),
        (replace(SMALL_MODULE, detach_rotations=False), "openfold", "has detach_rotations=True, not False"),
        (replace(SMALL_MODULE, project_initial_act=True), "esmfold", "has project_initial_act=False, not True"),
    ],
)
def test_other_systems_refuse_the_whole_module(config, target, message):
    with pytest.raises(ValueError, match=message):
        convert(Weights.random(config), target)


@pytest.mark.parametrize("config", [ABODYBUILDER3, WITHOUT_BIASES])
def test_each_attention_inside_is_converted_alone(config):
    weights = Weights.random(config)
    attention = weights.subtree(LAYER)
    assert (attention.config, attention.assumed) == (config.ipa, frozenset())
    converted, _ = convert(attention, "openfold")
    probes = [semantics.probe("ipa_jax", attention.arrays, attention.config)]
    probes += [semantics.probe("openfold", state_of(converted, "openfold"), converted.config)]
    assert semantics.distance(*probes) < 1e-13
    theirs = state_of(weights, "abodybuilder3")
    inside = {x.removeprefix("ipa_layers.1."): y for x, y in theirs.items() if x.startswith("ipa_layers.1.")}
    assert_same_bits(state_of(attention, "openfold_v1"), {name: inside[name] for name in inside})


def test_the_constructors_arguments_are_reported(tmp_path):
    pytest.importorskip("torch")
    weights = Weights.random(replace(IBEX, detach_rotations=True, position_scale=2.0))
    with pytest.warns(UserWarning, match="for Ibex: construct") as told:
        weights.save(tmp_path / "x.safetensors", dialect="ibex")
    messages = " ".join(str(x.message) for x in told)
    for text in ("2 for our position_scale", "True for our skip_connection", "detach_rotations"):
        assert text in messages
    assert Weights.load(tmp_path / "x.safetensors").config == weights.config


@pytest.mark.parametrize("damage", ["skip_connection", "distance_channel", "project_initial_act"])
def test_a_wrong_form_is_detected(damage):
    """The semantics differ where one of the module's forms does."""
    config = replace(IBEX, single_input_channel=None)
    state = state_of(Weights.random(config, dtype=np.float64), "ibex")
    right = semantics.probe("ibex", state, config)
    if damage == "distance_channel":
        state |= {
            name: x * (np.arange(x.shape[1]) < 1) for name, x in state.items() if name.endswith("linear_b.weight")
        }
    wrong = config if damage == "distance_channel" else replace(config, skip_connection=False)
    wrong = replace(wrong, project_initial_act=False) if damage == "project_initial_act" else wrong
    assert semantics.distance(semantics.probe("ibex", state, wrong), right) > 1e-4


@pytest.mark.parametrize("config", [ABODYBUILDER3, WITHOUT_BIASES, IBEX])
def test_a_conversion_is_verified(config):
    weights = Weights.random(config)
    assert verify(weights, "ibex", source_dialect="ibex").passed
    assert verify(weights, "ipa_torch", source_dialect="ibex").passed


@pytest.mark.parametrize("config", [ABODYBUILDER3, replace(WITHOUT_BIASES, skip_connection=True)])
def test_our_modules_compute_what_theirs_do(config, framework):
    """Parameters under their names, in their semantics and in our module, give the same layers in float32."""
    config = replace(config, num_layer=2)
    case = make_case("", config, weights=Weights.random(config, seed=5)).astype("float32")
    state = state_of(case.weights, "ibex")
    if isinstance(framework, Torch):
        tensors = {name: framework.torch.tensor(x) for name, x in state.items()}
        case = replace(case, weights=Weights.from_torch(tensors, dialect="ibex", config=config))
    doubles = (x.astype(np.float64) for x in (case.single, case.pair))
    layers = semantics.structure_module("ibex", state, config, *doubles, case.mask)
    theirs = {f"{field}/layer {i + 1}": y for field, x in layers.items() for i, y in enumerate(x)}
    ours = RUNNERS[framework.name](case, gradients=False)
    rows = [compare_stage(case, "float32", x, "ours", ours, "theirs", theirs, valid_only=True) for x in theirs]
    assert len(rows) == 4 * config.num_layer
    assert not [str(row) for row in rows if not row.passed]


def test_presets_differ_where_the_systems_do():
    ours, ibex = StructureModuleConfig.abodybuilder3(), StructureModuleConfig.ibex(c_s=23)
    assert ibex == ours
    assert (ours.input_channels, ours.frame_unit, ours.position_scale) == ((23, 132), 1.0, 1.0)
    assert replace(ours.ipa, norm_epsilon=1e-8, num_channel=384, frame_unit=10.0) == IPAConfig.alphafold2()
