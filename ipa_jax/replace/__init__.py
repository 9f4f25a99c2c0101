"""Replaces AlphaFold's attention by ours, with the same parameters under the same names."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType, TracebackType
from typing import Any

import jax

from ipa_bridge.config import Implementation
from ipa_bridge.replacement import ReplacedLayer, ReplacementReport
from ipa_jax.attention import check_implementation
from ipa_jax.replace.adapters import replaced_class
from ipa_jax.replace.recognise import find_attentions
from ipa_jax.replace.verify import compare_with_original


def replace_alphafold_ipa(
    *,
    modules: str | ModuleType | Iterable[str | ModuleType] | None = None,
    implementation: Implementation | None = None,
    verify: bool = True,
) -> AlphaFoldReplacement:
    """Lets AlphaFold's structure modules, monomer and multimer, build our attention instead of their own.

    The replacement lasts until `.restore()` is called or, as a context manager, until the end of the block:

        with ipa_jax.replace_alphafold_ipa():
            result = model_runner.predict(features, random_seed=0)

    By default this holds for DeepMind's or ColabFold's package alphafold, if it is installed, and for every copy of
    AlphaFold's attention that is already imported, under any module name: import colabdesign first, and its copies are
    found. A copy is a Haiku module `InvariantPointAttention` that takes AlphaFold's arguments. If it takes more, these
    must have defaults, and a call that passes anything else raises.

    Parameters keep their names and shapes, so published ones still load. A fresh `init` draws other numbers from the
    same distribution. JAX's caches are cleared, both here and at the end of the replacement, so that jitted functions
    are traced again at their next call. Executables that were compiled ahead of time do not change.

    Args:
        modules: only these modules, or names of modules to import, such as "net.model.folding" for Umol's.
        implementation: implementation of the attention; see `point_attention`.
        verify: compare with AlphaFold's own attention on random input of its sizes, in float32: outputs and gradients,
            with masked residues.

    Raises:
        ValueError: no module with AlphaFold's attention is found, one of `modules` has none, or one computes another
            function than AlphaFold's. Nothing is replaced then.
    """
    check_implementation(implementation)
    found, left_alone = find_attentions(modules)
    ours, rows = {}, []
    for attention in found:
        module, original, config = attention
        ours[module] = replaced_class(original, config, implementation)
        error = compare_with_original(attention, ours[module]) if verify else None
        name = getattr(original, "__name__", repr(original))
        rows.append(ReplacedLayer(module.__name__, f"AlphaFold, {config.layout}", name, "float32", error))
    before = {module: module.InvariantPointAttention for module in ours}
    for module, attention in ours.items():
        module.InvariantPointAttention = attention  # type: ignore[attr-defined]
    jax.clear_caches()
    return AlphaFoldReplacement(ReplacementReport(tuple(rows), left_alone), before, ours)


class AlphaFoldReplacement:
    """A replacement of AlphaFold's attentions. It ends with `restore`, or with the `with` block that uses it.

    Attributes:
        report: what was replaced, and how far outputs before and after differ.
    """

    def __init__(
        self, report: ReplacementReport, before: dict[ModuleType, Any], installed: dict[ModuleType, Any]
    ) -> None:
        self.report = report
        self._before, self._installed = before, installed

    def __enter__(self) -> ReplacementReport:
        if not self._before:
            raise ValueError("an active replacement was expected; this one is undone: call replace_alphafold_ipa again")
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return str(self.report)

    def restore(self) -> None:
        """Gives AlphaFold back the attentions that it had before; a second call does nothing.

        Raises:
            ValueError: another attention was installed since; nothing is changed then.
        """
        for module in self._before:
            if module.InvariantPointAttention is not self._installed[module]:
                raise ValueError(
                    f"{module.__name__}: the attention that this replacement installed was expected; it was replaced "
                    f"since by {module.InvariantPointAttention!r}: undo that first"
                )
        for module, attention in self._before.items():
            module.InvariantPointAttention = attention  # type: ignore[attr-defined]
        if self._before:
            jax.clear_caches()
        self._before = {}
