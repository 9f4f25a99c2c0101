"""What is found when weights are ported: results as plain data, whose fields `ipa-port --json` prints."""

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
    """The system whose names it has there."""
    root: str
    """Its path."""


@dataclass(frozen=True)
class Verification:
    """How far parameters before and after a conversion are from the same function, on random input."""

    eps: float | None
    """Larger error of both systems' semantics against ours, in eps of float64; None where outputs overflow."""
    within: int
    """The bound that it is held against."""
    change: float | None
    """What rounding and losses change, over the largest output; None where outputs overflow."""
    passed: bool


@dataclass(frozen=True)
class FileConversion:
    """What became of a module that was to be converted from one file into another."""

    source: Place
    destination: Place
    module: str
    config: Config
    converted: int
    """Number of parameters."""
    numbers: int
    added: tuple[str, ...]
    """Names of parameters that the target's modules own and never read, written as zeros."""
    assumed: tuple[str, ...]
    losses: tuple[Loss, ...]
    notes: tuple[str, ...]
    """What a reader of the destination must be told."""
    elsewhere: Mapping[str, int]
    """Arrays of other parts of the model, counted by where they lie in the source."""
    ignored: tuple[str, ...]
    """Entries of the source that are no arrays."""
    verified: Verification | None
    """None where nobody asked."""

    @property
    def written(self) -> bool:
        """The destination was written: nothing is where a verification fails."""
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
    """Arrays of other parts of the model, counted by where they lie."""


@dataclass(frozen=True)
class FileContents:
    """What is in a file."""

    file: str
    arrays: int
    ignored: tuple[str, ...]
    """Entries that are no arrays."""
    modules: tuple[FoundModule, ...]
    contents: ModuleContents | None
    """The module that is meant; None where there is a problem."""
    problem: str | None = None
    """Why no module can be read."""


@dataclass(frozen=True)
class ParameterComparison:
    """One parameter of two modules."""

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None] | None
    """Both shapes where they differ, None for a parameter that is not there; None where they are the same."""
    same: bool
    difference: float | None = None
    """The largest between two numbers."""
    relative: float | None = None
    """The difference over the largest number."""


@dataclass(frozen=True)
class Comparison:
    """Two modules of one kind, number for number."""

    files: tuple[Place, Place]
    module: str
    same: bool
    config: Mapping[str, tuple[Any, Any]]
    """Fields that say what a module computes and differ, with both values."""
    parameters: tuple[ParameterComparison, ...]
