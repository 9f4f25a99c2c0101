"""Tables of what `make trained` measured, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from licences import LICENCES
from trained_judge import Whole
from trained_models import Trained

from ipa_parity.report import Comparison

SUBJECTS = ("swapped", "PyTorch", "Haiku")


def table_of_models(models: dict[str, Trained], attentions: Sequence[Comparison], wholes: Sequence[Whole]) -> str:
    """One row for each model: its attentions' worst errors in eps, and its predictions before and after the swap."""
