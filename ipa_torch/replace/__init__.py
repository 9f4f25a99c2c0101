"""Our attention inside other people's PyTorch models: their layers, parameters and calls, computed as ours is.

A layer stays the object that it is, with its parameters, buffers and hooks; only its class becomes a subclass of its
own whose `forward` is ours. Nothing of another package is imported: layers are known by the names and shapes of their
parameters.
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
    LucidrainsAdapter,
    OpenFoldAdapter,
    Settings,
    empty_layer,
    is_as_replaced,
    original_class,
)
from ipa_torch.replace.recognise import Recognised, find_attentions
from ipa_torch.replace.verify import compare_with_original

_NAMES_IN_OLD_PICKLES = {
    "_new": empty_layer,
    "_OpenFold": OpenFoldAdapter,
    "_Lucidrains": LucidrainsAdapter,
    "_Settings": Settings,
    "_Argument": Argument,
}
"""Names in this module by which replaced layers were pickled while it was one file; they must stay importable."""
globals().update(_NAMES_IN_OLD_PICKLES)


def replace_ipa(
    model: nn.Module, *, implementation: Implementation | None = None, verify: bool = True
) -> ReplacementReport:
    """Lets every invariant point attention in a model compute as ours does.

    Layers of OpenFold 1 and 2 (monomer and multimer), ESMFold, FrameDiff and its family, and the package
    `invariant-point-attention` are known by their parameters. Each keeps its call, its conventions and its
    parameters, the same tensors: optimisers, hooks, `state_dict()`, device and dtype are as before, and a checkpoint
    saved after is one saved before. `restore_ipa` undoes it. Replacing again changes the implementation.

    Hooks on the layer, forward and backward, on its projections and on any parameter's tensor are called as before.
    What our attention does not call as the layer did cannot have any, nor give way to another module: the pair's bias
    (only its weight is read), `down_z` (called on the sum over the pair), `softmax` and its like. The call raises then.
    Arguments beyond single, pair, frames and mask must have the values at which they change nothing, else the call
    raises. Epsilon is what it is at the swap. Second derivatives and forward mode want `implementation="reference"`.

    Args:
        model: any module, an attention itself too.
        implementation: of the attention, see `point_attention`.
        verify: compare each layer with what it was, outputs and gradients, on random input, in its dtype and on its
            device. Its output projection is another one there, so that neither a zero nor a large bias hides anything.
            The reference is the layer in float64, or in float32 where it cannot run in that.

    Returns:
        What was replaced and how far before and after are apart, and what looked like an attention and was left alone.

    Raises:
        ValueError: there is no layer to replace, or one computes something else than it did or cannot be compared; the
            model is untouched then.
    """
    check_implementation(implementation)
    found = find_attentions(model)
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
    """Undoes `replace_ipa`; the paths of the layers that are their own again.

    Raises:
        ValueError: a layer was changed further since (a class or a forward on top, as sharding, parametrisation and
            hooks that move it put there), which has to be undone first; nothing is restored then.
    """
    replaced = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    for path, module in replaced.items():
        if not is_as_replaced(module) or "forward" in vars(module):
            raise ValueError(
                f"{path or 'the model itself'}: a layer as replace_ipa left it was expected; it is a "
                f"{type(module).__name__} with a class or a forward on top: undo that first"
            )
    for module in replaced.values():
        module.__class__ = original_class(module)
        del module._ipa_twins
    return list(replaced)
