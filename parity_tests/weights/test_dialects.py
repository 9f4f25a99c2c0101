"""Converted weights compute the same function in both frameworks, and converting back gives the same bits."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dialect_cases import (
    NATIVE,
    ONE_WIDTH,
    SMALL_MODULE,
    assert_same_bits,
    convert,
    state_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.config import (
    IPAConfig,
    PredictedLDDTConfig,
    StructureModuleConfig,
)
from ipa_bridge.kinds import attention_of
from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.conversion import in_layout
from ipa_bridge.weights.dialects import DIALECTS, Transform, find_dialect
from ipa_bridge.weights.dialects.spec import Order
from ipa_bridge.weights.finding import find_module
from ipa_parity import peers
from ipa_parity.attention.cases import ODD, ODD_NO_PAIR, make_case
from ipa_parity.attention.stages import RUNNERS
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.report import compare
from ipa_parity.structure_module import cases as structure_modules
from ipa_parity.structure_module.judge import compare_stage
from ipa_parity.structure_module.stages import RUNNERS as STRUCTURE_MODULE_RUNNERS

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
"""Rows of the README's table: system, config at its real size, and package to run; None for the numpy semantics."""


def in_other_layout(weights: Weights, layout: str) -> Weights:
    return Weights(*in_layout(weights.arrays, weights.config, layout))


def random_state(dialect: str, config, seed: int) -> dict[str, np.ndarray]:
    """Random parameters drawn directly under the system's names."""
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


@pytest.mark.covering
@pytest.mark.parametrize("direction", ["from", "to"])
@pytest.mark.parametrize("num_layer", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", WHOLE)
def test_the_same_function_in_both_frameworks(name, num_layer, direction, conversions):
    """Their parameters in our modules, and ours in theirs (loaded strictly), give the same outputs.

    A structure module is compared after `num_layer` layers, which share one set of weights.
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
    """Outputs by stage, of the package's module or of the dialect's semantics in float64."""
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


# --- Every dialect


def test_every_dialect_has_semantics_and_cases():
    """Every dialect has an entry in `semantics.SYSTEMS` and a case in `NATIVE`, and every case a row in `EXPECTED`."""
    with_cases = {dialect for dialect, _ in NATIVE.values()} | {"ipa_jax", "ipa_torch"}
    for wanted, found, table in (
        (DIALECTS, semantics.SYSTEMS, "SYSTEMS of ipa_bridge/weights/semantics/__init__.py"),
        (DIALECTS, with_cases, "NATIVE of parity_tests/weights/dialect_cases.py"),
        (NATIVE, EXPECTED, "EXPECTED of parity_tests/weights/test_dialects.py"),
    ):
        lacking, unknown = set(wanted) - set(found), set(found) - set(wanted)
        assert not lacking, f"{table} has no entry for {sorted(lacking)}: add it"
        assert not unknown, f"{table} has entries of unknown {sorted(unknown)}: remove them"


@pytest.mark.parametrize("name", NATIVE)
def test_semantics_equal_ours(name):
    """A system's semantics give our outputs for parameters that its table named and laid out."""
    dialect, config = NATIVE[name]
    weights = Weights.random(config, dtype=np.float64)
    theirs = semantics.probe(dialect, state_of(weights, dialect), config)
    assert semantics.distance(theirs, semantics.probe("ipa_jax", weights.arrays, config)) < 1e-12


# --- Round trips


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
    """Pairs (case, system) where the system can store the case's parameters without loss if biases are zero."""
    pairs = set()
    for name, (_, config) in NATIVE.items():
        weights = with_biases_of_zero(Weights.random(config))
        for target in DIALECTS:
            try:
                convert(weights, target)
            except ValueError:
                continue
            pairs.add((name, target))
    return pairs


EVERYONE = {"alphafold", "openfold", "openfold_v1", "esmfold"}
LUCIDRAINS = {"lucidrains", "igfold"}
OTHERS = {"lociparse", "unifold"}
EXPECTED = {
    "alphafold monomer": {"alphafold"} | LUCIDRAINS,
    "alphafold multimer": {"alphafold"},
    "openfold": EVERYONE | LUCIDRAINS | OTHERS,
    "openfold multimer": {"alphafold", "openfold"},
    "openfold_v1": EVERYONE | LUCIDRAINS | OTHERS,
    "esmfold": EVERYONE | LUCIDRAINS | OTHERS,
    "framediff": {"framediff", "frameflow"},
    "frameflow": {"framediff", "frameflow"},
    "mdgen": {"mdgen"},
    "unifold": EVERYONE | LUCIDRAINS | OTHERS,
    "openfold_v1 without biases": EVERYONE | LUCIDRAINS | OTHERS,
    "lucidrains": {"alphafold"} | LUCIDRAINS,
    "lucidrains without pair": LUCIDRAINS,
    "abodybuilder2": {"abodybuilder2"},
    "flashabb": {"flashabb"},
    "flashabb without spectra": {"flashabb"},
    "bioemu": {"bioemu"},
    "omegafold": {"omegafold"} | LUCIDRAINS,
    "lucidrains block": LUCIDRAINS,
    "lucidrains transformer": {"lucidrains"},
    "igfold": {"alphafold"} | LUCIDRAINS,
    "igfold block": LUCIDRAINS,
    "igfold transformer": LUCIDRAINS,
    "lociparse": EVERYONE | LUCIDRAINS | OTHERS,
    "alphafold structure module": EVERYONE,
    "openfold structure module": EVERYONE,
    "openfold_v1 structure module": EVERYONE,
    "openfold multimer structure module": {"alphafold", "openfold"},
    "esmfold structure module": EVERYONE,
    "abodybuilder3 structure module": {"abodybuilder3", "ibex"},
    "abodybuilder3 structure module without biases": {"abodybuilder3", "ibex"},
    "ibex structure module": {"ibex"},
    "alphafold confidence head": {"alphafold", "openfold", "openfold_v1"},
    "openfold confidence head": {"alphafold", "openfold", "openfold_v1"},
}
"""Lossless targets by case; AlphaFold's attention has scalar values of another width, which the others lack."""


def test_which_system_can_store_which_parameters():
    found = exact_pairs()
    differing = []
    for name, targets in EXPECTED.items():
        stored_in = {target for each, target in found if each == name} - {"ipa_jax", "ipa_torch"}
        if stored_in != targets:
            differing.append(f"{name}: add {sorted(stored_in - targets)}, remove {sorted(targets - stored_in)}")
    assert not differing, "EXPECTED differs; if the new answers are right, change these rows:\n" + "\n".join(differing)


@pytest.mark.parametrize(("name", "target"), sorted(exact_pairs()))
def test_there_and_back_through_another_system_is_bitwise(name, target):
    source, config = NATIVE[name]
    weights = with_biases_of_zero(Weights.random(config))
    state = state_of(weights, source)
    there, _ = convert(from_state(state, source, config), target)
    arrived = from_state(state_of(there, target), target, there.config)
    back, conversion = convert(arrived, source)
    # Conversion keeps the layout it is given if both fit, so convert to the original layout first.
    home = in_other_layout(back, attention_of(config).layout) if hasattr(config, "layout") else back
    home, _ = convert(home, source)
    assert not conversion.losses
    found = state_of(home, source)
    added = {name: found.pop(name) for name in set(found) - set(state)}  # biases of zero, if the state has no biases
    assert not any(x.any() for x in added.values())
    assert not added or not attention_of(config).attention_2d_bias
    assert_same_bits(found, state)


def test_an_attention_without_a_pair_in_openfolds_names_is_unknown():
    """MDGen's attention scales its logits as with a pair, which its names and shapes do not show."""
    config = replace(ONE_WIDTH, pair_channel=None)
    state = random_state("openfold_v1", config, seed=0)
    with pytest.raises(ValueError, match=r"always reads a pair representation; .* Pass config= if the scale is"):
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
    """Shapes, orders and bit patterns are random, and include NaNs and signed zeros."""
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


def test_orders_do_what_their_names_say():
    config = replace(ODD, num_head=2, num_point_qk=2)
    indices = Order(ours="h c q", theirs="h q c").indices(config)
    h, c, q = np.unravel_index(indices, (2, 3, 2))
    assert [(a, b, d) for a, b, d in zip(h, q, c, strict=True)] == list(itertools.product(range(2), range(2), range(3)))
