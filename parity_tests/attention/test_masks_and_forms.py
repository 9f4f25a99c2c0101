"""Masks of keys and of pairs, distances that are not squared and the logits' scale, in every implementation."""

from __future__ import annotations

import numpy as np
import pytest
from streamed_cases import core_arrays, judge

FORMS = {
    "squared": {},
    "unsquared": {"distance_form": "unsquared", "distance_epsilon": 1e-3},
    "unsquared, no epsilon": {"distance_form": "unsquared"},
    "two terms with a pair": {"logit_terms": 2},
}


def hidden_keys(arrays, kinds):
    """Masks that hide a third of the keys: all keys from query 1, and from valid queries of the last example."""
    rng = np.random.default_rng(1)
    shape = arrays["mask"].shape
    keys, pairs = (rng.random(x) > 1 / 3 for x in (shape, (*shape, shape[-1])))
    keys[-1] &= arrays["mask"][-1] == 0
    pairs[..., 1, :] = False
    return {name: x.astype(bool) for name, x in {"key_mask": keys, "pair_mask": pairs}.items() if name in kinds}


def with_coincident_points(arrays):
    """The first query point of residue 0 on the first key point of residue 2."""
    arrays["q_points"][..., 0, 0, 0, :] = arrays["k_points"][..., 2, 0, 0, :]
    return arrays


@pytest.mark.covering
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kinds", [(), ("key_mask",), ("pair_mask",), ("key_mask", "pair_mask")], ids="+".join)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_streamed_is_the_reference(framework, form, kinds, dtype):
    """Outputs and gradients, blocks of unequal length, points that coincide."""
    arrays, cotangents = core_arrays((2, 9))
    arrays = with_coincident_points(arrays)
    arrays |= hidden_keys(arrays, kinds)
    exact = framework.run_attention(arrays, cotangents, **FORMS[form], implementation="reference")
    rounded = {name: x if x is None or x.dtype == bool else x.astype(dtype) for name, x in arrays.items()}
    for options in ({"implementation": "reference"}, {"implementation": "streamed", "block_size": 4}):
        outputs, gradients = framework.run_attention(rounded, cotangents, **FORMS[form], **options)
        for x, e in zip(outputs, exact[0], strict=True):
            judge(x, e, "out", dtype)
        for name, e in exact[1].items():
            judge(gradients[name], e, f"gradient/{name}", dtype)


@pytest.mark.parametrize("kinds", [("key_mask",), ("key_mask", "pair_mask")], ids="+".join)
@pytest.mark.parametrize("implementation", ["reference", "streamed"])
def test_hidden_keys_have_no_weight_and_blind_queries_read_zeros(framework, implementation, kinds):
    """By a key mask alone, valid queries of the last example are blind and its masked queries are not."""
    arrays, cotangents = core_arrays((2, 9), dtype="float32")
    masks = hidden_keys(arrays, kinds)
    mask = arrays["mask"] != 0
    seen = masks["key_mask"][..., None, :] & ~(mask[..., :, None] & ~mask[..., None, :])
    seen &= masks.get("pair_mask", True)
    assert seen.any(-1)[~mask].any()
    assert (~seen.any(-1)).sum() > 2
    options = {"implementation": implementation, "return_attention": True}
    (o, o_points, o_pair, attention), gradients = framework.run_attention({**arrays, **masks}, cotangents, **options)
    assert (attention[~np.broadcast_to(seen[:, None], attention.shape)] == 0).all()
    totals = attention.sum(-1)
    np.testing.assert_allclose(totals, np.broadcast_to(seen.any(-1)[:, None], totals.shape), rtol=0, atol=1e-6)
    for x in (o, o_points, o_pair):
        assert (x[~seen.any(-1)] == 0).all()
    assert (gradients["q"][~seen.any(-1)] == 0).all()
    assert (gradients["k"][~seen.any(-2)] == 0).all()


def test_a_key_mask_also_holds_for_masked_queries(framework):
    """The residue mask alone lets a masked query attend to all keys."""
    arrays, cotangents = core_arrays((9,), dtype="float64")
    arrays["mask"][:] = 1
    arrays["mask"][3] = 0
    keys = np.ones(9, bool)
    keys[5] = False
    options = {"implementation": "reference", "return_attention": True}
    *_, without = framework.run_attention(arrays, cotangents, **options)[0]
    *_, attention = framework.run_attention({**arrays, "key_mask": keys}, cotangents, **options)[0]
    assert without[:, 3].min() > 0
    assert (attention[:, :, 5] == 0).all()
    assert attention[:, 3, 3].min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_mask": np.ones(8)}, r"key_mask must be \(9,\) to fit residues \(9,\); got \(8,\)"),
        ({"pair_mask": np.ones(9)}, r"pair_mask must be \(9, 9\) to fit"),
        ({"logit_terms": 0}, "logit_terms must be a positive integer, or None"),
        ({"distance_form": "cubed"}, "distance_form must be one of squared, unsquared; got 'cubed'"),
        ({"distance_epsilon": 1e-8}, "distance_epsilon must be 0 or more, and 0 where distance_form is 'squared'"),
    ],
)
def test_bad_options_raise(framework, options, message):
    arrays, cotangents = core_arrays((9,))
    masks = {name: x for name, x in options.items() if name.endswith("mask")}
    others = {name: x for name, x in options.items() if name not in masks}
    with pytest.raises(ValueError, match=message):
        framework.run_attention({**arrays, **masks}, cotangents, **others)


def test_torch_compiles_layers_that_differ_in_their_epsilon():
    torch = pytest.importorskip("torch")
    from ipa_torch import point_attention

    arrays, _ = core_arrays((5,), dtype="float32")
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}

    def attend(epsilon):
        return point_attention(**tensors, distance_form="unsquared", distance_epsilon=epsilon, block_size=2)[0]

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for epsilon in (1e-2, 1e-3, 1e-4):
        judge(compiled(epsilon), attend(epsilon), "out", "float32")
    torch.compiler.reset()
