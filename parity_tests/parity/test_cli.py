"""The command ipa-parity, run as a person or a script would."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import ipa_bridge
from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.weights import Weights
from ipa_bridge.weights import cli as port
from ipa_parity import cli
from ipa_parity.attention import stages
from ipa_parity.attention.cases import ODD_MULTIMER, load_weights
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.structure_module import cases as structure_modules
from ipa_parity.structure_module.stages import TERMS

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("jax")
pytest.importorskip("torch")


def refused(arguments: list[str], capsys) -> str:
    """Runs the command with wrong arguments; returns its one-line error (after the usage if argparse refused)."""
    start = "ipa-parity: "
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:
        status, start = stopped.code, "usage: "
    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith(start)
    assert said.count("\n") == 1 or start == "usage: "
    return said


def test_default_run_prints_a_table_and_passes(capsys):
    assert cli.main(["--residues", "20", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for part in ("float32", "float64", "20 random frames", "idealised peptide", "alphafold2", "alphafold-multimer"):
        assert part in printed.out
    lines = printed.out.splitlines()
    rows = [line for line in lines if line.endswith("pass")]
    stages_shown = {line.split()[0] for line in rows}
    assert {"logits", "attention", "o", "points", "norms", "o_pair", "out", "gradient/pair"} <= stages_shown
    assert "gradient/kv_point_local/weights" in stages_shown
    assert "comparisons passed" in lines[-1]


def test_json_holds_every_comparison(capsys):
    arguments = ["--residues", "9", "--preset", "lucidrains", "--dtype", "float32", "--no-gradients", "--json"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["passed"] is True
    assert report["frameworks"] == ["jax", "torch"]
    rows = report["comparisons"]
    assert {row["stage"] for row in rows} == {"logits", "attention", "o", "points", "norms", "o_pair", "out"}
    assert {(row["subject"], row["reference"]) for row in rows} == {
        ("jax", "float64"),
        ("torch", "float64"),
        ("jax", "torch"),
    }
    assert all(row["error"] <= row["bound"] and row["passed"] for row in rows)
    assert "jax float32" in printed.err


def test_a_users_weights_and_structure(tmp_path, structures_dir, capsys):
    Weights.random(ODD_MULTIMER).save(tmp_path / "mine.safetensors")
    arguments = ["--weights", str(tmp_path / "mine.safetensors"), "--structure", str(structures_dir / "1gcn.pdb")]
    assert cli.main([*arguments, "--quiet"]) == 0
    assert "mine.safetensors, 1gcn.pdb: 29 residues" in capsys.readouterr().out


def test_untrained_weights_are_refused(tmp_path, capsys):
    weights = Weights.random(ODD_MULTIMER)
    name = "output_projection/weights"
    replace(weights, arrays={**weights.arrays, name: 0 * weights.arrays[name]}).save(tmp_path / "fresh.npz")
    said = refused(["--weights", str(tmp_path / "fresh.npz")], capsys)
    assert "output_projection is zero, as in an untrained model" in said


def test_a_preset_gives_the_norm_that_a_file_lacks(tmp_path):
    weights = Weights.random(replace(ODD_MULTIMER, norm_form="add"))
    with pytest.warns(UserWarning, match=r"cannot store norm_form='add' \(Weights\.load will assume 'clamp'\)"):
        weights.save(tmp_path / "w.npz")
    guessed, told = (load_weights(tmp_path / "w.npz", preset) for preset in (None, "alphafold2"))
    assert (guessed.config.norm_form, "norm_form" in guessed.assumed) == ("clamp", True)
    assert (told.config.norm_form, told.assumed) == ("add", frozenset())


def test_a_failure_is_named_and_gives_status_1(capsys, monkeypatch):
    honest = stages.RUNNERS["jax"]

    def off(case, **options):
        arrays = honest(case, **options)
        arrays["out"] = arrays["out"] * 1.001
        return arrays

    monkeypatch.setitem(stages.RUNNERS, "jax", off)
    assert cli.main(["--residues", "9", "--preset", "lucidrains", "--no-gradients", "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL lucidrains, 9 random frames float32 out: jax against float64:" in printed
    assert "comparisons failed" in printed.splitlines()[-1]
    row = next(line for line in printed.splitlines() if line.startswith("out "))
    assert row.endswith("FAIL")


def test_a_structure_module_layer_by_layer(capsys, structures_dir):
    path = str(structures_dir / "1gcn.pdb")
    arguments = ["--module", "structure-module", "--preset", "alphafold-multimer", "--structure", path]
    assert cli.main([*arguments, "--dtype", "float32", "--no-gradients", "--quiet"]) == 0
    printed = capsys.readouterr().out.splitlines()
    passed = {line.split("  ")[0] for line in printed if line.endswith("pass")}
    fields = ("rotation", "translation", "angles", "atom14", "act")
    assert {f"{field}/layer {i + 1}" for field in fields for i in range(8)} <= passed
    assert {f"loss/{term}" for term in TERMS} <= passed
    assert "  alphafold-multimer, 1gcn.pdb: 29 residues" in printed[2]
    assert "comparisons passed" in printed[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--residues", "9"], "leave out --residues"),
        (["--dtype", "bfloat16"], "takes --dtype float32 or float64; got bfloat16"),
        (["--preset", "lucidrains"], "presets alphafold2, alphafold-multimer, esmfold, abodybuilder3; got lucidrains"),
    ],
)
def test_arguments_that_a_structure_module_does_not_take(arguments, message, capsys):
    assert message in refused(["--module", "structure-module", *arguments], capsys)


def test_a_preset_of_structure_modules_alone_is_refused_for_an_attention(capsys):
    assert "--module ipa has the presets alphafold2, " in refused(["--preset", "abodybuilder3"], capsys)


def test_a_structure_modules_weights_come_from_a_file(tmp_path, capsys):
    config = StructureModuleConfig.alphafold_multimer()
    Weights.random(config).save(tmp_path / "module.safetensors")
    Weights.random(config.ipa).save(tmp_path / "ipa.safetensors")
    assert structure_modules.load_weights(tmp_path / "module.safetensors").config == config
    told = structure_modules.load_weights(tmp_path / "module.safetensors", "esmfold").config
    assert (told.position_scale, told.ipa.norm_form) == (10.0, "add")
    said = refused(["--module", "structure-module", "--weights", str(tmp_path / "ipa.safetensors")], capsys)
    assert "holds an attention's weights, not a structure module's: use --module ipa" in said
    assert cli.main(["--weights", str(tmp_path / "module.safetensors"), "--residues", "5", "--no-gradients"]) == 0


def test_one_framework_alone_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(cli, "installed_frameworks", lambda: ("torch",))
    said = refused(["--residues", "9"], capsys)
    assert "not installed: jax. Install ipa-twins[jax], or pass --require='torch'" in said
    arguments = ["--residues", "9", "--preset", "lucidrains", "--require", "torch", "--quiet"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "torch only: the other framework, the reference of float64 gradients, is not installed" in printed
    arguments = [*arguments, "--dtype", "float64", "--json"]
    assert cli.main(arguments) == 0
    assert not any("gradient" in row["stage"] for row in json.loads(capsys.readouterr().out)["comparisons"])
    arguments = ["--module", "structure-module", "--require", "torch", "--dtype", "float64", "--quiet", "--json"]
    assert cli.main([*arguments, "--preset", "esmfold", "--no-gradients"]) == 2
    assert "nothing was compared: torch alone has no reference in float64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--structure", "nowhere.pdb"], "no such file: nowhere.pdb"),
        (["--weights", "nowhere.npz"], "no such file: nowhere.npz"),
        (["--structure", "x.pdb", "--residues", "9"], "--structure has its own residues"),
        (["--residues", "many"], "must be a whole number; got 'many'"),
        (["--residues", "1"], "must be at least 2, so that residues can attend to each other; got 1"),
        (["--preset", "alphafold9"], "invalid choice"),
        (["--require", "jax,tensorflow"], "--require takes jax, torch or both, as jax,torch; got tensorflow"),
    ],
)
def test_wrong_arguments_give_status_2(arguments, message, capsys):
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize("command", [cli, port])
def test_version_and_examples_of_the_commands(command, capsys):
    for option, expected in (
        ("--version", f"ipa-twins {ipa_bridge.__version__}\n"),
        ("--help", "\nexamples:\n  ipa-p"),
    ):
        with pytest.raises(SystemExit, match="0"):
            command.main([option])
        assert expected in capsys.readouterr().out
    assert ipa_bridge.__version__ == metadata.version("ipa-twins")


def test_installed_frameworks_are_found():
    assert installed_frameworks() == ("jax", "torch")


@pytest.mark.exhaustive  # ipa-parity runs on a user's files above
@pytest.mark.parametrize("both", [True, False])
def test_the_suite_runs_on_a_users_files(both, tmp_path, structures_dir):
    Weights.random(ODD_MULTIMER).save(tmp_path / "mine.npz")
    options = ["--weights", str(tmp_path / "mine.npz")]
    options += ["--structure", str(structures_dir / "1gcn.pdb")] if both else []
    command = [sys.executable, "-m", "pytest", "parity_tests/parity/test_parity.py", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "14 passed" in result.stdout
    assert "gradient/q_point_projection/point_projection " in result.stdout


def test_a_missing_requirement_fails_the_suite():
    command = [sys.executable, "-m", "pytest", "parity_tests/test_twins.py", "--require=jax,nonesuch"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "--require: not installed: nonesuch" in result.stderr


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_interrupts_and_closed_pipes_print_no_traceback(raised, status, monkeypatch, capsys):
    def stopped(*_, **__):
        raise raised

    monkeypatch.setattr(cli, "make_case", stopped)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main(["--residues", "5", "--preset", "lucidrains"]) == status
    sys.stdout.close()  # the command replaces a closed pipe by the null device
    assert ("interrupted" in capsys.readouterr().err) == (raised is KeyboardInterrupt)
