"""Other systems' weights: their modules load ours strictly, ours compute what theirs do, the way back is bitwise."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.config import (
    IPABlockConfig,
    IPAConfig,
    IPATransformerConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of, replace_attention
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.assumptions import is_functional
from ipa_bridge.weights.conversion import LOSSES, Conversion, in_layout
from ipa_bridge.weights.dialects import DIALECTS, Transform, find_dialect
from ipa_bridge.weights.dialects.spec import Order
from ipa_bridge.weights.finding import find_module
from ipa_bridge.weights.translation import from_dialect, in_dialect
from ipa_parity import peers
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS, ODD_NO_PAIR, make_case
from ipa_parity.attention.stages import RUNNERS
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import compare
from ipa_parity.structure_module import cases as structure_modules
from ipa_parity.structure_module.judge import compare_stage
from ipa_parity.structure_module.stages import RUNNERS as STRUCTURE_MODULE_RUNNERS

ONE_WIDTH = replace(ODD, num_scalar_v=ODD.num_scalar_qk)
SMALL_MODULE = StructureModuleConfig(ipa=ONE_WIDTH, sidechain_channel=5, num_layer=8)
"""Odd, distinct widths, where a system has one for scalar queries, keys and values."""
FRAMEDIFF = replace(ODD_DOWN_Z, num_scalar_v=ODD.num_scalar_qk, pair_channel=8, pair_value_channel=2)

NATIVE = {
    "alphafold monomer": ("alphafold", ODD),
    "alphafold multimer": ("alphafold", ODD_MULTIMER),
    "openfold": ("openfold", ONE_WIDTH),
    "openfold multimer": (
        "openfold",
        replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp", frame_unit=20.0),
    ),
    "openfold_v1": ("openfold_v1", ONE_WIDTH),
    "esmfold": ("esmfold", replace(ONE_WIDTH, point_weight_init=0.0)),
    "framediff": ("framediff", FRAMEDIFF),
    "frameflow": ("frameflow", FRAMEDIFF),
    "lucidrains": ("lucidrains", ODD_NO_BIAS),
    "lucidrains without pair": ("lucidrains", replace(ODD_NO_BIAS, pair_channel=None)),
    "lucidrains block": ("lucidrains", IPABlockConfig.lucidrains(6, heads=2, ff_mult=2)),
    "lucidrains transformer": (
        "lucidrains",
        IPATransformerConfig.lucidrains(
            6, depth=12, num_tokens=5, predict_points=True, original_composition_order=True, heads=2
        ),
    ),
    "alphafold structure module": ("alphafold", SMALL_MODULE),
    "openfold structure module": ("openfold", SMALL_MODULE),
    "openfold_v1 structure module": ("openfold_v1", SMALL_MODULE),
    "openfold multimer structure module": (
        "openfold",
        replace(SMALL_MODULE, ipa=replace(ONE_WIDTH, layout="multimer", scalar_bias=False, norm_form="clamp")),
    ),
    "esmfold structure module": ("esmfold", SMALL_MODULE),
    "alphafold confidence head": ("alphafold", PredictedLDDTConfig(num_channel=5, hidden_channel=4, num_bin=3)),
    "openfold confidence head": ("openfold", PredictedLDDTConfig(num_channel=5, hidden_channel=4, num_bin=3)),
}
"""By what the parameters are: whose, and with which config."""

WHOLE = {
    "alphafold monomer": ("alphafold", IPAConfig.alphafold2(), "alphafold"),
    "alphafold multimer": ("alphafold", IPAConfig.alphafold_multimer(), "alphafold"),
    "openfold": ("openfold", IPAConfig.alphafold2(), None),
    "openfold multimer": ("openfold", IPAConfig.alphafold_multimer(), None),
    "openfold_v1": ("openfold_v1", IPAConfig.alphafold2(), None),
    "esmfold": ("esmfold", IPAConfig.esmfold(), "transformers"),
    "framediff": ("framediff", IPAConfig.framediff(), None),
    "lucidrains": ("lucidrains", IPAConfig.lucidrains(64, pairwise_repr_dim=32), "invariant_point_attention"),
    "alphafold monomer, structure module": ("alphafold", StructureModuleConfig.alphafold2(), "alphafold"),
    "alphafold multimer, structure module": ("alphafold", StructureModuleConfig.alphafold_multimer(), "alphafold"),
    "openfold, structure module": ("openfold", StructureModuleConfig.alphafold2(), None),
    "openfold multimer, structure module": ("openfold", StructureModuleConfig.alphafold_multimer(), None),
    "openfold_v1, structure module": ("openfold_v1", StructureModuleConfig.alphafold2(), None),
    "esmfold, structure module": ("esmfold", StructureModuleConfig.esmfold(), "transformers"),
}
"""Rows of the README's table: whose, at its real size, and the package whose module is run; None for the semantics."""


def state_of(weights: Weights, dialect: str) -> dict[str, np.ndarray]:
    return in_dialect(weights.arrays, weights.config, find_dialect(dialect))


def convert(weights: Weights, dialect: str, **options) -> tuple[Weights, Conversion]:
    return weights.converted(find_dialect(dialect), **options)


def in_other_layout(weights: Weights, layout: str) -> Weights:
    return Weights(*in_layout(weights.arrays, weights.config, layout))


def random_state(dialect: str, config, seed: int) -> dict[str, np.ndarray]:
    """Parameters drawn under their names, no matter what ours are."""
    rng = np.random.default_rng(seed)
    state = {}
    for ours, (theirs, transform) in find_dialect(dialect).names(config).items():
        shape = transform.their_shape
        x = rng.standard_normal(shape) / (np.sqrt(np.prod(shape) / min(shape)) if len(shape) > 1 else 10)
        if ours.endswith("/scale"):
            x = 1 + x
        update = "affine_update" in ours or "quat_rigid" in ours
        state[theirs] = ((0.2 if update else 1) * x).astype(np.float32)
    unused = find_dialect(dialect).unused.get(type(config), {})
    return state | {name: np.zeros(shape, np.float32) for name, shape in unused.items()}


def from_state(state, dialect: str, config) -> Weights:
    torch = pytest.importorskip("torch")
    if DIALECTS[dialect].separator == "/":
        found = Weights.from_haiku({f"some/{name}": x for name, x in state.items()}, root="some", config=config)
        return Weights(found.arrays, found.config)  # under its own name
    root = "some.plddt" if isinstance(config, PredictedLDDTConfig) else "some"
    tensors = {f"{root}.{name}": torch.tensor(x) for name, x in state.items()}
    unused = find_dialect(dialect).unused.get(type(config))
    with pytest.warns(UserWarning, match="linear_rbf") if unused else contextlib.nullcontext():
        return Weights.from_torch(tensors, dialect=dialect, root=root, config=config)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (x.dtype, x.shape), name
        assert actual[name].tobytes() == x.tobytes(), name


@pytest.mark.covering
@pytest.mark.parametrize("direction", ["from", "to"])
@pytest.mark.parametrize("num_layer", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", WHOLE)
def test_the_same_function_in_both_frameworks(name, num_layer, direction, conversions):
    """Their parameters in our modules, and ours in theirs, which load them strictly: outputs are the same.

    Of structure modules after that many layers, which have one set of weights.
    """
    dialect, config, package = WHOLE[name]
    if isinstance(config, StructureModuleConfig):
        config = replace(config, num_layer=num_layer)
    elif num_layer > 2:
        pytest.skip("an attention has no layers")
    if package:
        pytest.importorskip(package)
    if len(installed_frameworks()) < 2:
        pytest.skip("one of the frameworks is not installed")
    if direction == "from":
        state = random_state(dialect, config, seed=3)
        weights = from_state(state, dialect, config)
        assert_same_bits(state_of(weights, dialect), state)
    else:
        weights = Weights.random(config, seed=4)
    whole = isinstance(config, StructureModuleConfig)
    case = (
        structure_modules.make_case(name, config, weights=weights)
        if whole
        else make_case(name, config, (33,), weights=weights)
    )
    case = case.astype("float32")
    theirs = run_theirs(case, dialect, package)
    runners = STRUCTURE_MODULE_RUNNERS if whole else RUNNERS
    for framework, run in runners.items():
        ours = run(case, gradients=False)
        rows = [
            compare_stage(case, "float32", stage, framework, ours, "theirs", theirs, valid_only=True)
            if whole
            else compare(
                ours[stage],
                x,
                case=name,
                stage=stage,
                dtype="float32",
                subject=framework,
                reference="theirs",
                meaningful=np.broadcast_to(case.mask[:, None], x.shape),
            )
            for stage, x in theirs.items()
        ]
        failures = [str(row) for row in rows if not row.passed]
        assert not failures, "\n".join(failures)
        worst = max(rows, key=lambda row: row.error / row.bound)
        conversions.append(replace(worst, case=name, stage=direction, subject=framework))


def run_theirs(case, dialect: str, package: str | None) -> dict[str, np.ndarray]:
    """By stage: of the package's module, or of the dialect's semantics in float64."""
    if isinstance(case.config, StructureModuleConfig):
        if package:
            found = peers.PEERS[dialect].run_structure_module(case, gradients=False)
            return {stage: x for stage, x in found.items() if stage.partition("/")[0] in LAYERS}
        state = {name: x.astype(np.float64) for name, x in state_of(case.weights, dialect).items()}
        single, pair = case.single.astype(np.float64), case.pair.astype(np.float64)
        layers = semantics.structure_module(dialect, state, case.config, single, pair, case.mask)
        return {f"{field}/layer {i + 1}": y for field, x in layers.items() for i, y in enumerate(x)}
    if package:
        only_valid = replace(case, cotangent=case.cotangent * case.mask[:, None])
        return {"out": peers.PEERS[dialect].run(only_valid)["out"]}
    state = {name: x.astype(np.float64) for name, x in state_of(case.weights, dialect).items()}
    inputs = (x.astype(np.float64) for x in (case.single, case.pair, case.rotation, case.translation))
    return {"out": semantics.attention(dialect, state, case.config, *inputs, case.mask)}


LAYERS = ("act", "rotation", "translation", "unnormalized_angles")
README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readmes_table_has_these_rows():
    section = README.read_text().partition("## Weights from other systems")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([^|]+?) \|", section, re.M)[1:] == list(WHOLE)


# --- There and back


@pytest.mark.parametrize("name", NATIVE)
def test_the_way_back_is_bitwise(name):
    dialect, config = NATIVE[name]
    weights = Weights.random(config)
    state = state_of(weights, dialect)
    again = from_state(state, dialect, config)
    assert list(again.arrays) == list(weights.arrays)
    assert_same_bits(again.arrays, weights.arrays)
    assert_same_bits(state_of(again, dialect), state)


def with_biases_of_zero(weights: Weights) -> Weights:
    bare = [name for name in weights.arrays if name.endswith("/bias") and re.search("_(scalar|point)", name)]
    return replace(
        weights, arrays={name: np.zeros_like(x) if name in bare else x for name, x in weights.arrays.items()}
    )


def exact_pairs() -> set[tuple[str, str]]:
    """Whose parameters another system can say, without loss, where biases are zero."""
    pairs = set()
    for name, (_, config) in NATIVE.items():
        if isinstance(config, IPAConfig):
            config = replace(config, norm_epsilon=1e-8)
        weights = with_biases_of_zero(Weights.random(config))
        for target in DIALECTS:
            try:
                convert(weights, target)
            except ValueError:
                continue
            pairs.add((name, target))
    return pairs


EVERYONE = {"alphafold", "openfold", "openfold_v1", "esmfold"}
EXPECTED = {
    "alphafold monomer": {"alphafold"},
    "alphafold multimer": {"alphafold"},
    "openfold": EVERYONE | {"lucidrains"},
    "openfold multimer": {"alphafold", "openfold"},
    "openfold_v1": EVERYONE | {"lucidrains"},
    "esmfold": EVERYONE | {"lucidrains"},
    "framediff": {"framediff", "frameflow"},
    "frameflow": {"framediff", "frameflow"},
    "lucidrains": {"lucidrains", "alphafold"},
    "lucidrains without pair": {"lucidrains"},
    "lucidrains block": {"lucidrains"},
    "lucidrains transformer": {"lucidrains"},
    "alphafold structure module": EVERYONE,
    "openfold structure module": EVERYONE,
    "openfold_v1 structure module": EVERYONE,
    "openfold multimer structure module": {"alphafold", "openfold"},
    "esmfold structure module": EVERYONE,
    "alphafold confidence head": {"alphafold", "openfold", "openfold_v1"},
    "openfold confidence head": {"alphafold", "openfold", "openfold_v1"},
}
"""Scalar values of another width keep AlphaFold's from the rest."""


def test_who_can_say_what():
    found = exact_pairs()
    ours = {"ipa_jax", "ipa_torch"}
    for name, targets in EXPECTED.items():
        if name == "alphafold monomer":
            targets = targets | {"lucidrains"}
        assert {target for each, target in found if each == name} == targets | ours, name


@pytest.mark.parametrize(("name", "target"), sorted(exact_pairs()))
def test_there_and_back_through_another_system_is_bitwise(name, target):
    source, config = NATIVE[name]
    if isinstance(config, IPAConfig):
        config = replace(config, norm_epsilon=1e-8)
    weights = with_biases_of_zero(Weights.random(config))
    state = state_of(weights, source)
    there, _ = convert(from_state(state, source, config), target)
    arrived = from_state(state_of(there, target), target, there.config)
    back, conversion = convert(arrived, source)
    # Of two layouts that say the same, the one it is in is kept: ask for the one it came in.
    home = in_other_layout(back, attention_of(config).layout) if hasattr(config, "layout") else back
    home, _ = convert(home, source)
    assert not conversion.losses
    assert_same_bits(state_of(home, source), state)


def test_an_attention_without_a_pair_in_openfolds_names_is_unknown():
    """MDGen's scales its logits as with a pair; nothing in its names or shapes tells."""
    config = replace(ONE_WIDTH, pair_channel=None)
    state = random_state("openfold_v1", config, seed=0)
    with pytest.raises(ValueError, match=r"always reads a pair representation; .* Pass config= if they are scaled"):
        find_module({name: x.shape for name, x in state.items()}, dialect="openfold_v1")
    assert from_state(state, "openfold_v1", config).config == config


@pytest.mark.parametrize(
    "config", [ODD, SMALL_MODULE, replace(SMALL_MODULE, tied_layers=False, num_layer=2), ODD_NO_PAIR]
)
def test_layouts_are_exact_both_ways(config):
    weights = Weights.random(config)
    multimer = in_other_layout(weights, "multimer")
    assert attention_of(multimer.config).scalar_bias
    assert in_other_layout(multimer, "monomer").config == config
    assert_same_bits(in_other_layout(multimer, "monomer").arrays, weights.arrays)
    probes = [semantics.probe("ipa_jax", x.arrays, x.config) for x in (weights, multimer)]
    assert semantics.distance(*probes) < 1e-13


WIDTHS = st.integers(1, 4)


@settings(max_examples=60)
@given(WIDTHS, WIDTHS, WIDTHS, WIDTHS, st.sampled_from(["float16", "float32", "float64"]), st.integers(0, 2**32 - 1))
def test_any_transform_is_inverted_bitwise(inputs, heads, points, width, dtype, seed):
    """Shapes, orders and bit patterns at random, NaNs and zeros of either sign among them."""
    rng = np.random.default_rng(seed)
    shape = (inputs, heads, 3 * points * width)
    outputs = rng.permutation(heads * 3 * points * width)
    choices = [
        Transform(shape, turned=True, outputs=outputs, inputs=rng.permutation(inputs)),
        Transform(shape, turned=True, outputs=outputs),
        Transform(shape, turned=True),
        Transform(shape[1:], outputs=outputs),
        Transform(shape[1:]),
        Transform(shape, flat=False),
    ]
    for transform in choices:
        bits = rng.integers(0, 256, int(np.prod(transform.shape)) * np.dtype(dtype).itemsize, np.uint8)
        x = bits.view(dtype).reshape(transform.shape)
        there = transform.apply(x)
        assert there.shape == transform.their_shape
        assert transform.invert(there).tobytes() == x.tobytes()
        assert transform.apply(transform.invert(there)).tobytes() == there.tobytes()


def test_orders_are_what_they_say():
    config = replace(ODD, num_head=2, num_point_qk=2)
    indices = Order(ours="h c q", theirs="h q c").indices(config)
    h, c, q = np.unravel_index(indices, (2, 3, 2))
    assert [(a, b, d) for a, b, d in zip(h, q, c, strict=True)] == list(itertools.product(range(2), range(2), range(3)))


# --- Recognising


@pytest.mark.parametrize("root", ["", "model.structure_module", "a.b"])
@pytest.mark.parametrize("name", [name for name, (dialect, _) in NATIVE.items() if dialect != "alphafold"])
def test_names_and_shapes_tell_the_dialect(name, root):
    dialect, config = NATIVE[name]
    if "confidence" in name:
        root = f"{root}.plddt".removeprefix(".")
    if dialect == "esmfold" and root:
        root = f"{root.replace('model.structure_module', 'trunk.structure_module')}"
    state = {f"{root}.{x}".removeprefix("."): y.shape for x, y in state_of(Weights.random(config), dialect).items()}
    found, inferred, _ = find_module(state)
    alike = {"esmfold": {"openfold_v1"} if "trunk" not in root else set()}
    if "confidence" not in name:  # OpenFold's versions call it the same
        assert found.dialect.name in {dialect} | alike.get(dialect, set())
    assert (found.kind, found.root) == (type(config), root)
    assert replace_untold(inferred) == replace_untold(config)


def replace_untold(config):
    """What names and shapes do not tell, put aside."""
    if isinstance(config, StructureModuleConfig):
        return replace(config, ipa=replace(replace_untold(config.ipa), frame_unit=1.0), position_scale=1.0)
    if isinstance(config, IPAConfig):
        return replace(config, zero_init=True, point_weight_init=0.0)
    if isinstance(config, IPABlockConfig | IPATransformerConfig):
        return replace_attention(config, replace_untold(config.ipa))
    return config


def test_an_untold_difference_is_an_error_not_a_guess(monkeypatch):
    """Were ESMFold's function another than OpenFold's under the same names."""
    state = {name: x.shape for name, x in state_of(Weights.random(ONE_WIDTH), "openfold_v1").items()}
    other = replace(DIALECTS["esmfold"], finish=lambda config: replace(config, norm_epsilon=1e-12))
    monkeypatch.setitem(DIALECTS, "esmfold", other)
    with pytest.raises(
        ValueError, match=r"several dialects.*'openfold_v1' \(OpenFold 1\) or 'esmfold' \(ESMFold\), or config="
    ):
        find_module(state)
    assert find_module(state, config=ONE_WIDTH)[1] == ONE_WIDTH  # told what it computes, they read it alike


def test_a_name_too_many_is_not_passed_over():
    """FrameDiff's down_z under OpenFold's name is another function."""
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(x) for name, x in state_of(Weights.random(ONE_WIDTH), "openfold_v1").items()}
    with pytest.raises(ValueError, match=r"unexpected linear_x\.weight \(2, 2\)"):
        Weights.from_torch(state | {"linear_x.weight": torch.ones(2, 2)}, dialect="openfold_v1")
    with pytest.raises(ValueError, match=r"no invariant point attentions .*in OpenFold 1's names"):
        Weights.from_torch(state | {"down_z.weight": torch.ones(2, 2)}, dialect="openfold_v1", config=ONE_WIDTH)


def test_shapes_are_named_in_both_tongues():
    torch = pytest.importorskip("torch")
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold")
    state["linear_q.weight"] = torch.ones(3, 11)
    with pytest.raises(
        ValueError, match=r"q_scalar/weights must be \(11, .*\(linear_q\.weight: \(.*, 11\), got \(3, 11\)"
    ):
        Weights.from_torch(state, config=ONE_WIDTH)
    with pytest.raises(ValueError, match=r"dialect must be one of alphafold, .*; got 'rosetta'"):
        Weights.from_torch(state, dialect="rosetta")


def test_openfolds_checkpoints_hold_several(tmp_path):
    """Lightning's and DeepSpeed's prefixes, an average beside the weights: one must be named."""
    torch = pytest.importorskip("torch")
    weights = [Weights.random(SMALL_MODULE, seed=seed) for seed in (1, 2)]
    plain, averaged = (x.to_torch(dialect="openfold") for x in weights)
    checkpoint = {
        "epoch": 3,
        "state_dict": {f"model.structure_module.{name}": x for name, x in plain.items()},
        "ema": {"params": {f"structure_module.{name}": x for name, x in averaged.items()}, "decay": 0.999},
        "optimizer_states": [{"state": {}}],
    }
    torch.save(checkpoint, tmp_path / "checkpoint.ckpt.pt")
    with pytest.raises(ValueError, match=r"2 structure modules .*'state_dict\.model\.structure_module', 'ema\.params"):
        Weights.load(tmp_path / "checkpoint.ckpt.pt")
    for root, expected in (
        ("state_dict.model.structure_module", weights[0]),
        ("ema.params.structure_module", weights[1]),
    ):
        again = Weights.load(tmp_path / "checkpoint.ckpt.pt", root=root)
        assert_same_bits(again.arrays, expected.arrays)
    torch.save({f"module.model.structure_module.{name}": x for name, x in plain.items()}, tmp_path / "deepspeed.pt")
    assert_same_bits(Weights.load(tmp_path / "deepspeed.pt").arrays, weights[0].arrays)


# --- What cannot be said


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (ODD, "openfold", "OpenFold 2 cannot say this:\n.*num_scalar_v must be 4, not 2"),
        (ONE_WIDTH, "framediff", "down_z is c_z / 4 = 1 wide, and pair_value_channel here is none"),
        (ODD_NO_PAIR, "alphafold", "always reads a pair representation"),
        (replace(SMALL_MODULE, tied_layers=False), "alphafold", "tied_layers must be True"),
        (replace(SMALL_MODULE, num_layer_in_transition=2), "openfold", "its transition has 3 linear layers, not 2"),
        (SMALL_MODULE, "lucidrains", "invariant-point-attention has no structure module"),
        (PredictedLDDTConfig(), "esmfold", "ESMFold has no confidence head"),
    ],
)
def test_what_a_system_cannot_say_is_refused(config, target, message):
    with pytest.raises(ValueError, match=message):
        convert(Weights.random(config), target, allow_lossy=list(LOSSES))


@pytest.mark.parametrize(
    ("config", "target", "losses", "apart"),
    [
        (ONE_WIDTH, "lucidrains", ["scalar_bias", "point_bias"], 1.0),
        (ODD_MULTIMER, "lucidrains", ["point_bias", "norm"], 1.0),
        (replace(ONE_WIDTH, norm_epsilon=1e-12), "alphafold", ["norm"], 1e-6),
        (NATIVE["esmfold"][1], "alphafold", [], 1e-13),
        (ODD_NO_BIAS, "alphafold", [], 1e-13),
        (NATIVE["framediff"][1], "openfold", ["down_z"], 1e-6),
        (NATIVE["openfold multimer"][1], "esmfold", ["norm"], 1e-6),
    ],
)
def test_losses_have_names_and_are_allowed_by_them(config, target, losses, apart):
    weights = Weights.random(config)
    if losses:
        with pytest.raises(ValueError, match=rf"cannot say all of this.*--allow-lossy {','.join(losses)}"):
            convert(weights, target)
        with pytest.raises(ValueError, match=f"--allow-lossy {losses[-1]} "):
            convert(weights, target, allow_lossy=losses[:-1])
    result, conversion = convert(weights, target, allow_lossy=losses)
    assert [loss.name for loss in conversion.losses] == losses
    probes = [
        semantics.probe("ipa_jax", weights.arrays, config),
        semantics.probe(target, state_of(result, target), result.config),
    ]
    assert semantics.distance(*probes) < apart
    with pytest.raises(ValueError, match="allow_lossy must name norm, "):
        convert(weights, target, allow_lossy=["everything"])


def test_of_two_layouts_the_less_grave_loss_is_taken():
    """A guard of a length at 1e-8 rather than biases."""
    config = replace(ONE_WIDTH, layout="multimer", scalar_bias=True, norm_form="clamp")
    weights = Weights.random(config)
    for allowed in (["norm"], ["norm", "scalar_bias"]):
        converted, conversion = convert(weights, "openfold", allow_lossy=allowed)
        assert [loss.name for loss in conversion.losses] == ["norm"]
        assert converted.config.layout == "monomer"
    _, conversion = convert(weights, "openfold", allow_lossy=["scalar_bias"])
    assert [loss.name for loss in conversion.losses] == ["scalar_bias"]


def test_what_a_file_cannot_say_is_told(tmp_path):
    pytest.importorskip("torch")
    weights = Weights.random(
        replace(SMALL_MODULE, position_scale=3.0, ipa=replace(ONE_WIDTH, norm_epsilon=1e-6, frame_unit=3.0))
    )
    with pytest.warns(UserWarning, match=r"as OpenFold 2's: ") as told:
        weights.save(tmp_path / "of.safetensors", dialect="openfold")
    messages = [str(x.message) for x in told]
    assert any("construct it with eps=1e-06" in x for x in messages)
    assert any("construct it with 3 for what is called position_scale here" in x for x in messages)
    again = Weights.load(tmp_path / "of.safetensors")  # which knows it all the same
    assert again.config == weights.config
    with pytest.warns(UserWarning, match="its `rotations` are the transpose of ours"):
        Weights.random(ODD_NO_BIAS).save(tmp_path / "l.safetensors", dialect="lucidrains")
    with pytest.warns(UserWarning, match="divide the translations of its frames by 10"):
        Weights.random(NATIVE["framediff"][1]).save(tmp_path / "f.pt", dialect="framediff")


def test_transformers_reads_what_is_written(tmp_path):
    """Its loader asks .safetensors for a format."""
    pytest.importorskip("torch")
    from safetensors import safe_open

    Weights.random(replace(ONE_WIDTH, norm_epsilon=1e-8)).save(
        tmp_path / "e.safetensors", dialect="esmfold", root="trunk.structure_module.ipa"
    )
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert all(key.startswith("trunk.structure_module.ipa.") for key in file.keys())
    assert Weights.load(tmp_path / "e.safetensors").config == ONE_WIDTH


# --- Names and shapes of systems without a package


MANIFESTS = json.loads((Path(__file__).parents[1] / "data" / "manifests.json").read_text())


@pytest.mark.parametrize("name", MANIFESTS)
def test_names_and_shapes_are_theirs(name):
    """At their real sizes; the lists are of `CONVENTIONS` and not of our tables."""
    manifest = MANIFESTS[name]
    presets = {"ipa": IPAConfig, "structure module": StructureModuleConfig}
    config = getattr(presets[manifest["module"]], manifest["preset"])()
    weights = Weights.random(config)
    assert {name: list(x.shape) for name, x in state_of(weights, manifest["dialect"]).items()} == manifest["shapes"]


@pytest.mark.parametrize("dialect", [None, "openfold_v1", "esmfold"])
def test_two_systems_of_the_same_function_are_no_ambiguity(dialect, tmp_path):
    """OpenFold 1's names and ESMFold's are the same, and so are the functions: a structure module's is all told."""
    pytest.importorskip("torch")
    state = Weights.random(SMALL_MODULE).to_torch(dialect="openfold_v1", root="model.structure_module")
    found = Weights.from_torch(state, dialect=dialect)
    assert (replace_untold(found.config), found.assumed_function) == (replace_untold(SMALL_MODULE), {})
    found.save(tmp_path / "a.npz", dialect="alphafold")
    found.save(tmp_path / "a.safetensors")


def test_an_attention_in_openfold_1s_names_may_be_anothers():
    """ABodyBuilder3 has another ε under these names: only who names the system tells it."""
    pytest.importorskip("torch")
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1", root="a")
    assert set(Weights.from_torch(state).assumed_function) == {"norm_epsilon"}
    for dialect in ("openfold_v1", "esmfold"):
        assert not Weights.from_torch(state, dialect=dialect).assumed
    state = Weights.random(ONE_WIDTH).to_torch(dialect="esmfold", root="trunk.structure_module.ipa")
    assert not Weights.from_torch(state).assumed


@pytest.mark.parametrize(
    ("name", "assumed"),
    [
        ("openfold", set()),
        ("openfold multimer", set()),
        ("framediff", set()),
        ("frameflow", set()),
        ("openfold structure module", set()),
        ("openfold multimer structure module", set()),
        ("lucidrains", {"norm_epsilon"}),
        ("lucidrains block", {"ipa.norm_epsilon", "post_norm"}),
        ("lucidrains transformer", {"block.ipa.norm_epsilon", "block.post_norm", "detach_rotations"}),
    ],
)
def test_a_system_tells_what_all_its_models_share(name, assumed):
    """And not what its constructors take."""
    dialect, config = NATIVE[name]
    state = {f"a.{x}": y.shape for x, y in state_of(Weights.random(config), dialect).items()}
    for each in (None, dialect):
        *_, found = find_module(state, dialect=each)
        assert {path for path in found if is_functional(path)} == assumed


def test_esmfolds_epsilon_is_its_published_classs():
    """Where value points have no length, it is all there is of them: 1e-12 in its place would be seen."""
    pytest.importorskip("transformers")
    from transformers.models.esm.configuration_esm import StructureModuleConfig as EsmConfig

    assert IPAConfig.esmfold().norm_epsilon == StructureModuleConfig.esmfold().ipa.norm_epsilon == EsmConfig().epsilon
    weights = Weights.random(IPAConfig.esmfold())
    arrays = {name: x * (0 if name.startswith("kv_") else 1) for name, x in weights.arrays.items()}
    rest = arrays["output_projection/weights"].copy()
    scalars, lengths = 12 * 16 + 3 * 12 * 8, 12 * 8
    rest[:scalars], rest[scalars + lengths :] = 0, 0
    arrays |= {"output_projection/weights": rest, "output_projection/bias": 0 * arrays["output_projection/bias"]}
    case = make_case("lengths", IPAConfig.esmfold(), (1,), weights=replace(weights, arrays=arrays))
    case = replace(case, mask=np.ones_like(case.mask)).astype("float32")
    theirs = peers.run_esmfold(case)["out"]
    assert np.abs(theirs).max() > 1e-5
    names = {"case": "lengths", "stage": "out", "dtype": "float32", "subject": "torch", "reference": "theirs"}
    for epsilon, same in ((1e-8, True), (1e-12, False)):
        weights = replace(case.weights, config=replace(case.config, norm_epsilon=epsilon))
        row = compare(RUNNERS["torch"](replace(case, weights=weights), gradients=False)["out"], theirs, **names)
        assert row.passed == same, str(row)


# --- What lies beside


def with_linear_rbf(torch, blocks: int = 2) -> dict:
    """A trunk of FrameDiff's: each block owns what no forward reads."""
    state = {}
    for b in range(blocks):
        own = Weights.random(FRAMEDIFF, seed=b).to_torch(dialect="frameflow", root=f"trunk.ipa_{b}")
        state |= own | {f"trunk.ipa_{b}.linear_rbf.weight": torch.randn(1, 20)}
        state |= {f"trunk.ipa_{b}.linear_rbf.bias": torch.randn(1), f"trunk.ipa_ln_{b}.weight": torch.ones(11)}
    return state


def test_what_no_forward_reads_is_ignored_with_a_word(tmp_path):
    torch = pytest.importorskip("torch")
    state = with_linear_rbf(torch)
    expected = Weights.random(FRAMEDIFF, seed=1)
    torch.save(state, tmp_path / "f.pt")
    for read in (lambda **x: Weights.from_torch(state, **x), lambda **x: Weights.load(tmp_path / "f.pt", **x)):
        for dialect in (None, "framediff"):
            with pytest.warns(
                UserWarning, match=r"linear_rbf\.weight, linear_rbf\.bias at trunk\.ipa_1: ignored"
            ) as told:
                found = read(root="trunk.ipa_1", dialect=dialect)
            assert len(told) == 1
            assert told[0].filename == __file__
            assert_same_bits(found.arrays, expected.arrays)
            assert (replace_untold(found.config), found.assumed) == (replace_untold(FRAMEDIFF), frozenset())
    wrong = state | {"trunk.ipa_1.linear_rbf.weight": torch.ones(2, 20)}
    with pytest.raises(ValueError, match=r"unexpected linear_rbf\.weight \(2, 20\)"):
        Weights.from_torch(wrong, root="trunk.ipa_1")
    with pytest.raises(ValueError, match=r"no module at root='trunk\.ipa_1'"):
        Weights.from_torch(state, root="trunk.ipa_1", dialect="frameflow")


def test_it_is_written_for_those_whose_strict_load_asks_for_it():
    """FrameDiff's; FrameFlow's and MultiFlow's would refuse it."""
    torch = pytest.importorskip("torch")
    weights = Weights.random(FRAMEDIFF, dtype=np.float64)
    state = weights.to_torch(dialect="framediff", root="trunk.ipa_0")
    assert set(state) - set(weights.to_torch(dialect="frameflow", root="trunk.ipa_0")) == {
        "trunk.ipa_0.linear_rbf.weight",
        "trunk.ipa_0.linear_rbf.bias",
    }
    assert {x.dtype for x in state.values()} == {torch.float64}
    torch.nn.Linear(20, 1).double().load_state_dict(
        {name: state[f"trunk.ipa_0.linear_rbf.{name}"] for name in ("weight", "bias")}
    )


@pytest.mark.parametrize("root", ["", "mpnn_layers.0"])
def test_modules_beside_an_attentions_own_do_not_hide_it(root, tmp_path):
    """As in lociPARSE, whose layer holds the attention's parameters and those of a transition and layer norms."""
    torch = pytest.importorskip("torch")
    weights = Weights.random(ONE_WIDTH)
    others = {"norm.0.weight": 11, "norm.1.bias": 11, "node_dense.W_in.weight": 44, "transition.weight": 3}
    state = weights.to_torch(dialect="openfold_v1") | {name: torch.ones(x) for name, x in others.items()}
    state |= {"node_dense.extra": torch.ones(2, dtype=torch.int64)}
    state = {f"{root}.{name}".removeprefix("."): x for name, x in state.items()}
    torch.save(state, tmp_path / "l.pt")
    for read in (lambda: Weights.from_torch(state), lambda: Weights.load(tmp_path / "l.pt")):
        with pytest.warns(UserWarning, match=r"norm, node_dense, transition.*beside the parameters of the attention"):
            found = read()
        assert_same_bits(found.arrays, weights.arrays)


@pytest.mark.parametrize(
    "name",
    ["linear_x.weight", "q_norm.weight", "logit_scale", "linear_out_2.0.weight", "point_gate.weight", "down_z.bias"],
)
def test_what_may_be_the_attentions_own_is_refused(name):
    torch = pytest.importorskip("torch")
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1") | {name: torch.ones(2)}
    with pytest.raises(ValueError, match=rf"unexpected {re.escape(name).replace('weight', 'weights?')} \(2,\)"):
        Weights.from_torch(state, dialect="openfold_v1", config=ONE_WIDTH)


# --- The semantics can tell


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("openfold", lambda s: s | {"linear_q_points.linear.weight": s["linear_q_points.linear.weight"][::-1]}),
        ("openfold multimer", lambda s: s | {"linear_k.weight": np.roll(s["linear_k.weight"], 1, 0)}),
        ("framediff", lambda s: s | {"down_z.bias": 1.01 * s["down_z.bias"]}),
        ("lucidrains", lambda s: s | {"to_point_v.weight": np.roll(s["to_point_v.weight"], 1, 0)}),
        (
            "openfold structure module",
            lambda s: swapped(s, "angle_resnet.linear_in.weight", "angle_resnet.linear_initial.weight"),
        ),
        ("esmfold structure module", lambda s: swapped(s, "layer_norm_ipa.weight", "transition.layer_norm.weight")),
        ("openfold confidence head", lambda s: s | {"linear_1.bias": -s["linear_1.bias"]}),
    ],
)
def test_a_wrong_conversion_is_seen(name, damage):
    dialect, config = NATIVE[name]
    weights = Weights.random(config)
    state = state_of(weights, dialect)
    ours = semantics.probe("ipa_jax", weights.arrays, config)
    assert semantics.distance(semantics.probe(dialect, state, config), ours) < 1e-13
    assert semantics.distance(semantics.probe(dialect, damage(dict(state)), config), ours) > 1e-5


def swapped(state: dict, a: str, b: str) -> dict:
    return state | {a: state[b], b: state[a]}


# --- Anything at all


LANDMARK_PARTS = {
    part for d in DIALECTS.values() for marks in d.landmarks.values() for mark in marks for part in mark.split(".")
}
OTHER_PARTS = ["structure_module", "trunk", "ipa_0", "plddt", "weights", "bias", "//", "", "transition_99999", "é"]
PARTS = st.sampled_from([*sorted(LANDMARK_PARTS), *OTHER_PARTS])
NAMES = st.lists(PARTS, min_size=1, max_size=5).flatmap(
    lambda parts: st.sampled_from([".".join(parts), "/".join(parts)])
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 6, 12, 1 << 40]), max_size=3).map(tuple)


@settings(max_examples=300)
@given(st.dictionaries(NAMES, SHAPES, max_size=8), st.sampled_from([None, *DIALECTS]))
def test_any_names_and_shapes_are_read_or_refused(shapes, dialect):
    with contextlib.suppress(ValueError):
        found, *_ = find_module(shapes, dialect=dialect)
        assert found.names(shapes)


@settings(max_examples=200)
@given(st.sampled_from(sorted(NATIVE)), st.data())
def test_any_damage_to_names_and_shapes_is_named(name, data):
    """A parameter lost, renamed or of another shape: an error, whatever the system."""
    dialect, config = NATIVE[name]
    names = find_dialect(dialect).names(config)
    shapes = {theirs: transform.their_shape for theirs, transform in names.values()}
    victim = data.draw(st.sampled_from(sorted(shapes)))
    match data.draw(st.integers(0, 2)):
        case 0:
            del shapes[victim]
        case 1:
            shapes[f"{victim}_"] = shapes.pop(victim)
        case 2:
            shapes[victim] = (*shapes[victim], 2)

    def read():
        found, told, _ = find_module(shapes, dialect=dialect, config=config)
        return from_dialect(found, told, shapes, lambda key: np.zeros(shapes[key]))

    with pytest.raises(ValueError, match=r"no .*s |do not fit"):
        read()
