"""Registers other people's systems: a table of names, and optionally what the system computes with them."""

from __future__ import annotations

from collections.abc import Callable

from numpy import ndarray

from ipa_bridge.config import IPAConfig
from ipa_bridge.weights.dialects import DIALECTS, Dialect
from ipa_bridge.weights.finding import words_of_attentions
from ipa_bridge.weights.semantics import SYSTEMS, System

_REGISTERED: set[str] = set()
"""Names of the dialects that were registered here, and may be unregistered."""


def register_dialect(dialect: Dialect, *, semantics: System | Callable[..., ndarray] | None = None) -> None:
    """Lets `Weights`, `ipa-port` and `ipa_torch.register_adapter` read and write another system's parameters.

    Args:
        dialect: the table of the system's names and layouts; `ipa_bridge.weights.dialects` has its parts (`Dialect`,
            `Form`, `Order`, `Row`), and those of every known system as examples.
        semantics: what the system computes, in numpy, which `ipa-port convert --verify` compares with ours. A function
            of an attention's parameters, config, single, pair, rotation, translation and mask, or a
            `ipa_bridge.weights.semantics.System`. Without it, conversions cannot be verified.

    Raises:
        ValueError: there is a dialect of that name, or the dialect has no landmarks for one of its tables.
    """
    if not isinstance(dialect, Dialect):
        raise ValueError(f"a Dialect was expected; got a {type(dialect).__name__}")
    if dialect.name in DIALECTS:
        raise ValueError(f"there is a dialect {dialect.name!r} already ({DIALECTS[dialect.name].title}): name another")
    if not dialect.name or not dialect.rows:
        raise ValueError("a dialect was expected to have a name and at least one table of rows")
    for kind in dialect.rows:
        if not dialect.landmarks.get(kind):
            raise ValueError(
                f"landmarks[{kind.__name__}] must hold names of parameters that identify such a module; there are none"
            )
    DIALECTS[dialect.name] = dialect
    if semantics is not None:
        SYSTEMS[dialect.name] = semantics if isinstance(semantics, System) else System(semantics)
    _REGISTERED.add(dialect.name)
    words_of_attentions.cache_clear()


def unregister_dialect(name: str) -> None:
    """Undoes `register_dialect`, as tests may need to.

    Raises:
        ValueError: no dialect of that name was registered.
    """
    if name not in _REGISTERED:
        known = ", ".join(sorted(_REGISTERED)) or "none"
        raise ValueError(f"a dialect that register_dialect added was expected ({known}); got {name!r}")
    _REGISTERED.remove(name)
    del DIALECTS[name]
    SYSTEMS.pop(name, None)
    words_of_attentions.cache_clear()


def attention_rows(dialect: Dialect) -> dict[str, str]:
    """Our names of an attention's modules to the system's.

    Raises:
        ValueError: the dialect has no table of an attention.
    """
    layouts = dialect.rows.get(IPAConfig, {})
    if not layouts:
        raise ValueError(f"{dialect.title} has no table of an attention: add rows[IPAConfig] to its dialect")
    return {row.ours: row.theirs for rows in layouts.values() for row in rows}
