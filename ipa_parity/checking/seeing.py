"""Sees what kind of thing a candidate is, and puts it behind one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ipa_bridge.config import IPAConfig
from ipa_parity.checking.candidates import Candidate, Framework, function_candidate, make_names


def see(
    candidate: Any,
    config: IPAConfig | None,
    *,
    parameters: str | Mapping[str, str] | None,
    call: Callable | None,
    framework: Framework | None,
    name: str | None,
) -> Candidate:
    """A candidate from what a user passes to `check`; its arguments are explained there.

    Raises:
        ValueError: it is of no kind that can be checked, or its config is unknown.
    """
    name = name or getattr(candidate, "__name__", None) or type(candidate).__name__
    kinds = {kind.__module__.partition(".")[0] for kind in type(candidate).__mro__}
    if isinstance(candidate, Candidate):
        return candidate
    if "torch" in kinds:
        from ipa_parity.checking.torch_modules import module_candidate

        return module_candidate(candidate, config, parameters=parameters, call=call, name=name)
    for package in {"haiku", "flax", "equinox"} & kinds if not inspect.isclass(candidate) else ():
        from ipa_parity.checking import jax_modules

        make = getattr(jax_modules, f"{package}_candidate")
        return make(candidate, config, parameters=parameters, call=call, name=name)
    if inspect.isclass(candidate) or not callable(candidate):
        came = f"the class {name}" if inspect.isclass(candidate) else name
        raise ValueError(
            "an instance of a module, a transformed Haiku function, or a function of (parameters, single, pair, "
            f"rotation, translation, mask) was expected; got {came}"
        )
    if config is None:
        raise ValueError("config= was expected, since a function has no parameters that tell its widths; got None")
    return function_candidate(
        _called_by(call, candidate) if call else candidate,
        config,
        make_names(parameters),
        framework=framework,
        name=name,
    )


def _called_by(call: Callable, function: Callable) -> Callable:
    """A function of parameters and inputs, from a user's call of a function that still takes its parameters."""

    def run(parameters: Any, *inputs: Any) -> Any:
        return call(lambda *more, **named: function(parameters, *more, **named), *inputs)

    return run
