"""What the README tells a new user to do works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge import cli, residues
from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.frames import idealised_peptide
from ipa_bridge.structures import load_structure, save_structure
from ipa_bridge.tensors import torch_tensor
from ipa_bridge.weights import Weights
from ipa_parity.report import compare

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_quickstarts_run_one_after_the_other(tmp_path, monkeypatch):
    """The Haiku block saves what the PyTorch block loads; both give the twins of one function."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    haiku, torch, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    first: dict = {}
    with jax.enable_x64(False):
        exec(compile(haiku, "README.md: Haiku", "exec"), first)
    assert first["update"].shape == (48, 384)
    assert not np.asarray(first["update"]).any(), "AlphaFold's output projection starts at zero"
    second: dict = {}
    exec(compile(torch, "README.md: PyTorch", "exec"), second)
    assert second["update"].shape == (48, 384)
    assert second["attention"].shape == (12, 48, 48)
    assert_the_same_function(first, second)
    jax.tree.map(np.testing.assert_array_equal, second["params"], dict(first["params"]))


def test_a_proteins_frames_come_in_the_models_unit(tmp_path, monkeypatch):
    jax = pytest.importorskip("jax")
    pytest.importorskip("torch")
    pytest.importorskip("gemmi")
    monkeypatch.chdir(tmp_path)
    peptide = idealised_peptide()
    save_structure("1gcn.pdb", peptide.atom37, peptide.aatype, atom37_mask=peptide.atom37_mask)
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[2].replace("rigids = ipa_torch", "twins = ipa_torch")
    shared: dict = {}
    with jax.enable_x64(False):
        exec(compile(block, "README.md: frames", "exec"), shared)
    for rigids in (shared["rigids"], shared["twins"]):
        step = np.linalg.norm(np.diff(np.asarray(rigids.translation), axis=0), axis=-1)
        np.testing.assert_allclose(step, 0.38, rtol=0.01)


def test_representations_become_structure_files(tmp_path, monkeypatch):
    """The two blocks share weights; what they write is read again, every heavy atom of every residue."""
    jax = pytest.importorskip("jax")
    torch = pytest.importorskip("torch")
    gemmi = pytest.importorskip("gemmi")
    monkeypatch.chdir(tmp_path)
    haiku, pytorch, training = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[3:6]
    for block in (haiku, pytorch):
        lines = [line for line in block.strip().splitlines() if line and not line.startswith(("import", "from"))]
        assert len(lines) <= 10
    first: dict = {}
    with jax.enable_x64(False):
        exec(compile(haiku, "README.md: Haiku", "exec"), first)
        # Drawn anew by the PyTorch block; here the two must have the same inputs.
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
    exec(compile(training, "README.md: training", "exec"), second)
    gradients = [x.grad for x in second["structure_module"].parameters()]
    assert all(x is not None and x.isfinite().all() for x in gradients)
    assert second["losses"].loss > 0.1
    for name, block in (("prediction.pdb", first), ("prediction.cif", second)):
        assert len(gemmi.read_structure(name)[0][0]) == 48
        structure = load_structure(name)
        np.testing.assert_array_equal(structure.aatype, np.asarray(block["aatype"]))
        np.testing.assert_array_equal(structure.atom37_mask, residues.ATOM37_MASK[structure.aatype])


def test_the_transformers_are_one(tmp_path, monkeypatch):
    """The PyTorch block goes on with the Haiku block's config and parameters."""
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
    """Named by its config; without, the file's structure module comes."""
    assert 'Weights.load("params_model_1.npz", config=config).to_haiku()' in README
    config = StructureModuleConfig.alphafold2()
    Weights.random(config).save(tmp_path / "params_model_1.npz")
    found = Weights.load(tmp_path / "params_model_1.npz", config=config.ipa)
    assert found.config == config.ipa
    assert {name.split("/")[0] for name in found.to_haiku()} == {"invariant_point_attention"}
    assert Weights.load(tmp_path / "params_model_1.npz").config == config


def test_ipa_port_says_what_it_is_shown_to_say(tmp_path, monkeypatch, capsys):
    """Word for word, but for the last digits of what is measured."""
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
