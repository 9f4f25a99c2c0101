"""Files that are damaged, hostile or huge are refused or read in little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from port_cases import ALPHAFOLD, SMALL_MODULE, run

from ipa_bridge.config import StructureModuleConfig
from ipa_bridge.console import Progress
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.weights import Weights, checkpoints, files, porting
from ipa_bridge.weights.cli import main
from ipa_parity.attention.cases import ODD

pytestmark = pytest.mark.usefixtures("torch")


def test_a_pickle_is_refused_with_the_remedy(tmp_path, capsys):
    (tmp_path / "params.pkl").write_bytes(b"\x80\x04N.")
    code, _, err = run(capsys, "convert", tmp_path / "params.pkl", tmp_path / "b.npz")
    assert code == 2
    assert "pickles are never loaded" in err
    assert "numpy.savez" in err
    code, _, err = run(capsys, "inspect", tmp_path / "nothing.npz")
    assert code == 2
    assert "no such file" in err


def test_duplicate_names_are_errors(tmp_path, capsys):
    Weights.random(ODD).save(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], archive.read(archive.namelist()[0]))
    assert "occurs twice" in run(capsys, "inspect", tmp_path / "a.npz")[2]
    arrays = {"m//weights": np.ones(2), "m/weights": np.ones(2)}
    np.savez(tmp_path / "b.npz", **arrays)
    assert "'m/weights' occurs twice" in run(capsys, "inspect", tmp_path / "b.npz")[2]
    # JSON may name a key twice; the second would win.
    header = (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    )
    (tmp_path / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert run(capsys, "inspect", tmp_path / "c.safetensors")[0] == 2


def header_of(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (header_of("(1000000000000,)"), "its header implies 4000000000000 bytes, but it has 0"),
        (header_of("(-3,)"), "implies -12 bytes"),
        (header_of("(3,)") + bytes(11), "implies 12 bytes, but it has 11"),
        (header_of("(3,)", "|O") + bytes(24), "pickled objects"),
        (header_of("(3,)", "<U9") + bytes(108), "an array of real numbers was expected; got <U9"),
        (header_of("(3,)", "|S200000000"), "an array of real numbers was expected"),
        (header_of("(3,)", "<f4") + np.float32([1, np.nan, 2]).tobytes(), "missing|must have"),
    ],
)
def test_members_that_claim_too_much(tmp_path, capsys, member, message):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ipa//trainable_point_weights.npy", member)
    code, out, err = run(capsys, "inspect", path)
    assert code == 2
    assert re.search(message, out + err), out + err


def test_a_small_file_that_claims_a_large_module(tmp_path, capsys, monkeypatch):
    """The file holds zeros, compressed a thousandfold, in consistent shapes. It is refused by its size, unread."""
    path = tmp_path / "bomb.npz"
    huge = replace(ODD, num_channel=1 << 21)
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, shape in parameter_shapes(huge).items():
            module, _, leaf = f"ipa/{name}".rpartition("/")
            with archive.open(f"{module}//{leaf}.npy", "w", force_zip64=True) as member:
                member.write(header_of(str(tuple(shape))))
                left = 4 * int(np.prod(shape))
                while left:
                    left -= member.write(zeros[:left])
    assert path.stat().st_size < 20 << 20
    for limit, accepted in ((checkpoints.MAX_NUMBERS, checkpoints.MAX_NUMBERS), (1, path.stat().st_size)):
        monkeypatch.setattr(checkpoints, "MAX_NUMBERS", limit)
        code, out, err = run(capsys, "inspect", path)
        assert code == 2
        assert f"at most {accepted} numbers were expected in a module from a file of its size" in out + err


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_large_module_in_a_large_file_is_no_bomb(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(checkpoints, "MAX_NUMBERS", 10)
    weights = Weights.random(ODD)
    weights.save(tmp_path / f"a{suffix}")
    assert Weights.load(tmp_path / f"a{suffix}").config == ODD
    assert Weights.from_torch(weights.to_torch()).config == ODD


def test_an_unreadable_member_does_not_hide_other_errors(tmp_path, capsys):
    for seed, root in enumerate(("one", "two")):
        Weights.random(ODD, seed=seed).save(tmp_path / f"{root}.npz", root=root)
    with zipfile.ZipFile(tmp_path / "one.npz", "a") as archive, zipfile.ZipFile(tmp_path / "two.npz") as other:
        for name in other.namelist():
            archive.writestr(name, other.read(name))
        archive.writestr("README.txt", "hello")
    code, _, err = run(capsys, "convert", tmp_path / "one.npz", tmp_path / "x.pt")
    assert code == 2
    assert "2 invariant point attentions" in err
    assert "'README.txt'" in err


def test_values_that_are_not_finite_numbers_are_named(tmp_path, capsys):
    arrays = {
        f"ipa//{name}" if "/" not in name else f"ipa/{name.replace('/', '//')}": x
        for name, x in Weights.random(ODD).arrays.items()
    }
    arrays["ipa/q_scalar//bias"] = np.full_like(arrays["ipa/q_scalar//bias"], np.inf)
    arrays["ipa/kv_scalar//bias"] = np.zeros(arrays["ipa/kv_scalar//bias"].shape, np.int32)
    np.savez(tmp_path / "a.npz", **arrays)
    code, _, err = run(capsys, "convert", tmp_path / "a.npz", tmp_path / "b.pt")
    assert code == 2
    assert "q_scalar/bias holds NaN or infinity" in err
    assert "kv_scalar/bias must be floating-point, got int32" in err


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_mutated_files_are_converted_or_refused(tmp_path, capsys, suffix):
    """With bytes flipped, dropped or doubled, the command gives a clean error or a complete file."""
    source, destination = tmp_path / f"a{suffix}", tmp_path / "b.safetensors"
    Weights.random(ODD).save(source)
    whole, rng = source.read_bytes(), np.random.default_rng(1)
    codes = []
    for _ in range(80):
        damaged = bytearray(whole)
        start, length = rng.integers(0, len(whole)), int(rng.integers(1, 64))
        # Readers mostly need the headers, which are at either end of the file.
        start = [start, start % 512, len(whole) - 1 - start % 2048][int(rng.integers(3))]
        match int(rng.integers(4)):
            case 0:
                damaged[start] ^= int(rng.integers(1, 256))
            case 1:
                del damaged[start : start + length]
            case 2:
                damaged[start:start] = damaged[start : start + length]
            case 3:
                damaged[start : start + length] = rng.integers(0, 256, length, np.uint8).tobytes()
        source.write_bytes(damaged)
        code, _, err = run(capsys, "convert", source, destination)
        codes.append(code)
        assert code in (0, 2)
        assert code == 0 or (err.startswith("ipa-port convert: ") and "Traceback" not in err)
        assert destination.exists() == (code == 0)
        destination.unlink(missing_ok=True)
        assert [x.name for x in tmp_path.iterdir()] == [source.name]
    assert codes.count(2) > 20


FULL_SIZE = """
import resource, sys
import numpy, safetensors
if not sys.argv[1].endswith(".npz") or not sys.argv[2].endswith(".npz"):
    import torch
from ipa_bridge.weights.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = main(["convert", sys.argv[1], sys.argv[2], "--to", sys.argv[3]])
print(code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    ("suffix", "target"), [(".npz", "openfold"), (".safetensors", "alphafold"), (".pt", "alphafold")]
)
def test_a_whole_model_takes_little_memory(tmp_path, suffix, target, torch):
    """Converting the 8 MB structure module of a 400 MB file takes under 300 MB of memory beyond the imports."""
    weights = Weights.random(StructureModuleConfig.alphafold2())
    source = tmp_path / f"whole{suffix}"
    other = {f"evoformer/block_{i}//weights": np.ones((25, 1000, 1000), np.float32) for i in range(4)}
    if suffix == ".npz":
        tree = weights.to_haiku(root=f"{ALPHAFOLD}/structure_module")
        own = {f"{module}//{leaf}": x for module, leaves in tree.items() for leaf, x in leaves.items()}
    else:
        own = {
            name: x.numpy() for name, x in weights.to_torch(dialect="openfold", root="model.structure_module").items()
        }
        other = {name.replace("//", "/").replace("/", "."): x for name, x in other.items()}
    files.write_arrays(source, {**other, **own})
    assert source.stat().st_size > 350 << 20
    result = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, source, tmp_path / "out.npz", target],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    code, extra = map(int, result.stdout.splitlines()[-1].split())
    assert code == 0
    assert extra < 300
    again = Weights.load(tmp_path / "out.npz", **({"dialect": target} if target == "openfold" else {}))
    assert all(again.arrays[name].tobytes() == x.tobytes() for name, x in weights.arrays.items())


@pytest.mark.parametrize(
    "config",
    [
        "[" * 200_000,
        json.dumps({"norm_epsilon": 10**400}),
        '{"ipa": {}, "tied_layers": false, "num_layer": 200000000}',
        '{"block": {"num_layer_in_transition": 99999}}',
        '{"block": 3}',
        "3",
        "[]",
        "null",
        '{"ipa": 1}',
    ],
)
def test_metadata_is_not_believed(tmp_path, capsys, config):
    weights = Weights.random(ODD)
    files.write_arrays(tmp_path / "a.safetensors", weights.arrays, {"ipa_config": config})
    code, _, err = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert code == 2
    assert "its ipa_config metadata is not a config" in err


def test_a_checkpoint_that_multiplies(tmp_path, capsys, torch):
    """Nested dictionaries, each used twice: one kilobyte would expand to four million names."""
    nested = {"x": torch.ones(1)}
    for _ in range(22):
        nested = {"a": nested, "b": nested}
    torch.save(nested, tmp_path / "laughs.pt")
    with files.open_arrays(tmp_path / "laughs.pt") as file:
        assert len(file.keys) == 1
        assert len(file.ignored) == 22


def test_tensors_without_plain_memory(tmp_path, capsys, torch):
    good = Weights.random(ODD).to_torch()
    bad = {
        "expanded": torch.zeros(1).expand(good["q_scalar.weight"].shape),
        "sparse": good["q_scalar.weight"].to_sparse(),
        "meta": good["q_scalar.weight"].to("meta"),
    }
    for name, tensor in bad.items():
        torch.save(good | {"q_scalar.weight": tensor}, tmp_path / "a.pt")
        code, _, err = run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.npz")
        assert code == 2, name
        assert "q_scalar.weight" in err, name
        if name != "expanded":
            with pytest.raises(ValueError, match=r"q_scalar\.weight is not a plain tensor"):
                Weights.from_torch(good | {"q_scalar.weight": tensor})
    with pytest.raises(ValueError, match=r"names were expected, .*got 3"):
        Weights.from_torch({**good, 3: torch.ones(1)})
    torch.save({"state_dict": good, 3: torch.ones(1), "optimizer": [torch.ones(1)]}, tmp_path / "last.ckpt")
    code, out, _ = run(capsys, "convert", tmp_path / "last.ckpt", tmp_path / "c.npz")
    assert code == 0
    assert "they are not arrays with names: 3, optimizer" in out


def test_errors_elsewhere_in_a_file_do_not_matter(alphafold, tmp_path, capsys):
    with zipfile.ZipFile(alphafold, "a") as archive:
        archive.writestr("README.txt", "hello")
        archive.writestr("other//objects.npy", header_of("(3,)", "|O") + bytes(24))
    assert run(capsys, "convert", alphafold, tmp_path / "b.pt")[0] == 0


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_other_bytes_of_the_same_numbers(tmp_path, capsys, suffix):
    arrays = Weights.random(ODD).arrays
    tree = {f"ipa//{name}" if "/" not in name else f"ipa/{name.replace('/', '//')}": x for name, x in arrays.items()}
    np.savez(tmp_path / "big.npz", **{name: x.astype(">f4") for name, x in tree.items()})
    assert run(capsys, "convert", tmp_path / "big.npz", tmp_path / f"b{suffix}")[0] == 0
    assert Weights.load(tmp_path / f"b{suffix}").arrays["q_scalar/bias"].tolist() == arrays["q_scalar/bias"].tolist()
    np.savez(tmp_path / "long.npz", **{name: x.astype(np.longdouble) for name, x in tree.items()})
    code, _, err = run(capsys, "convert", tmp_path / "long.npz", tmp_path / f"c{suffix}")
    assert code == 2
    assert "must be floating-point, got" in err


def test_files_are_ported_and_looked_into_without_the_command_line(tmp_path):
    weights = Weights.random(SMALL_MODULE)
    weights.save(tmp_path / "a.npz")
    report = porting.convert(tmp_path / "a.npz", tmp_path / "b.pt", dialect="openfold", verified=True)
    assert report.written
    assert report.verified == porting.verify(weights, "openfold")
    assert report.verified.eps < 10
    comparison = porting.compare(tmp_path / "a.npz", tmp_path / "b.pt")
    assert comparison.same
    assert len(comparison.parameters) == report.converted == len(weights.arrays)
    contents = porting.inspect(tmp_path / "b.pt").contents
    assert contents.dialect == "openfold"
    assert contents.config == SMALL_MODULE
    with pytest.raises(ValueError, match="exists, and is not to be replaced"):
        porting.convert(tmp_path / "a.npz", tmp_path / "b.pt")


def test_progress_is_drawn_on_terminals_only_and_late(capsys, monkeypatch):
    progress = Progress(delay=1)
    progress.bar("reading x", 1, 10)
    progress.clear()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress.started -= 2
    progress.bar("reading x", 5, 10)
    progress.clear()
    assert "reading x ███████████████░░░░░░░░░░░░░░░ 5/10" in capsys.readouterr().err


def test_the_command_is_installed_and_helps(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    assert "--allow-lossy" in capsys.readouterr().out
