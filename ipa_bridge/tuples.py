"""Named tuples whose fields are read by name only, since their items are not residues or layers."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

Tuple = TypeVar("Tuple", bound=type)


def by_name(kind: Tuple) -> Tuple:
    """Class decorator: indexing the named tuple raises TypeError with its fields' names; unpacking still works.

    Otherwise `output[-1]`, written by analogy with `output.atom14[-1]`, would silently return the last field.
    """

    def refuse(self: Any, index: object) -> NoReturn:
        names = ", ".join(self._fields)
        raise TypeError(
            f"{kind.__name__} has fields, not items: take one of {names} by its name and index that, "
            f"as in .{self._fields[-1]}[…], or unpack all of them; got [{index!r}]"
        )

    kind.__getitem__ = refuse  # type: ignore[index]
    return kind
