"""The streamed attention is the reference's function, outputs and gradients."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest
from streamed_cases import core_arrays, judge

from ipa_bridge import tolerance
from ipa_parity.attention.cases import CATALOGUE
from ipa_parity.attention.stages import RUNNERS, run_oracle
from ipa_parity.report import compare


def judge_all(actual, expected, dtype):
    (outputs, gradients), (wanted, of_reference) = actual, expected
    assert [x.shape for x in outputs] == [x.shape for x in wanted]
    for x, e in zip(outputs, wanted, strict=True):
        judge(x, e, "out", dtype)
    assert set(gradients) == set(of_reference)
    for name, x in of_reference.items():
        judge(gradients[name], x, f"gradient/{name}", dtype)


@pytest.mark.covering("framework")
@pytest.mark.parametrize("return_attention", [False, True])
@pytest.mark.parametrize("block_size", [None, 1, 4])
@pytest.mark.parametrize("options", [{}, {"pair": False}, {"mask": False, "shape": (2, 7)}, {"shape": (2, 3, 5)}])
def test_it_is_the_reference(framework, options, block_size, return_attention):
    arrays, cotangents = core_arrays(**options)
    run = partial(framework.run_attention, arrays, cotangents, return_attention=return_attention)
    judge_all(run(implementation="streamed", block_size=block_size), run(implementation="reference"), "float64")


def test_small_weights_count_in_float64(framework):
    """Also those that float32 would not see beside 1."""
    arrays, cotangents = core_arrays((9,), spread=8.0)
    run = partial(framework.run_attention, arrays, cotangents, return_attention=True)
    expected = run(implementation="reference")
    attention = expected[0][-1]
    assert ((attention > 1e-13) & (attention < 1e-9)).any()
    judge_all(run(implementation="streamed", block_size=4), expected, "float64")


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_float32_is_as_exact_as_the_reference(framework, spread):
    """Errors against float64 on the same inputs are at most twice the reference's, those of gradients three times."""
    arrays, cotangents = core_arrays((60,), spread=spread, dtype="float32")
    wide = {name: None if x is None else x.astype("float64") for name, x in arrays.items()}
    exact = framework.run_attention(wide, [x.astype("float64") for x in cotangents], implementation="reference")
    runs = {
        name: framework.run_attention(arrays, cotangents, implementation=name, **options)
        for name, options in (("reference", {}), ("streamed", {"block_size": 16}))
    }

    def errors(run):
        outputs, gradients = run
        of_outputs = [np.linalg.norm(x - e) / np.linalg.norm(e) for x, e in zip(outputs, exact[0], strict=True)]
        return of_outputs, {n: np.linalg.norm(gradients[n] - e) / np.linalg.norm(e) for n, e in exact[1].items()}

    (outputs, gradients), (of_reference, of_gradients) = errors(runs["streamed"]), errors(runs["reference"])
    eps = tolerance.epsilon("float32")
    assert all(x <= 2 * e + eps for x, e in zip(outputs, of_reference, strict=True))
    assert all(x <= 3 * of_gradients[name] + eps for name, x in gradients.items())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("monomer", "bfloat16"),
        ("multimer", "float64"),
        ("no-pair", "float32"),
        ("batch-of-batches", "float64"),
        ("spread-50", "float32"),
        ("offset-1000", "float32"),
        ("offset-1000", "float64"),
        ("alphafold2", "float32"),
    ],
)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_whole_module_is_the_oracles(framework, name, dtype):
    """Every stage agrees with the oracle, and all gradients with the reference's."""
    pytest.importorskip(framework)
    case = CATALOGUE[name]().astype(dtype)
    run = RUNNERS[framework]
    exact = run_oracle(case) | {
        stage: x
        for stage, x in run(case.astype("float64"), implementation="reference").items()
        if stage.startswith("gradient/")
    }
    actual = run(case, implementation="streamed")
    assert set(actual) == set(exact)
    for stage, expected in exact.items():
        if stage == "logits" or (stage == "gradient/translation" and name == "spread-50"):
            continue  # logits come from the reference anyway; residues far apart leave only rounding
        conditioning = 1.0
        if stage in ("points", "norms"):
            conditioning = tolerance.conditioning(case.translation, case.mask, exact["points"])
        scale = None
        if stage == "gradient/attention_2d/bias":
            scale = float(np.abs(exact["gradient/attention_2d/weights"]).max())
        row = compare(
            actual[stage],
            expected,
            case=name,
            stage=stage,
            dtype=dtype,
            subject=framework,
            reference="float64",
            conditioning=conditioning,
            scale=scale,
        )
        assert row.passed, str(row)


@pytest.mark.parametrize("implementation", [None, "streamed"])
def test_block_sizes_below_one_are_refused(framework, implementation):
    arrays, cotangents = core_arrays()
    with pytest.raises(ValueError, match="block_size must be at least 1, or None for a size that suits N; got 0"):
        framework.run_attention(arrays, cotangents, implementation=implementation, block_size=0)


def test_a_block_size_or_the_length_chooses_it(framework):
    module = importlib.import_module(f"ipa_{framework.name}.attention")
    choose, named = module.choose_implementation, module.IMPLEMENTATIONS
    assert choose(None, 4, block_size=4) is named["streamed"]
    assert choose(None, module.STREAMED_FROM) is named["streamed"]
    assert choose(None, module.STREAMED_FROM - 1) is named["reference"]
    assert choose("reference", 10 * module.STREAMED_FROM) is named["reference"]


@pytest.mark.covering("framework")
@pytest.mark.parametrize("block_size", [None, 4])
def test_no_residue_and_one(framework, block_size):
    for shape in ((0,), (1,), (2, 0)):
        arrays, cotangents = core_arrays(shape)
        run = partial(framework.run_attention, arrays, cotangents)
        outputs, gradients = run(implementation="streamed", block_size=block_size)
        wanted, of_reference = run(implementation="reference")
        assert [x.shape for x in outputs] == [x.shape for x in wanted]
        assert {n: x.shape for n, x in gradients.items()} == {n: x.shape for n, x in of_reference.items()}
        assert all(np.isfinite(x).all() for x in (*outputs, *gradients.values()))


def test_everything_masked_is_finite(framework):
    arrays, cotangents = core_arrays()
    arrays["mask"] = np.zeros_like(arrays["mask"])
    run = partial(framework.run_attention, arrays, cotangents)
    judge_all(run(implementation="streamed", block_size=4), run(implementation="reference"), "float64")
