"""Finds which module of which system a set of parameters holds, and which other parameters lie beside it.

A dialect is recognised by names and shapes alone. If two dialects would read the same parameters as different
functions, an error names both; nothing is guessed.
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
from ipa_bridge.weights.dialects import DIALECTS, Dialect, find_dialect, layout_of
from ipa_bridge.weights.paths import names_below


class Found(NamedTuple):
    """A module found among parameters."""

    dialect: Dialect
    kind: type
    root: str
    """Path of the module, which its names start with; "" for none."""

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Maps the names below the root to their keys, for all keys below the root."""
        return names_below(keys, self.root, self.dialect.separator)

    def infer(self, shapes: Shapes) -> Config:
        """Infers the module's config from its names and shapes."""
        return self.dialect.infer({name: shapes[key] for name, key in self.names(shapes).items()}, self.kind)

    def parts(self, shapes: Mapping[str, tuple[int, ...]], config: Config) -> Parts:
        """Sorts the parameters at the module's path: its own, those without effect, and those of other modules.

        In other systems, an attention's parameters may lie beside other modules. An unknown name counts as the
        attention's own if it belongs to no submodule, or if its submodule shares a word with those of known attentions:
        it then raises an error later instead of being ignored.
        """
        known = {theirs for theirs, _ in self.dialect.names(config).values()}
        unused = self.dialect.unused.get(self.kind, {})
        below, without_effect, beside = {}, [], []
        for name, key in self.names(shapes).items():
            if name not in known and shapes[key] == unused.get(name):
                without_effect.append(name)
            elif name not in known and self._is_beside(name):
                beside += [] if name.partition(".")[0] in self.dialect.beside else [name]
            else:
                below[name] = key
        return Parts(self, below, tuple(without_effect), tuple(beside))

    def _is_beside(self, name: str) -> bool:
        """Returns True if a name below the root belongs to another module beside the attention."""
        module, dot, _ = name.partition(".")
        if module in self.dialect.other_modules.get(self.kind, {}) or module in self.dialect.beside:
            return True
        is_theirs = self.kind is IPAConfig and bool(self.dialect.rows[IPAConfig])
        return is_theirs and bool(dot) and not set(_words(module)) & words_of_attentions()


@dataclass(frozen=True)
class Parts:
    """The parameters at a module's path, sorted by whom they belong to."""

    found: Found
    below: Mapping[str, str]
    """The module's own names to keys, including unknown names."""
    unused: tuple[str, ...]
    """Names of parameters that no forward pass of its system reads."""
    beside: tuple[str, ...]
    """Names of other modules' parameters, except those of modules that the dialect lists."""

    @property
    def read(self) -> tuple[str, ...]:
        """Keys of the module's own parameters."""
        return tuple(self.below.values())

    def notes(self) -> list[str]:
        """Sentences on which parameters are not read, and why."""
        notes, where = [], f" at {self.found.root}" if self.found.root else ""
        if self.unused:
            notes.append(f"{', '.join(self.unused)}{where}: ignored, since {self.found.dialect.title} never reads them")
        modules = list(dict.fromkeys(name.partition(".")[0] for name in self.beside))
        known = self.found.dialect.other_modules.get(self.found.kind, {})
        notes += [f"{name}{where}: ignored, as {known[name]}" for name in modules if name in known]
        modules = [name for name in modules if name not in known]
        if modules:
            some = ", ".join(modules[:10]) + (f" and {len(modules) - 10} more" if len(modules) > 10 else "")
            notes.append(
                f"{some}{where}, beside the parameters of the attention: ignored, as other parts of the model; if the "
                f"attention reads them, it is not {self.found.dialect.title}'s"
            )
        return notes

    def mention(self, *, stacklevel: int) -> None:
        """Warns about parameters that are not read."""
        for note in self.notes():
            warnings.warn(note, stacklevel=stacklevel)


def modules(keys: Mapping[str, object], dialect: str | None = None, *, haiku: bool | None = None) -> list[Found]:
    """Lists every module that the names may belong to in any dialect, including modules within modules.

    Args:
        keys: names with `/` between haiku's modules and `.` between torch's.
        dialect: the only dialect to try; None for all.
        haiku: True to try only dialects with haiku's names, False only those with torch's; None for both.
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
                usual = dialect is not None or (each.at(root, kind) and _has_beside(each, prefix, keys))
                if there and not foreign and usual:
                    found.append(Found(each, kind, root))
    told = {(each.kind, each.root) for each in found if each.dialect.beside}
    return [each for each in found if each.dialect.beside or (each.kind, each.root) not in told]


def _has_beside(dialect: Dialect, prefix: str, keys: Iterable[str]) -> bool:
    """Returns True if all submodules that lie beside a dialect's attention have parameters there."""
    starts = [f"{prefix}{name}{dialect.separator}" for name in dialect.beside]
    return all(any(key.startswith(start) for key in keys) for start in starts)


def find_module(
    shapes: Shapes,
    *,
    dialect: str | None = None,
    root: str | None = None,
    config: Config | None = None,
    haiku: bool | None = None,
    source: str = "these parameters",
) -> tuple[Found, Config, frozenset[str]]:
    """Finds the one module that is meant; returns it, its config, and the paths of the config's assumed fields.

    It is of the first kind present: structure module, transformer, block, attention, confidence head. If it may be of
    several dialects that read it as the same function, a field is determined only if all of them determine it alike.

    Args:
        shapes: shapes of all parameters, by name.
        dialect: the system whose names these are; None to recognise it.
        root: path of the module; needed if there are several, or to choose another one.
        config: the module's config; only modules of its kind are considered.
        haiku: True to try only dialects with haiku's names, False only those with torch's; None for both.
        source: name of the parameters' source in error messages.

    Raises:
        ValueError: there is no such module, there are several and `root` is None, dialects would read it differently,
            or parameters are missing or do not fit each other.
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
    pairs = list(zip(found, readings, strict=True))
    fitting = [pair for pair in pairs if not _lacks_pair(*pair) and _has_biases(*pair)]
    found, readings = map(list, zip(*(fitting or pairs), strict=True))
    _check_pair(found, readings, source)
    return found[0], readings[0], _untold(found, readings, dialect is not None, source)


def _at_root(found: Sequence[Found], root: str, source: str) -> list[Found]:
    """The modules found at a path; raises if there is none."""
    at_root = [each for each in found if each.root == root]
    if not at_root:
        there = list(dict.fromkeys(each.root for each in found))
        raise ValueError(f"no module at root={root!r} in {source}; modules were found at {there or 'no path'}")
    return at_root


def _none_found(kinds: Sequence[type], shapes: Shapes, dialect: str | None, source: str) -> str:
    """Error message for a missing module of these kinds, with the names that would identify one."""
    known = " or ".join(f"{KINDS[kind].title}s" for kind in kinds)
    ends = " or ".join(KINDS[kind].landmark for kind in kinds)
    whose = f"with the names of {find_dialect(dialect).title} " if dialect else ""
    some = ", ".join(sorted(shapes)[:5])
    return (
        f"no {known} {whose}in {source}: no name ends in {ends}, or in another system's name for it; names are "
        f"{some}, …"
    )


def _check_pair(found: Sequence[Found], readings: Sequence[Config], source: str) -> None:
    """Raises if a module has no pair representation although every attention of its system reads one."""
    for each, reading in zip(found, readings, strict=True):
        if _lacks_pair(each, reading):
            raise ValueError(
                f"{source}: {each.dialect.title}'s attention always reads a pair representation; this one has no "
                "parameters for it, so it is from another system, whose scale of logits is unknown (in MDGen: √(1/3)). "
                "Pass config= if the scale is √(1/2), as it is here without a pair"
            )


def _lacks_pair(found: Found, reading: Config) -> bool:
    """True for a module without a pair representation of a system that always reads one."""
    pairless = has_attention(reading) and attention_of(reading).pair_channel is None
    forms = () if found.dialect.separator == "/" else found.dialect.forms.values()  # AlphaFold's names are ours too
    return pairless and bool(forms) and all(form.pair_required for form in forms)


def _has_biases(found: Found, reading: Config) -> bool:
    """True unless a module lacks biases that its system's attention has, or the reverse."""
    form = found.dialect.forms.get(layout_of(reading))
    return form is None or not has_attention(reading) or form.has_biases_of(attention_of(reading))


def _untold(found: Sequence[Found], readings: Sequence[Config], named: bool, source: str) -> frozenset[str]:
    """Paths of the config's fields that the candidates do not all determine alike; raises if their functions differ."""
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


_GENERAL_WORDS = frozenset({"edge", "final"})
"""Words in names of attentions' submodules that also other modules beside an attention may have."""


@cache
def words_of_attentions() -> frozenset[str]:
    """Words in the names of submodules of other systems' attentions, and of few other modules."""
    rows = (row for each in DIALECTS.values() for layout in each.rows.get(IPAConfig, {}).values() for row in layout)
    return frozenset(word for row in rows for word in _words(row.theirs.partition(".")[0])) - _GENERAL_WORDS


def _words(module: str) -> list[str]:
    return re.split(r"[_\d]+", module)
