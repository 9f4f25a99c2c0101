"""The installed frameworks, and JAX's attention core without Haiku."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ipa_bridge


def installed_frameworks() -> tuple[str, ...]:
    """The frameworks, of "jax" and "torch", that are installed; "jax" needs Haiku too."""
    modules = {"jax": ("jax", "haiku"), "torch": ("torch",)}
    return tuple(name for name, needs in modules.items() if all(importlib.util.find_spec(module) for module in needs))


def jax_point_attention() -> Callable:
    """`ipa_jax.point_attention`; without Haiku, `ipa_jax` is imported with nothing but its attention."""
    if importlib.util.find_spec("haiku") is None and "ipa_jax" not in sys.modules:
        package = ModuleType("ipa_jax")
        package.__path__ = [str(Path(ipa_bridge.__file__).parent.parent / "ipa_jax")]
        sys.modules["ipa_jax"] = package
    return importlib.import_module("ipa_jax.attention").point_attention
