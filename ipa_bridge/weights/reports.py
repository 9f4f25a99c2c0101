"""Results of porting weights, as plain data; `ipa-port --json` prints their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ipa_bridge.config import Config
from ipa_bridge.weights.conversion import Loss


@dataclass(frozen=True)
class Place:
    """A module in a file."""

    file: str
    dialect: str
    """The system whose names the module has in the file."""
    root: str
    """The module's path; "" for none."""


@dataclass(frozen=True)
class Verification:
    """Result of a verification: how far both systems' outputs on random input are from ours."""

    eps: float | None
    """Larger error of the two systems' semantics against ours, in eps of float64; None if outputs overflow."""
    within: int
    """Largest `eps` that passes."""
    change: float | None
    """Change of outputs by rounding and losses, relative to the largest output; None if outputs overflow."""
    passed: bool


@dataclass(frozen=True)
class FileConversion:
    """Result of converting a module in one file to another file."""

    source: Place
    destination: Place
    module: str
    config: Config
    converted: int
    """Number of parameters."""
    numbers: int
    added: tuple[str, ...]
    """Names of parameters that were written as zeros, because the target's modules own but never read them."""
    assumed: tuple[str, ...]
    losses: tuple[Loss, ...]
    notes: tuple[str, ...]
    """Facts that a reader of the destination needs but the file cannot store."""
    elsewhere: Mapping[str, int]
    """Number of arrays of other parts of the model, by their path in the source."""
    ignored: tuple[str, ...]
    """Names of entries of the source that are not arrays."""
    verified: Verification | None
    """None if no verification was requested."""

    @property
    def written(self) -> bool:
        """True if the destination was written; it is not if a verification fails."""
        return self.verified is None or self.verified.passed


@dataclass(frozen=True)
class FoundModule:
    """A module that a file may hold."""

    module: str
    root: str
    dialect: str


@dataclass(frozen=True)
class FileParameter:
    """One parameter of a module in a file."""

    name: str
    theirs: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Its shape in the file."""
    dtype: str
    norm: float


@dataclass(frozen=True)
class ModuleContents:
    """One module of a file."""

    module: str
    root: str
    dialect: str
    config: Config
    assumed: tuple[str, ...]
    notes: tuple[str, ...]
    parameters: tuple[FileParameter, ...]
    elsewhere: Mapping[str, int]
    """Number of arrays of other parts of the model, by their path."""


@dataclass(frozen=True)
class FileContents:
    """Contents of a file."""

    file: str
    arrays: int
    ignored: tuple[str, ...]
    """Names of entries that are not arrays."""
    modules: tuple[FoundModule, ...]
    contents: ModuleContents | None
    """The selected module; None if no module can be read."""
    problem: str | None = None
    """The reason if no module can be read."""


@dataclass(frozen=True)
class ParameterComparison:
    """One parameter of two modules."""

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None
    """Both shapes if they differ, with None for a missing parameter; None if the shapes are the same."""
    same: bool
    difference: float | None = None
    """Largest absolute difference of two numbers."""
    relative: float | None = None
    """Largest difference, divided by the largest number of the second file."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of two modules of one kind, number for number."""

    files: tuple[Place, Place]
    module: str
    same: bool
    config: Mapping[str, tuple[Any, Any]]
    """Both values, by name, of the functional fields that differ."""
    parameters: tuple[ParameterComparison, ...]
