"""Replaces the attention in PyTorch models of other projects by ours, with their layers, parameters and calls.

A layer stays the same object, with its parameters, buffers and hooks. Only its class becomes a subclass of its own with
our `forward`. No other package is imported: layers are recognised by the names and shapes of their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ipa_bridge.config import Implementation
from ipa_bridge.replacement import ReplacedLayer, ReplacementReport
from ipa_bridge.weights.dialects import DIALECTS
from ipa_torch.attention import check_implementation
from ipa_torch.replace.adapters import (
    Adapter,
    Argument,
    Settings,
    empty_layer,
    is_as_replaced,
    original_class,
)
from ipa_torch.replace.recognise import Recognised, find_attentions
from ipa_torch.replace.systems import (
    CALLS,
    SYSTEMS,
    Call,
    LucidrainsAdapter,
    OpenFoldAdapter,
    forget_tables,
    system_of,
)
from ipa_torch.replace.verify import compare_with_original

_NAMES_IN_OLD_PICKLES = {
    "_new": empty_layer,
    "_OpenFold": OpenFoldAdapter,
    "_Lucidrains": LucidrainsAdapter,
    "_Settings": Settings,
    "_Argument": Argument,
}
"""Names that earlier pickles of replaced layers refer to in this module; they must stay importable."""
globals().update(_NAMES_IN_OLD_PICKLES)


def replace_ipa(
    model: nn.Module, *, implementation: Implementation | None = None, verify: bool = True
) -> ReplacementReport:
    """Lets every invariant point attention in a model compute as ours does.

    Layers of these systems are recognised by their parameters: OpenFold 1 and 2 (monomer and multimer), ESMFold,
    FrameDiff and its family, Genie, MDGen, Uni-Fold, the package `invariant-point-attention`, IgFold, lociPARSE,
    ABodyBuilder2, BioEmu, FlashABB and OmegaFold. So are layers of your own (`register_adapter`). Each keeps its call,
    its conventions and its parameter tensors. Optimisers, hooks, `state_dict()`, device and dtype stay as they are, and
    checkpoints saved before and after are interchangeable. `restore_ipa` undoes the replacement. Replacing again
    changes the implementation.

    Hooks on the layer (forward and backward), on its projections and on any parameter's tensor are called as before.
    Some submodules are not called as the layer called them: the pair's bias (only its weight is read), `down_z` (called
    on the sum over the pair), `softmax` and the like. If one of these has hooks or was exchanged, the call raises. It
    also raises if an argument beyond single, pair, frames and masks is not at its default, and in training if the layer
    would drop attention weights. Later changes of the layer's epsilon have no effect. Second derivatives and forward
    mode need `implementation="reference"`.

    Args:
        model: any module, also an attention itself.
        implementation: implementation of the attention; see `point_attention`.
        verify: compare outputs and gradients of each layer before and after, on random input, in its dtype and on its
            device. The comparison uses a random output projection, so that neither zero weights nor a large bias hide a
            difference. The reference is the layer in float64, or in float32 where it cannot run in float64. Only a
            comparison can replace a layer with more parameters than its system has, with an epsilon that no attribute
            holds, or with a mask that is not known by its name.

    Returns:
        Report of the layers replaced and how far they differ before and after, and of similar layers left alone.

    Raises:
        ValueError: there is no layer to replace, or a layer would compute another function or cannot be compared. The
            model is unchanged then.
    """
    check_implementation(implementation)
    found = find_attentions(model, verify=verify)
    left_alone = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    layers = [
        replace(layer, settings=replace(layer.settings, implementation=implementation))
        for layer in found.values()
        if isinstance(layer, Recognised)
    ]
    if not layers:
        reasons = "".join(f"\n  {path or 'the model itself'}: {reason}" for path, reason in left_alone.items())
        raise ValueError(
            f"an invariant point attention of a supported system ({_titles()}) was expected somewhere in this "
            f"{type(model).__name__}; there is none" + (f" but these:{reasons}" if reasons else "")
        )
    classes = [layer.replacement for layer in layers]
    verified = [compare_with_original(layer) if verify else (layer, None) for layer in layers]
    layers, errors = [layer for layer, _ in verified], [error for _, error in verified]
    for layer, replacement in zip(layers, classes, strict=True):
        layer.module.__class__ = replacement
        layer.module._ipa_twins = layer.settings
    return ReplacementReport(
        tuple(
            ReplacedLayer(x.path, x.title, x.original.__name__, str(x.dtype).removeprefix("torch."), error, x.unused)
            for x, error in zip(layers, errors, strict=True)
        ),
        left_alone,
    )


def _titles() -> str:
    """Titles of the systems whose layers can be replaced."""
    return ", ".join(DIALECTS[dialect].title for dialect in SYSTEMS if dialect in DIALECTS)


def restore_ipa(model: nn.Module) -> list[str]:
    """Undoes `replace_ipa` and returns the paths of the restored layers.

    Raises:
        ValueError: the class or the forward of a layer was changed after `replace_ipa`, for example by sharding,
            parametrisation or hooks that move it. Nothing is restored then: undo that change first.
    """
    replaced = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    for path, module in replaced.items():
        if not is_as_replaced(module) or "forward" in vars(module):
            raise ValueError(
                f"{path or 'the model itself'}: the layer's class or forward was changed after replace_ipa; it is a "
                f"{type(module).__name__} now: undo that first"
            )
    for module in replaced.values():
        module.__class__ = original_class(module)
        del module._ipa_twins
    return list(replaced)


def register_adapter(
    dialect: str,
    *,
    to_ours: Callable[..., Mapping[str, Any]],
    to_theirs: Callable[..., Mapping[str, Any]],
    result: Callable[..., Any] | None = None,
    method: str = "forward",
) -> None:
    """Lets `replace_ipa` replace layers of a class of your own, whose parameters a registered dialect describes.

    The layer's parameters go into our module by the dialect's table, so that only the call remains to be described.
    Its submodules are not called any more: hooks on them raise. Copies of the layer in another process need the same
    registration there.

    Args:
        dialect: name of the dialect; see `ipa_bridge.register_dialect`.
        to_ours: function of the layer and the arguments of its call, by their names, which returns the arguments of
            `InvariantPointAttention` by name: single, pair, rigids and, if there are masks, mask, key_mask, pair_mask.
        to_theirs: function that makes the arguments of the layer's call, by name, to compare before and after on random
            input. It takes a single representation, a pair representation (or None), rotation matrices, translations
            and a residue mask.
        result: function of the layer, our attention's output and the arguments of the layer's call, by their names,
            which makes what the layer returns, such as a residual sum; None if that is the output.
        method: the method to replace, if it is not forward: forward then stays as it is.

    Raises:
        ValueError: there is no such dialect, or it has an adapter already.
    """
    system = system_of(dialect, to_ours, to_theirs, method)
    if dialect in SYSTEMS:
        raise ValueError(f"layers of the dialect {dialect!r} can be replaced already: call unregister_adapter first")
    SYSTEMS[dialect], CALLS[dialect] = system, Call(to_ours, result)


def unregister_adapter(dialect: str) -> None:
    """Undoes `register_adapter`, as tests may need to.

    Raises:
        ValueError: no adapter was registered for the dialect.
    """
    if dialect not in CALLS:
        known = ", ".join(CALLS) or "none"
        raise ValueError(f"a dialect with a registered adapter was expected ({known}); got {dialect!r}")
    del SYSTEMS[dialect], CALLS[dialect]
    forget_tables()
