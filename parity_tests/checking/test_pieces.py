"""The judges of backbone update, atoms and FAPE: formulas, known mistakes, and our own functions."""

from __future__ import annotations

import numpy as np
import pytest
from planted import FRAMEWORKS, names_of

import ipa_parity
from ipa_bridge import oracle
from ipa_parity.checking.formula import NUMPY
from ipa_parity.checking.pieces import PIECES
from ipa_parity.cli import main


def planted(piece, changes, framework):
    backend = FRAMEWORKS[framework][0]

    def function(*arrays):
        return piece.formula(changes, dict(zip(piece.arguments, arrays, strict=True)), backend())

    return function


def functions_of(package, array):
    """Our functions of one framework, of arrays."""

    def backbone_update(rotation, translation, update):
        ones = array.ones_like(update[..., :1])
        quaternion = array.concatenate([ones, update[..., :3]], -1)
        update = package.Rigid.from_quaternion(quaternion, update[..., 3:])
        return tuple(package.Rigid(rotation, translation).compose(update))

    def atoms(rotation, translation, angles, aatype):
        frames = package.torsion_angles_to_frames(package.Rigid(rotation, translation), angles, aatype)
        return package.frames_to_atom14(frames, aatype)

    def fape(
        predicted_rotation,
        predicted_translation,
        true_rotation,
        true_translation,
        frame_mask,
        predicted_points,
        true_points,
        point_mask,
    ):
        return package.frame_aligned_point_error(
            package.Rigid(predicted_rotation, predicted_translation),
            package.Rigid(true_rotation, true_translation),
            frame_mask,
            predicted_points,
            true_points,
            point_mask,
            clamp_distance=10.0,
        )

    return {"backbone-update": backbone_update, "atoms": atoms, "fape": fape}


@pytest.mark.parametrize("name", PIECES)
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_our_own_are_right(framework, name):
    array = pytest.importorskip({"jax": "jax.numpy", "torch": "torch"}[framework])
    pytest.importorskip({"jax": "haiku", "torch": "torch"}[framework])
    package = pytest.importorskip(f"ipa_{framework}")
    function = functions_of(package, array)[name]
    if framework == "jax":
        function = pytest.importorskip("jax").jit(function)
    report = PIECES[name][1](function, framework=framework)
    assert report.passed, str(report)
    assert any(row.stage.startswith("gradient/") for row in report.comparisons)


def test_atoms_are_the_oracles():
    piece = PIECES["atoms"][0]
    inputs = piece.draw(np.random.default_rng(3))
    expected = oracle.atom14(*oracle.rigid_groups(*inputs.values()), inputs["aatype"])
    np.testing.assert_allclose(piece.formula({}, inputs, NUMPY)["atom14"], expected, atol=1e-12)


MISTAKES = [(name, mistake) for name, (piece, _) in PIECES.items() for mistake in piece.mistakes]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids=[f"{name}: {x.name}" for name, x in MISTAKES])
def test_every_mistake_is_named(name, mistake):
    expect_named(name, mistake, "numpy", ("float64",))


@pytest.mark.exhaustive
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", PIECES)
def test_every_mistake_is_named_in_each_framework(name, framework):
    pytest.importorskip(framework)
    for mistake in PIECES[name][0].mistakes:
        for dtype in ("float32", "float64"):
            expect_named(name, mistake, framework, (dtype,))


def expect_named(name, mistake, framework, dtypes):
    piece, check = PIECES[name]
    report = check(planted(piece, mistake.changes, framework), framework=framework, dtypes=dtypes, gradients=False)
    assert report.verdict == "wrong", (mistake.name, str(report))
    assert mistake.name in set().union(*names_of(report)), (mistake.name, report.diagnosis)


def test_pairs_are_named():
    piece, check = PIECES["backbone-update"]
    changes = {"composed": "left", "real_part": "last"}
    report = check(planted(piece, changes, "numpy"), framework="numpy")
    assert {"the update composed from the left", "the quaternion's real part last"} <= set().union(*names_of(report))
    assert str(report).count(" of Algorithm 23: ") == 2


def test_gradients_that_end():
    torch = pytest.importorskip("torch")
    piece, check = PIECES["fape"]
    right = planted(piece, {}, "torch")
    report = check(lambda *x: right(x[0].detach(), *x[1:]), framework="torch")
    assert (report.verdict, report.diagnosis.kind) == ("wrong", "gradient")
    assert report.diagnosis.text.endswith("not: predicted_rotation")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda rotation, translation, update: rotation, "translation is missing"),
        (lambda rotation, translation, update: 1 / 0, "raises ZeroDivisionError"),
        (lambda rotation, translation, update: (rotation[:-1], translation), "shape (12, 3, 3) where (13, 3, 3)"),
        (lambda rotation, translation, update: (rotation * np.nan, translation), "not finite"),
        (
            lambda rotation, translation, update: (rotation, translation + np.random.default_rng().random()),
            "two calls with the same inputs",
        ),
    ],
)
def test_what_misbehaves_is_a_finding(function, said):
    report = ipa_parity.check_backbone_update(function, framework="numpy")
    assert report.verdict == "wrong"
    assert said in str(report), str(report)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="a function and dtypes float32 or float64"):
        ipa_parity.check_fape(3)
    with pytest.raises(ValueError, match="bfloat16"):
        ipa_parity.check_atoms(print, dtypes=("bfloat16",))


UPDATE = """
import numpy as np

def backbone_update(rotation, translation, update):
    b, c, d = np.moveaxis(update[:, :3], -1, 0)
    q = np.stack([2 + 0 * b, b, c, d], -1)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    turn = np.stack(
        [
            np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
            np.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
            np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
        ],
        -2,
    )
    return rotation @ turn, translation + np.einsum("nxy,ny->nx", rotation, update[:, 3:])
"""


def test_the_command(capsys, tmp_path):
    """As the page shows it."""
    (tmp_path / "a_model.py").write_text(UPDATE)
    target = f"{tmp_path / 'a_model.py'}:backbone_update"
    assert main(["check", target, "--piece", "backbone-update", "--quiet"]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert "Algorithm 23 with the quaternion's update added to it, q + q·(1, b, c, d)" in first
    assert main(["check", target, "--piece", "backbone-update", "--preset", "esmfold"]) == 2
