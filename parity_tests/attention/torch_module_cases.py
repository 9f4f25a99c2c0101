"""Runs of the torch module on a case, and the judgement of its output."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


import ipa_torch
from ipa_bridge.weights.tensors import torch_tensor
from ipa_parity.report import compare


def arguments(case, dtype="float32"):
    case = case.astype(dtype)
    single, rotation, translation, mask = map(torch_tensor, (case.single, case.rotation, case.translation, case.mask))
    pair = None if case.pair is None else torch_tensor(case.pair)
    return single, pair, ipa_torch.Rigid(rotation, translation), mask


def model(case, dtype="float32"):
    module = ipa_torch.InvariantPointAttention(case.config).to(getattr(torch, dtype))
    module.load_state_dict(case.weights.astype(dtype).to_torch())
    return module


def judge(actual, expected, stage="out", dtype="float32"):
    row = compare(
        actual.detach().double().numpy(),
        expected.detach().double().numpy(),
        case="",
        stage=stage,
        dtype=dtype,
        subject="transformed",
        reference="plain",
    )
    assert row.passed, str(row)
