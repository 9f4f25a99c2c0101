"""Paths of parameters, `module/…/leaf` in haiku and `module.….leaf` in torch: joined, split and looked up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def join_path(module: str, leaf: str, separator: str = "/") -> str:
    """The path of a leaf or module within a module; `module` is "" for none."""
    return module + separator + leaf if module else leaf


def split_path(path: str) -> tuple[str, str]:
    """The module of a haiku path, "" for none, and its leaf."""
    module, _, leaf = path.rpartition("/")
    return module, leaf


def double_slash(path: str) -> str:
    """The path as AlphaFold's .npz has it, `module//leaf`."""
    return join_path(*split_path(path), "//")


def names_below(keys: Iterable[str], root: str, separator: str) -> dict[str, str]:
    """Maps names below the root to their keys, for all keys below the root."""
    prefix = root + separator if root else ""
    return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}


def keys_by_path(keys: Iterable[str], source: str = "this file") -> dict[str, str]:
    """Maps haiku paths, with one `/` before the leaf, to a file's keys.

    Raises:
        ValueError: two keys have the same path.
    """
    return without_duplicates([(key.replace("//", "/"), key) for key in keys], source)


def without_duplicates(pairs: Iterable[tuple[str, Any]], source: str) -> dict[str, Any]:
    """The pairs as a dictionary.

    Raises:
        ValueError: a name occurs twice.
    """
    found: dict[str, Any] = {}
    for name, x in pairs:
        if name in found:
            raise ValueError(f"{source}: {name!r} occurs twice: remove one of the two")
        found[name] = x
    return found
