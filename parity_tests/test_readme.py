"""The README's code and commands work as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.proteins import load_structure, residues, save_structure
from ipa_bridge.proteins.frames import idealised_peptide
from ipa_bridge.weights import Weights, cli
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.report import compare

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_quickstarts_run_one_after_the_other(tmp_path, monkeypatch):
    """Both quickstarts compute one function and save the same weights."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    haiku, torch, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    first: dict = {}
    with jax.enable_x64(False):
        exec(compile(haiku, "README.md: Haiku", "exec"), first)
    assert first["update"].shape == (48, 384)
    second: dict = {}
    exec(compile(torch, "README.md: PyTorch", "exec"), second)
    assert second["update"].shape == (48, 384)
    assert second["attention"].shape == (12, 48, 48)
    for update in (first["update"], second["update"].detach()):
        assert 0.3 < np.asarray(update).std() < 3, "the first result must not be zero"
    assert_the_same_function(first, second)
    for file in ("ipa.safetensors", "ipa.npz"):
        again = Weights.load(file, config=first["config"]).arrays
        assert all(x.tobytes() == first["weights"].arrays[name].tobytes() for name, x in again.items())


def test_a_proteins_frames_come_in_the_models_unit(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("gemmi")
    monkeypatch.chdir(tmp_path)
    save_glucagon()
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2]
    shared: dict = {}
    exec(compile(block, "README.md: frames", "exec"), shared)
    step = np.linalg.norm(np.diff(shared["rigids"].translation.numpy(), axis=0), axis=-1)
    np.testing.assert_allclose(step, 0.38, rtol=0.01)


def save_glucagon():
    """Saves a peptide under the file name that the README reads."""
    peptide = idealised_peptide()
    save_structure("1gcn.pdb", peptide.atom37, peptide.aatype, atom37_mask=peptide.atom37_mask)


ALONE = """
import pathlib, re, sys
for name in {absent!r}:
    sys.modules[name] = None
for block in re.findall(r"```python\\n(.*?)```", pathlib.Path({readme!r}).read_text("utf-8"), re.DOTALL)[:8]:
    if {imported!r} in block:
        print("block:", len(block), flush=True)
        exec(compile(block, block, "exec"), {{}})
"""


@pytest.mark.parametrize(("framework", "other"), [("jax", ["torch"]), ("torch", ["jax", "haiku"])])
def test_every_block_runs_with_only_what_it_names(framework, other, tmp_path, monkeypatch):
    """Each block runs in its own namespace, without the other framework and other packages it does not name."""
    pytest.importorskip(framework)
    pytest.importorskip("gemmi")
    monkeypatch.chdir(tmp_path)
    save_glucagon()
    absent = [*other, "optax", "matplotlib", "transformers", "alphafold", "invariant_point_attention", "triton"]
    code = ALONE.format(absent=absent, readme=str(ROOT / "README.md"), imported=f"import ipa_{framework}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # PyTorch 2.6 leaves a temporary folder to be cleaned up at the end.
    ignored = ["-W", "ignore::DeprecationWarning", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    command = [sys.executable, "-W", "error", *ignored, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    shown = run.stdout.split("block:")[1:]
    assert len(shown) == {"jax": 3, "torch": 5}[framework]
    assert all(len(lines.splitlines()) > 1 for lines in shown), "every block prints something"
    assert run.stderr == ""


def test_representations_become_structure_files(tmp_path, monkeypatch):
    """The two blocks share weights; every heavy atom of every residue that they write is read back."""
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    gemmi = pytest.importorskip("gemmi")
    monkeypatch.chdir(tmp_path)
    haiku, pytorch, training = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[3:6]
    for block in (haiku, pytorch):
        lines = [line for line in block.strip().splitlines() if line and not line.startswith(("import", "from"))]
        assert len(lines) <= 11
    first: dict = {}
    with jax.enable_x64(False):
        exec(compile(haiku, "README.md: Haiku", "exec"), first)
        # The PyTorch block draws its own inputs; this comparison needs the same ones.
        same = first["structure_module"].apply(
            first["weights"].to_haiku(), None, first["single"], first["pair"], first["aatype"]
        )
    second: dict = {}
    exec(compile(pytorch, "README.md: PyTorch", "exec"), second)
    inputs = [torch_tensor(np.asarray(first[name])) for name in ("single", "pair", "aatype")]
    with torch.no_grad():
        twin = second["structure_module"](*inputs)
    row = compare(
        twin.act.numpy(),
        np.asarray(same.act),
        case="README",
        stage="act",
        dtype="float32",
        subject="torch",
        reference="jax",
    )
    assert row.passed, str(row)
    third: dict = {}
    exec(compile(training, "README.md: training", "exec"), third)
    gradients = [x.grad for x in third["structure_module"].parameters()]
    assert all(x is not None and x.isfinite().all() for x in gradients)
    assert third["losses"].loss > 0.1
    for name, block in (("prediction.pdb", first), ("prediction.cif", second)):
        assert len(gemmi.read_structure(name)[0][0]) == 48
        structure = load_structure(name)
        np.testing.assert_array_equal(structure.aatype, np.asarray(block["aatype"]))
        np.testing.assert_array_equal(structure.atom37_mask, residues.ATOM37_MASK[structure.aatype])


def test_both_transformers_compute_the_same(tmp_path, monkeypatch):
    """Both blocks have the same config and parameters."""
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    haiku, pytorch = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[6:8]
    shared: dict = {}
    with jax.enable_x64(False):
        exec(compile(haiku, "README.md: Haiku", "exec"), shared)
    points = np.asarray(shared["points"])
    sequence = torch_tensor(np.asarray(shared["sequence"]))
    exec(compile(pytorch, "README.md: PyTorch", "exec"), shared)
    with torch.no_grad():
        twin = shared["transformer"](sequence).points.numpy()
    names = {"case": "README", "stage": "points", "dtype": "float32", "subject": "torch", "reference": "jax"}
    row = compare(twin, points, **names)
    assert row.passed, str(row)


def test_the_attention_of_a_whole_models_file(tmp_path):
    """A config selects the attention; without one the file's structure module is loaded."""
    assert 'Weights.load("params_model_1.npz", config=config).to_haiku()' in README
    config = StructureModuleConfig.alphafold2()
    Weights.random(config).save(tmp_path / "params_model_1.npz")
    found = Weights.load(tmp_path / "params_model_1.npz", config=config.ipa)
    assert found.config == config.ipa
    assert {name.split("/")[0] for name in found.to_haiku()} == {"invariant_point_attention"}
    assert Weights.load(tmp_path / "params_model_1.npz").config == config


def test_ipa_port_prints_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    """The output agrees word for word, except for measured numbers."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Weights.random(StructureModuleConfig.alphafold2()).save("structure_module.safetensors")
    (console,) = (x for x in re.findall(r"```console\n(.*?)```", README, re.DOTALL) if "ipa-port" in x)
    shown = [part.split("\n", 1) for part in re.split(r"^\$ ipa-port ", console, flags=re.MULTILINE)[1:]]
    assert len(shown) == 5
    for command, expected in shown:
        cli.main(command.split())
        said = "".join(capsys.readouterr())
        unmeasured = (re.sub(r"within \S+ eps|by \S+ of", "…", text) for text in (said, expected))
        assert next(unmeasured) == next(unmeasured), command


def test_commands_are_in_the_makefile():
    makefile = (Path(__file__).resolve().parent.parent / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def assert_the_same_function(haiku: dict, pytorch: dict) -> None:
    """The two quickstarts' objects, on the Haiku one's inputs and on weights that are not zero."""
    import torch

    weights = Weights.random(haiku["config"])
    arrays = [torch_tensor(np.asarray(haiku[name])) for name in ("single", "pair", "mask")]
    rigids = pytorch["ipa_torch"].Rigid(*(torch_tensor(np.asarray(x)) for x in haiku["rigids"]))
    pytorch["module"].load_state_dict(weights.to_torch())
    with torch.no_grad():
        actual = pytorch["module"](*arrays[:2], rigids, arrays[2]).numpy()
    expected = haiku["ipa"].apply(weights.to_haiku(), *(haiku[name] for name in ("single", "pair", "rigids", "mask")))
    names = {"case": "README", "stage": "out", "dtype": "float32", "subject": "torch", "reference": "jax"}
    row = compare(actual, np.asarray(expected), **names)
    assert row.passed, str(row)


def test_no_placeholder_is_left():
    assert "@@" not in README
