"""AlphaFold builds our attention with the same function and names, and its own again afterwards."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.tolerance import bound
from ipa_parity import peers
from ipa_parity.attention.cases import ODD, ODD_MULTIMER, make_case
from ipa_parity.report import compare
from ipa_parity.structure_module import cases as structure_modules

jax = pytest.importorskip("jax")
hk = pytest.importorskip("haiku")
folding = pytest.importorskip("alphafold.model.folding")
folding_multimer = pytest.importorskip("alphafold.model.folding_multimer")

import ipa_jax
from ipa_bridge.config import StructureModuleConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()
ITS_OWN = {folding: folding.InvariantPointAttention, folding_multimer: folding_multimer.InvariantPointAttention}


@pytest.fixture(autouse=True)
def afterwards():
    """Every test leaves AlphaFold as it was."""
    yield
    assert {module: module.InvariantPointAttention for module in ITS_OWN} == ITS_OWN


def judge(actual, expected, stage, dtype="float32", meaningful=None, norm="max"):
    names = {"case": "replaced", "stage": stage, "dtype": dtype, "subject": "after", "reference": "before"}
    row = compare(np.asarray(actual), np.asarray(expected), **names, meaningful=meaningful, norm=norm)
    assert row.passed, str(row)


@pytest.mark.parametrize(
    ("config", "dtype", "implementation"),
    [
        (ODD, "float32", "streamed"),
        pytest.param(ODD, "float64", None, marks=pytest.mark.exhaustive),
        pytest.param(ODD_MULTIMER, "float32", "streamed", marks=pytest.mark.exhaustive),
    ],
    ids=["monomer", "monomer in float64", "multimer"],
)
def test_the_attention_and_its_gradients(config, dtype, implementation):
    case = make_case("AlphaFold", config).astype(dtype)
    case = replace(case, cotangent=case.cotangent * case.mask[..., None])
    before = peers.run_alphafold(case)
    with ipa_jax.replace_alphafold_ipa(implementation=implementation, verify=False):
        after = peers.run_alphafold(case)
    assert set(before) == set(after)
    for stage, x in before.items():
        if stage == "gradient/attention_2d/bias":  # zero, or a sum that cancels except for rounding
            assert not after[stage].any()
        else:
            meaningful = np.broadcast_to(case.mask[..., None], x.shape) if stage == "out" else None
            judge(after[stage], x, stage, dtype, meaningful)


@pytest.mark.parametrize("num_layer", [2, pytest.param(8, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("layout", ["monomer", "multimer"])
def test_the_structure_module(layout, num_layer):
    """All outputs of valid residues agree; a few torsions are divided by lengths near zero."""
    multimer = layout == "multimer"
    config = StructureModuleConfig.alphafold_multimer() if multimer else StructureModuleConfig.alphafold2()
    config = replace(config, num_layer=num_layer)
    case = structure_modules.make_case("AlphaFold", config).astype("float32")
    before = peers.run_alphafold_structure_module(case, gradients=False)
    with ipa_jax.replace_alphafold_ipa(implementation="streamed", verify=False):
        after = peers.run_alphafold_structure_module(case, gradients=False)
    assert set(before) == set(after)
    for stage, x in before.items():
        meaningful = np.broadcast_to(case.mask.reshape(-1, *[1] * (x.ndim - 1)), x.shape)
        if stage.partition("/")[0] in ("rotation", "translation", "atom14", "act", "angles"):
            norm = "euclidean" if stage.startswith("angles") else "max"
            judge(after[stage], x, stage, "float32", meaningful, norm)


def test_the_readmes_lines():
    """They swap while AlphaFold's own runner builds its model."""
    assert predict_as_the_readme_says(lambda features: features, "features") == "features"


@pytest.mark.exhaustive  # its attention and its structure module are compared above
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64", "ignore:jax.nn.one_hot input")  # AlphaFold's own
def test_the_whole_of_alphafold():
    """Every output of AlphaFold-Multimer, one block of each stack, and the parameters that it makes."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        example = importlib.import_module("swap_alphafold")
    finally:
        sys.path.remove(str(EXAMPLES))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        alphafold, batch = example.small_alphafold(), example.random_batch(100)
        params, key = example.random_params(alphafold, batch), jax.random.PRNGKey(1)
        predict = jax.jit(alphafold.apply)
        before = predict(params, key, batch)
        with ipa_jax.replace_alphafold_ipa() as report:
            made = jax.eval_shape(alphafold.init, key, batch)
        after = predict_as_the_readme_says(lambda features: predict(params, key, features), batch)
    assert [x.layer for x in report.replaced] == ["InvariantPointAttention"] * 2
    assert all(x.error <= bound("out", "float32") for x in report.replaced)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    judge(
        after["structure_module"]["final_atom_positions"], before["structure_module"]["final_atom_positions"], "atom14"
    )
    judge(after["predicted_lddt"]["logits"], before["predicted_lddt"]["logits"], "act")
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        judge(np.asarray(y, float), np.asarray(x, float), "act")


def predict_as_the_readme_says(predict, features):
    """Runs the README's lines with a small model runner in place of AlphaFold's."""
    built = []

    class ModelRunner:
        def predict(self, features, random_seed):
            built.append(folding_multimer.InvariantPointAttention)
            return predict(features)

    (code,) = re.findall(r"```python\n([^`]*replace_alphafold_ipa[^`]*)```", README)
    namespace = {"model_runner": ModelRunner(), "features": features}
    exec(code, namespace)
    assert issubclass(built[0], ipa_jax.InvariantPointAttention)
    return namespace["result"]


def attention(seen):
    """A function that builds the attention that AlphaFold has at the time of the call."""
    forward = peers.alphafold_forward(ODD)

    def call(*arguments):
        seen.append(folding.InvariantPointAttention)
        return forward(*arguments)

    transformed = hk.without_apply_rng(hk.transform(call))
    case = make_case("AlphaFold", ODD).astype("float32")
    arrays = (case.single, case.pair, case.mask, case.rotation, case.translation)
    return jax.jit(transformed.apply), (case.weights.to_haiku(), *map(jax.numpy.asarray, arrays))


def test_functions_traced_before_are_traced_again():
    """This holds for replacing and restoring; otherwise JAX would use its cached traces."""
    seen: list = []
    function, arguments = attention(seen)
    with jax.numpy_dtype_promotion("standard"):
        function(*arguments)
        function(*arguments)
        assert seen == [ITS_OWN[folding]]
        with ipa_jax.replace_alphafold_ipa(verify=False):
            function(*arguments)
            function(*arguments)
        function(*arguments)
    assert len(seen) == 3
    assert issubclass(seen[1], ipa_jax.InvariantPointAttention)
    assert seen[2] is ITS_OWN[folding]


def test_as_a_function_until_it_is_restored():
    replacement = ipa_jax.replace_alphafold_ipa(implementation="reference")
    assert repr(replacement) == str(replacement.report)
    assert "alphafold.model.folding_multimer" in str(replacement.report)
    for module in ITS_OWN:
        assert issubclass(module.InvariantPointAttention, ipa_jax.InvariantPointAttention)
    replacement.restore()
    replacement.restore()


def test_one_within_another_and_errors_within():
    with ipa_jax.replace_alphafold_ipa(implementation="reference", verify=False):
        outer = folding.InvariantPointAttention
        inner = ipa_jax.replace_alphafold_ipa(implementation="streamed", verify=False)
        assert folding.InvariantPointAttention is not outer
        with pytest.raises(KeyError), inner:
            raise KeyError
        assert folding.InvariantPointAttention is outer
    with pytest.raises(ValueError, match="this one is undone"), inner:
        pass


def test_restored_in_order_only():
    """Otherwise AlphaFold would keep our attention, or lose another package's replacement."""
    first = ipa_jax.replace_alphafold_ipa(verify=False)
    second = ipa_jax.replace_alphafold_ipa(verify=False)
    with pytest.raises(ValueError, match="undo that first"):
        first.restore()
    second.restore()
    first.restore()


def test_half_precision_comes_back_as_theirs_does():
    """AlphaFold concatenates features in float32, so their projection is float32 too."""
    case = make_case("AlphaFold", ODD).astype("float32")
    arrays = (case.single, case.pair, case.mask, case.rotation, case.translation)
    transformed = hk.without_apply_rng(hk.transform(peers.alphafold_forward(ODD)))
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):
        single, pair, *others = map(jax.numpy.asarray, arrays)
        single, pair = (x.astype(jax.numpy.bfloat16) for x in (single, pair))
        before = transformed.apply(case.weights.to_haiku(), single, pair, *others)
        with ipa_jax.replace_alphafold_ipa(implementation="streamed", verify=False):
            after = transformed.apply(case.weights.to_haiku(), single, pair, *others)
    assert before.dtype == after.dtype == jax.numpy.float32
    judge(after, before, "out", "bfloat16", np.broadcast_to(case.mask[..., None], before.shape))


def test_a_different_function_is_detected_and_nothing_is_replaced(monkeypatch):
    class Doubled(ITS_OWN[folding_multimer]):
        def __call__(self, *arguments, **named):
            return 2 * super().__call__(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(folding_multimer, "InvariantPointAttention", Doubled)
        with pytest.raises(ValueError, match=r"folding_multimer: .* another function: .* nothing was replaced"):
            ipa_jax.replace_alphafold_ipa()
        assert folding.InvariantPointAttention is ITS_OWN[folding]
        assert folding_multimer.InvariantPointAttention is Doubled
        with ipa_jax.replace_alphafold_ipa(verify=False) as report:
            assert [x.error for x in report.replaced] == [None, None]
        patch.setattr(folding_multimer, "InvariantPointAttention", lambda: None)
        with pytest.raises(ValueError, match=r"TypeError.*; pass verify=False"):
            ipa_jax.replace_alphafold_ipa()
    with pytest.raises(ValueError, match="implementation"):
        ipa_jax.replace_alphafold_ipa(implementation="fastest")


def test_alphafold_is_imported_only_to_be_swapped():
    code = "import sys, ipa_jax; assert not any(x.startswith(('alphafold', 'torch')) for x in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
