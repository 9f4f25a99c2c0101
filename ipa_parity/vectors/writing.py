"""Writes the judge's probes and their results in float64: the folder of `ipa-parity vectors`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.proteins import Structure
from ipa_bridge.version import __version__
from ipa_bridge.weights import Weights
from ipa_bridge.weights.files import write_arrays
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.candidates import INPUTS, Names, make_names
from ipa_parity.checking.formula import Formula
from ipa_parity.checking.judging import STAGES
from ipa_parity.checking.probes import Probe, make_probes
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.vectors.folders import DTYPES, FORMAT, MANIFEST, SUFFIXES
from ipa_parity.vectors.readme import readme


def write_vectors(
    folder: Path,
    config: IPAConfig,
    *,
    seed: int = 0,
    weights: Weights | None = None,
    structure: Structure | None = None,
    parameters: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> None:
    """Writes inputs, parameters, stages and gradients of every probe, in .safetensors and .npz.

    They are written to a folder beside it, which takes its name once it is complete.

    Args:
        folder: destination, which must not exist, or be empty.
        config: the attention's config.
        seed: seed of all random numbers.
        weights: the attention's weights; None for seeded ones.
        structure: a protein to add.
        parameters: name of the system whose names and layouts the parameters get; None for ours.
        progress: called with a few words before each step.

    Raises:
        ValueError: the destination is taken, or the system has no such attention.
        ImportError: neither PyTorch nor JAX is installed, which gradients need.
    """
    if not installed_frameworks():
        raise ImportError("gradients need PyTorch or JAX; neither is installed: pip install 'ipa-twins[torch]'")
    path = Path(os.path.abspath(folder))
    _check_free(path)
    names = make_names(parameters)
    files: dict[str, str] = {}
    beside = path.with_name(f".{secrets.token_hex(8)}.part")
    beside.mkdir()
    try:
        for case in make_probes(config, seed=seed, weights=weights, structure=structure):
            _check_names(names, case.weights, parameters)
            file = case.name.replace(" ", "_")
            files[file] = case.name
            for dtype in DTYPES:
                progress(f"{case.name}, {dtype}")
                arrays = _arrays(Probe(case, dtype), names)
                for suffix in SUFFIXES:
                    write_arrays(beside / f"{file}.{dtype}{suffix}", arrays)
                if len(files) == 1:
                    (beside / "README.md").write_text(readme(arrays, config), "utf-8")
        manifest = {"format": FORMAT, "version": __version__, "seed": seed, "parameters": parameters}
        manifest |= {"config": asdict(config), "dtypes": DTYPES, "probes": files}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        _check_free(path)
        if path.exists():
            path.rmdir()
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_free(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise ValueError(f"{path}: a new or empty folder was expected; it is there already: name another one")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: a path in an existing folder was expected; there is no {path.parent}: make it first")


def _check_names(names: Names, weights: Weights, parameters: str | None) -> None:
    """Checks that the parameters come back from the system's names as they were."""
    try:
        ours, problem = names.ours(names.theirs(weights), weights.config), "its layout is another one"
    except (ValueError, KeyError) as error:
        ours, problem = {}, str(error).rpartition("\n")[2].strip()
    if ours.keys() != weights.arrays.keys() or any(not np.array_equal(x, ours[n]) for n, x in weights.arrays.items()):
        raise ValueError(
            f"a system that has this attention's parameters was expected; got {parameters} ({problem}): pass another "
            "one, or none for our names"
        )


def _arrays(probe: Probe, names: Names) -> Arrays:
    """Everything about one probe, by the names in the files."""
    case, truth = probe.rounded, probe.truth
    gradients = {name.removeprefix("gradient/"): x for name, x in probe.gradients(Formula()).items()}
    to_parameters = replace(case.weights, arrays={name: gradients[name] for name in case.weights.arrays})
    by_name = {name: gradients[name] for name in INPUTS if name in gradients} | names.theirs(to_parameters)
    parts: dict[str, Arrays] = {
        "input": {name: x for name in (*INPUTS, "cotangent") if (x := getattr(case, name)) is not None},
        "parameter": names.theirs(case.weights),
        "expected": {name: truth[name] for name in STAGES if name in truth},
        "expected/gradient": by_name,
    }
    arrays = {f"{part}/{name}": x.astype(probe.dtype) for part, each in parts.items() for name, x in each.items()}
    return {"input/mask": case.mask, **arrays}
