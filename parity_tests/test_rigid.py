"""Rigid motions form a group, convert without loss, and are the same in both frameworks."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
from frameworks import Jax, Torch, needs_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipa_bridge.proteins.frames import backbone_frames, random_frames, random_rotations
from ipa_bridge.tolerance import BOUNDS

EPS = np.finfo(np.float64).eps
TOLERANCE = BOUNDS["points"] * EPS


def frames(framework, seed, shape=(5,), spread=3.0):
    return framework.Rigid(*map(framework.array, random_frames(np.random.default_rng(seed), shape, spread=spread)))


def assert_close(framework, actual, expected, tolerance=TOLERANCE):
    for a, e in zip(actual, expected, strict=True):
        a, e = framework.numpy(a), framework.numpy(e)
        assert a.shape == e.shape
        assert np.abs(a - e).max() <= tolerance * max(1.0, np.abs(e).max())


seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


@few
@given(seed=seeds)
def test_group_laws(framework, seed):
    a, b, c = (frames(framework, [seed, i]) for i in range(3))
    identity = framework.Rigid.identity((5,), dtype=a.translation.dtype)
    assert_close(framework, a.compose(b).compose(c), a.compose(b.compose(c)))
    assert_close(framework, a.compose(identity), a)
    assert_close(framework, identity.compose(a), a)
    assert_close(framework, a.compose(a.invert()), identity)
    assert_close(framework, a.invert().compose(a), identity)
    assert_close(framework, a.compose(b).invert(), b.invert().compose(a.invert()))


@few
@given(seed=seeds)
def test_composition_is_application_in_turn(framework, seed):
    a, b = (frames(framework, [seed, i]) for i in range(2))
    points = framework.array(np.random.default_rng(seed).standard_normal((5, 3)))
    assert_close(framework, [a.compose(b).apply(points)], [a.apply(b.apply(points))])
    assert_close(framework, [a.invert().apply(points)], [a.apply_inverse(points)])


def test_apply_is_rotation_times_column_plus_translation(framework):
    rigid = frames(framework, 0, ())
    point = np.array([1.0, -2.0, 0.5])
    expected = framework.numpy(rigid.rotation) @ point + framework.numpy(rigid.translation)
    assert np.abs(framework.numpy(rigid.apply(framework.array(point))) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("extra", [(), (4,), (2, 3)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_several_points_per_frame(framework, batch, extra):
    rigid = frames(framework, 1, batch)
    points = np.random.default_rng(2).standard_normal((*batch, *extra, 3))
    ones = (1,) * len(extra)
    rotation = framework.numpy(rigid.rotation).reshape(*batch, *ones, 3, 3)
    translation = framework.numpy(rigid.translation).reshape(*batch, *ones, 3)
    moved = rigid.apply(framework.array(points))
    expected = np.einsum("...xy,...y->...x", rotation, points) + translation
    assert np.abs(framework.numpy(moved) - expected).max() <= TOLERANCE
    assert_close(framework, [rigid.apply_inverse(moved)], [framework.array(points)], 10 * TOLERANCE)


def test_every_frame_on_every_point(framework):
    """Frames (N, 1) broadcast over points (1, M), as frame-aligned errors need."""
    rigid = frames(framework, 3, (4, 1))
    points = framework.array(np.random.default_rng(4).standard_normal((1, 6, 3)))
    local = framework.numpy(rigid.apply_inverse(points))
    assert local.shape == (4, 6, 3)
    one = framework.Rigid(rigid.rotation[2, 0], rigid.translation[2, 0]).apply_inverse(points[0, 5])
    assert_close(framework, [framework.array(local[2, 5])], [one])


def test_points_that_do_not_fit_are_refused(framework):
    rigid = frames(framework, 0, (2, 5))
    for shape in ((3,), (5, 3), (2, 5, 2)):
        with pytest.raises(ValueError, match=r"points must be \(\*batch, …, 3\) for frames of batch shape \(2, 5\)"):
            rigid.apply(framework.array(np.zeros(shape)))


@few
@given(seed=seeds)
def test_quaternions_there_and_back(framework, seed):
    rng = np.random.default_rng(seed)
    quaternion = rng.standard_normal((9, 4))
    translation = framework.array(rng.standard_normal((9, 3)))
    rigid = framework.Rigid.from_quaternion(framework.array(3.7 * quaternion), translation)
    unit = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    unit *= np.where(unit[:, :1] < 0, -1, 1)
    again = framework.numpy(rigid.to_quaternion())
    assert np.abs(again - unit).max() <= TOLERANCE / max(np.abs(unit[:, 0]).min(), 0.01)
    assert_close(framework, framework.Rigid.from_quaternion(framework.array(again), translation), rigid)
    assert_close(framework, framework.Rigid.from_tensor_7(rigid.to_tensor_7()), rigid)
    assert_close(framework, framework.Rigid.from_4x4(rigid.to_4x4()), rigid, 0)


def test_quaternion_of_zero_is_the_identity(framework):
    zero = framework.array(np.zeros(4)), framework.array(np.ones(3))
    assert_close(
        framework, framework.Rigid.from_quaternion(*zero), framework.Rigid(framework.array(np.eye(3)), zero[1])
    )
    gradients = framework.gradients_of_sum(lambda q: framework.Rigid.from_quaternion(q, zero[1]).rotation, np.zeros(4))
    assert np.isfinite(gradients[0]).all()


def awkward_rotations():
    """The identity, half turns about axes and diagonals, and rotations close to each."""
    axes = np.concatenate([np.eye(3), np.ones((1, 3)), [[1, 1, 0], [0, 1, -1]]])
    axes = axes / np.linalg.norm(axes, axis=-1, keepdims=True)
    half_turns = 2 * axes[:, :, None] * axes[:, None, :] - np.eye(3)
    exact = np.concatenate([np.eye(3)[None], half_turns])
    angle = 1e-7
    tilt = np.array([[1, -angle, 0], [angle, 1, 0], [0, 0, 1]])
    return np.concatenate([exact, exact @ tilt])


def test_to_quaternion_is_right_and_smooth_everywhere(framework):
    rotation = awkward_rotations()
    translation = framework.array(np.zeros((len(rotation), 3)))
    rigid = framework.Rigid(framework.array(rotation), translation)
    quaternion = rigid.to_quaternion()
    assert (framework.numpy(quaternion)[:, 0] >= 0).all()
    assert_close(framework, framework.Rigid.from_quaternion(quaternion, translation), rigid, 1e-13)
    (gradient,) = framework.gradients_of_sum(lambda r: framework.Rigid(r, translation).to_quaternion(), rotation)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() < 10


def test_gradient_of_to_quaternion(framework):
    """The gradient agrees with central differences along rotations, where the quaternion is defined."""
    rng = np.random.default_rng(5)
    rotation = random_rotations(rng, (20,))
    generator = np.cross(np.eye(3), rng.standard_normal(3))
    direction, weights, step = rotation @ generator, rng.standard_normal(4), 1e-6

    def value(r):
        rigid = framework.Rigid(framework.array(r), framework.array(np.zeros((20, 3))))
        return framework.numpy(rigid.to_quaternion()) @ weights

    numeric = (value(rotation + step * direction) - value(rotation - step * direction)) / (2 * step)
    weigh = framework.array(np.tile(weights, (20, 1)))
    zero = framework.array(np.zeros((20, 3)))
    (gradient,) = framework.gradients_of_sum(lambda r: framework.Rigid(r, zero).to_quaternion() * weigh, rotation)
    assert np.abs((gradient * direction).sum((-1, -2)) - numeric).max() < 100 * step**2 + 100 * EPS / step


def test_from_three_points_agrees_with_ipa_bridge(framework):
    points = np.random.default_rng(6).standard_normal((3, 30, 3))
    rigid = framework.Rigid.from_three_points(*map(framework.array, points))
    expected = framework.Rigid(*map(framework.array, backbone_frames(*points)))
    assert_close(framework, rigid, expected, 1e3 * EPS)


def test_collinear_points_give_finite_frames_and_gradients(framework):
    for spoiled in ([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[1, 2, 3]] * 3):
        points = np.array(spoiled, np.float64)

        def flat(*xs):
            return framework.Rigid.from_three_points(*xs).rotation

        assert np.isfinite(framework.numpy(flat(*map(framework.array, points)))).all()
        assert all(np.isfinite(x).all() for x in framework.gradients_of_sum(flat, *points))


def test_scaled_and_stopped(framework):
    rigid = frames(framework, 7)
    scaled = rigid.scale_translation(10.0)
    assert_close(framework, scaled, framework.Rigid(rigid.rotation, rigid.translation * 10.0), 0)
    points = framework.array(np.ones((5, 3)))

    def stopped(rotation, translation):
        return framework.Rigid(rotation, translation).stop_rotation_gradient().apply(points)

    to_rotation, to_translation = framework.gradients_of_sum(stopped, *(framework.numpy(x) for x in rigid))
    assert (to_rotation == 0).all()
    assert (to_translation == 1).all()


def test_the_frameworks_agree():
    """Values and gradients differ by a few roundings at most, since the arithmetic is elementwise."""
    jax, torch = Jax(), Torch()
    rng = np.random.default_rng(8)
    (r1, t1), (r2, t2) = (random_frames(rng, (50,)) for _ in range(2))
    points = rng.standard_normal((50, 4, 3))

    def everything(framework, r1, t1, r2, t2, points):
        a, b = framework.Rigid(r1, t1), framework.Rigid(r2, t2)
        moved = a.compose(b.invert()).apply(points)
        back = framework.Rigid.from_three_points(moved[:, 0], moved[:, 1], moved[:, 2])
        again = framework.Rigid.from_quaternion(back.to_quaternion(), back.translation)
        return again.apply(moved) ** 2

    arrays = (r1, t1, r2, t2, points)
    outputs = [fw.numpy(everything(fw, *map(fw.array, arrays))) for fw in (jax, torch)]
    assert np.abs(outputs[0] - outputs[1]).max() <= TOLERANCE * np.abs(outputs[0]).max()
    gradients = [fw.gradients_of_sum(partial(everything, fw), *arrays) for fw in (jax, torch)]
    for a, b in zip(*gradients, strict=True):
        assert np.abs(a - b).max() <= BOUNDS["gradient"] * EPS * np.abs(a).max()


def test_random_and_dtypes(framework):
    if isinstance(framework, Jax):
        draw = partial(framework.Rigid.random, framework.jax.random.key(0), dtype="float64")
        single = "float32"
    else:
        generate = framework.torch.Generator

        def draw(shape, **options):
            return framework.Rigid.random(
                shape, generator=generate().manual_seed(0), dtype=framework.torch.float64, **options
            )

        single = framework.torch.float32
    rigid = draw((2000,), spread=3.0)
    rotation, translation = map(framework.numpy, rigid)
    assert np.abs(np.einsum("nxy,nxz->nyz", rotation, rotation) - np.eye(3)).max() <= TOLERANCE
    assert np.abs(np.linalg.det(rotation) - 1).max() <= TOLERANCE
    assert np.abs(rotation.mean(0)).max() < 5 / np.sqrt(2000)
    assert 2.9 < np.abs(translation).max() <= 3.0
    assert_close(framework, draw((2000,), spread=3.0), rigid, 0)
    assert {str(x.dtype).removeprefix("torch.") for x in rigid.astype(single)} == {"float32"}


INDICES = {
    "last layer": (-1, (5, 7)),
    "some residues": ((..., slice(2, 5)), (3, 5, 3)),
    "a residue of a layer": ((0, 1, 2), ()),
    "known residues": (np.arange(3) != 1, (2, 5, 7)),
    "residues by number": ((slice(None), 0, np.array([6, 0])), (3, 2)),
    "a new axis": ((..., None), (3, 5, 7, 1)),
}


@pytest.mark.parametrize(("index", "batch"), INDICES.values(), ids=INDICES)
def test_an_index_selects_frames(framework, index, batch):
    """`rigids[-1]` selects frames like `atom14[-1]`; unpacking gives the fields."""
    rigid = frames(framework, 10, (3, 5, 7))
    of_framework = framework.array(index) if isinstance(index, np.ndarray) else index
    picked = rigid[of_framework]
    assert type(picked) is framework.Rigid
    rotation, translation = (framework.numpy(x) for x in rigid)
    for field in picked:
        assert field.shape[: len(batch)] == batch
    whole = index if isinstance(index, tuple) else (index,)
    whole = whole if any(i is ... for i in whole) else (*whole, ...)
    np.testing.assert_array_equal(framework.numpy(picked.rotation), rotation[(*whole, slice(None), slice(None))])
    np.testing.assert_array_equal(framework.numpy(picked.translation), translation[(*whole, slice(None))])


def test_an_index_never_reaches_the_coordinates(framework):
    with pytest.raises(IndexError):
        frames(framework, 10, (5,))[2, 0]
    with pytest.raises(IndexError):
        frames(framework, 10, ())[0]


def test_it_stays_a_named_tuple(framework):
    rigid = frames(framework, 11, (3, 5))
    rotation, translation = rigid
    assert rotation is rigid.rotation
    assert translation is rigid.translation
    moved = rigid._replace(translation=rigid.translation + 1)
    assert type(moved) is framework.Rigid
    assert moved.rotation is rotation
    assert (rigid._fields, len(rigid)) == (("rotation", "translation"), 2)
    assert framework.Rigid._make([rotation, translation]).translation is translation
    for again in (pickle.loads(pickle.dumps(rigid)), copy.deepcopy(rigid)):
        assert type(again) is framework.Rigid
        assert_close(framework, again, rigid, 0)


def test_jax_pytree():
    jax = Jax().jax
    rigid = frames(Jax(), 9)
    assert len(jax.tree.leaves(rigid)) == 2
    inverse = jax.jit(lambda r: r.invert())(rigid)
    assert type(inverse) is type(rigid)
    assert_close(Jax(), jax.vmap(lambda r: r.compose(r))(rigid), rigid.compose(rigid))
    assert_close(Jax(), jax.lax.scan(lambda r, _: (r.invert(), None), rigid, length=2)[0], rigid)
    gradient = jax.grad(lambda r: r.invert().translation.sum())(rigid)
    assert type(gradient) is type(rigid)
    assert_close(Jax(), jax.jit(lambda r: r[-1])(rigid), rigid[-1], 0)
    assert_close(Jax(), jax.vmap(lambda r: r, (type(rigid)(0, 0),))(rigid), rigid, 0)
    _, origins = jax.lax.scan(lambda _, r: (None, r.translation), None, rigid)
    assert_close(Jax(), [origins], [rigid.translation], 0)
    to_one = jax.grad(lambda r: r[2].translation.sum())(rigid)
    assert np.flatnonzero(to_one.translation.any(-1)).tolist() == [2]


def test_torch_pytree():
    framework = Torch()
    torch, rigid = framework.torch, frames(framework, 9)
    leaves, _ = torch.utils._pytree.tree_flatten(rigid)
    assert len(leaves) == 2
    compiled = torch.compile(lambda r: r.invert(), fullgraph=True, backend="aot_eager")
    assert_close(framework, compiled(rigid), rigid.invert())
    assert type(compiled(rigid)) is type(rigid)
    assert_close(framework, torch.func.vmap(lambda r: r.compose(r))(rigid), rigid.compose(rigid))
    gradient = torch.func.grad(lambda r: r.invert().translation.sum())(rigid)
    assert type(gradient) is type(rigid)
    collated = torch.utils.data.default_collate([rigid, rigid])
    assert type(collated) is type(rigid)
    assert_close(framework, collated[1], rigid, 0)
    last = torch.compile(lambda r: r[-1], fullgraph=True, backend="aot_eager")
    assert_close(framework, last(rigid), rigid[-1], 0)
    layers = torch._higher_order_ops.scan(lambda c, r: (c + 1, r.translation.clone()), torch.zeros(()), rigid)
    assert_close(framework, layers[1:], [rigid.translation], 0)


@pytest.mark.parametrize("strict", [False, True])
@needs_torch("2.11")
def test_torch_exports_indices_and_fields(strict):
    """Exported modules flatten arguments by x[0], x[1], …, which for frames would select residues."""
    framework = Torch()

    class Last(framework.torch.nn.Module):
        def forward(self, rigids, *, others):
            return rigids[-1].compose(others["of"])

    rigid, others = frames(framework, 12, (3, 5)), {"of": frames(framework, 13, (5,))}
    exported = framework.torch.export.export(Last(), (rigid,), {"others": others}, strict=strict).module()
    composed = exported(rigid, others=others)
    assert type(composed) is framework.Rigid
    assert_close(framework, composed, rigid[-1].compose(others["of"]), 0)
