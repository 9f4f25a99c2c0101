"""The judge names every mistake that is planted, alone and in pairs, and never calls right candidates wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
from planted import SMALL, my_ipa, names_of, planted

from ipa_parity import check
from ipa_parity.attention.cases import CATALOGUE, PRESETS
from ipa_parity.attention.stages import run_oracle
from ipa_parity.checking.formula import Formula, Inputs, compute
from ipa_parity.checking.mistakes import MISTAKES, STOPS, formula_with, pairs, singles
from ipa_parity.checking.probes import Probe, make_probes

WITHOUT_HIDDEN_KEYS = [name for name in CATALOGUE if "mask" not in name]


@pytest.mark.parametrize("name", WITHOUT_HIDDEN_KEYS)
def test_the_right_formula_is_the_oracle(name):
    case = CATALOGUE[name]()
    inputs = Inputs(case.single, case.pair, case.rotation, case.translation, case.mask.astype(np.float64))
    stages = compute(Formula(), case.weights.arrays, case.config, inputs)
    for stage, expected in run_oracle(case).items():
        if stage != "logits":  # these have the mask in them
            np.testing.assert_allclose(stages[stage], expected, atol=1e-11 * np.abs(expected).max(), err_msg=stage)


@pytest.mark.covering
@pytest.mark.parametrize("layout", SMALL)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_every_mistake_is_named(mistake, layout):
    """In numpy, in float64."""
    expect_named(mistake, SMALL[layout], "numpy", "float64")


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("layout", SMALL)
def test_every_mistake_is_named_in_each_framework(layout, framework, dtype):
    pytest.importorskip(framework)
    every = 12 if framework == "jax" else 2  # JAX compiles each
    for mistake in singles(SMALL[layout])[::every]:
        expect_named(mistake, SMALL[layout], framework, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("preset", PRESETS)
def test_mistakes_are_named_at_their_models_widths(preset):
    """A sixth of them, others for each model; and those whose rounding is largest."""
    config, shift = PRESETS[preset](), list(PRESETS).index(preset)
    every = singles(config)
    rough = [x for x in every if x.name.startswith("the softmax over")]
    for mistake in [*every[shift::6], *rough]:
        expect_named(mistake, config, "numpy", "float32")


def expect_named(mistake, config, framework, dtype):
    if not mistake.applies(config):
        pytest.skip("this config cannot have it")
    attention = planted(formula_with(mistake), config, framework)
    report = check(attention, config, framework=framework, dtypes=(dtype,), gradients=False)
    same_to_float32 = dtype == "float32" and "lengths" in mistake.name  # ε of 1e-16 and none
    assert report.verdict == "wrong", (mistake.name, str(report))
    named = names_of(report)
    assert len(named) == 1, (mistake.name, report.diagnosis)
    assert mistake.name in named[0] or (same_to_float32 and "lengths" in " ".join(named[0])), (
        mistake.name,
        report.diagnosis,
    )


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_nine_of_ten_pairs_are_named(seed):
    expect_pairs(random.Random(seed), list(SMALL.values()), "float64", number=5)


@pytest.mark.exhaustive
def test_nine_of_ten_pairs_are_named_at_models_widths():
    expect_pairs(random.Random(0), [make() for make in PRESETS.values()], "float32", number=10)


def expect_pairs(rng, configs, dtype, number):
    missed = []
    for _ in range(number):
        config = rng.choice(configs)
        every = list(pairs(config))
        rng.shuffle(every)
        pair = next(x for x in every if shows(x, config))
        attention = planted(formula_with(*pair), config, "numpy")
        report = check(attention, config, framework="numpy", dtypes=(dtype,), gradients=False)
        named = names_of(report)
        if report.verdict != "wrong" or not all(any(x.name in group for group in named) for x in pair):
            missed.append(([x.name for x in pair], str(report.diagnosis)))
    assert len(missed) <= number // 10, missed


def shows(pair, config):
    """True if no half of a pair hides the other one: a pair bias that is dropped cannot be transposed as well."""
    probe = Probe(next(make_probes(config)), "float64")
    outputs = [probe.compute(formula_with(*some))["out"] for some in (pair, pair[:1], pair[1:], ())]
    return all(np.abs(outputs[0] - x).max() > 1e-4 * np.abs(x).max() for x in outputs[1:])


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.name)
def test_gradients_that_end_somewhere_are_named(stop, framework):
    pytest.importorskip(framework)
    config = SMALL["monomer"]
    report = check(planted(formula_with(stop), config, framework), config, framework=framework, dtypes=("float64",))
    assert (report.verdict, names_of(report)) == ("wrong", [{stop.name}]), str(report)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("0.5 * weight", "0.5 * 1.001 * weight")], "the point term of the logits (line 7) multiplied by 1.001"),
        ([("math.sqrt(1 / 3) * self.linear_b", "0.7 * self.linear_b")], "the pair bias (line 7) multiplied by 1.21244"),
        (
            [("        q = self", "        translation = 1.7 * translation\n        q = self")],
            "translations (lines 7 and 10) multiplied by 1.7",
        ),
    ],
)
def test_a_wrong_constant_is_told_by_its_value(changes, words):
    report = check(my_ipa(*changes), dtypes=("float64",), gradients=False)
    assert report.verdict == "wrong"
    assert words in report.diagnosis.text


EXPANDED = """\
        distance = (
            q_points.square().sum(-1).unsqueeze(-3)
            + k_points.square().sum(-1).unsqueeze(-4)
            - 2 * torch.einsum("...ihpx,...jhpx->...ijhp", q_points, k_points)
        )
"""

OTHER_ORDERS = {
    "as it is": [],
    "centred": [
        (
            "        q = self",
            "        translation = translation - translation.mean(-2, keepdim=True)\n        q = self",
        )
    ],
    "mask before scaling": [("1e5 * (mask", "math.sqrt(1 / 3) * 1e9 * (mask")],
    "softmax by hand": [
        (
            "logits.softmax(-1)",
            "(logits - logits.amax(-1, keepdim=True)).exp()\n        a = a / a.sum(-1, keepdim=True)",
        )
    ],
    "pair summed first": [('torch.einsum("...hij,...ijc->...ihc", a, z)', "(a.movedim(-3, -2) @ z)")],
}


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_right_orders_of_operations_are_right(name):
    report = check(my_ipa(*OTHER_ORDERS[name]))
    assert report.passed, str(report)


LOW = {
    "bfloat16 autocast": [
        (
            "        q = self.linear_q(s)",
            "        with torch.autocast('cpu'):\n            return self.low(s, z, rotation, translation, mask)\n\n"
            "    def low(self, s, z, rotation, translation, mask):\n        q = self.linear_q(s)",
        ),
        ("return self.linear_out(torch.cat(", "return torch.Tensor.to(self.linear_out(torch.cat("),
        ("norms, o_pair)], -1))", "norms, o_pair)], -1)), s.dtype)"),
    ],
    "float16 products": [
        ("        logits = torch", "        q, k = q.half().to(s.dtype), k.half().to(s.dtype)\n        logits = torch"),
        ('"...ihc,...jhc->...hij", q, k)', '"...ihc,...jhc->...hij", q, k).half().to(s.dtype)'),
    ],
    "expanded distances": [
        ("        offset = q_points.unsqueeze(-4) - k_points.unsqueeze(-5)\n", ""),
        ("        distance = offset.square().sum(-1)\n", EXPANDED),
    ],
}


@pytest.mark.parametrize("name", LOW)
def test_fewer_digits_are_no_mistake(name):
    report = check(my_ipa(*LOW[name]), gradients=False)
    assert (report.verdict, report.diagnosis.kind) == ("imprecise", "precision"), str(report)
    expected = {
        "float16 products": "the products of queries and keys (line 7) in float16",
        "expanded distances": "|q|²",
    }
    assert expected.get(name, "") in report.diagnosis.text


def test_tf32_is_no_mistake():
    """Operands of every product rounded to ten bits, in sums of other orders."""
    config = SMALL["monomer"]
    attention = planted(Formula(rounded={"everything": "tf32"}), config, "numpy")
    report = check(attention, config, framework="numpy", dtypes=("float32",))
    assert report.verdict == "imprecise"
    assert "in tf32" in report.diagnosis.text


@pytest.mark.covering
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_our_own_are_right_in_every_dtype(framework, dtype):
    pytest.importorskip(framework)
    config = SMALL["multimer"]
    if framework == "torch":
        import ipa_torch

        candidate = ipa_torch.InvariantPointAttention(config)
        report = check(candidate, dtypes=(dtype,))
    else:
        pytest.importorskip("haiku")
        import ipa_jax

        apply = ipa_jax.transform_ipa(config).apply

        def candidate(parameters, single, pair, rotation, translation, mask):
            tree = {}
            for name, x in parameters.items():
                module, _, leaf = name.rpartition("/")
                tree.setdefault(f"invariant_point_attention/{module}".rstrip("/"), {})[leaf] = x
            return apply(tree, single, pair, ipa_jax.Rigid(rotation, translation), mask)

        report = check(candidate, config, framework="jax", dtypes=(dtype,))
    assert report.passed, str(report)
