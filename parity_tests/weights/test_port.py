"""The command `ipa-port`: what it says, what it refuses, and that nothing is lost when something goes wrong."""

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

from ipa_bridge.config import IPABlockConfig, IPATransformerConfig, PredictedLDDTConfig, StructureModuleConfig
from ipa_bridge.console import Progress
from ipa_bridge.kinds import parameter_shapes
from ipa_bridge.weights import Weights, checkpoints, files, porting
from ipa_bridge.weights.cli import main
from ipa_parity.attention.cases import ODD, ODD_DOWN_Z, ODD_MULTIMER, ODD_NO_BIAS

ONE_WIDTH = replace(ODD, num_scalar_v=ODD.num_scalar_qk)
SMALL_MODULE = StructureModuleConfig(ipa=ONE_WIDTH, sidechain_channel=5)
ALPHAFOLD = "alphafold/alphafold_iteration"


@pytest.fixture(autouse=True)
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def alphafold(tmp_path):
    """A file such as AlphaFold's: a structure module, a confidence head and other parts."""
    parts = {
        f"{ALPHAFOLD}/structure_module": Weights.random(SMALL_MODULE),
        f"{ALPHAFOLD}/predicted_lddt_head": Weights.random(PredictedLDDTConfig(num_channel=11)),
    }
    arrays = {
        f"{module}//{leaf}": x
        for root, weights in parts.items()
        for module, leaves in weights.to_haiku(root=root).items()
        for leaf, x in leaves.items()
    }
    arrays |= {f"{ALPHAFOLD}/evoformer/{name}//weights": np.ones((2, 2)) for name in ("a", "b")}
    path = tmp_path / "params.npz"
    np.savez(path, **arrays)
    return path


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(x) for x in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_there_and_back_through_openfold(alphafold, tmp_path, capsys):
    there, back = tmp_path / "openfold.pt", tmp_path / "back.npz"
    code, out, _ = run(capsys, "convert", alphafold, there, "--to", "openfold", "--verify")
    assert code == 0
    assert f"AlphaFold's structure module at {ALPHAFOLD}/structure_module" in out
    assert "OpenFold 2's, 45 parameters" in out
    assert (
        f"belong to other parts of the model: 10 arrays: {ALPHAFOLD}/evoformer (2), {ALPHAFOLD}/predicted_lddt" in out
    )
    assert "the same function" in out
    code, out, _ = run(
        capsys, "convert", there, back, "--to", "alphafold", "--to-root", f"{ALPHAFOLD}/structure_module"
    )
    assert code == 0
    with np.load(alphafold) as before, np.load(back) as after:
        assert set(after.files) == {name for name in before.files if "structure_module" in name}
        assert all(after[name].tobytes() == before[name].tobytes() for name in after.files)
    code, out, _ = run(capsys, "compare", alphafold, there)
    assert (code, out.splitlines()[-1]) == (0, "the same function: 45 parameters, number for number")


def test_json_says_all_of_it(alphafold, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", alphafold, tmp_path / "e.pt", "--to", "esmfold", "--verify", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["source"] == {
        "file": str(alphafold),
        "dialect": "alphafold",
        "root": f"{ALPHAFOLD}/structure_module",
    }
    assert report["converted"] + sum(report["elsewhere"].values()) == len(np.load(alphafold).files)
    assert (report["notes"], report["assumed"], report["added"]) == ([], [], [])
    assert (report["losses"], report["verified"]["passed"]) == ([], True)
    assert report["verified"]["eps"] < 100
    code, out, _ = run(capsys, "inspect", alphafold, "--json")
    report = json.loads(out)
    assert (code, report["dialect"], report["module"]) == (0, "alphafold", "structure module")
    assert report["config"]["ipa"]["num_head"] == ODD.num_head
    assert len(report["parameters"]) == 45
    first = report["parameters"][0]
    expected = np.linalg.norm(np.load(alphafold)[f"{ALPHAFOLD}/structure_module/single_layer_norm//scale"])
    assert (first["name"], first["dtype"]) == ("single_layer_norm/scale", "float32")
    assert first["norm"] == pytest.approx(expected, rel=1e-6)
    assert {x["module"] for x in report["modules"]} == {
        "structure module",
        "invariant point attention",
        "confidence head",
    }


def test_inspect_says_what_is_there(alphafold, tmp_path, capsys, torch):
    code, out, _ = run(capsys, "inspect", alphafold)
    assert code == 0
    for line in ("AlphaFold's structure module at", "num_layer = 8", f"  {ALPHAFOLD}/evoformer: 2 arrays"):
        assert line in out
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "ipa.pt")
    code, out, _ = run(capsys, "inspect", tmp_path / "ipa.pt")
    assert code == 0
    assert "invariant point attention at state_dict: openfold_v1 or esmfold" in out
    assert "  norm_epsilon = 1e-08 (assumed)" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "ipa.pt", "--dialect", "esmfold")
    assert code == 0
    assert "(assumed)" not in out
    assert "no arrays by name: epoch" in out
    assert "linear_kv_points.weight" in out
    Weights.random(ODD_NO_BIAS).save(tmp_path / "ours.npz")
    assert "IPA Twins in Haiku's invariant point attention" in run(capsys, "inspect", tmp_path / "ours.npz")[1]


def test_losses_are_allowed_by_name_or_refused(tmp_path, capsys):
    source, destination = tmp_path / "m.safetensors", tmp_path / "l.pt"
    Weights.random(ODD_MULTIMER).save(source)
    code, out, err = run(capsys, "convert", source, destination, "--to", "lucidrains")
    assert (code, out, destination.exists()) == (2, "", False)
    assert "--allow-lossy point_bias,norm" in err
    code, out, _ = run(
        capsys, "convert", source, destination, "--to", "lucidrains", "--allow-lossy", "point_bias,norm", "--verify"
    )
    assert code == 0
    assert "lost, as allowed: point_bias: it has none of the biases of the point projections" in out
    assert "its `rotations` are the transpose of ours" in out
    assert "the same function as the file's names mean" in out
    assert "what was lost or rounded changes outputs by" in out
    code, out, _ = run(capsys, "compare", source, destination)
    assert code == 1
    assert "norm_form differs: 'clamp' and 'add'" in out
    assert "q_point_local/bias differs by" in out


def test_down_z_can_be_merged(tmp_path, capsys):
    config = replace(ODD_DOWN_Z, num_scalar_v=ODD.num_scalar_qk, pair_channel=8, pair_value_channel=2)
    source = tmp_path / "f.pt"
    torch = pytest.importorskip("torch")
    torch.save(
        {
            f"trunk.ipa_{b}.{name}": x
            for b in range(2)
            for name, x in Weights.random(config, seed=b).to_torch(dialect="framediff").items()
        },
        source,
    )
    assert "2 invariant point attentions" in run(capsys, "convert", source, tmp_path / "o.npz")[2]
    choice = ("--root", "trunk.ipa_1", "--to", "openfold", "--allow-lossy", "down_z", "--verify", "--json")
    code, out, _ = run(capsys, "convert", source, tmp_path / "o.pt", *choice)
    report = json.loads(out)
    assert (code, report["verified"]["passed"]) == (0, True)
    assert sum(report["elsewhere"].values()) == len(Weights.random(config).to_torch(dialect="framediff"))
    ignored = "linear_rbf.weight, linear_rbf.bias at trunk.ipa_1: ignored, since FrameDiff never reads them"
    assert (report["notes"][0], report["added"]) == (ignored, [])
    _, out, _ = run(capsys, "inspect", source, "--root", "trunk.ipa_1")
    assert f"mind: {ignored}" in out
    Weights.random(config).save(tmp_path / "ours.safetensors")
    code, out, _ = run(capsys, "convert", tmp_path / "ours.safetensors", tmp_path / "g.pt", "--to", "framediff")
    assert (code, "and zeros, which FrameDiff never reads: linear_rbf.weight, linear_rbf.bias" in out) == (0, True)


def test_dtype_rounds_and_verify_says_how_much(tmp_path, capsys):
    Weights.random(ODD).save(tmp_path / "a.npz")
    code, out, _ = run(
        capsys, "convert", tmp_path / "a.npz", tmp_path / "b.safetensors", "--dtype", "bfloat16", "--verify", "--json"
    )
    verified = json.loads(out)["verified"]
    assert (code, verified["passed"]) == (0, True)
    assert 1e-4 < verified["change"] < 0.1
    assert Weights.load(tmp_path / "b.safetensors").arrays["q_scalar/weights"].dtype.name == "bfloat16"
    code, _, err = run(capsys, "convert", tmp_path / "b.safetensors", tmp_path / "c.npz")
    assert code == 2
    assert "cast to float32" in err


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"], ["--to", "openfold", "--allow-lossy", "down_z"]])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_conversion_that_does_not_hold_writes_nothing(tmp_path, capsys, monkeypatch, options, zeros):
    """Neither half precision nor an allowed loss hides it, nor an output projection that has not been trained."""
    config = replace(ODD_DOWN_Z, num_scalar_v=ODD.num_scalar_qk, position_scale=1.0)
    weights = Weights.random(config)
    if zeros:
        untrained = {name: 0 * x if name.startswith("output_") else x for name, x in weights.arrays.items()}
        weights = replace(weights, arrays=untrained)
    weights.save(tmp_path / "a.safetensors")
    real = porting.in_dialect

    def damaged(*of):
        arrays = real(*of)
        return {
            x: y[::-1].copy() if x.endswith(("q_scalar.weight", "linear_q.weight")) else y for x, y in arrays.items()
        }

    assert run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.bin", "--verify", *options)[0] == 0
    monkeypatch.setattr(porting, "in_dialect", damaged)
    code, out, _ = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "c.pt", "--verify", *options)
    assert code == 1
    assert "NOT THE SAME FUNCTION" in out
    assert "nothing was written" in out
    assert not (tmp_path / "c.pt").exists()


def test_what_overflows_is_not_called_verified(tmp_path, capsys):
    weights = Weights.random(ODD, dtype=np.float64)
    replace(weights, arrays={name: x * 1e200 for name, x in weights.arrays.items()}).save(tmp_path / "a.npz")
    with np.errstate(all="ignore"):
        code, out, _ = run(capsys, "convert", tmp_path / "a.npz", tmp_path / "b.pt", "--verify")
    assert code == 1
    assert "NOTHING CAN BE SAID" in out


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_what_the_default_target_cannot_say_is_told(tmp_path, capsys, suffix):
    """A conversion is followed by a comparison that finds nothing, or by a word of what to tell the reader."""
    source, destination = tmp_path / "esm.pt", tmp_path / f"ours{suffix}"
    config = IPATransformerConfig.lucidrains(6, depth=1, heads=2, original_composition_order=True)
    torch = pytest.importorskip("torch")
    torch.save(Weights.random(config).to_torch(dialect="lucidrains"), source)
    code, out, _ = run(capsys, "convert", source, destination)
    assert code == 0
    same = run(capsys, "compare", source, destination)[0] == 0
    assert same == (suffix == ".safetensors")
    assert same or "cannot say that original_composition_order is True, not False" in out


def test_what_is_assumed_is_shown_and_said(tmp_path, capsys, torch):
    """A file of .pt carries no config, so that post_norm of a block is a guess; .safetensors marks it."""
    source, marked, told = (tmp_path / f"{x}" for x in ("a.pt", "b.safetensors", "c.safetensors"))
    config = IPABlockConfig(ipa=ODD_NO_BIAS)
    torch.save(Weights.random(config).to_torch(), source)
    Weights.random(config).save(told)
    code, out, _ = run(capsys, "convert", source, marked)
    assert code == 0
    assert "mind: assumed, for neither names nor shapes tell: " in out
    assert "post_norm=True; where these weights are read, pass what holds, as config=IPABlockConfig(" in out
    for path in (source, marked):
        code, out, _ = run(capsys, "inspect", path)
        lines = out.splitlines()
        assert code == 0
        assert "  post_norm = True (assumed)" in lines
        assert "  ipa.num_head = 3" in lines
        report = json.loads(run(capsys, "inspect", path, "--json")[1])
        assert {"post_norm", "ipa.norm_epsilon", "ipa.norm_form", "ipa.position_scale"} <= set(report["assumed"])
        assert "ipa.num_head" not in report["assumed"]
    assert "(assumed)" not in run(capsys, "inspect", told)[1]
    report = json.loads(run(capsys, "convert", source, marked, "--force", "--json")[1])
    assert set(report["assumed"]) == set(Weights.load(marked).assumed)


def test_modules_beside_an_attentions_own_are_left(tmp_path, capsys, torch):
    state = Weights.random(ONE_WIDTH).to_torch(dialect="openfold_v1", root="layers.0")
    torch.save(state | {"layers.0.norm.0.weight": torch.ones(3)}, tmp_path / "l.pt")
    code, out, _ = run(capsys, "convert", tmp_path / "l.pt", tmp_path / "ours.npz")
    assert code == 0
    assert "mind: norm at layers.0, beside the parameters of the attention: left, as other parts of the model" in out
    assert "left, for they belong to other parts of the model: 1 arrays: layers.0.norm (1)" in out


def test_metadata_reaches_the_module_within(tmp_path, capsys):
    config = replace(SMALL_MODULE, ipa=replace(ONE_WIDTH, norm_epsilon=1e-5))
    Weights.random(config).save(tmp_path / "a.safetensors")
    within = "fold_iteration.invariant_point_attention"
    assert Weights.load(tmp_path / "a.safetensors", root=within).config.norm_epsilon == 1e-5


# --- Destinations


def test_what_exists_is_replaced_by_force_only(tmp_path, capsys):
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


def test_what_comes_to_be_meanwhile_is_left_alone(tmp_path, capsys, monkeypatch):
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
    for name, message in {"link.npz": "is a symbolic link", "pipe.npz": "is no ordinary file"}.items():
        with pytest.raises(ValueError, match=message):
            Weights.random(ODD).save(tmp_path / name)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_disk_that_fills_midway(tmp_path):
    """For real: a limit on the size of files, met while the parameters are written."""
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
    assert not Weights.load(tmp_path / "b.pt").assumed  # the path tells whose it is
    code, _, err = run(capsys, "convert", source, tmp_path / "b.pt", *to, "trunk..ipa")
    assert code == 2
    assert "must be names with '.' between them" in err


# --- Sources


def test_a_pickle_is_refused_with_the_way_out(tmp_path, capsys):
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
    assert "is there twice" in run(capsys, "inspect", tmp_path / "a.npz")[2]
    arrays = {"m//weights": np.ones(2), "m/weights": np.ones(2)}
    np.savez(tmp_path / "b.npz", **arrays)
    assert "'m/weights' is there twice" in run(capsys, "inspect", tmp_path / "b.npz")[2]
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
        (header_of("(1000000000000,)"), "its header asks for 4000000000000 bytes where there are 0"),
        (header_of("(-3,)"), "asks for -12 bytes"),
        (header_of("(3,)") + bytes(11), "asks for 12 bytes where there are 11"),
        (header_of("(3,)", "|O") + bytes(24), "pickled objects"),
        (header_of("(3,)", "<U9") + bytes(108), "it holds no real numbers, but <U9"),
        (header_of("(3,)", "|S200000000"), "it holds no real numbers"),
        (header_of("(3,)", "<f4") + np.float32([1, np.nan, 2]).tobytes(), "missing|without"),
    ],
)
def test_members_that_claim_too_much(tmp_path, capsys, member, message):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ipa//trainable_point_weights.npy", member)
    code, out, err = run(capsys, "inspect", path)
    assert code == 2
    assert re.search(message, out + err), out + err


def test_a_small_file_that_claims_a_large_module(tmp_path, capsys):
    """A bomb of zeros: consistent shapes, a thousandfold compressed. It is refused by its size, unread."""
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
    code, out, err = run(capsys, "inspect", path)
    assert code == 2
    assert "numbers are more than the" in out + err


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_large_module_in_a_large_file_is_no_bomb(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(checkpoints, "MAX_NUMBERS", 10)
    weights = Weights.random(ODD)
    weights.save(tmp_path / f"a{suffix}")
    assert Weights.load(tmp_path / f"a{suffix}").config == ODD
    assert Weights.from_torch(weights.to_torch()).config == ODD


def test_what_cannot_be_read_does_not_hide_what_is_wrong(tmp_path, capsys):
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


def test_what_is_not_finite_or_no_number_is_named(tmp_path, capsys):
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
    """Bytes flipped, dropped, doubled: a clean error or a file, nothing else, and never half of one."""
    source, destination = tmp_path / f"a{suffix}", tmp_path / "b.safetensors"
    Weights.random(ODD).save(source)
    whole, rng = source.read_bytes(), np.random.default_rng(1)
    codes = []
    for _ in range(80):
        damaged = bytearray(whole)
        start, length = rng.integers(0, len(whole)), int(rng.integers(1, 64))
        # Most of what matters to a reader is in the headers, at either end.
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
    """400 MB of parameters, of which the structure module is 8: less than 300 MB more than its imports."""
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
    assert "its ipa_config metadata is no config" in err


def test_a_checkpoint_that_multiplies(tmp_path, capsys, torch):
    """Dictionaries within dictionaries, each twice: a kilobyte that would be four million names."""
    nested = {"x": torch.ones(1)}
    for _ in range(22):
        nested = {"a": nested, "b": nested}
    torch.save(nested, tmp_path / "laughs.pt")
    with files.open_arrays(tmp_path / "laughs.pt") as file:
        assert len(file.keys) == 1
        assert len(file.ignored) == 22


def test_tensors_that_are_none(tmp_path, capsys, torch):
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
            with pytest.raises(ValueError, match=r"q_scalar\.weight is no plain tensor"):
                Weights.from_torch(good | {"q_scalar.weight": tensor})
    with pytest.raises(ValueError, match=r"names were expected, .*got 3"):
        Weights.from_torch({**good, 3: torch.ones(1)})
    torch.save({"state_dict": good, 3: torch.ones(1), "optimizer": [torch.ones(1)]}, tmp_path / "last.ckpt")
    code, out, _ = run(capsys, "convert", tmp_path / "last.ckpt", tmp_path / "c.npz")
    assert code == 0
    assert "no arrays by name: 3, optimizer" in out


def test_what_is_wrong_elsewhere_is_no_hindrance(alphafold, tmp_path, capsys):
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
