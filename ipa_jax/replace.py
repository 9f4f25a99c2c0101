"""Our attention inside AlphaFold: its structure module builds ours, with the same parameters under the same names."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ipa_bridge.config import Implementation, IPAConfig, Layout
from ipa_bridge.proteins.frames import random_frames
from ipa_bridge.replacement import RESIDUES, ReplacedLayer, ReplacementReport
from ipa_bridge.tolerance import bound
from ipa_bridge.weights import Weights
from ipa_jax.attention import choose_implementation
from ipa_jax.invariant_point_attention import InvariantPointAttention
from ipa_jax.rigid import Rigid

MODULES: dict[str, Layout] = {"alphafold.model.folding": "monomer", "alphafold.model.folding_multimer": "multimer"}
"""Where AlphaFold has its attentions, in DeepMind's package and ColabFold's."""


class AlphaFoldReplacement:
    """AlphaFold's attentions are ours until `restore` is called, or the `with` block ends that this was made for.

    Attributes:
        report: what was replaced, and how far before and after are apart.
    """

    def __init__(
        self, report: ReplacementReport, before: dict[ModuleType, Any], installed: dict[ModuleType, Any]
    ) -> None:
        self.report = report
        self._before, self._installed = before, installed

    def __enter__(self) -> ReplacementReport:
        if not self._before:
            raise ValueError(
                "a replacement that holds was expected; this one is undone: call replace_alphafold_ipa again"
            )
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return str(self.report)

    def restore(self) -> None:
        """Gives AlphaFold back the attentions that it had before; the second time it does nothing.

        Raises:
            ValueError: somebody has put another attention there since; nothing is changed then.
        """
        for module in self._before:
            if module.InvariantPointAttention is not self._installed[module]:
                raise ValueError(
                    f"{module.__name__}: the attention that was put there was expected; there is another one since "
                    f"({module.InvariantPointAttention!r}): undo that first"
                )
        for module, attention in self._before.items():
            module.InvariantPointAttention = attention  # type: ignore[attr-defined]
        if self._before:
            jax.clear_caches()
        self._before = {}


def replace_alphafold_ipa(*, implementation: Implementation | None = None, verify: bool = True) -> AlphaFoldReplacement:
    """Lets AlphaFold's structure modules, monomer and multimer, build our attention instead of their own.

    As a function it holds until `.restore()`; as a context manager until the end of the block:

        with ipa_jax.replace_alphafold_ipa():
            result = model_runner.predict(features, random_seed=0)

    Parameters keep their names and shapes, so that published ones go on loading; a fresh `init` draws other numbers of
    the same distribution. What was traced before is another program: JAX's caches are cleared, here and when it is
    undone, so that jitted functions are traced again when they are called next. Executables that were compiled ahead
    of time stay what they are.

    Args:
        implementation: of the attention, see `point_attention`.
        verify: compare with AlphaFold's own on random input of its sizes, in float32.

    Raises:
        ValueError: there is no `alphafold` package, or its attention computes something else than AlphaFold's; nothing
            is replaced then.
    """
    choose_implementation(implementation, RESIDUES)
    try:
        modules = {name: importlib.import_module(name) for name in MODULES if _exists(name)}
    except ImportError as broken:
        raise ValueError(f"AlphaFold's package could not be imported as it is installed: {broken}") from broken
    if not modules:
        raise ValueError(
            f"DeepMind's or ColabFold's package alphafold was expected, with {' or '.join(MODULES)}; neither can be "
            "imported: install one, or use ipa_jax.InvariantPointAttention in your own module"
        )
    ours, rows = {}, []
    for name, module in modules.items():
        original = _original(module.InvariantPointAttention)
        ours[module] = _adapted(original, MODULES[name], implementation)
        error = _verify(name, original, ours[module], MODULES[name]) if verify else None
        rows.append(ReplacedLayer(name, f"AlphaFold, {MODULES[name]}", original.__name__, "float32", error))
    before = {module: module.InvariantPointAttention for module in ours}
    for module, attention in ours.items():
        module.InvariantPointAttention = attention  # type: ignore[attr-defined]
    jax.clear_caches()
    return AlphaFoldReplacement(ReplacementReport(tuple(rows)), before, ours)


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _original(attention: Any) -> Any:
    """The class that AlphaFold defines."""
    return getattr(attention, "ipa_twins_original", attention)


def _adapted(original: Any, layout: Layout, implementation: Implementation | None) -> Any:
    """Our attention with the constructor and the call of AlphaFold's."""
    preset = IPAConfig.alphafold2() if layout == "monomer" else IPAConfig.alphafold_multimer()

    class Adapted(InvariantPointAttention):
        """Our attention, called as AlphaFold calls its own."""

        ipa_twins_original = original

        def __init__(
            self,
            config: Any,
            global_config: Any,
            dist_epsilon: float = 1e-8,
            name: str = "invariant_point_attention",
        ) -> None:
            ours = replace(
                preset,
                **_widths(config),
                norm_epsilon=dist_epsilon,
                frame_unit=None,  # AlphaFold's own affair
                zero_init=bool(global_config.zero_init),
            )
            super().__init__(ours, implementation=implementation, name=name)

    def attend(self: Any, single: Array, pair: Array, mask: Array, rigids: Rigid) -> Any:
        self.config = replace(self.config, pair_channel=pair.shape[-1])
        single = single.astype(jnp.promote_types(single.dtype, rigids.translation.dtype))  # in which theirs returns
        return InvariantPointAttention.__call__(self, single, pair, rigids, mask[..., 0])

    class Monomer(Adapted):
        def __call__(self, inputs_1d: Array, inputs_2d: Array, mask: Array, affine: Any) -> Array:  # type: ignore[override]
            rotation = jnp.stack([jnp.stack(row, -1) for row in affine.rotation], -2)
            return attend(self, inputs_1d, inputs_2d, mask, Rigid(rotation, jnp.stack(affine.translation, -1)))

    class Multimer(Adapted):
        def __call__(self, inputs_1d: Array, inputs_2d: Array, mask: Array, rigid: Any) -> Array:  # type: ignore[override]
            rigids = Rigid(rigid.rotation.to_array(), rigid.translation.to_array())
            return attend(self, inputs_1d, inputs_2d, mask, rigids)

    return Monomer if layout == "monomer" else Multimer


def _widths(config: Any) -> dict[str, Any]:
    """What AlphaFold's config of a structure module and ours call alike."""
    fields = ("num_channel", "num_head", "num_scalar_qk", "num_scalar_v", "num_point_qk", "num_point_v")
    return {field: getattr(config, field) for field in fields}


def _verify(where: str, original: Any, adapted: Any, layout: Layout) -> float:
    """How far the attention is from AlphaFold's own, in epsilons.

    Raises:
        ValueError: further than rounding explains, or it cannot be run.
    """
    config = IPAConfig.alphafold2() if layout == "monomer" else IPAConfig.alphafold_multimer()
    rng = np.random.default_rng(0)
    frames = random_frames(rng, (RESIDUES,), spread=1.5)
    valid = rng.random(RESIDUES) > 0.1
    drawn = [rng.standard_normal((RESIDUES, config.num_channel))]
    drawn += [rng.standard_normal((RESIDUES, RESIDUES, config.pair_channel or 0))]
    arrays = [x.astype(np.float32) for x in (*drawn, valid[:, None], *frames)]
    widths, params = SimpleNamespace(**_widths(config)), Weights.random(config).to_haiku()

    def run(attention: Any) -> np.ndarray:
        def forward(single: Array, pair: Array, mask: Array, rotation: Array, translation: Array) -> Array:
            return attention(widths, SimpleNamespace(zero_init=False))(
                single, pair, mask, _alphafold_frames(where, layout, rotation, translation)
            )

        transformed: Any = hk.without_apply_rng(hk.transform(forward))
        return np.asarray(jax.jit(transformed.apply)(params, *arrays), np.float64)[valid]

    # Multimer's geometry asserts float32, which its own float64 constants break where x64 is on.
    try:
        with (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.default_matmul_precision("highest"),
        ):
            expected, actual = run(original), run(adapted)
    except Exception as error:
        raise ValueError(
            f"{where}: its InvariantPointAttention was run on random input, to compare before and after, and said "
            f"{type(error).__name__}: {error}; pass verify=False to replace it unseen"
        ) from error
    apart = float(np.abs(actual - expected).max() / np.abs(expected).max() / np.finfo(np.float32).eps)
    explained = bound("out", "float32")
    if not apart <= explained:
        raise ValueError(
            f"{where}: its InvariantPointAttention has the parameters of AlphaFold's attention but computes another "
            f"function: {apart:.3g} eps of float32 apart on random input, where rounding explains "
            f"{explained}; nothing was replaced"
        )
    return apart


def _alphafold_frames(where: str, layout: Layout, rotation: Array, translation: Array) -> Any:
    """What AlphaFold's attention is called with."""
    package = where.rpartition(".")[0]
    if layout == "monomer":
        quat_affine = importlib.import_module(f"{package}.quat_affine")
        return quat_affine.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
    geometry = importlib.import_module(f"{package}.geometry")
    rotations, vectors = geometry.Rot3Array.from_array(rotation), geometry.Vec3Array.from_array(translation)
    return geometry.Rigid3Array(rotations, vectors)
