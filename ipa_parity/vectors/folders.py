"""A folder of test vectors: its manifest, and the probes in its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights import Weights
from ipa_bridge.weights.files import open_arrays
from ipa_parity.attention.cases import Case
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.candidates import Names, make_names
from ipa_parity.checking.probes import Probe

MANIFEST, FORMAT = "manifest.json", 1
DTYPES = ("float32", "float64")
SUFFIXES = (".safetensors", ".npz")


@dataclass(frozen=True)
class Vectors:
    """An open folder of test vectors."""

    path: Path
    config: IPAConfig
    probes: Mapping[str, str]
    """The probes' names by the names of their files."""
    names: Names
    """Names and layouts of the parameters."""

    def probe(self, file: str, dtype: str) -> Probe:
        """A probe, from the inputs and parameters in its file.

        Raises:
            ValueError: the file is missing or damaged.
        """
        paths = [self.path / f"{file}.{dtype}{suffix}" for suffix in SUFFIXES]
        path = next((x for x in paths if x.is_file()), None)
        if path is None:
            raise ValueError(f"{paths[0]} or {SUFFIXES[1]} was expected; there is neither: write the vectors again")
        arrays = read_arrays(path)
        inputs, parameters = (within(arrays, prefix) for prefix in ("input", "parameter"))
        self._check(path, inputs, dtype)
        try:
            weights = Weights(self.names.ours(parameters, self.config), self.config)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: parameters of the manifest's config were expected: {error}") from error
        inputs.setdefault("pair", None)  # type: ignore[arg-type]
        return Probe(Case(self.probes[file], weights, **inputs), dtype)

    def _check(self, path: Path, inputs: Arrays, dtype: str) -> None:
        batch = inputs["mask"].shape if "mask" in inputs else (0,)
        single = (*batch, self.config.num_channel)
        expected = {"single": single, "rotation": (*batch, 3, 3), "translation": (*batch, 3), "mask": batch}
        expected["cotangent"] = single
        if self.config.pair_channel is not None:
            expected["pair"] = (*batch, *batch[-1:], self.config.pair_channel)
        wanted = {name: (shape, "bool" if name == "mask" else dtype) for name, shape in expected.items()}
        got = {name: (x.shape, x.dtype.name) for name, x in inputs.items()}
        if got != wanted or not batch:
            differ = ", ".join(f"{x} {got.get(x, 'missing')}" for x in wanted | got if got.get(x) != wanted.get(x))
            raise ValueError(f"{path}: inputs {wanted} were expected; got {differ}: write the vectors again")


def open_vectors(path: Path) -> Vectors:
    """Opens a folder that `ipa-parity vectors` wrote.

    Raises:
        ValueError: it is none, or its manifest is damaged.
    """
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"{path}: a folder with a {MANIFEST} was expected, as `ipa-parity vectors` writes it; it has none"
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {FORMAT} was expected; got {manifest['format']!r}")
        probes = {str(file): str(name) for file, name in manifest["probes"].items()}
        if not probes or not all(re.fullmatch(r"\w+", file) for file in probes):
            raise ValueError(
                f"names of files without folders were expected as probes; got {', '.join(probes) or 'none'}"
            )
        if not isinstance(manifest["parameters"], str | None):
            raise ValueError(f"a system or null was expected as parameters; got {manifest['parameters']!r}")
        return Vectors(path, IPAConfig(**manifest["config"]), probes, make_names(manifest["parameters"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / MANIFEST} is damaged ({error}): write the vectors again") from error


def read_arrays(path: Path) -> Arrays:
    """All arrays of a file.

    Raises:
        ValueError: the file is damaged.
    """
    with open_arrays(path) as file:
        return {name: file[name] for name in file.keys}


def within(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """The arrays below a prefix, without it."""
    return {name.removeprefix(f"{prefix}/"): x for name, x in arrays.items() if name.startswith(f"{prefix}/")}
