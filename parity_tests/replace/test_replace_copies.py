"""AlphaFold's attention is found and replaced in other packages' copies, under any module name, and nothing else is."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from ipa_bridge.tolerance import bound
from ipa_parity.attention.cases import ODD, ODD_MULTIMER, make_case
from ipa_parity.report import compare

jax = pytest.importorskip("jax")
hk = pytest.importorskip("haiku")
folding = pytest.importorskip("alphafold.model.folding")
folding_multimer = pytest.importorskip("alphafold.model.folding_multimer")

import jax.numpy as jnp

import ipa_jax

OWN = ["alphafold.model.folding", "alphafold.model.folding_multimer"]
COPIES = ["vendored.model.folding", "vendored.model.folding_multimer"]
LAYOUTS = {"vendored.model.folding": ODD, "vendored.model.folding_multimer": ODD_MULTIMER}


class Vendored:
    """Imports AlphaFold's source a second time, as package `vendored`, whose modules import each other."""

    folder = Path(folding.__file__).parent.parent

    def find_spec(self, name, path=None, target=None):
        top, *rest = name.split(".")
        if top != "vendored":
            return None
        place = self.folder.joinpath(*rest)
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not file.exists():
            return None
        inside = [str(place)] if place.is_dir() else None
        loader = Renaming(name, str(file))
        return importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=inside)


class Renaming(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = re.sub(r"\b(from|import) alphafold\b", r"\1 vendored", Path(self.path).read_text())
        return compile(source, self.path, "exec", dont_inherit=True)


class Broken:
    """AlphaFold's modules are there, but fail when they are imported."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in OWN else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        raise ImportError("a library is missing")


@pytest.fixture
def vendored():
    """Package `vendored` can be imported, and is gone after the test; tests name this fixture before monkeypatch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [Vendored(), *sys.meta_path])
        yield
    for name in [x for x in sys.modules if x.partition(".")[0] == "vendored"]:
        del sys.modules[name]
    assert not issubclass(folding.InvariantPointAttention, ipa_jax.InvariantPointAttention)
    assert not issubclass(folding_multimer.InvariantPointAttention, ipa_jax.InvariantPointAttention)


def define(monkeypatch, name, code):
    """A module that is already imported, with this source."""
    module = ModuleType(name)
    exec(inspect.cleandoc(code), vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def names(report):
    return [x.path for x in report.replaced]


def is_ours(module):
    return issubclass(module.InvariantPointAttention, ipa_jax.InvariantPointAttention)


def run(module, config, dtype="float32"):
    """Outputs of valid residues and all gradients of a module's attention, in the module's own frames."""
    case = make_case("a copy", config).astype(dtype)
    assert not case.mask.all()
    cotangent = case.cotangent * case.mask[..., None]

    def forward(single, pair, rotation, translation):
        if config.layout == "monomer":
            frames = module.quat_affine.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
        else:
            geometry = module.geometry
            turn, shift = geometry.Rot3Array.from_array(rotation), geometry.Vec3Array.from_array(translation)
            frames = geometry.Rigid3Array(turn, shift)
        attention = module.InvariantPointAttention(config, SimpleNamespace(zero_init=False))
        return attention(single, pair, jnp.asarray(case.mask[:, None], single.dtype), frames)

    apply = hk.without_apply_rng(hk.transform(forward)).apply

    def differentiate(params, arrays):
        out, pullback = jax.vjp(lambda p, x: apply(p, *x), params, arrays)
        return out, pullback(jnp.asarray(cotangent))

    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(dtype == "float64"):
        arrays = tuple(map(jnp.asarray, (case.single, case.pair, case.rotation, case.translation)))
        out, (to_params, to_arrays) = jax.jit(differentiate)(case.weights.to_haiku(), arrays)
    found = {"out": np.asarray(out)[case.mask.astype(bool)]}
    found |= dict(zip(("gradient/single", "gradient/pair", "gradient/R", "gradient/t"), to_arrays, strict=True))
    return found | {f"gradient/{path}/{leaf}": x for path, leaves in to_params.items() for leaf, x in leaves.items()}


def assert_same(after, before, dtype="float32"):
    assert set(after) == set(before)
    for stage, x in before.items():
        if not stage.endswith("attention_2d/bias"):  # its gradient is zero, or rounding
            names = {"case": "a copy", "stage": stage, "dtype": dtype, "subject": "after", "reference": "before"}
            row = compare(np.asarray(after[stage]), np.asarray(x), **names, meaningful=None, norm="max")
            assert row.passed, str(row)


@pytest.mark.parametrize(
    ("name", "dtype"), [(COPIES[0], "float32"), (COPIES[0], "float64"), (COPIES[1], "float32")], ids=str
)
def test_a_copy_computes_the_same_afterwards(vendored, name, dtype):
    module, config = importlib.import_module(name), LAYOUTS[name]
    assert module.InvariantPointAttention is not getattr(folding, "InvariantPointAttention", None)
    before = run(module, config, dtype)
    with ipa_jax.replace_alphafold_ipa(modules=[module], implementation="streamed", verify=False):
        assert is_ours(module)
        after = run(module, config, dtype)
    assert not is_ours(module)
    assert_same(after, before, dtype)


def test_imported_copies_are_found_beside_alphafold(vendored, monkeypatch):
    """They are compared in their own frames, and all are restored."""
    copies = [importlib.import_module(name) for name in COPIES]
    own = [x.InvariantPointAttention for x in (folding, folding_multimer, *copies)]
    assert len(set(own)) == 4
    # AlphaFold's frames would fail here, and a copy's isinstance tests would not notice.
    monkeypatch.setattr(folding.quat_affine, "QuatAffine", None)
    monkeypatch.setattr(folding_multimer.geometry, "Rigid3Array", None)
    with ipa_jax.replace_alphafold_ipa(modules=copies) as report:
        assert names(report) == COPIES
        assert all(x.error <= bound("out", "float32") for x in report.replaced)
        assert [is_ours(x) for x in (folding, folding_multimer, *copies)] == [False, False, True, True]
    replacement = ipa_jax.replace_alphafold_ipa(verify=False)
    assert names(replacement.report) == [*OWN, *COPIES]
    assert [x.system for x in replacement.report.replaced] == ["AlphaFold, monomer", "AlphaFold, multimer"] * 2
    assert not replacement.report.left_alone
    assert all(is_ours(x) for x in (folding, folding_multimer, *copies))
    replacement.restore()
    assert [x.InvariantPointAttention for x in (folding, folding_multimer, *copies)] == own


def test_without_alphafold_a_copy_is_enough(vendored, monkeypatch):
    copy = importlib.import_module(COPIES[0])
    for name in [x for x in sys.modules if x.startswith("alphafold.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "alphafold", None)
    with ipa_jax.replace_alphafold_ipa(verify=False) as report:
        assert names(report) == [COPIES[0]]
        assert is_ours(copy)
    monkeypatch.delitem(sys.modules, COPIES[0])
    with pytest.raises(ValueError, match=r"package alphafold was expected, .* or an imported module with a copy"):
        ipa_jax.replace_alphafold_ipa()


def test_an_alphafold_that_cannot_be_imported(vendored, monkeypatch):
    """With a copy, the report tells it; without, it is the reason in the error."""
    copy = importlib.import_module(COPIES[0])
    for name in OWN:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with ipa_jax.replace_alphafold_ipa(verify=False) as report:
        assert is_ours(copy)
        assert "left alone: alphafold: it is installed but cannot be imported: a library is missing" in str(report)
    monkeypatch.delitem(sys.modules, COPIES[0])
    with pytest.raises(ValueError, match="there is none; alphafold: it is installed but cannot be imported"):
        ipa_jax.replace_alphafold_ipa()


@pytest.mark.parametrize("as_list", [False, True])
def test_modules_by_name_or_object(vendored, as_list):
    """Names are imported; only these modules are replaced, each once."""
    assert COPIES[0] not in sys.modules
    with ipa_jax.replace_alphafold_ipa(modules=[COPIES[0]] if as_list else COPIES[0], verify=False) as report:
        copy = sys.modules[COPIES[0]]
        assert is_ours(copy)
        assert not is_ours(folding)
        with ipa_jax.replace_alphafold_ipa(modules=[copy, COPIES[0]], verify=False) as again:
            assert names(again) == names(report) == [COPIES[0]]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "at least one module"),
        (["no_such_package.folding"], "'no_such_package.folding' cannot be imported: .*; check the name"),
        (["json"], r"json: a Haiku module .* was expected.* it has none: name the module that defines it"),
        (["ipa_jax.invariant_point_attention"], r"called with .*inputs_1d.* got <class 'ipa_jax"),
        ([5], "modules or names of modules; got 5"),
    ],
    ids=["none", "no module", "no class", "ours", "no name"],
)
def test_modules_that_cannot_be_replaced(modules, message):
    with pytest.raises(ValueError, match=message):
        ipa_jax.replace_alphafold_ipa(modules=["alphafold.model.folding", *modules] if modules else modules)
    assert not is_ours(folding)


OTHERS = {
    "no Haiku module": """
        class InvariantPointAttention:
            def __init__(self, config, global_config): ...
            def __call__(self, inputs_1d, inputs_2d, mask, affine): ...
        """,
    "another call": """
        import haiku as hk
        class InvariantPointAttention(hk.Module):
            def __init__(self, config, global_config, name=None): super().__init__(name)
            def __call__(self, inputs_1d, inputs_2d, mask, rotation): ...
        """,
    "another order": """
        import haiku as hk
        class InvariantPointAttention(hk.Module):
            def __init__(self, config, global_config, name=None): super().__init__(name)
            def __call__(self, inputs_2d, inputs_1d, mask, affine): ...
        """,
    "another constructor": """
        import haiku as hk
        class InvariantPointAttention(hk.Module):
            def __init__(self, config, name=None): super().__init__(name)
            def __call__(self, inputs_1d, inputs_2d, mask, affine): ...
        """,
    "no class": "InvariantPointAttention = len",
    "imported only": "from alphafold.model.folding import InvariantPointAttention",
    "ours": "from ipa_jax import InvariantPointAttention",
}


def test_others_are_not_mistaken_for_alphafolds(monkeypatch):
    modules = [define(monkeypatch, f"others.{name}", code) for name, code in OTHERS.items()]
    before = [x.InvariantPointAttention for x in modules]
    with ipa_jax.replace_alphafold_ipa(verify=False) as report:
        assert names(report) == OWN
        assert not report.left_alone
        assert [x.InvariantPointAttention for x in modules] == before


def test_modules_that_load_at_first_use_stay_asleep(monkeypatch):
    class Asleep(ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"{name} was looked up, which would import this module's package")

    monkeypatch.setitem(sys.modules, "asleep", Asleep("asleep"))
    monkeypatch.setitem(sys.modules, "blocked", None)
    with ipa_jax.replace_alphafold_ipa(verify=False) as report:
        assert names(report) == OWN


SUBCLASS = """
    import jax
    from alphafold.model import quat_affine
    from alphafold.model.folding import InvariantPointAttention as AlphaFolds
    class InvariantPointAttention(AlphaFolds):
        def __init__(self, config, global_config, {built}):
            super().__init__(config, global_config, {passed})
        def __call__(self, inputs_1d, inputs_2d, mask, affine{called}):
            return super().__call__({single}, {pair}, mask, affine)
    """
PLAIN = {
    "built": "dist_epsilon=1e-8, name='invariant_point_attention'",
    "passed": "dist_epsilon, name=name",
    "called": "",
    "single": "inputs_1d",
    "pair": "inputs_2d",
}


def copy_with(monkeypatch, **changes):
    return define(monkeypatch, "copy_of.folding", SUBCLASS.format(**{**PLAIN, **changes}))


def call(module, *others, **named):
    """The attention's output, called with further arguments."""
    case = make_case("a copy", ODD).astype("float32")

    def forward(single, pair, rotation, translation):
        frames = module.quat_affine.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
        attention = module.InvariantPointAttention(ODD, SimpleNamespace(zero_init=False))
        mask = named.pop("mask", case.mask[:, None])
        return attention(single, pair, jnp.asarray(mask, single.dtype), frames, *others, **named)

    apply = jax.jit(hk.without_apply_rng(hk.transform(forward)).apply)
    with jax.numpy_dtype_promotion("standard"):
        return apply(case.weights.to_haiku(), case.single, case.pair, case.rotation, case.translation)


def test_an_argument_that_alphafold_has_not(monkeypatch):
    """It is accepted at its default; anything else raises, because ours would ignore it."""
    copy = copy_with(monkeypatch, called=", mask_2d=None, scale=1.0")
    shown = np.tri(len(make_case("a copy", ODD).mask))
    with ipa_jax.replace_alphafold_ipa(verify=False) as report:
        assert names(report) == [*OWN, "copy_of.folding"]
        expected = call(copy)
        np.testing.assert_array_equal(call(copy, mask_2d=None, scale=1), expected)
        with pytest.raises(ValueError, match=r"mask_2d .* must be None, its default.*got array"):
            call(copy, mask_2d=shown)
        with pytest.raises(ValueError, match=r"scale .* must be 1\.0, its default.*got 2\.0"):
            call(copy, scale=2.0)
        with pytest.raises(TypeError):
            call(copy, shown)  # by position
        with pytest.raises(TypeError, match="unexpected argument 'other'"):
            call(copy, other=None)


def test_a_mask_of_pairs_is_refused():
    """AlphaFold's attention would take it, as (N, N); ours must not read its first column alone."""
    shown = np.ones((len(make_case("a copy", ODD).mask),) * 2)
    with (
        ipa_jax.replace_alphafold_ipa(verify=False),
        pytest.raises(ValueError, match=r"mask must have the shape \(residues, 1\).*got \(7, 7\)"),
    ):
        call(folding, mask=shown)


@pytest.mark.parametrize(
    "changes",
    [{"called": ", mask_2d"}, {"built": "rate, dist_epsilon=1e-8, name=None"}, {"built": "rate=0, dist_epsilon=1e-8"}],
    ids=["in the call", "in the constructor", "before AlphaFold's"],
)
def test_an_argument_without_a_default_is_left_alone(monkeypatch, changes):
    copy = copy_with(monkeypatch, **changes)
    with ipa_jax.replace_alphafold_ipa(verify=False) as report:
        assert names(report) == OWN
        assert "were expected first, and others with a default" in report.left_alone["copy_of.folding"]
    with pytest.raises(ValueError, match=r"^copy_of\.folding: .* give the others defaults"):
        ipa_jax.replace_alphafold_ipa(modules=[copy])


def test_another_default_is_kept(monkeypatch):
    """The comparison before and after shows it: it builds both with the defaults."""
    copy_with(monkeypatch, built="dist_epsilon=1e-3, name='invariant_point_attention'")
    with ipa_jax.replace_alphafold_ipa(modules="copy_of.folding") as report:
        assert report.replaced[0].error <= bound("out", "float32")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"passed": "1.1e-8, name=name"}, "outputs where points have no length but their ε"),
        ({"single": "inputs_1d + 1e-2"}, "outputs"),
        ({"pair": "jax.lax.stop_gradient(inputs_2d)"}, "gradient to pair"),
        ({"single": "inputs_1d + 0.01 * (inputs_1d - jax.lax.stop_gradient(inputs_1d))"}, "gradient to single"),
    ],
    ids=["ε", "outputs", "no gradient to the pair", "another gradient"],
)
def test_a_copy_that_computes_something_else_is_refused(monkeypatch, changes, part):
    copy = copy_with(monkeypatch, **changes)
    own = copy.InvariantPointAttention
    with pytest.raises(ValueError, match=rf"copy_of\.folding: .* another function: {part}: .* name them in modules="):
        ipa_jax.replace_alphafold_ipa(modules=[copy])
    assert copy.InvariantPointAttention is own


def test_a_copy_whose_frames_are_nowhere(monkeypatch):
    copy = copy_with(monkeypatch)
    del copy.quat_affine
    with ipa_jax.replace_alphafold_ipa(modules=[copy]) as report:  # in the module of the class that it is made of
        assert names(report) == ["copy_of.folding"]
    monkeypatch.delattr(folding, "quat_affine")
    with pytest.raises(ValueError, match=r"quat_affine was expected among the names of copy_of\.folding.*verify=False"):
        ipa_jax.replace_alphafold_ipa(modules=[copy])
