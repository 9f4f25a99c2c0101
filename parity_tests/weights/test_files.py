"""Files are read lazily, never unpickled, and replaced completely or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest

from ipa_bridge.weights import Weights, files
from ipa_bridge.weights.files import open_arrays, write_arrays
from ipa_parity.attention.cases import ODD

SUFFIXES = (".npz", ".safetensors", ".pt")
ARRAYS = {"a//b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.ones((), np.float64)}


@pytest.fixture(autouse=True)
def torch():
    return pytest.importorskip("torch")


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_first_then_the_arrays_asked_for(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    write_arrays(path, ARRAYS, {"note": "hello"})
    with open_arrays(path) as file:
        assert set(file.keys) == set(ARRAYS)
        assert file.metadata == ({"note": "hello"} if suffix == ".safetensors" else {})
        for name, x in ARRAYS.items():
            assert (file[name].dtype, file[name].shape, file[name].tobytes()) == (x.dtype, x.shape, x.tobytes())


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".pkl"])
def test_pickles_are_refused_and_nothing_runs(suffix, tmp_path, torch):
    marker, path = tmp_path / "exploded", tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, x=np.array([Bomb(marker)], dtype=object))
    elif suffix == ".pt":
        torch.save({"x": Bomb(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"x": Bomb(marker)}))
    with pytest.raises(ValueError, match=r"never loaded"), open_arrays(path) as file:
        file["x"]
    assert not marker.exists()


def test_a_pickle_named_as_an_array_file_is_refused(tmp_path):
    for suffix in SUFFIXES:
        path = tmp_path / f"x{suffix}"
        path.write_bytes(pickle.dumps({"x": Bomb(tmp_path / "exploded")}))
        with pytest.raises(ValueError, match="cannot read file"), open_arrays(path) as file:
            file["x"]
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kept", [0, 1, 10, 100, 1000, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cut_files_are_plain_errors(suffix, kept, tmp_path):
    path = tmp_path / f"x{suffix}"
    Weights.random(ODD).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"x{suffix}"):
        Weights.load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bytes_are_read_or_refused_plainly(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    Weights.random(ODD).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 3):
            damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            Weights.load(path)


def test_contents_that_a_pt_file_must_have(tmp_path, torch):
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="it holds a list"), open_arrays(tmp_path / "list.pt"):
        pass
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"it holds no tensors, but epoch: save a state dict"):
        Weights.load(tmp_path / "checkpoint.pt")
    torch.save({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"'a\.b' occurs twice"):
        Weights.load(tmp_path / "twice.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_is_called_damaged(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_text("hello there, everyone")
    with pytest.raises(ValueError, match=rf"x\{suffix}: cannot read file: it may be damaged"):
        Weights.load(path)


def test_members_that_are_no_arrays(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ipa//trainable_point_weights", b"raw bytes")
    with pytest.raises(
        ValueError, match=r"x\.npz: cannot read array 'ipa//trainable_point_weights': it is not an \.npy"
    ):
        Weights.load(path)


def test_names_that_are_no_array_files(tmp_path):
    for suffix in SUFFIXES:
        with pytest.raises(FileNotFoundError, match=f"no such file: .*nothing{suffix}"):
            Weights.load(tmp_path / f"nothing{suffix}")
        (tmp_path / f"empty{suffix}").touch()
        with pytest.raises(ValueError, match=f"empty{suffix} is empty"):
            Weights.load(tmp_path / f"empty{suffix}")
    with pytest.raises(ValueError, match=r"expected a name ending in \.npz"):
        Weights.random(ODD).save(tmp_path / "weights.h5")
    np.save(tmp_path / "bare.npy", np.ones(3))
    (tmp_path / "bare.npy").rename(tmp_path / "bare.npz")
    with pytest.raises(ValueError, match="one bare array"):
        Weights.load(tmp_path / "bare.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failing_write_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"x{suffix}"
    Weights.random(ODD).save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Weights.random(ODD, seed=9).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_written_files_replace_and_have_ordinary_permissions(suffix, tmp_path):
    path, plain = tmp_path / f"x{suffix}", tmp_path / "plain"
    plain.write_text("")
    path.write_text("old")
    Weights.random(ODD).save(path)
    assert Weights.load(path).config == ODD
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_folder_is_named(suffix, tmp_path):
    path = tmp_path / "nowhere" / f"x{suffix}"
    with pytest.raises(FileNotFoundError, match=rf"x\{suffix}: no such folder: .*nowhere$"):
        Weights.random(ODD).save(path)
