"""Other parameters beside an attention's own, and damaged names and shapes."""

from __future__ import annotations

import contextlib
import re

import numpy as np
import pytest
from dialect_cases import (
    FRAMEDIFF,
    NATIVE,
    ONE_WIDTH,
    assert_same_bits,
    replace_untold,
    state_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.weights import Weights, semantics
from ipa_bridge.weights.dialects import DIALECTS, find_dialect
from ipa_bridge.weights.finding import find_module
from ipa_bridge.weights.translation import from_dialect


def with_linear_rbf(torch, blocks: int = 2) -> dict:
    """A FrameDiff trunk in which each block has parameters that no forward pass reads."""
    state = {}
    for b in range(blocks):
        own = Weights.random(FRAMEDIFF, seed=b).to_torch(dialect="frameflow", root=f"trunk.ipa_{b}")
        state |= own | {f"trunk.ipa_{b}.linear_rbf.weight": torch.randn(1, 20)}
        state |= {f"trunk.ipa_{b}.linear_rbf.bias": torch.randn(1), f"trunk.ipa_ln_{b}.weight": torch.ones(11)}
    return state


def test_parameters_that_no_forward_pass_reads_are_ignored_with_a_message(tmp_path):
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


def test_unread_parameters_are_written_where_strict_loading_needs_them():
    """FrameDiff needs linear_rbf; FrameFlow and MultiFlow would refuse it."""
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
    """In lociPARSE one layer also holds layer norms and `node_dense`; another module beside them is mentioned."""
    torch = pytest.importorskip("torch")
    weights = Weights.random(ONE_WIDTH)
    others = {"norm.0.weight": 11, "norm.1.bias": 11, "node_dense.W_in.weight": 44, "transition.weight": 3}
    state = weights.to_torch(dialect="openfold_v1") | {name: torch.ones(x) for name, x in others.items()}
    state |= {"node_dense.extra": torch.ones(2, dtype=torch.int64)}
    state = {f"{root}.{name}".removeprefix("."): x for name, x in state.items()}
    torch.save(state, tmp_path / "l.pt")
    for read in (lambda: Weights.from_torch(state), lambda: Weights.load(tmp_path / "l.pt")):
        with pytest.warns(UserWarning, match=r"^transition.*beside the parameters of the attention"):
            found = read()
        assert_same_bits(found.arrays, weights.arrays)


@pytest.mark.parametrize(
    "name",
    ["linear_x.weight", "q_norm.weight", "logit_scale", "linear_out_2.0.weight", "point_gate.weight", "down_z.bias"],
)
def test_parameters_that_may_be_the_attentions_own_raise(name):
    torch = pytest.importorskip("torch")
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1") | {name: torch.ones(2)}
    with pytest.raises(ValueError, match=rf"unexpected {re.escape(name).replace('weight', 'weights?')} \(2,\)"):
        Weights.from_torch(state, dialect="openfold_v1", config=ONE_WIDTH)


# --- Wrong conversions


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("openfold", lambda s: s | {"linear_q_points.linear.weight": s["linear_q_points.linear.weight"][::-1]}),
        ("openfold multimer", lambda s: s | {"linear_k.weight": np.roll(s["linear_k.weight"], 1, 0)}),
        ("framediff", lambda s: s | {"down_z.bias": 1.01 * s["down_z.bias"]}),
        ("lucidrains", lambda s: s | {"to_point_v.weight": np.roll(s["to_point_v.weight"], 1, 0)}),
        ("bioemu", lambda s: s | {"pair_value.weight": np.roll(s["pair_value.weight"], 1, 0)}),
        ("bioemu", lambda s: s | {"fc_out.weight": np.roll(s["fc_out.weight"], 1, 1)}),
        ("omegafold", lambda s: swapped(s, "k_point.weight", "q_point.weight")),
        (
            "openfold structure module",
            lambda s: swapped(s, "angle_resnet.linear_in.weight", "angle_resnet.linear_initial.weight"),
        ),
        ("esmfold structure module", lambda s: swapped(s, "layer_norm_ipa.weight", "transition.layer_norm.weight")),
        ("openfold confidence head", lambda s: s | {"linear_1.bias": -s["linear_1.bias"]}),
    ],
)
def test_a_wrong_conversion_is_detected(name, damage):
    dialect, config = NATIVE[name]
    weights = Weights.random(config)
    state = state_of(weights, dialect)
    ours = semantics.probe("ipa_jax", weights.arrays, config)
    assert semantics.distance(semantics.probe(dialect, state, config), ours) < 1e-13
    assert semantics.distance(semantics.probe(dialect, damage(dict(state)), config), ours) > 1e-5


def swapped(state: dict, a: str, b: str) -> dict:
    return state | {a: state[b], b: state[a]}


# --- Arbitrary names and shapes


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
    """In every system, a missing, renamed or reshaped parameter raises."""
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
