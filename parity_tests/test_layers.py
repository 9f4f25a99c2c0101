"""Linear and LayerNorm: AlphaFold's initialisers, documented dtypes, the same function in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")
hk = pytest.importorskip("haiku")
torch = pytest.importorskip("torch")

import jax.numpy as jnp

import ipa_jax
import ipa_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.report import compare

FAN_IN = 400


def initial_weights(framework, initializer):
    """Initial weights, (inputs, outputs)."""
    if framework == "torch":
        torch.manual_seed(0)
        return ipa_torch.Linear(FAN_IN, 300, initializer=initializer).weight.detach().numpy().T
    init, _ = hk.transform(lambda x: ipa_jax.Linear(300, initializer=initializer)(x))
    return np.asarray(init(jax.random.key(0), jnp.ones((1, FAN_IN)))["linear"]["weights"])


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize(("initializer", "gain"), [("linear", 1.0), ("relu", 2.0)])
def test_truncated_normal_initialisers(framework, initializer, gain):
    """The variance is gain / fan-in after truncation at two standard deviations of the untruncated normal."""
    weights = initial_weights(framework, initializer)
    stddev = np.sqrt(gain / FAN_IN)
    number = weights.size
    assert weights.shape == (FAN_IN, 300)
    assert abs(weights.mean()) < 5 * stddev / np.sqrt(number)
    assert abs(weights.std() / stddev - 1) < 5 / np.sqrt(2 * number)
    assert 0.99 < np.abs(weights).max() / (2 * stddev / 0.87962566) <= 1


def test_gradients_under_vmap():
    """Gradients for several cotangents at once, as in `jax.jacrev`; jaxlib 0.10.2 on CPU is off by a quarter."""
    init, apply = hk.without_apply_rng(hk.transform(lambda x: ipa_jax.LayerNorm()(x)))
    rng = np.random.default_rng(0)
    x, cotangents = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((29, 29, 16), (5, 29, 29, 16)))
    params = init(None, x)

    def gradient(x, cotangent):
        return jax.vjp(lambda x: apply(params, x), x)[1](cotangent)[0]

    together = jax.jit(jax.vmap(gradient, (None, 0)))(x, cotangents)
    apart = jnp.stack([gradient(x, cotangent) for cotangent in cotangents])
    options = {"case": "", "stage": "gradient", "dtype": "float32", "subject": "together", "reference": "apart"}
    comparison = compare(np.asarray(together), np.asarray(apart), **options)
    assert comparison.passed, comparison


def test_jax_dropout_scales_up_what_it_keeps():
    """The mean stays, as PyTorch's does."""
    dropped = np.asarray(ipa_jax.layers.dropout(jax.random.key(0), 0.25, jnp.ones(1000, jnp.float32)))
    assert set(dropped.tolist()) == {0.0, float(np.float32(1 / 0.75))}
    assert 0.2 < (dropped == 0).mean() < 0.3


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_zeros_and_unknown_initialisers(framework):
    assert (initial_weights(framework, "zeros") == 0).all()
    with pytest.raises(KeyError, match="orthogonal"):
        initial_weights(framework, "orthogonal")


def jax_linear(x, weights, bias, **options):
    apply = hk.without_apply_rng(
        hk.transform(lambda x: ipa_jax.Linear(weights.shape[1:], use_bias=bias is not None, **options)(x))
    ).apply
    leaves = {"weights": weights} if bias is None else {"weights": weights, "bias": bias}
    return apply({"linear": jax.tree.map(jnp.asarray, leaves)}, jnp.asarray(x))


def torch_linear(x, weights, bias, **options):
    module = ipa_torch.Linear(weights.shape[0], weights.shape[1:], use_bias=bias is not None, **options)
    state = {"weight": torch_tensor(weights.reshape(len(weights), -1).T)}
    state |= {} if bias is None else {"bias": torch_tensor(bias.reshape(-1))}
    module.to(state["weight"].dtype).load_state_dict(state)
    return module(torch_tensor(x))


def close(actual, expected, dtype):
    row = compare(
        np.asarray(actual).astype(np.float64),
        np.asarray(expected),
        case="layer",
        stage="out",
        dtype=dtype,
        subject="layer",
        reference="numpy",
    )
    assert row.passed, str(row)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("outputs", [(5,), (3, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_is_one_function(outputs, biased, dtype):
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal(shape).astype(dtype) for shape in ((2, 6, 7), (7, *outputs)))
    bias = rng.standard_normal(outputs).astype(dtype) if biased else None
    expected = np.tensordot(x.astype(np.float64), weights.astype(np.float64), 1) + (0 if bias is None else bias)
    close(jax_linear(x, weights, bias), expected, dtype)
    close(torch_linear(x, weights, bias).detach(), expected, dtype)


@pytest.mark.parametrize("linear", [jax_linear, torch_linear], ids=["jax", "torch"])
@pytest.mark.parametrize(
    ("inputs", "parameters", "full_precision", "expected"),
    [
        ("bfloat16", "float32", False, "float32"),
        ("float32", "bfloat16", False, "float32"),
        ("bfloat16", "bfloat16", False, "bfloat16"),
        ("bfloat16", "bfloat16", True, "float32"),
        ("float16", "float16", True, "float32"),
        ("float64", "float32", True, "float64"),
    ],
)
def test_linear_runs_in_the_wider_dtype(linear, inputs, parameters, full_precision, expected):
    x, weights, bias = (
        np.ones(shape).astype(np.dtype(t)) for shape, t in (((2, 3), inputs), ((3, 4), parameters), ((4,), parameters))
    )
    output = linear(x, weights, bias, full_precision=full_precision)
    assert str(output.dtype).removeprefix("torch.") == expected


def test_linear_under_autocast():
    x, weights, bias = (np.ones(shape, np.float32) for shape in ((2, 3), (3, 4), (4,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_linear(x, weights, bias).dtype == torch.bfloat16
        assert torch_linear(x, weights, bias, full_precision=True).dtype == torch.float32


def jax_layer_norm(x, scale, offset):
    apply = hk.without_apply_rng(hk.transform(lambda x: ipa_jax.LayerNorm()(x))).apply
    return apply({"layer_norm": {"scale": jnp.asarray(scale), "offset": jnp.asarray(offset)}}, jnp.asarray(x))


def torch_layer_norm(x, scale, offset):
    module = ipa_torch.LayerNorm(x.shape[-1])
    state = {"weight": torch_tensor(scale), "bias": torch_tensor(offset)}
    module.to(state["weight"].dtype).load_state_dict(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(torch_tensor(x)).detach()


@pytest.mark.parametrize("layer_norm", [jax_layer_norm, torch_layer_norm], ids=["jax", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_layer_norm(layer_norm, dtype):
    """Inputs are far from zero, where E[x²] − E[x]² as the variance loses its bits; in torch under autocast too."""
    rng = np.random.default_rng(1)
    x = (100 + rng.standard_normal((4, 33))).astype(np.dtype(dtype))
    scale, offset = (rng.standard_normal(33).astype(np.dtype(dtype)) for _ in range(2))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    output = layer_norm(x, scale, offset)
    assert str(output.dtype).removeprefix("torch.") == dtype
    output = output.double() if isinstance(output, torch.Tensor) else output
    expected = exact * scale.astype(np.float64) + offset.astype(np.float64)
    # Subtracting a mean much larger than the deviations loses bits.
    row = compare(
        np.asarray(output).astype(np.float64),
        expected,
        case="layer norm",
        stage="out",
        dtype=dtype,
        subject="ours",
        reference="numpy",
        conditioning=100.0 if dtype != "bfloat16" else 1.0,
    )
    assert row.passed, str(row)
