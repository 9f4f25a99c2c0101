"""Named tuples that are no sequences of residues or layers: their fields are taken by name."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

Tuple = TypeVar("Tuple", bound=type)


def by_name(kind: Tuple) -> Tuple:
    """A class decorator: indexing the named tuple raises TypeError with its fields' names; unpacking it works.

    `output[-1]`, written by analogy with `output.atom14[-1]`, would otherwise be the last field in silence.
    """

    def refuse(self: Any, index: object) -> NoReturn:
        names = ", ".join(self._fields)
        raise TypeError(
            f"{kind.__name__} has fields, not items: take one of {names} by its name and index that, "
            f"as in .{self._fields[-1]}[…], or unpack all of them; got [{index!r}]"
        )

    kind.__getitem__ = refuse  # type: ignore[index]
    return kind
