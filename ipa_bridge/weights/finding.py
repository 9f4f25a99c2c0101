"""Which module of which system a set of parameters holds, and what lies beside it.

A dialect is recognised by names and shapes alone. Where two would read the same parameters differently, that is an
error which names both; nothing is guessed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ipa_bridge.config import Config, IPAConfig
from ipa_bridge.kinds import KINDS, attention_of, has_attention
from ipa_bridge.parameters import Shapes
from ipa_bridge.weights.assumptions import fields, functional_fields
from ipa_bridge.weights.dialects import DIALECTS, Dialect, find_dialect
from ipa_bridge.weights.paths import names_below


class Found(NamedTuple):
    """A module among parameters."""

    dialect: Dialect
    kind: type
    root: str
    """The path that its names lie below, "" for none."""

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Their name below the root to the key, of all keys there."""
        return names_below(keys, self.root, self.dialect.separator)

    def infer(self, shapes: Shapes) -> Config:
        """What the module's names and shapes tell."""
        return self.dialect.infer({name: shapes[key] for name, key in self.names(shapes).items()}, self.kind)

    def parts(self, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Parts:
        """Sorts what lies at the module's path: its own parameters, those without effect, and other modules.

        Other systems' layers may hold an attention's parameters beside other modules. What is named as a parameter or
        a projection of an attention is counted as its own, so that an unknown one is not passed over.
        """
        known = {theirs for theirs, _ in self.dialect.names(config).values()}
        unused = self.dialect.unused.get(self.kind, {})
        below, without_effect, beside = {}, [], []
        for name, key in self.names(shapes).items():
            if name not in known and shapes[key] == unused.get(name):
                without_effect.append(name)
            elif name not in known and self._is_beside(name):
                beside.append(name)
            else:
                below[name] = key
        return Parts(self, below, tuple(without_effect), tuple(beside))

    def _is_beside(self, name: str) -> bool:
        """A name below the root is of another module than a system's attention."""
        module, dot, _ = name.partition(".")
        is_theirs = self.kind is IPAConfig and bool(self.dialect.rows[IPAConfig])
        return is_theirs and bool(dot) and not set(_words(module)) & _words_of_attentions()


@dataclass(frozen=True)
class Parts:
    """Parameters at a module's path, by what they are to it."""

    found: Found
    below: Mapping[str, str]
    """The module's own names to keys, unknown ones among them."""
    unused: tuple[str, ...]
    """Names of parameters that no forward of its system reads."""
    beside: tuple[str, ...]
    """Names of other modules' parameters."""

    @property
    def read(self) -> tuple[str, ...]:
        """Keys of the module's own."""
        return tuple(self.below.values())

    def notes(self) -> list[str]:
        """Sentences that tell which parameters are not read, and why."""
        notes, where = [], f" at {self.found.root}" if self.found.root else ""
        if self.unused:
            notes.append(f"{', '.join(self.unused)}{where}: ignored, since {self.found.dialect.title} never reads them")
        if self.beside:
            modules = list(dict.fromkeys(name.partition(".")[0] for name in self.beside))
            some = ", ".join(modules[:10]) + (f" and {len(modules) - 10} more" if len(modules) > 10 else "")
            notes.append(
                f"{some}{where}, beside the parameters of the attention: left, as other parts of the model; should the "
                f"attention read them, it is another one"
            )
        return notes

    def mention(self, *, stacklevel: int) -> None:
        """Warns of what is not read."""
        for note in self.notes():
            warnings.warn(note, stacklevel=stacklevel)


def modules(keys: Mapping[str, object], dialect: str | None = None, *, haiku: bool | None = None) -> list[Found]:
    """Every module of every dialect that the names may be of, those within others too.

    Args:
        keys: names with `/` between haiku's modules and `.` between torch's.
        dialect: only of this one.
        haiku: whether only haiku's or only torch's names are in question; None for both.
    """
    asked = DIALECTS.values() if dialect is None else [find_dialect(dialect)]
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
) -> tuple[Found, Config, frozenset[str]]:
    """The one module that is meant, its config, and the paths of the config's fields that are only assumed.

    That is the structure module, or where there is none the attention, or else the confidence head. Where it may be of
    several dialects that read it as the same function, a field is told if all of them tell the same.

    Args:
        shapes: of all parameters.
        dialect: whose they are; None to recognise it.
        root: path of the module, where there are several or another is meant.
        config: what the module is; a module of its kind is looked for.
        haiku: whether only haiku's or only torch's names are in question.
        source: what the errors call the parameters.

    Raises:
        ValueError: no such module; several and no root; dialects that would read it differently; or parameters that
            are missing or do not fit each other.
    """
    kinds = [kind for kind in KINDS if config is None or isinstance(config, kind)]
    found = [each for each in modules(shapes, dialect, haiku=haiku) if each.kind in kinds]
    if root is not None:
        found = _at_root(found, root, source)
    present = next((kind for kind in kinds if any(each.kind is kind for each in found)), None)
    if present is None:
        raise ValueError(_none_found(kinds, shapes, dialect, source))
    found = [each for each in found if each.kind is present]
    roots = list(dict.fromkeys(each.root for each in found))
    if len(roots) > 1:
        listed = ", ".join(map(repr, roots))
        raise ValueError(f"{len(roots)} {KINDS[present].title}s in {source}: choose with root=, one of {listed}")
    if config is not None:
        return found[0], config, frozenset()
    readings = [each.infer(shapes) for each in found]
    _check_pair(found, readings, source)
    return found[0], readings[0], _untold(found, readings, dialect is not None, source)


def _at_root(found: Sequence[Found], root: str, source: str) -> list[Found]:
    """The modules at a path, of which there must be one."""
    at_root = [each for each in found if each.root == root]
    if not at_root:
        there = list(dict.fromkeys(each.root for each in found))
        raise ValueError(f"no module at root={root!r} in {source}; there is {there or 'none'}")
    return at_root


def _none_found(kinds: Sequence[type], shapes: Shapes, dialect: str | None, source: str) -> str:
    """The message that no module of these kinds is there, with the names by which one would be known."""
    known = " or ".join(f"{KINDS[kind].title}s" for kind in kinds)
    ends = " or ".join(KINDS[kind].landmark for kind in kinds)
    whose = f"in {find_dialect(dialect).title}'s names " if dialect else ""
    some = ", ".join(sorted(shapes)[:5])
    return (
        f"no {known} {whose}in {source}: no name ends in {ends}, or in what other dialects call it; names are {some}, …"
    )


def _check_pair(found: Sequence[Found], readings: Sequence[Config], source: str) -> None:
    """No module lacks a pair representation that every attention of its system reads."""
    for each, reading in zip(found, readings, strict=True):
        pairless = has_attention(reading) and attention_of(reading).pair_channel is None
        forms = () if each.dialect.separator == "/" else each.dialect.forms.values()  # AlphaFold's names are ours too
        if pairless and forms and all(form.pair_required for form in forms):
            raise ValueError(
                f"{source}: {each.dialect.title}'s attention always reads a pair representation; this one has no "
                "parameters for it, so it is another system's, and how that scales its logits is unknown (MDGen: by "
                "√(1/3)). Pass config= if they are scaled by √(1/2), as without a pair here"
            )


def _untold(found: Sequence[Found], readings: Sequence[Config], named: bool, source: str) -> frozenset[str]:
    """Paths of the config's fields that not all candidates tell alike; the candidates must be the same function."""
    if any(functional_fields(reading) != functional_fields(readings[0]) for reading in readings):
        candidates = " or ".join(f"{each.dialect.name!r} ({each.dialect.title})" for each in found)
        raise ValueError(
            f"{source} may be of several dialects, which read the same names as different functions: pass "
            f"dialect={candidates}, or config="
        )
    values = [fields(reading) for reading in readings]
    told = [each.dialect.told(reading, named=named) for each, reading in zip(found, readings, strict=True)]
    agreed = {path for path, x in values[0].items() if all(other[path] == x for other in values)}
    return frozenset(values[0]) - agreed.intersection(*told)


@cache
def _words_of_attentions() -> frozenset[str]:
    """Words that the names of other systems' attentions are made of."""
    rows = (row for each in DIALECTS.values() for layout in each.rows.get(IPAConfig, {}).values() for row in layout)
    return frozenset(word for row in rows for word in _words(row.theirs.partition(".")[0]))


def _words(module: str) -> list[str]:
    return re.split(r"[_\d]+", module)
