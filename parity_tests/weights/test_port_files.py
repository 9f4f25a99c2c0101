"""ipa-port never damages files: existing ones, links, full disks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from port_cases import ONE_WIDTH, run

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.weights import Weights, files, porting
from ipa_parity.attention.cases import ODD

pytestmark = pytest.mark.usefixtures("torch")


def test_existing_files_are_replaced_only_with_force(tmp_path, capsys):
    source, destination = tmp_path / "a.npz", tmp_path / "b.pt"
    Weights.random(ODD).save(source)
    destination.write_text("precious")
    code, _, err = run(capsys, "convert", source, destination)
    assert code == 2
    assert "exists, and is not to be replaced; --force replaces an ordinary file" in err
    assert destination.read_text() == "precious"
    assert run(capsys, "convert", source, destination, "--force")[0] == 0
    assert Weights.load(destination).config == ODD
    for case, message in {
        source: "is the source itself",
        tmp_path: "expected a name ending in",
        tmp_path / "nowhere" / "b.pt": "there is no directory",
        tmp_path / "b.h5": "expected a name ending in",
    }.items():
        code, _, err = run(capsys, "convert", source, case, "--force")
        assert code == 2, case
        assert message in err, case
        with pytest.raises(ValueError, match=message):
            porting.convert(source, case, replace=True)
    assert Weights.load(source).config == ODD


def test_links_are_not_followed(tmp_path, capsys):
    source, precious, link = tmp_path / "a.npz", tmp_path / "precious.pt", tmp_path / "link.pt"
    Weights.random(ODD).save(source)
    precious.write_text("precious")
    link.symlink_to(precious)
    code, _, err = run(capsys, "convert", source, link, "--force")
    assert code == 2
    assert "is a symbolic link" in err
    assert precious.read_text() == "precious"
    assert link.is_symlink()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_full_disk_leaves_the_old_file(tmp_path, capsys, monkeypatch, suffix):
    source, destination = tmp_path / "a.npz", tmp_path / f"b{suffix}"
    Weights.random(ODD).save(source)
    destination.write_text("precious")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    code, _, err = run(capsys, "convert", source, destination, "--force")
    assert code == 2
    assert "No space left on device" in err
    assert destination.read_text() == "precious"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.npz", f"b{suffix}"]


def test_a_file_created_meanwhile_is_left_alone(tmp_path, capsys, monkeypatch):
    source, destination = tmp_path / "a.npz", tmp_path / "b.pt"
    Weights.random(ODD).save(source)
    real = files.os.fsync

    def slow(descriptor):
        destination.write_text("precious")
        return real(descriptor)

    monkeypatch.setattr(files.os, "fsync", slow)  # the last moment before the file takes its place
    code, _, err = run(capsys, "convert", source, destination)
    assert (code, destination.read_text()) == (2, "precious")
    assert "is not to be replaced" in err


def test_saving_refuses_links_and_pipes(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link.npz").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "pipe.npz")
    for name, message in {"link.npz": "is a symbolic link", "pipe.npz": "must be an ordinary file"}.items():
        with pytest.raises(ValueError, match=message):
            Weights.random(ODD).save(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_disk_that_fills_midway(tmp_path):
    """A real limit on file sizes is hit while the parameters are written."""
    Weights.random(StructureModuleConfig.alphafold2()).save(tmp_path / "a.npz")
    (tmp_path / "b.pt").write_text("precious")
    script = (
        "import resource, signal, sys, torch\nfrom ipa_bridge.weights.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "sys.exit(main(['convert', 'a.npz', 'b.pt', '--force']))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "b.pt").read_text() == "precious"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.npz", "b.pt"]


def test_the_path_in_the_destination(tmp_path, capsys):
    source = tmp_path / "a.npz"
    Weights.random(ONE_WIDTH).save(source)
    to = ("--to", "esmfold", "--force", "--to-root")
    assert run(capsys, "convert", source, tmp_path / "b.pt", *to, "trunk.structure_module.ipa.")[0] == 0
    assert not Weights.load(tmp_path / "b.pt").assumed  # the path identifies the system
    code, _, err = run(capsys, "convert", source, tmp_path / "b.pt", *to, "trunk..ipa")
    assert code == 2
    assert "must be names with '.' between them" in err
