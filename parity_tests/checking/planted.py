"""Candidates with mistakes planted on purpose, in each framework."""

from __future__ import annotations

import types
from functools import cache
from pathlib import Path

from ipa_parity.attention.cases import ODD, ODD_MULTIMER
from ipa_parity.checking.formula import NUMPY, Inputs, compute, jax_backend, torch_backend

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "examples" / "my_ipa.py").read_text()

SMALL = {"monomer": ODD, "multimer": ODD_MULTIMER}
"""Small configs, whose widths are all different."""

FRAMEWORKS = {
    "numpy": (lambda: NUMPY, lambda x, like: x.astype(like.dtype)),
    "torch": (cache(torch_backend), lambda x, like: x.to(like.dtype)),
    "jax": (cache(jax_backend), lambda x, like: x.astype(like.dtype)),
}


def planted(formula, config, framework):
    """A function of arrays that computes a formula in a framework."""
    backend, cast = FRAMEWORKS[framework]

    def attention(parameters, single, pair, rotation, translation, mask):
        inputs = Inputs(single, pair, rotation, translation, cast(mask, single))
        return compute(formula, parameters, config, inputs, backend())["out"]

    return attention


def my_ipa(*changes, **widths):
    """`examples/my_ipa.py`'s module with parts of its text replaced."""
    source = SOURCE
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    module = types.ModuleType("my_ipa")
    exec(compile(source, "my_ipa.py", "exec"), module.__dict__)
    return module.MyIPA(**widths)


def names_of(report):
    """Names of the mistakes that a report names, synonyms together."""
    return [{x.name for x in group} for group in report.diagnosis.mistakes] if report.diagnosis else []
