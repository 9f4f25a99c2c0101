"""The examples learn and write their files, and a run that switches framework midway continues unchanged."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.proteins import load_structure

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Makes the examples importable and restores JAX's defaults, as for a user."""
    for package in ("jax", "torch", "optax", "tqdm", "matplotlib", "gemmi"):
        pytest.importorskip(package)
    import jax

    monkeypatch.syspath_prepend(str(EXAMPLES))
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def backbones(examples):
    return importlib.import_module("backbones")


SHORT = {
    "custom_layer": [],
    "denoise_backbone": ["--steps", "2", "--out", "out"],
    "denoise_backbone_jax": ["--steps", "2", "--out", "out"],
    "handoff": ["--steps", "4", "--at", "2", "--out", "out"],
    "swap_alphafold": ["--residues", "20", "--repeats", "1"],
    "swap_block": ["--residues", "20", "--repeats", "1", "--backward"],
    "swap_esmfold": ["--residues", "20", "--repeats", "1"],
}
"""Every example, with arguments that let it finish in seconds."""


ALL_HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, path
"""


def run_elsewhere(arguments, tmp_path):
    """Runs Python on a copy of the examples, where only the installed packages of this project can be imported."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "installed").mkdir()
    for package in ("ipa_bridge", "ipa_jax", "ipa_torch", "ipa_parity"):
        (tmp_path / "installed" / package).symlink_to(EXAMPLES.parent / package)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-P", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Error" not in run.stderr
    return run.stdout


def test_every_example_starts_in_another_folder(tmp_path):
    """Every example imports what it needs and prints its help."""
    programs = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert programs == set(SHORT)
    said = run_elsewhere(["-c", ALL_HELP, *(f"examples/{name}.py" for name in SHORT)], tmp_path)
    assert said.count("usage: ") == len(SHORT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SHORT)
def test_every_example_runs_in_another_folder(name, tmp_path):
    assert run_elsewhere([f"examples/{name}.py", *SHORT[name]], tmp_path)


@pytest.mark.parametrize(
    "name", ["denoise_backbone", pytest.param("denoise_backbone_jax", marks=pytest.mark.exhaustive)]
)
def test_a_denoiser_learns_what_one_without_attention_cannot(name, backbones, tmp_path, monkeypatch, capsys):
    """A few steps suffice for this; the README shows results after more."""
    example = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--steps", "40", "--out", str(tmp_path / "out")])
    example.main()
    said = capsys.readouterr().out
    scores = {
        line.rsplit("  ", 1)[0].strip(): float(line.split()[-3]) for line in said.splitlines() if line.endswith("°")
    }
    assert scores["denoised"] < 0.97 * scores["noised"]
    assert scores["each alone"] > 0.97 * scores["noised"]
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    truth, noised = (load_structure(tmp_path / "out" / f"{x}.pdb") for x in ("truth", "noised"))
    assert len(truth) == backbones.LENGTH
    off = np.sqrt(((truth.translation - noised.translation) ** 2).sum(-1).mean())
    assert 2 < off < 5


def test_a_run_handed_over_goes_on(backbones):
    """The run goes on with parameters and Adam's moments; without the moments its losses differ."""
    handoff = importlib.import_module("handoff")
    clean = backbones.peptides(16, seed=1)
    haiku, pytorch, handed = (np.array(x) for x in handoff.curves(clean, 16, 8, quiet=True).values())
    np.testing.assert_allclose(pytorch, haiku, rtol=1e-4)
    np.testing.assert_allclose(handed, haiku, rtol=1e-4)
    assert handed[-1] < haiku[0]
    in_jax, in_torch = handoff.in_jax, handoff.in_torch
    params = in_jax.initial_params()
    params, state, _ = in_jax.train(params, in_jax.ADAM.init(params), clean, range(8), quiet=True)
    model, optimizer = handoff.to_torch(params, state)
    assert all(x["step"] == 8 and x["exp_avg_sq"].min() >= 0 for x in optimizer.state.values())
    forgetful = in_torch.train(model, in_torch.adam(model), clean, range(8, 16), quiet=True)
    assert np.abs(np.array(forgetful) - haiku[8:]).max() > 1e-2


def test_scores_do_not_depend_on_where_a_chain_lies(backbones):
    chains = backbones.peptides(2, seed=3)
    from ipa_bridge.proteins.frames import random_rotations

    turn = random_rotations(np.random.default_rng(0))
    moved = backbones.Backbones(turn @ chains.rotation, chains.translation @ turn.T + 5, chains.mask)
    score = backbones.score(moved, chains)
    assert score.rmsd < 1e-3
    assert score.angle < 0.1
    noised = backbones.score(chains.noised(np.random.default_rng(0)), chains)
    assert 2.5 < noised.rmsd < 4
    assert 20 < noised.angle < 50


def test_a_folder_of_proteins(backbones, structures_dir, tmp_path):
    for name in ("1gcn.pdb", "2rbg.pdb", "3u8v.cif"):
        shutil.copy(structures_dir / name, tmp_path)
    training, unseen = backbones.training_and_held_out(tmp_path)
    assert len(training) > 2
    assert len(unseen) > 2
    assert not unseen.mask.all() or training.mask.any()
    assert np.isfinite(unseen.translation).all()
    (tmp_path / "1gcn.pdb").unlink()
    (tmp_path / "2rbg.pdb").unlink()
    with pytest.raises(ValueError, match="expected at least two structures"):
        backbones.training_and_held_out(tmp_path)


def test_proteins_without_a_backbone_or_too_short_are_skipped(backbones, structures_dir, tmp_path):
    """A file with Cα atoms only once made every loss NaN."""
    lines = (structures_dir / "5nmu.pdb").read_text().splitlines(keepends=True)
    (tmp_path / "traced.pdb").write_text("".join(x for x in lines if x[12:16] == " CA "))
    for name, copy in {"1gcn.pdb": "1GCN.PDB", "2rbg.pdb": "2RBG.PDB", "3u8v.cif": "3u8v.cif"}.items():
        shutil.copy(structures_dir / name, tmp_path / copy)
    assert len(backbones.structure_files(tmp_path)) == 4
    assert len(backbones.proteins(tmp_path)) == 2
    (tmp_path / "2RBG.PDB").unlink()
    with pytest.raises(ValueError, match="expected chains of 40 residues with a backbone in at least two files"):
        backbones.training_and_held_out(tmp_path)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("denoise_backbone", ["--structures", "nope"], "argument --structures: no such folder: nope"),
        ("denoise_backbone_jax", ["--steps", "-3"], "argument --steps: expected a whole number from 1; got '-3'"),
        ("denoise_backbone", ["--out", "taken"], "argument --out: "),
        ("handoff", ["--steps", "5", "--at", "5"], "--at must be less than --steps; got 5 of 5"),
    ],
)
def test_wrong_arguments_raise_before_training(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(name).main()
    assert f": error: {message}" in capsys.readouterr().err
