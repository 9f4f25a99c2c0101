"""Judges what a program in any language computed from the test vectors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ipa_parity.attention.stages import Arrays
from ipa_parity.checking import conclude
from ipa_parity.checking.candidates import INPUTS, Candidate, Names
from ipa_parity.checking.formula import Formula
from ipa_parity.checking.judging import STAGES, Judged, compare_with
from ipa_parity.checking.probes import Probe
from ipa_parity.checking.reporting import Report
from ipa_parity.frameworks import installed_frameworks
from ipa_parity.vectors.folders import DTYPES, MANIFEST, SUFFIXES, Vectors, open_vectors, read_arrays, within


def judge_outputs(outputs: Path, vectors: Path, progress: Callable[[str], None] = lambda step: None) -> Report:
    """Judges a program's outputs, and says what it computes if they are wrong.

    Args:
        outputs: a folder of files with the probes' names, or one such file. Each holds `out`, and may hold stages and
            gradients as `gradient/…`.
        vectors: the folder that `ipa-parity vectors` wrote, from whose inputs the outputs were computed.
        progress: called with a few words before each step.

    Raises:
        ValueError: there are no outputs, a file is damaged or has no `out`, or `vectors` is no folder of vectors.
    """
    started, folder = time.perf_counter(), open_vectors(vectors)
    found, notes = _files(outputs, folder)
    judged: dict[str, list[Judged]] = {}
    for (dtype, file), path in found.items():
        progress(f"{dtype}: {folder.probes[file]}")
        each, more = _judge(outputs.name, folder.probe(file, dtype), path, folder.names)
        judged.setdefault(dtype, []).append(each)
        notes += [x for x in more if x not in notes]
    candidate = Candidate(outputs.name, "numpy", _not_called, folder.names, folder.config)
    report = conclude(candidate, judged, time.perf_counter() - started, progress)
    return replace(report, notes=(*report.notes, *notes))


def _not_called(*inputs: Any) -> Any:
    raise NotImplementedError("outputs from files cannot be computed again")


def _files(outputs: Path, vectors: Vectors) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """Files of outputs by dtype and probe, and notes on what is missing or has another name."""
    if not outputs.exists():
        raise ValueError(
            f"{outputs}: a folder or a file of outputs was expected; there is none: run your program first"
        )
    if (outputs / MANIFEST).exists():
        raise ValueError(f"{outputs}: outputs were expected; got a folder of vectors: pass the folder of your outputs")
    paths = sorted(outputs.iterdir()) if outputs.is_dir() else [outputs]
    known = {f"{file}.{dtype}": (dtype, file) for dtype in DTYPES for file in vectors.probes}
    found: dict[tuple[str, str], Path] = {}
    strange = []
    for path in paths:
        key = known.get(path.stem) if path.suffix in SUFFIXES and path.is_file() else None
        if key is None:
            strange.append(path.name)
        elif key in found:
            raise ValueError(f"{path}: one file per probe was expected; got {found[key].name} too: remove one of them")
        else:
            found[key] = path
    if not found:
        raise ValueError(
            f"{outputs}: files with the probes' names, such as {next(iter(known))}.safetensors, were expected; got "
            f"{', '.join(strange[:5]) or 'none'}: name each file of outputs as its file of inputs"
        )
    missing = [name for name, key in known.items() if key not in found]
    notes = [f"no outputs of {', '.join(missing)}: these probes were not judged"] if missing else []
    notes += [f"no probe is named as these: {', '.join(strange[:5])}"] if strange else []
    return {key: found[key] for key in known.values() if key in found}, notes


def _judge(name: str, probe: Probe, path: Path, names: Names) -> tuple[Judged, list[str]]:
    """Outputs of one probe, compared; and notes on what was not."""
    arrays = read_arrays(path)
    if "out" not in arrays:
        got = ", ".join(list(arrays)[:5]) or "nothing"
        raise ValueError(f"{path}: an array named out was expected; got {got}: write the attention's output as out")
    odd = [x for x, array in arrays.items() if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"]
    if odd:
        raise ValueError(f"{path}: real numbers were expected; {odd[0]} is {arrays[odd[0]].dtype}: write its real part")
    arrays = {x: np.asarray(array, np.float64) for x, array in arrays.items()}
    gradients = _gradients(path, probe, within(arrays, "gradient"), names)
    stages = {x: array for x, array in arrays.items() if x in probe.truth}
    notes, unknown = [], [x for x in arrays if x not in STAGES and not x.startswith("gradient/")]
    unknown += [x for x in gradients if x not in _leaves(probe)]
    if unknown:
        notes.append(f"names that mean nothing here, and were not judged: {', '.join(unknown)}")
    comparisons = list(compare_with(name, probe, stages, probe.truth))
    if gradients and not installed_frameworks():
        notes.append("gradients were not judged, since neither PyTorch nor JAX is installed")
        gradients = {}
    if gradients:
        truth = probe.truth | probe.gradients(Formula())
        stages |= {f"gradient/{x}": array for x, array in gradients.items()}
        comparisons += compare_with(name, probe, stages, truth, prefix="gradient/")
    return Judged(probe, stages, tuple(comparisons), ()), notes


def _leaves(probe: Probe) -> set[str]:
    return {*INPUTS, *probe.case.weights.arrays}


def _gradients(path: Path, probe: Probe, given: Arrays, names: Names) -> Arrays:
    """A program's gradients under our names; those to parameters of another system's layout only together."""
    theirs = names.theirs(probe.case.weights)
    to_parameters = {x: array for x, array in given.items() if x in theirs}
    if type(names) is Names or not to_parameters:
        return given
    wrong = [x for x in theirs if x not in given or given[x].shape != theirs[x].shape]
    if wrong:
        got = "none" if wrong[0] not in given else str(given[wrong[0]].shape)
        raise ValueError(
            f"{path}: gradient/{wrong[0]} was expected as {theirs[wrong[0]].shape}; got {got}: write the gradients to "
            "all parameters, or to none"
        )
    others = {x: array for x, array in given.items() if x not in theirs}
    return others | names.ours(to_parameters, probe.case.config)
