"""Other systems' parameters: how each names and lays out ours, and which of them a set of names is.

A dialect is recognised by names and shapes alone. Where two would read the same parameters differently, that is an
error which names both; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ipa_bridge.config import Config
from ipa_bridge.dialects.alphafold import ALPHAFOLD, IPA_JAX, IPA_TORCH
from ipa_bridge.dialects.esmfold import ESMFOLD
from ipa_bridge.dialects.framediff import FRAMEDIFF
from ipa_bridge.dialects.lucidrains import LUCIDRAINS
from ipa_bridge.dialects.openfold import OPENFOLD, OPENFOLD_V1
from ipa_bridge.dialects.spec import KINDS, Dialect, Form, Transform, layout_of
from ipa_bridge.parameters import LANDMARKS, Shapes

__all__ = ["DIALECTS", "KINDS", "Dialect", "Form", "Found", "Transform", "find_module", "layout_of", "named"]

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (ALPHAFOLD, IPA_JAX, IPA_TORCH, OPENFOLD, OPENFOLD_V1, ESMFOLD, FRAMEDIFF, LUCIDRAINS)
}
"""Every dialect by name."""


class Found(NamedTuple):
    """A module among parameters."""

    dialect: Dialect
    kind: type
    root: str
    """The path that its names lie below, "" for none."""

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Their name below the root to the key, of all keys there."""
        prefix = self.root + self.dialect.separator if self.root else ""
        return {key.removeprefix(prefix): key for key in keys if key.startswith(prefix)}

    def infer(self, shapes: Shapes) -> Config:
        """What the module's names and shapes tell."""
        return self.dialect.infer({name: shapes[key] for name, key in self.names(shapes).items()}, self.kind)


def named(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DIALECTS:
        raise ValueError(f"dialect must be one of {', '.join(DIALECTS)}; got {name!r}")
    return DIALECTS[name]


def modules(keys: Mapping[str, object], dialect: str | None = None, *, haiku: bool | None = None) -> list[Found]:
    """Every module of every dialect that the names may be of, those within others too.

    Args:
        keys: names with `/` between haiku's modules and `.` between torch's.
        dialect: only of this one.
        haiku: whether only haiku's or only torch's names are in question; None for both.
    """
    asked = DIALECTS.values() if dialect is None else [named(dialect)]
    found = []
    for each in asked:
        if haiku is not None and haiku != (each.separator == "/"):
            continue
        for kind, landmarks in each.landmarks.items():
            first, *others = landmarks
            ends = (key for key in keys if (each.separator + key).endswith(each.separator + first))
            for key in ends:
                root = key.removesuffix(first).removesuffix(each.separator)
                prefix = root + each.separator if root else ""
                there = all(prefix + name in keys for name in others)
                foreign = any(prefix + name in keys for name in each.absent)
                if there and not foreign and (dialect is not None or each.at(root, kind)):
                    found.append(Found(each, kind, root))
    return found


def find_module(
    shapes: Shapes,
    *,
    dialect: str | None = None,
    root: str | None = None,
    config: Config | None = None,
    haiku: bool | None = None,
    source: str = "these parameters",
) -> tuple[Found, Config]:
    """The one module that is meant, and its config.

    That is the structure module, or where there is none the attention, or else the confidence head.

    Args:
        shapes: of all parameters.
        dialect: whose they are; None to recognise it.
        root: path of the module, where there are several or another is meant.
        config: overrides what names and shapes say; a module of its kind is looked for.
        haiku: whether only haiku's or only torch's names are in question.
        source: what the errors call the parameters.

    Raises:
        ValueError: no such module; several and no root; dialects that would read it differently; or parameters that
            are missing or do not fit each other.
    """
    kinds = [kind for kind in LANDMARKS if config is None or isinstance(config, kind)]
    found = [each for each in modules(shapes, dialect, haiku=haiku) if each.kind in kinds]
    if root is not None:
        at_root = [each for each in found if each.root == root]
        if not at_root:
            there = list(dict.fromkeys(each.root for each in found))
            raise ValueError(f"no module at root={root!r} in {source}; there is {there or 'none'}")
        found = at_root
    present = next((kind for kind in kinds if any(each.kind is kind for each in found)), None)
    if present is None:
        known = " or ".join(f"{KINDS[kind]}s" for kind in kinds)
        ends = " or ".join(LANDMARKS[kind] for kind in kinds)
        whose = f"in {named(dialect).title}'s names " if dialect else ""
        some = ", ".join(sorted(shapes)[:5])
        raise ValueError(
            f"no {known} {whose}in {source}: no name ends in {ends}, or in what other dialects call it; names are "
            f"{some}, …"
        )
    found = [each for each in found if each.kind is present]
    roots = list(dict.fromkeys(each.root for each in found))
    if len(roots) > 1:
        listed = ", ".join(map(repr, roots))
        raise ValueError(f"{len(roots)} {KINDS[present]}s in {source}: choose with root=, one of {listed}")
    readings = [(each, config or each.infer(shapes)) for each in found]
    if any(reading != readings[0][1] for _, reading in readings):
        candidates = " or ".join(f"{each.dialect.name!r} ({each.dialect.title})" for each in found)
        raise ValueError(
            f"{source} may be of several dialects, which read the same names as different functions: pass "
            f"dialect={candidates}, or config="
        )
    return readings[0]
