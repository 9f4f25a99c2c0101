"""Replaces the attention in PyTorch models of other projects by ours, with their layers, parameters and calls.

A layer stays the same object, with its parameters, buffers and hooks. Only its class becomes a subclass of its own with
our `forward`. No other package is imported: layers are recognised by the names and shapes of their parameters.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ipa_bridge.config import Implementation
from ipa_bridge.replacement import ReplacedLayer, ReplacementReport
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
from ipa_torch.replace.systems import LucidrainsAdapter, OpenFoldAdapter
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

    Layers of OpenFold 1 and 2 (monomer and multimer), ESMFold, FrameDiff and its family, Genie, MDGen, Uni-Fold, and
    the package `invariant-point-attention` are recognised by their parameters. Each keeps its call, its conventions and
    its parameter tensors. Optimisers, hooks, `state_dict()`, device and dtype stay as they are, and checkpoints saved
    before and after are interchangeable. `restore_ipa` undoes the replacement. Replacing again changes the
    implementation.

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
            f"an invariant point attention of OpenFold, ESMFold, FrameDiff or invariant-point-attention was expected "
            f"somewhere in this {type(model).__name__}; there is none" + (f" but these:{reasons}" if reasons else "")
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
