"""`ipa_parity.check` and its command: candidates of every kind, and candidates that misbehave."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from planted import ROOT, SMALL, SOURCE, my_ipa, names_of, planted

from ipa_bridge import IPAConfig
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_parity import check
from ipa_parity.attention.cases import PRESETS, make_case
from ipa_parity.checking.formula import Formula, Inputs, compute
from ipa_parity.cli import main
from ipa_parity.peers import esmfold_module, lucidrains_module

CONFIG = SMALL["monomer"]
TRANSPOSED = ('"...ixy,...ihpy->...ihpx", rotation, local', '"...iyx,...ihpy->...ihpx", rotation, local')


@pytest.fixture(autouse=True)
def needs_torch():
    pytest.importorskip("torch")


def lucidrains():
    pytest.importorskip("invariant_point_attention")
    return lucidrains_module(IPAConfig.lucidrains(64))


def esmfold():
    pytest.importorskip("transformers")
    return esmfold_module(make_case("", IPAConfig.esmfold()).astype("float32"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [lucidrains, esmfold, my_ipa], ids=lambda make: make.__name__)
def test_published_modules_are_right(make):
    report = check(make(), structure=idealised_peptide())
    assert report.passed, str(report)
    assert any(row.stage == "gradient/rotation" for row in report.comparisons)
    assert "the structure" in {row.case for row in report.comparisons}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_published_module_called_wrongly_is_diagnosed():
    def call(module, single, pair, rotations, translations, mask):
        """Gives column-vector frames to a module that takes row-vector frames."""
        return module(single, pair, rotations=rotations, translations=translations, mask=mask)

    report = check(lucidrains(), call=call, dtypes=("float32",), gradients=False)
    assert "rotations transposed" in names_of(report)[0], str(report)


def with_stages(parameters, single, pair, rotation, translation, mask):
    inputs = Inputs(single, pair, rotation, translation, mask.astype(single.dtype))
    stages = compute(Formula(), parameters, CONFIG, inputs)
    del stages["logits"]
    stages["points"] = np.tanh(stages["points"])  # no known mistake
    return stages | {"out": np.tanh(stages["out"])}


def test_the_first_stage_that_departs_is_told():
    report = check(with_stages, CONFIG, dtypes=("float64",))
    assert (report.verdict, report.diagnosis.kind) == ("wrong", "stage")
    assert "departs is points" in report.diagnosis.text


def test_stages_may_be_shown_too():
    def stages(parameters, single, pair, rotation, translation, mask):
        inputs = Inputs(single, pair, rotation, translation, mask.astype(single.dtype))
        return compute(Formula(), parameters, CONFIG, inputs)

    report = check(stages, CONFIG)
    assert report.passed, str(report)
    assert {"logits", "attention", "o", "points", "norms", "o_pair", "out"} <= {x.stage for x in report.comparisons}


def test_a_candidates_own_gradients_are_compared():
    def attention(parameters, single, pair, rotation, translation, mask):
        inputs = Inputs(single, pair, rotation, translation, mask.astype(single.dtype))
        out = compute(Formula(), parameters, CONFIG, inputs)["out"]
        return {"out": out, "gradient/pair": np.zeros_like(pair)}

    report = check(attention, CONFIG, dtypes=("float64",))
    assert report.verdict == "wrong"
    assert "pair" in report.diagnosis.text


def misbehave(kind):
    import torch

    class Misbehaving(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ipa = my_ipa()

        def forward(self, s, z, rotation, translation, mask):
            out = self.ipa(s, z, rotation, translation, mask)
            if kind == "raises":
                raise RuntimeError("out of order")
            if kind == "shape":
                return out[..., :-1]
            if kind == "nan":
                return out / (mask[..., None] - 1) * 0
            if kind == "dtype":
                return out.to(torch.float16)
            if kind == "random":
                return out + torch.rand(())
            s.mul_(2)
            return out

    return Misbehaving()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", "raises RuntimeError: out of order"),
        ("shape", "383"),
        ("nan", "not finite"),
        ("dtype", "the output is float16; float32, the dtype of the inputs, was expected"),
        ("random", "two calls with the same inputs give different outputs"),
        ("writes", "writes into its input single"),
    ],
)
def test_a_candidate_that_misbehaves_is_a_finding(kind, said):
    report = check(misbehave(kind), gradients=kind != "writes")
    assert report.verdict == "wrong"
    assert said in str(report), str(report)
    json.dumps(report.as_json())


def test_float32_inside_is_a_note():
    report = check(my_ipa(("        q = self", "        s = s.float().to(s.dtype)\n        q = self")), gradients=False)
    assert report.passed
    assert "it computes in float32 when its inputs are float64" in report.notes


def test_a_numpy_function_that_writes_into_its_inputs():
    right = planted(Formula(), CONFIG, "numpy")

    def attention(parameters, single, pair, rotation, translation, mask):
        out = right(parameters, single, pair, rotation, translation, mask)
        pair *= 0
        return out

    assert any("pair" in str(x) for x in check(attention, CONFIG).findings)


@pytest.mark.parametrize(
    ("candidate", "options", "said"),
    [
        (planted(Formula(), CONFIG, "numpy"), {}, "config= was expected"),
        (planted(Formula(), CONFIG, "numpy"), {"config": "alphafold3"}, "a preset of alphafold2"),
        (planted(Formula(), CONFIG, "numpy"), {"config": CONFIG, "dtypes": ("float8",)}, "float8"),
        (int, {"config": CONFIG}, "the class int"),
        (3, {"config": CONFIG}, "an instance of a module"),
        (lambda single, teapot: single, {"config": CONFIG}, "teapot is none of them"),
        (
            lambda parameters, single, rotation, translation: single,
            {"config": CONFIG, "parameters": {"w": "q/w"}},
            "q/w",
        ),
    ],
)
def test_what_cannot_be_checked_raises(candidate, options, said):
    if "parameters" in options:
        report = check(candidate, **options)
        assert said in str(report)
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        check(candidate, **options)


def test_a_module_with_names_of_its_own():
    import torch

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = my_ipa()
            self.query = torch.nn.Parameter(self.inner.linear_q.weight.detach().T.clone())
            del self.inner.linear_q
            self.inner.linear_q = lambda s: s @ self.query + self.bias
            self.bias = torch.nn.Parameter(torch.zeros(192))

        def forward(self, s, z, rotation, translation, mask):
            return self.inner(s, z, rotation, translation, mask)

    table = {"query": "q_scalar/weights", "bias": "q_scalar/bias", "inner.head_weights": "trainable_point_weights"}
    for theirs, ours in (
        ("linear_kv", "kv_scalar"),
        ("linear_q_points", "q_point_local"),
        ("linear_kv_points", "kv_point_local"),
        ("linear_b", "attention_2d"),
        ("linear_out", "output_projection"),
    ):
        table |= {f"inner.{theirs}.weight": f"{ours}/weights.T", f"inner.{theirs}.bias": f"{ours}/bias"}
    module = Mine()

    def call(module, *inputs):
        module.inner.linear_q = lambda s: s @ module.query + module.bias
        return module(*inputs)

    report = check(module, PRESETS["alphafold2"](), parameters=table, call=call, dtypes=("float32",))
    assert report.passed, str(report)
    report = check(module, PRESETS["alphafold2"](), parameters={**table, "query": "q_scalar/bias"}, call=call)
    assert report.verdict == "wrong"


def test_epsilon_comes_from_the_module():
    module = my_ipa(("1e-8", "self.eps"))
    module.eps = 1e-5
    assert check(module, dtypes=("float64",)).passed
    config = replace(IPAConfig.alphafold2(), norm_epsilon=1e-8)
    report = check(module, config, dtypes=("float64",), gradients=False)
    assert "ε = 1e-05 in the lengths" in report.diagnosis.text


def run(capsys, *arguments):
    status = main(["check", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(capsys, tmp_path):
    target = f"{ROOT / 'examples' / 'my_ipa.py'}:MyIPA"
    status, out, err = run(capsys, target, "--no-gradients", "--dtype", "float32")
    assert (status, out.splitlines()[0]) == (0, "MyIPA is right.")
    assert "float32: random frames" in err
    wrong = tmp_path / "wrong_ipa.py"
    wrong.write_text(SOURCE.replace(*TRANSPOSED))
    status, out, err = run(capsys, f"{wrong}:MyIPA", "--quiet", "--json", "--no-gradients", "--dtype", "float64")
    report = json.loads(out)
    assert (status, err, report["verdict"]) == (1, "", "wrong")
    assert "rotations transposed where points go to the global frame" in report["diagnosis"]["text"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "package.module:name or path/to/file.py:name was expected"),
        (["nowhere.py:MyIPA"], "there is no such file"),
        (["no_such_module:MyIPA"], "no_such_module"),
        (["examples/my_ipa.py:YourIPA"], "it has MyIPA"),
        (["examples/my_ipa.py:MyIPA", "--kwargs", "{"], "--kwargs takes a JSON object"),
        (["examples/my_ipa.py:MyIPA", "--kwargs", '{"teapot": 1}'], "teapot"),
        (["examples/my_ipa.py:MyIPA", "--parameters", "openfold3"], "openfold3"),
        (["examples/my_ipa.py:MyIPA", "--structure", "nothing.pdb"], "nothing.pdb"),
    ],
)
def test_wrong_arguments_have_status_2(capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(ROOT)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [("raise RuntimeError('no licence')", "cannot be imported: RuntimeError: no licence"), ("x = (", "SyntaxError")],
)
def test_a_file_that_cannot_be_imported(capsys, tmp_path, text, said):
    (tmp_path / "broken_ipa.py").write_text(text)
    status, out, err = run(capsys, f"{tmp_path / 'broken_ipa.py'}:MyIPA")
    assert (status, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["[1]", '{"a": 1}', "not JSON"])
def test_a_table_of_parameters_is_a_json_object(capsys, tmp_path, text):
    (tmp_path / "names.json").write_text(text)
    target = f"{ROOT / 'examples' / 'my_ipa.py'}:MyIPA"
    status, _, err = run(capsys, target, "--preset", "alphafold2", "--parameters", str(tmp_path / "names.json"))
    assert status == 2
    assert "names.json: a JSON object from its names to ours was expected" in err


def test_it_runs_as_a_command():
    command = [sys.executable, "-m", "ipa_parity.cli", "check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0
