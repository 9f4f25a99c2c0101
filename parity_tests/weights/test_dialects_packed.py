"""Another system's parameter may pack several of ours: reading, writing, recognition and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from dialect_cases import ABODYBUILDER2, FLASHABB, ONE_WIDTH, assert_same_bits, convert, state_of

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights import Weights, porting
from ipa_bridge.weights.conversion import LOSSES
from ipa_bridge.weights.dialects import DIALECTS, Dialect, Form, find_dialect
from ipa_bridge.weights.dialects.spec import Order, Row, packed
from ipa_bridge.weights.files import write_arrays
from ipa_bridge.weights.finding import find_module
from ipa_bridge.weights.translation import from_dialect
from ipa_parity.attention.cases import ODD

SHARED = (Row("trainable_point_weights", "gamma"), Row("attention_2d", "pair"), Row("output_projection", "out"))
FORM = Form(scalar_bias=True, point_bias=True, norm_form="add", norm_epsilon=1e-8)
MULTIMER = replace(ONE_WIDTH, layout="multimer")
POINT_WIDTHS = (3 * ODD.num_head * ODD.num_point_qk, 3 * ODD.num_head * (ODD.num_point_qk + ODD.num_point_v))
PACKED = Dialect(
    name="packed",
    title="Packed",
    rows={
        IPAConfig: {
            "monomer": (
                *SHARED,
                Row("q_scalar", "q"),
                Row("kv_scalar", "kv"),
                *packed(("q_point_local", "kv_point_local"), "points", Order("c h q|c h w", "c h q+c h w")),
            ),
            "multimer": (
                *SHARED,
                *packed([f"{x}_scalar_projection" for x in "qkv"], "qkv", Order("h d|h d|h s", "h d|h d|h s")),
                *(Row(f"{x}_point_projection/point_projection", f"points_{x}") for x in "qkv"),
            ),
        }
    },
    forms={"monomer": FORM, "multimer": FORM},
    landmarks={IPAConfig: ("gamma", "out.weight")},
    part_widths=lambda shapes: {"points": POINT_WIDTHS},
)
"""A dialect with one linear layer for all points in one layout, and one for all scalars in the other."""


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(DIALECTS, "packed", PACKED)


def read(state, config=None) -> Weights:
    shapes = {name: x.shape for name, x in state.items()}
    found, settled, _ = find_module(shapes, config=config)
    assert found.dialect is PACKED
    return Weights(from_dialect(found, settled, shapes, state.__getitem__), settled)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("config", [ODD, MULTIMER, replace(MULTIMER, scalar_bias=False)])
def test_reading_back_is_bitwise(config, dtype):
    weights = Weights.random(config, dtype=dtype)
    state = state_of(weights, "packed")
    again = read(state)
    assert replace(again.config, frame_unit=None) == replace(config, frame_unit=None, norm_form=again.config.norm_form)
    assert_same_bits(again.arrays, weights.arrays)
    assert_same_bits(state_of(again, "packed"), state)


def test_where_each_number_goes():
    """Rows of the packed scalars are q, k, v; rows of the packed points are coordinate, head, [query | key | value]."""
    weights = Weights.random(MULTIMER)
    a = weights.arrays
    for leaf, transpose in (("weight", True), ("bias", False)):
        parts = [a[f"{x}_scalar_projection/{leaf}{'s' * transpose}"] for x in "qkv"]
        rows = [x.reshape(len(x), -1).T if transpose else x.reshape(-1) for x in parts]
        assert np.array_equal(state_of(weights, "packed")[f"qkv.{leaf}"], np.concatenate(rows))
    weights = Weights.random(ODD)
    c, h = 3, ODD.num_head
    q, kv = (weights.arrays[f"{x}_point_local/bias"].reshape(c, h, -1) for x in ("q", "kv"))
    assert np.array_equal(state_of(weights, "packed")["points.bias"], np.concatenate([q, kv], -1).reshape(-1))


def test_parts_in_several_dtypes_keep_their_numbers():
    weights = Weights.random(MULTIMER, dtype=np.float32)
    narrow = weights.arrays["k_scalar_projection/weights"].astype(np.float16)
    mixed = replace(weights, arrays={**weights.arrays, "k_scalar_projection/weights": narrow})
    again = read(state_of(mixed, "packed"))
    assert all(np.array_equal(x, mixed.arrays[name]) for name, x in again.arrays.items())


def test_a_packed_array_is_read_once():
    state = state_of(Weights.random(MULTIMER), "packed")
    shapes = {name: x.shape for name, x in state.items()}
    found, config, _ = find_module(shapes)
    seen = []
    from_dialect(found, config, shapes, lambda name: seen.append(name) or state[name])
    assert sorted(seen) == sorted(state)


@pytest.mark.parametrize(
    ("config", "name", "shape", "message"),
    [
        (MULTIMER, "qkv.weight", None, r"missing v_scalar_projection/weights \(.*\), part of qkv\.weight \(36, 11\)"),
        (MULTIMER, "qkv.weight", (30, 11), r"k_scalar_projection/weights, part of qkv\.weight \(36, 11\): got \(30,"),
        (ODD, "points.bias", (5,), r"kv_point_local/bias, part of points\.bias \(153,\): got \(5,\)"),
    ],
)
def test_errors_name_both_parameters(config, name, shape, message):
    state = state_of(Weights.random(config), "packed")
    if shape is None:
        del state[name]
    else:
        state[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=message):
        read(state, config)


def test_outputs_that_do_not_divide():
    state = state_of(Weights.random(MULTIMER), "packed")
    state["qkv.weight"] = np.zeros((35, 11), np.float32)
    with pytest.raises(
        ValueError, match=r"qkv\.weight \(35, 11\) must hold q_sca.*, v_.* its 35 outputs do not divide"
    ):
        read(state)


def test_files_with_packed_parameters(tmp_path):
    """`ipa-port` reads, lists and converts them."""
    weights = Weights.random(replace(ODD, norm_epsilon=1e-8))
    write_arrays(tmp_path / "p.safetensors", state_of(weights, "packed"))
    listed = porting.inspect(tmp_path / "p.safetensors").contents
    assert {(x.name, x.theirs, x.shape) for x in listed.parameters if x.theirs == "points.weight"} == {
        (f"{x}_point_local/weights", "points.weight", (153, 11)) for x in ("q", "kv")
    }
    report = porting.convert(tmp_path / "p.safetensors", tmp_path / "o.safetensors")
    assert report.converted == len(weights.arrays)
    porting.convert(tmp_path / "o.safetensors", tmp_path / "b.safetensors", dialect="packed")
    assert_same_bits(read(state_of(Weights.load(tmp_path / "b.safetensors"), "packed")).arrays, weights.arrays)


def test_orders_of_groups():
    """Groups may change places, and joined groups alternate."""
    config = replace(ODD, num_head=2, num_scalar_v=1, num_point_v=2, pair_channel=1)
    order = Order("h s|c h p|h p|h z", "h z|h s|h p 1+h p c")
    h, p = np.meshgrid(range(2), range(2), indexing="ij")
    points = np.stack([14 + 2 * h + p, *(2 + 4 * c + 2 * h + p for c in range(3))], -1)
    assert order.indices(config).tolist() == [18, 19, 0, 1, *points.reshape(-1)]
    assert order.widths(config) == [2, 12, 4, 2]


# --- ABodyBuilder2 and FlashABB


@pytest.mark.parametrize("spectrum", [128, None])
@pytest.mark.parametrize(("num_point_qk", "num_point_v"), [(4, 8), (1, 1), (12, 3), (16, 31), (19, 8)])
def test_flashabbs_numbers_of_points(num_point_qk, num_point_v, spectrum):
    """`linear_points` gives their sum and `linear_out` the value points, with a spectrum of 128 channels or without."""
    config = replace(FLASHABB, num_point_qk=num_point_qk, num_point_v=num_point_v, pair_channel=spectrum)
    config = replace(config, pair_bias=spectrum is None)
    shapes = {name: x.shape for name, x in state_of(Weights.random(config), "flashabb").items()}
    assert find_dialect("flashabb").infer(shapes, IPAConfig) == config


@pytest.mark.parametrize(
    ("name", "shape"), [("linear_points.weight", (154, 11)), ("linear_out.weight", (11, 481)), ("head_weights", (0,))]
)
def test_flashabbs_widths_that_do_not_fit(name, shape):
    shapes = {x: y.shape for x, y in state_of(Weights.random(FLASHABB), "flashabb").items()}
    with pytest.raises(ValueError, match=r"linear_points\.weight \(.*\) does not fit linear_out\.weight \(.*2 P \+ Pv"):
        find_module({**shapes, name: shape})


def test_what_one_system_determines():
    """ABodyBuilder2's class has one function; ε and the frames' unit are arguments or inputs of FlashABB's."""
    for config, dialect, assumed in (
        (ABODYBUILDER2, "abodybuilder2", set()),
        (FLASHABB, "flashabb", {"norm_epsilon", "frame_unit"}),
    ):
        shapes = {x: y.shape for x, y in state_of(Weights.random(config), dialect).items()}
        assert find_module(shapes)[1:] == (config, assumed)


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (ABODYBUILDER2, "openfold", "its attention has distance_form='squared', and here it is 'unsquared'"),
        (ABODYBUILDER2, "lucidrains", "its attention has point_weight_form='softplus', and here it is 'identity'"),
        (
            replace(ABODYBUILDER2, distance_epsilon=1e-6),
            "abodybuilder2",
            "distance_epsilon=1e-08, and here it is 1e-06",
        ),
        (
            replace(ABODYBUILDER2, attention_2d_bias=True),
            "abodybuilder2",
            "attention_2d_bias=False, and here it is True",
        ),
        (FLASHABB, "openfold", "its attention has rotary_embedding=False, and here it is True"),
        (replace(FLASHABB, pair_channel=64), "flashabb", "pair_channel must be 128, or None for .*, not 64"),
        (replace(FLASHABB, logit_terms=2), "flashabb", r"scales its logits by √\(1/3\), and logit_terms is 2 here"),
        (replace(ONE_WIDTH, logit_terms=2), "openfold", r"scales its logits by √\(1/3\), and logit_terms is 2 here"),
        (ONE_WIDTH, "flashabb", "its attention has rotary_embedding=True, and here it is False"),
    ],
)
def test_other_functions_are_refused_even_as_losses(config, target, message):
    with pytest.raises(ValueError, match=rf"cannot represent this:(?s:.)*{message}"):
        convert(Weights.random(config), target, allow_lossy=list(LOSSES))
