"""The float64 oracle against Algorithm 22 spelled out in scalar loops, and gradients against its complex step."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from ipa_bridge import oracle
from ipa_bridge.tolerance import BOUNDS
from ipa_parity.attention.cases import CATALOGUE, ODD, Case, make_case
from ipa_parity.attention.stages import RUNNERS

EPS = np.finfo(np.float64).eps


def spelled_out(case: Case, i: int) -> np.ndarray:
    """Row i of the output, written as plain loops over the supplement's indices."""
    c, p = case.config, case.weights.arrays
    h_range, residues = range(c.num_head), range(len(case.single))

    def linear(name, s, start, stop=None):
        columns = slice(start, stop) if stop is not None else start
        return s @ p[f"{name}/weights"][:, columns] + p[f"{name}/bias"][columns]

    def scalars(j, h):
        qk, v = c.num_scalar_qk, c.num_scalar_v
        q = linear("q_scalar", case.single[j], h * qk, (h + 1) * qk)
        kv = linear("kv_scalar", case.single[j], h * (qk + v), (h + 1) * (qk + v))
        return q, kv[:qk], kv[qk:]

    def points(name, j, h, number):
        flat = linear(name, case.single[j], 0, 3 * c.num_head * number)
        local = [[flat[x * c.num_head * number + h * number + n] for x in range(3)] for n in range(number)]
        return [case.rotation[j] @ np.array(x) + case.translation[j] for x in local]

    features = {name: [] for name in ("o", "x", "y", "z", "norm", "o_pair")}
    for h in h_range:
        logits = []
        for j in residues:
            distance2 = sum(
                ((a - b) ** 2).sum()
                for a, b in zip(
                    points("q_point_local", i, h, c.num_point_qk),
                    points("kv_point_local", j, h, c.num_point_qk + c.num_point_v)[: c.num_point_qk],
                    strict=True,
                )
            )
            gamma = math.log(1 + math.exp(p["trainable_point_weights"][h]))
            logit = scalars(i, h)[0] @ scalars(j, h)[1] / math.sqrt(c.num_scalar_qk)
            logit += linear("attention_2d", case.pair[i, j], h)
            logit -= 0.5 * gamma * math.sqrt(2 / (9 * c.num_point_qk)) * distance2
            masked = case.mask[i] and not case.mask[j]
            logits.append(math.sqrt(1 / 3) * logit - (1e5 if masked else 0))
        weights = np.exp(np.array(logits) - max(logits))
        weights /= weights.sum()
        features["o"].append(sum(w * scalars(j, h)[2] for j, w in zip(residues, weights, strict=True)))
        features["o_pair"].append(weights @ case.pair[i])
        for n in range(c.num_point_v):
            mean = sum(
                w * points("kv_point_local", j, h, c.num_point_qk + c.num_point_v)[c.num_point_qk + n]
                for j, w in zip(residues, weights, strict=True)
            )
            x, y, z = case.rotation[i].T @ (mean - case.translation[i])
            for name, value in zip(("x", "y", "z"), (x, y, z), strict=True):
                features[name].append([value])
            features["norm"].append([math.sqrt(x * x + y * y + z * z + c.norm_epsilon)])
    row = np.concatenate([np.concatenate(part) for part in features.values()])
    return row @ p["output_projection/weights"] + p["output_projection/bias"]


@pytest.mark.parametrize("i", [0, 3])
def test_oracle_is_algorithm_22(i):
    case = CATALOGUE["monomer"]()
    assert case.mask[0]
    assert not case.mask[3]
    out = oracle.invariant_point_attention(
        case.weights.arrays, case.config, case.single, case.pair, case.rotation, case.translation, case.mask
    ).out
    assert np.abs(out[i] - spelled_out(case, i)).max() <= BOUNDS["out"] * EPS * np.abs(out).max()


@pytest.mark.parametrize("framework", RUNNERS)
@pytest.mark.parametrize("name", ["monomer", "multimer", "no-pair", "batch-no-pair"])
def test_gradients_are_the_oracles_complex_step(name, framework):
    """For a random direction v of each input and parameter, ⟨gradient, v⟩ is the oracle's complex-step derivative."""
    pytest.importorskip(framework)
    case = CATALOGUE[name]()
    gradients = {
        stage.removeprefix("gradient/"): x
        for stage, x in RUNNERS[framework](case).items()
        if stage.startswith("gradient/")
    }
    rng = np.random.default_rng(3)
    step = 1e-30
    for key, gradient in gradients.items():
        if key == "attention_2d/bias":
            continue
        direction = rng.standard_normal(gradient.shape)
        out = _oracle_with(case, key, 1j * step * direction).out
        expected = (out.imag * case.cotangent).sum() / step
        magnitude = np.abs(gradient * direction).sum()
        assert abs((gradient * direction).sum() - expected) <= BOUNDS["gradient"] * EPS * magnitude, key


def _oracle_with(case: Case, key: str, change: np.ndarray) -> oracle.Stages:
    inputs = {field: getattr(case, field) for field in ("single", "pair", "rotation", "translation")}
    parameters = dict(case.weights.arrays)
    target = inputs if key in inputs else parameters
    target[key] = target[key] + change
    return oracle.invariant_point_attention(parameters, case.config, **inputs, mask=case.mask)


def test_without_mask_is_a_mask_of_ones():
    case = CATALOGUE["monomer"]()
    case = replace(case, mask=np.ones_like(case.mask))
    args = (case.weights.arrays, case.config, case.single, case.pair, case.rotation, case.translation)
    assert (
        oracle.invariant_point_attention(*args).out.tobytes()
        == oracle.invariant_point_attention(*args, case.mask).out.tobytes()
    )


def test_an_empty_chain_gives_no_warning():
    case = make_case("", ODD, (0,))
    stages = oracle.invariant_point_attention(
        case.weights.arrays, case.config, case.single, case.pair, case.rotation, case.translation, case.mask
    )
    assert stages.out.shape == (0, ODD.num_channel)
