"""What was replaced in somebody's model, a table for people; and how it is compared with what it was."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipa_bridge.console import table_lines

RESIDUES = 101
"""Residues of the random input that before and after are compared on: enough to stream, and no multiple of a block."""


@dataclass(frozen=True)
class ReplacedLayer:
    """One layer that computes as ours does now."""

    path: str
    """Where it lies in the model; "" for the model itself."""
    system: str
    """The system whose layer it is."""
    layer: str
    """What it is, its class for instance."""
    dtype: str
    """The dtype of its parameters."""
    error: float | None
    """How far it is from the layer before on random input, in epsilons of the dtype; None where nobody looked."""
    unused: tuple[str, ...] = ()
    """Names of its parameters that its own forward does not read either."""


@dataclass(frozen=True)
class ReplacementReport:
    """Every layer that was replaced, and what looked like one and was left alone."""

    replaced: tuple[ReplacedLayer, ...]
    left_alone: dict[str, str] = field(default_factory=dict)
    """Path to the reason."""

    def __str__(self) -> str:
        rows = [("layer", "whose", "class", "dtype", "before and after")]
        rows += [
            (
                x.path or "the model itself",
                x.system,
                x.layer,
                x.dtype,
                "not compared" if x.error is None else f"{x.error:.1f} eps apart",
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
