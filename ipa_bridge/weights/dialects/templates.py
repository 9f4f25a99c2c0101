"""Templates of names: `{}` and the like stand for the number of a module."""

from __future__ import annotations

import re
from collections.abc import Callable

_HOLES: dict[str, tuple[str, Callable[[int], str], Callable[[str | None], int]]] = {
    "{}": (r"(_[1-9]\d{0,3})?", lambda n: f"_{n}" if n else "", lambda text: int(text[1:]) if text else 0),
    "{0}": (r"(0|[1-9]\d{0,3})", str, lambda text: int(text or 0)),
    "{1}": (r"([1-9]\d{0,3})", lambda n: str(n + 1), lambda text: int(text or 1) - 1),
    "{2}": (r"(0|[1-9]?\d{0,2}[02468])", lambda n: str(2 * n), lambda text: int(text or 0) // 2),
}
"""Placeholders of a module's number: a pattern to match it, and functions to write and to read it, counted from 0."""

_HOLE = re.compile(r"\{[012]?\}")


def pattern_of(template: str) -> tuple[re.Pattern, list[Callable[[str | None], int]]]:
    """A pattern that matches names of a template, and a function to read each number in them."""
    texts, holes = _HOLE.split(template), _HOLE.findall(template)
    pattern = re.escape(texts[0])
    for hole, text in zip(holes, texts[1:], strict=True):
        pattern += _HOLES[hole][0] + re.escape(text)
    return re.compile(pattern), [_HOLES[hole][2] for hole in holes]


def fill(template: str, numbers: list[int]) -> str:
    """The name that a template gives with these numbers."""
    remaining = iter(numbers)
    return _HOLE.sub(lambda hole: _HOLES[hole[0]][1](next(remaining)), template)
