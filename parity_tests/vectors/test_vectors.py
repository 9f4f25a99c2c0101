"""Test vectors: what is written comes back, a program in C is judged by them, and wrong folders are refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ipa_bridge.weights.files import write_arrays
from ipa_parity.attention.cases import ODD, ODD_MULTIMER, ODD_NO_PAIR, ODD_PAIR_VALUES
from ipa_parity.checking.probes import make_probes
from ipa_parity.cli import main
from ipa_parity.vectors import judge_outputs, write_vectors
from ipa_parity.vectors.folders import SUFFIXES, open_vectors, read_arrays, within

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples" / "vectors" / "ipa.c"
PAGE = (ROOT / "docs" / "vectors.md").read_text("utf-8")


@pytest.fixture(scope="module", autouse=True)
def needs_torch():
    pytest.importorskip("torch")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Vectors of the monomer layout."""
    folder = tmp_path_factory.mktemp("monomer") / "vectors"
    write_vectors(folder, ODD, seed=3)
    return folder


def files(vectors, suffix=".safetensors"):
    return sorted(vectors.glob(f"*{suffix}"))


def answer(vectors, outputs, suffix=".safetensors", **changes):
    """Writes the expected results as if a program had computed them; `changes` replace arrays."""
    outputs.mkdir()
    for path in files(vectors, suffix):
        write_arrays(outputs / path.name, within(read_arrays(path), "expected") | changes)
    return outputs


def run_c(vectors, folder, *changes):
    """Outputs of the example in C, with parts of its source replaced."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler named cc")
    text = SOURCE.read_text("utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "ipa.c").write_text(text, "utf-8")
    flags = ["-std=c99", "-pedantic-errors", "-O2"]
    subprocess.run([compiler, *flags, "-o", folder / "ipa", folder / "ipa.c", "-lm"], check=True)
    (folder / "mine").mkdir()
    for path in files(vectors):
        subprocess.run([folder / "ipa", path, folder / "mine" / path.name], check=True)
    return folder / "mine"


def test_a_program_in_c_is_right(vectors, tmp_path, capsys):
    outputs = run_c(vectors, tmp_path)
    assert main(["check", "--outputs", str(outputs), "--vectors", str(vectors), "--quiet"]) == 0
    assert "mine is right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("return rotation[3 * row + column];", "return rotation[3 * column + row];", "rotations transposed"),
        ("if (!mask[first + j])", "if (mask[first + j])", "mask"),
        ("sqrt(1.0 / 3) * (dot", "(dot", "√(1/3) missing from all logits"),
    ],
)
def test_a_mistake_in_c_is_named(vectors, tmp_path, old, new, name):
    report = judge_outputs(run_c(vectors, tmp_path, (old, new)), vectors)
    assert report.verdict == "wrong"
    assert report.diagnosis.kind == "mistake"
    assert any(name in x.name for x in report.diagnosis.mistakes[0]), str(report)


def test_the_pages_mistake_gives_what_the_page_says(vectors, tmp_path):
    old, new = (re.search(rf"^\{sign} +(.*)$", PAGE, re.MULTILINE)[1] for sign in "-+")
    report = judge_outputs(run_c(vectors, tmp_path, (old, new)), vectors)
    said, *_ = str(report).partition(", within")
    assert said in PAGE
    assert report.diagnosis.advice()[0] in PAGE


def test_the_pages_reader_in_cpp(vectors, tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler named c++")
    (tmp_path / "read.cpp").write_text(re.search(r"```cpp\n(.*?)```", PAGE, re.DOTALL)[1], "utf-8")
    subprocess.run([compiler, "-std=c++17", "-o", tmp_path / "read", tmp_path / "read.cpp"], check=True)
    path = vectors / "a_batch.float64.safetensors"
    for name in ("input/pair", "parameter/q_scalar/weights", "expected/gradient/rotation"):
        printed = subprocess.run([tmp_path / "read", path, name], check=True, capture_output=True, text=True).stdout
        np.testing.assert_array_equal([float(x) for x in printed.split()], read_arrays(path)[name].ravel())


def test_the_program_in_c_refuses_damaged_files(vectors, tmp_path):
    run_c(vectors, tmp_path)
    whole = files(vectors)[0].read_bytes()
    for damaged in (b"", whole[:100], whole[:-8], b"\xff" * 64):
        (tmp_path / "damaged").write_bytes(damaged)
        command = [tmp_path / "ipa", tmp_path / "damaged", tmp_path / "never"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 2
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ODD, None),
        (replace(ODD, num_scalar_v=4), "openfold"),
        (ODD, "alphafold"),
        (ODD_MULTIMER, None),
        (ODD_NO_PAIR, None),
        (ODD_PAIR_VALUES, None),
    ],
)
def test_what_is_written_comes_back(tmp_path, config, parameters, suffix):
    write_vectors(tmp_path / "v", config, parameters=parameters)
    for path in tmp_path.glob("v/*.safetensors" if suffix == ".npz" else "v/*.npz"):
        path.unlink()
    folder = open_vectors(tmp_path / "v")
    for case in make_probes(config):
        probe = folder.probe(case.name.replace(" ", "_"), "float64")
        assert (probe.name, folder.config) == (case.name, config)
        for field in ("single", "pair", "rotation", "translation", "mask", "cotangent"):
            if getattr(case, field) is not None:
                np.testing.assert_array_equal(getattr(probe.case, field), getattr(case, field))
        for name, x in case.weights.arrays.items():
            np.testing.assert_array_equal(probe.case.weights.arrays[name], x)
    report = judge_outputs(answer(tmp_path / "v", tmp_path / "mine", suffix), tmp_path / "v")
    assert report.passed, str(report)
    assert {x.dtype for x in report.comparisons} == {"float32", "float64"}
    assert {"points", "out", "gradient/rotation", "gradient/output_projection/weights"} <= {
        x.stage for x in report.comparisons
    }


def test_the_folders_page_lists_every_array_and_departure(vectors, tmp_path):
    page = (vectors / "README.md").read_text("utf-8")
    for name, x in read_arrays(vectors / "random_frames.float64.npz").items():
        assert f"| `{name}` | {x.shape} |" in page
    assert "10 Å" in page
    assert "Not as in" not in page
    write_vectors(tmp_path / "v", ODD_PAIR_VALUES)
    page = (tmp_path / "v" / "README.md").read_text("utf-8")
    assert "`distance_form='unsquared'`, `pair_value_channel=4`, `pair_value_per_head=True`" in page


def test_both_formats_hold_the_same(vectors):
    for path in files(vectors):
        one, other = read_arrays(path), read_arrays(path.with_suffix(".npz"))
        assert one.keys() == other.keys()
        for name, x in one.items():
            np.testing.assert_array_equal(x, other[name])
            assert name == "input/mask" or f".{x.dtype}." in path.name


def test_wrong_gradients_are_found(vectors, tmp_path):
    outputs = answer(vectors, tmp_path / "mine", **{"gradient/trainable_point_weights": np.zeros(ODD.num_head)})
    report = judge_outputs(outputs, vectors)
    assert (report.verdict, report.diagnosis.kind) == ("wrong", "gradient")
    assert "γ" in report.diagnosis.text


def test_parts_are_judged_with_a_note(vectors, tmp_path):
    outputs = answer(vectors, tmp_path / "mine", extra=np.zeros(2))
    report = judge_outputs(outputs / "a_batch.float32.safetensors", vectors)
    assert report.passed
    assert "random_frames.float64" in report.notes[0]
    assert "extra" in report.notes[1]
    (outputs / "random_frame.float64.npz").touch()
    assert any("random_frame.float64.npz" in x for x in judge_outputs(outputs, vectors).notes)


def test_outputs_that_are_not_finite_are_wrong(vectors, tmp_path):
    report = judge_outputs(answer(vectors, tmp_path / "mine", out=np.full((17, ODD.num_channel), np.nan)), vectors)
    assert report.verdict == "wrong"
    assert "not finite" in str(report)


def test_a_wrong_shape_is_told(vectors, tmp_path):
    report = judge_outputs(answer(vectors, tmp_path / "mine", out=np.zeros((2, 2))), vectors)
    assert report.verdict == "wrong"
    assert "shape (2, 2)" in str(report)


def damage(vectors, outputs, kind):
    first = outputs / "random_frames.float64.safetensors"
    manifest = json.loads((vectors / "manifest.json").read_text("utf-8"))
    if kind == "no outputs":
        shutil.rmtree(outputs)
    elif kind == "other names":
        shutil.rmtree(outputs)
        write_arrays_to = outputs / "out.npz"
        outputs.mkdir()
        write_arrays(write_arrays_to, {"out": np.zeros(3)})
    elif kind == "truncated":
        first.write_bytes(first.read_bytes()[:-5])
    elif kind == "empty":
        first.write_bytes(b"")
    elif kind == "twice":
        write_arrays(first.with_suffix(".npz"), {"out": np.zeros(3)})
    elif kind == "no out":
        write_arrays(first, {"output": np.zeros(3)})
    elif kind == "no vectors":
        (vectors / "manifest.json").unlink()
    elif kind == "vectors truncated":
        for suffix in SUFFIXES:
            path = vectors / f"random_frames.float64{suffix}"
            path.write_bytes(path.read_bytes()[:-5])
    elif kind == "vectors gone":
        for path in vectors.glob("random_frames.*"):
            path.unlink()
    elif kind == "other widths":
        manifest["config"]["num_channel"] = 12
    elif kind == "outside":
        manifest["probes"] = {"../secret": "random frames"}
    elif kind == "other format":
        manifest["format"] = 2
    elif kind == "other parameters":
        manifest["parameters"] = 5
    elif kind == "another system":
        manifest["parameters"] = "openfold"
    elif kind == "no object":
        manifest = [1]
    if kind != "no vectors":
        (vectors / "manifest.json").write_text(json.dumps(manifest), "utf-8")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no outputs", "run your program first"),
        ("other names", "name each file of outputs as its file of inputs"),
        ("truncated", "cannot read file"),
        ("empty", "is empty"),
        ("twice", "remove one of them"),
        ("no out", "an array named out was expected; got output"),
        ("no vectors", "a folder with a manifest.json was expected"),
        ("vectors truncated", "cannot read file"),
        ("vectors gone", "write the vectors again"),
        ("other widths", "inputs"),
        ("outside", "names of files without folders were expected"),
        ("other format", "format 1 was expected; got 2"),
        ("other parameters", "is damaged"),
        ("another system", "parameters of the manifest's config were expected"),
        ("no object", "is damaged"),
    ],
)
def test_hostile_files_are_refused(vectors, tmp_path, capsys, kind, said):
    shutil.copytree(vectors, tmp_path / "v")
    outputs = answer(vectors, tmp_path / "mine")
    damage(tmp_path / "v", outputs, kind)
    with pytest.raises(ValueError, match=said):
        judge_outputs(outputs, tmp_path / "v")
    assert main(["check", "--outputs", str(outputs), "--vectors", str(tmp_path / "v"), "--quiet"]) == 2
    assert said in capsys.readouterr().err


def test_the_vectors_themselves_are_no_outputs(vectors):
    with pytest.raises(ValueError, match="a folder of vectors: pass the folder"):
        judge_outputs(vectors, vectors)


@pytest.mark.parametrize("kind", ["full", "file", "link", "no parent"])
def test_taken_destinations_are_refused(tmp_path, kind):
    path = tmp_path / "v"
    if kind == "full":
        path.mkdir()
        (path / "mine.txt").write_text("kept")
    elif kind == "file":
        path.write_text("kept")
    elif kind == "link":
        path.symlink_to(tmp_path)
    else:
        path = tmp_path / "a" / "v"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="expected"):
        write_vectors(path, ODD)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_left_of_a_failure(tmp_path):
    (tmp_path / "v").mkdir()
    with pytest.raises(ValueError, match="got lucidrains"):
        write_vectors(tmp_path / "v", ODD, parameters="lucidrains")
    assert [x.name for x in tmp_path.iterdir()] == ["v"]
    write_vectors(tmp_path / "v", ODD)
    assert (tmp_path / "v" / "README.md").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--outputs", "x"],
        ["--vectors", "x"],
        ["a:b", "--outputs", "x", "--vectors", "y"],
        [],
        ["--outputs", "x", "--vectors", "y", "--preset", "alphafold2"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    assert main(["check", *arguments]) == 2
    assert "expected" in capsys.readouterr().err
