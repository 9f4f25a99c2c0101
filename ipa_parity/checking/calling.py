"""Ways to call someone's module: the first one that works is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast


class CannotCall(Exception):
    """Raised where a call cannot be made, before the module sees it. Errors of the module itself say more."""


class Ways:
    """Calls that a module may take, the likeliest first, on inputs without and with a batch axis."""

    def __init__(self, calls: Iterable[Any]) -> None:
        self.ways = [(call, batched) for call in calls for batched in (False, True)]

    def first(self, attempt: Callable[[Any, tuple[Any, ...]], Any], inputs: tuple[Any, ...]) -> Any:
        """The result of the first call that gives an output in the shape of `single`, which is kept.

        If there is none, the first call counts that does not raise.

        Args:
            attempt: function of a call and inputs, which calls the module.
            inputs: single, pair, rotation, translation and mask.

        Raises:
            Exception: the first call's error, if all raise.
        """
        problem: Exception | None = None
        other: list[tuple[Any, Any]] = []
        for way in self.ways:
            call, batched = way
            add_batch = batched and inputs[0].ndim == 2
            given = tuple(None if x is None else x[None] for x in inputs) if add_batch else tuple(inputs)
            try:
                result = attempt(call, given)
                result = without_batch(result) if add_batch else result
            except Exception as error:  # another kind of frames or mask may do
                problem = error if problem is None or isinstance(problem, CannotCall) else problem
                continue
            if _shape(result) in (None, inputs[0].shape):
                self.ways = [way]
                return result
            other.append((way, result))
        if other:
            way, result = other[0]
            self.ways = [way]
            return result
        raise cast(Exception, problem)


def without_batch(result: Any) -> Any:
    """The output, or stages, of a batch of one."""
    if isinstance(result, Mapping):
        return {name: x[0] for name, x in result.items()}
    return (result[0] if isinstance(result, tuple) else result)[0]


def _shape(result: Any) -> Any:
    """The shape of an output; None if there is none."""
    if isinstance(result, Mapping):
        result = result.get("out")
    return getattr(result[0] if isinstance(result, tuple) else result, "shape", None)
