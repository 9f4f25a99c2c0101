"""Report of the layers that were replaced in a user's model, printed as a table."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipa_bridge.console import table_lines

RESIDUES = 101
"""Number of residues in the random input for comparison: enough to stream, and not a multiple of a block."""


@dataclass(frozen=True)
class ReplacedLayer:
    """One layer whose computation was replaced by ours."""

    path: str
    """Path in the model; "" for the model itself."""
    system: str
    """The system that the layer is from."""
    layer: str
    """Description of the layer, such as its class."""
    dtype: str
    """The dtype of its parameters."""
    error: float | None
    """Difference from the original layer on random input, in epsilons of the dtype; None if not compared."""
    unused: tuple[str, ...] = ()
    """Names of its parameters that neither its own forward pass nor ours reads."""


@dataclass(frozen=True)
class ReplacementReport:
    """Every layer that was replaced, and similar layers that were left alone."""

    replaced: tuple[ReplacedLayer, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    """Reasons why layers were left alone, by path."""

    def __str__(self) -> str:
        rows = [("layer", "whose", "class", "dtype", "before and after")]
        rows += [
            (
                x.path or "the model itself",
                x.system,
                x.layer,
                x.dtype,
                "not compared" if x.error is None else f"{x.error:.{'1f' if x.error < 1e4 else '1e'}} eps apart",
            )
            for x in self.replaced
        ]
        lines = table_lines(rows)
        lines += [
            f"not read, before or after: {', '.join(f'{x.path}.{name}'.lstrip('.') for name in x.unused)}"
            for x in self.replaced
            if x.unused
        ]
        lines += [f"left alone: {path or 'the model itself'}: {reason}" for path, reason in self.left_alone.items()]
        return "\n".join(lines)

    __repr__ = __str__
