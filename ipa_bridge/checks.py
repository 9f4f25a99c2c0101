"""Input checks that both frameworks share; errors tell what was expected, what came, and how to mend it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np

from ipa_bridge.attention_config import DistanceForm, check_number
from ipa_bridge.config import IPAConfig, IPATransformerConfig, StructureModuleConfig

if TYPE_CHECKING:
    from numpy import ndarray

MIN_CHAIN = 8
"""Smallest number of residues for the check of the unit: fewer distances do not show the unit."""

MIN_SUSPECTED_UNIT = 10.0
"""Smallest unit, in Å, that is checked: in a smaller one, distances that look like Å may be right."""

CA_STEPS = (3.6, 4.0)
"""Range of the distance between consecutive Cα, Å; it is 3.8 over a trans peptide bond."""


class Shaped(Protocol):
    """Anything with a shape and a dtype: a numpy, JAX or torch array."""

    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def dtype(self) -> Any: ...  # noqa: D102


def check_rigids(rigids: Any, array: type | None = None) -> None:
    """Checks that frames are the package's Rigid, with arrays of its framework.

    Args:
        rigids: what the caller passed.
        array: type of the framework's arrays; None to accept anything with a shape and a dtype.

    Raises:
        ValueError: `rigids` is anything else.
    """
    if hasattr(rigids, "rigids") and not callable(rigids.rigids):
        raise ValueError(
            f"rigids must be Rigid(rotation, translation); got {type(rigids).__name__}: pass its .rigids, or "
            ".rigids[-1] if it has several layers"
        )
    if hasattr(rigids, "rigids"):
        raise ValueError(
            f"rigids must be Rigid(rotation, translation); got {type(rigids).__name__}: make a Rigid of the two "
            "arrays of structure.rigids(config), which are in the config's unit"
        )
    if not (hasattr(rigids, "rotation") and hasattr(rigids, "translation")):
        shape = f" {tuple(rigids.shape)}" if hasattr(rigids, "shape") else ""
        raise ValueError(
            f"rigids must be Rigid(rotation (*batch, N, 3, 3), translation (*batch, N, 3)); got {type(rigids).__name__}"
            f"{shape}: make a Rigid of the two arrays, or of homogeneous matrices with Rigid.from_4x4(matrix)"
        )
    check_arrays(array, **{f"rigids.{name}": getattr(rigids, name) for name in ("rotation", "translation")})


def check_config(config: Any, kind: type) -> None:
    """Checks that a module is made from a config of its own kind.

    Raises:
        ValueError: `config` is of another kind, or not a config.
    """
    if not isinstance(config, kind):
        came = repr(config) if isinstance(config, str) else type(config).__name__
        raise ValueError(
            f"config must be {_a(kind.__name__)}; got {came}: make one, by a preset if it has any, or take the config "
            f"of weights of such a module"
        )


def check_arrays(kind: type | None = None, /, **arrays: Any) -> None:
    """Checks that all arguments are arrays of the framework, or None.

    Args:
        kind: type of the framework's arrays; None to accept anything with a shape and a dtype.
        **arrays: arrays by the caller's names for them.

    Raises:
        ValueError: an argument is anything else.
    """
    for name, x in arrays.items():
        if x is None:
            continue
        if kind is not None and not isinstance(x, kind):
            raise ValueError(f"{name} must be a {kind.__name__}; got {type(x).__name__}: pass torch.as_tensor(x)")
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise ValueError(f"{name} must be an array; got {type(x).__name__}: pass jnp.asarray(x)")


def check_floating(**arrays: Any) -> None:
    """Checks that all arguments are floating-point arrays, or None.

    Raises:
        ValueError: an argument is not floating-point, or not an array.
    """
    check_arrays(**arrays)
    for name, x in arrays.items():
        if x is not None and "float" not in str(x.dtype):
            raise ValueError(f"{name} must be floating; got {x.dtype}: cast it, for example to float32")


def check_ipa_inputs(
    config: IPAConfig,
    single: Shaped,
    pair: Shaped | None,
    rotation: Shaped,
    translation: Shaped,
    mask: Shaped | None,
) -> None:
    """Checks that the inputs of an invariant point attention fit its config and each other.

    Raises:
        ValueError: an input is not an array, or single or pair is not floating-point; a rank, size or batch shape is
            wrong; or the config has a pair representation and the inputs have none, or the reverse.
    """
    check_arrays(mask=mask)
    check_floating(single=single, pair=pair)
    if len(single.shape) < 2 or single.shape[-1] != config.num_channel:
        raise ValueError(f"single must be (*batch, N, {config.num_channel}), num_channel last; got {_shape(single)}")
    if (pair is None) != (config.pair_channel is None):
        raise ValueError(
            f"config.pair_channel is {config.pair_channel}, but pair is {None if pair is None else _shape(pair)}: "
            + ("pass the pair representation" if pair is None else "pass None")
            + ", or replace pair_channel in the config"
        )
    residues = tuple(single.shape[:-1])
    _check_shapes(
        f"single {_shape(single)}",
        {
            "rigids.rotation": (rotation, (*residues, 3, 3)),
            "rigids.translation": (translation, (*residues, 3)),
            "pair": (pair, (*residues, residues[-1], config.pair_channel or 0)),
            "mask": (mask, residues),
        },
    )


def may_be_in_angstroms(config: IPAConfig) -> bool:
    """Returns True if frames in Å are a mistake that `warn_if_in_angstroms` can detect.

    They are no mistake if the attention itself divides by a position_scale.
    """
    return config.position_scale == 1 and (config.frame_unit or 0) >= MIN_SUSPECTED_UNIT


def warn_if_in_angstroms(config: IPAConfig, translation: ndarray, mask: ndarray | None) -> None:
    """Warns if a protein's frames were not divided by the unit; Python shows the warning once.

    Translations count as Å if at least half of the distances between consecutive residues, over all chains of the
    batch, are 3.6–4.0 units, as between Cα atoms in Å. Nucleic acids in Å are not detected: their residues lie further
    apart.

    Args:
        config: config of the attention that gets the frames.
        translation: (*B, N, 3), as the caller passes them.
        mask: (*B, N), 1 or True where a residue is valid; None for everywhere.
    """
    if not may_be_in_angstroms(config) or translation.shape[-2] < MIN_CHAIN:
        return
    step = np.diff(translation.astype(np.float32), axis=-2)
    length = np.sqrt(np.einsum("...i,...i->...", step, step))
    if mask is not None:
        length = length[(mask[..., 1:] != 0) & (mask[..., :-1] != 0)]
    least, most = CA_STEPS
    if length.size < MIN_CHAIN - 1 or 2 * np.count_nonzero((length >= least) & (length <= most)) < length.size:
        return
    unit = f"{config.frame_unit:g}"
    warnings.warn(
        f"frames in units of {unit} Å were expected (config.frame_unit); consecutive residues lie a median of "
        f"{np.median(length):.1f} units apart, as Cα atoms do in Å: divide the translations by {unit}, as "
        "Structure.rigids(config) does; if the weights take Å, use dataclasses.replace(config, frame_unit=1.0)",
        stacklevel=3,
    )


def check_structure_module_inputs(
    config: StructureModuleConfig,
    single: Shaped,
    pair: Shaped,
    aatype: Shaped,
    mask: Shaped | None,
    rigids: tuple[Shaped, Shaped] | None,
    update_mask: Shaped | None,
) -> None:
    """Checks that the inputs of a structure module fit its config and each other.

    Raises:
        ValueError: an input is not an array, single or pair is not floating-point, aatype is not integers, or a rank,
            size or batch shape is wrong.
    """
    check_arrays(aatype=aatype, mask=mask, update_mask=update_mask)
    check_floating(single=single, pair=pair)
    width, pair_width = config.input_channels
    if len(single.shape) < 2 or single.shape[-1] != width:
        field = "num_channel" if config.single_input_channel is None else "single_input_channel"
        raise ValueError(f"single must be (*batch, N, {width}), {field} last; got {_shape(single)}")
    check_residue_types(aatype)
    residues = tuple(single.shape[:-1])
    rotation, translation = (None, None) if rigids is None else rigids
    _check_shapes(
        f"single {_shape(single)}",
        {
            "pair": (pair, (*residues, residues[-1], pair_width)),
            "aatype": (aatype, residues),
            "mask": (mask, residues),
            "rigids.rotation": (rotation, (*residues, 3, 3)),
            "rigids.translation": (translation, (*residues, 3)),
            "update_mask": (update_mask, residues),
        },
    )


def check_tokens(config: IPATransformerConfig, single: Shaped, outside: Sequence[int] = ()) -> None:
    """Checks that an IPA transformer's input is tokens if it embeds them, and a single representation if not.

    Args:
        config: the transformer's config.
        single: what the caller passed.
        outside: tokens in the input that are outside the vocabulary.

    Raises:
        ValueError: the input is of the other sort, or has tokens outside the vocabulary.
    """
    if config.num_token is None:
        check_floating(single=single)
    if config.num_token is not None and ("int" not in str(single.dtype) or len(single.shape) < 1):
        raise ValueError(
            f"single must hold tokens, integers (*batch, N), because config.num_token is {config.num_token}; got "
            f"{_shape(single)} of {single.dtype}"
        )
    if len(outside):
        found = ", ".join(map(str, sorted(set(outside))))
        last = (config.num_token or 0) - 1
        raise ValueError(f"tokens must be 0–{last}, because config.num_token is {config.num_token}; got {found}")
    if config.num_token is None and (len(single.shape) < 2 or single.shape[-1] != config.num_channel):
        raise ValueError(f"single must be (*batch, N, {config.num_channel}), num_channel last; got {_shape(single)}")


def check_shape(name: str, array: Shaped, shape: Sequence[int], beside: str) -> None:
    """Checks that an array has the shape that fits another one, `beside`.

    Raises:
        ValueError: the array has another shape.
    """
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} must be {tuple(shape)} to fit {beside}; got {tuple(array.shape)}")


def check_residue_types(aatype: Shaped, outside: Sequence[int] = ()) -> None:
    """Checks that residue types are integers and, at valid residues, from 0 to 20.

    Args:
        aatype: residue types.
        outside: types of valid residues that are outside 0–20.

    Raises:
        ValueError: `aatype` is not integers, or `outside` is not empty.
    """
    if "int" not in str(aatype.dtype):
        raise ValueError(f"aatype must hold integers, 0–19 or 20 for unknown; got {aatype.dtype}")
    if len(outside):
        found = ", ".join(map(str, sorted(set(outside))))
        raise ValueError(
            f"aatype must be 0–19, or 20 for unknown, where a residue is valid; got {found}: give unknown residues 20, "
            "and give padding, whose aatype may be anything, a mask of 0"
        )


def check_per_atom(name: str, atoms: Shaped, slots: int, aatype: Shaped) -> None:
    """Checks that a per-atom array has the axes of aatype, then one of atoms, then at most one more.

    Raises:
        ValueError: the array has another shape.
    """
    expected = (*aatype.shape, slots)
    if tuple(atoms.shape[: len(expected)]) != expected or len(atoms.shape) > len(expected) + 1:
        raise ValueError(
            f"{name} must be {expected}, or that and one axis more, to fit aatype {_shape(aatype)}; "
            f"got {_shape(atoms)}: for several layers or members of a batch, pass one of them, or an aatype for each"
        )


def check_point_attention_inputs(
    q: Shaped,
    k: Shaped,
    v: Shaped,
    q_points: Shaped,
    k_points: Shaped,
    v_points: Shaped,
    pair: Shaped | None,
    pair_bias_weight: Shaped | None,
    point_weights: Shaped,
    mask: Shaped | None,
) -> None:
    """Checks that the arrays of a point attention fit each other.

    Raises:
        ValueError: a rank, size or batch shape is wrong, or pair_bias_weight is given without pair.
    """
    if len(q.shape) < 3:
        raise ValueError(f"q must be (*batch, N, H, C); got {_shape(q)}")
    if pair is None and pair_bias_weight is not None:
        raise ValueError("pair_bias_weight is given but pair is None: pass both, or None for both")
    *residues, num_head, _ = q.shape
    heads = (*residues, num_head)
    num_point_qk, num_point_v = (x.shape[-2] if len(x.shape) > 1 else 0 for x in (q_points, v_points))
    pair_channel = pair.shape[-1] if pair is not None and len(pair.shape) > 0 else 0
    _check_shapes(
        f"q {_shape(q)}",
        {
            "k": (k, tuple(q.shape)),
            "v": (v, (*heads, v.shape[-1] if len(v.shape) > 0 else 0)),
            "q_points": (q_points, (*heads, num_point_qk, 3)),
            "k_points": (k_points, (*heads, num_point_qk, 3)),
            "v_points": (v_points, (*heads, num_point_v, 3)),
            "pair": (pair, (*residues, residues[-1], pair_channel)),
            "pair_bias_weight": (pair_bias_weight, (pair_channel, num_head)),
            "point_weights": (point_weights, (num_head,)),
            "mask": (mask, tuple(residues)),
        },
    )


def check_masks(residues: tuple[int, ...], key_mask: Shaped | None, pair_mask: Shaped | None) -> None:
    """Checks that masks of keys and of pairs fit the residues.

    Args:
        residues: batch axes and the number of residues.
        key_mask: mask of the residues as keys.
        pair_mask: mask of pairs, queries by keys.

    Raises:
        ValueError: a mask is not an array, or has another shape.
    """
    check_arrays(key_mask=key_mask, pair_mask=pair_mask)
    shapes = {"key_mask": (key_mask, residues), "pair_mask": (pair_mask, (*residues, *residues[-1:]))}
    _check_shapes(f"residues {residues}", shapes)


def check_logits(logit_terms: int | None, distance_form: str, distance_epsilon: float) -> None:
    """Checks the numbers and names that determine how logits are computed.

    Raises:
        ValueError: a number is out of range, or no form of distance has the name.
    """
    if logit_terms is not None and (not isinstance(logit_terms, int) or logit_terms < 1):
        raise ValueError(f"logit_terms must be a positive integer, or None to count them; got {logit_terms!r}")
    if distance_form not in get_args(DistanceForm):
        raise ValueError(f"distance_form must be one of {', '.join(get_args(DistanceForm))}; got {distance_form!r}")
    check_number("distance_epsilon", distance_epsilon)
    if distance_epsilon < 0 or (distance_epsilon and distance_form == "squared"):
        raise ValueError(
            f"distance_epsilon must be 0 or more, and 0 where distance_form is 'squared'; got {distance_epsilon!r}"
        )


def _check_shapes(anchor: str, expected: Mapping[str, tuple[Shaped | None, tuple[int, ...]]]) -> None:
    for name, (array, shape) in expected.items():
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(f"{name} must be {shape} to fit {anchor}; got {_shape(array)}")


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _shape(array: Shaped) -> tuple[int, ...]:
    return tuple(array.shape)
