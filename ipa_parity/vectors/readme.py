"""The page that lies in a folder of test vectors: names, shapes, units and conventions."""

from __future__ import annotations

from dataclasses import fields

from ipa_bridge.config import IPAConfig
from ipa_bridge.tolerance import BOUNDS
from ipa_parity.attention.stages import Arrays
from ipa_parity.checking.judging import STAGES

PAGE = """\
# Test vectors of invariant point attention (Jumper et al. 2021, Suppl. Algorithm 22)

Each probe is one input. It lies in `<probe>.<dtype>.safetensors`, and again in `<probe>.<dtype>.npz`. `manifest.json`
lists the probes, the config and the seed. All numbers of a file are of its dtype; the mask is boolean. Expected values
were computed in float64 from the inputs as they are in the file, then rounded to its dtype. Arrays lie in row-major
order, the last axis fastest.

## What to compute

Give your attention `input/…` and `parameter/…`. Write one file per probe and dtype under the probe's file name,
.safetensors or .npz, with an array `out` in the shape of `expected/out`. If you have them, add the stages {stages}
and the gradients `gradient/single`, `gradient/pair`, … under the names below. Then

    ipa-parity check --outputs YOURS --vectors THIS_FOLDER

says whether they are right, and if not, which known mistake gives them. Probes may be left out.

## Conventions

- Frames: x_global = R·x_local + t, with column vectors; `input/rotation[…, a, b]` is the entry in row a and column b.
- Unit: `input/translation` is in {unit}. The attention divides it by position_scale, here {scale:g}, before all else.
- Mask: True for valid residues. A masked residue is no key for valid ones. Its own rows do not count, neither in `out`
  nor in the stages: anything may stand there. Its cotangent is zero, so gradients count everywhere.
- Layout: {layout}. A `…/weights` of ours is (inputs, outputs): y = x·W + b. If `parameters` in `manifest.json` is not
  null, parameters and their gradients have that system's names and layouts instead.
  - monomer: scalars are packed per head, `kv_scalar` as (H, [C keys | Cv values]); points lie as (3, H, P), coordinates
    outermost, in `kv_point_local` as (3, H, [P keys | Pv values]).
  - multimer: queries, keys and values are apart; points lie per head as (3, P).
- Features before `output_projection`: o (H, Cv) | x (H, Pv) | y (H, Pv) | z (H, Pv) | norms (H, Pv) | o_pair (H, c_z).
- Length of a point: {norm} with ε = {epsilon:g}. The logits' factor is √(1/{terms}).{others}
- `logits` count up to a constant per row, and for valid keys only. `points` are in the local frame.
- Gradients are those of Σ cotangent·out. The nine entries of a rotation count as independent numbers.

## How errors are measured

max|yours − expected| / max|expected| over what counts, in machine epsilons of the dtype: 2⁻²³ in float32 and 2⁻⁵² in
float64. Bounds: {bounds}.
They are multiplied by 1 + max|t| / max|points|, with t after the division. Gradients that are mathematically zero, of
biases that cancel in the softmax, are measured against the size of their terms.

## Arrays of the first probe

N = {n} residues, H = {h} heads. Probes differ in N, and `a_batch` has a batch axis in front of every input and stage.

| name | shape |
|---|---|
"""


OTHERS = (
    "distance_form",
    "distance_epsilon",
    "point_weight_form",
    "rotary_embedding",
    "pair_bias",
    "pair_value_channel",
    "pair_value_per_head",
)
"""Fields of a config by which it departs from Algorithm 22."""


def readme(arrays: Arrays, config: IPAConfig) -> str:
    """The page's text, with the arrays of one probe."""
    bounds = ", ".join(f"{stage} {BOUNDS[stage]}" for stage in (*STAGES, "gradient"))
    usual = {x.name: x.default for x in fields(config)}
    others = ", ".join(f"`{x}={getattr(config, x)!r}`" for x in OTHERS if getattr(config, x) != usual[x])
    page = PAGE.format(
        stages=", ".join(f"`{x}`" for x in STAGES[:-1]),
        unit="units of the model" if config.frame_unit is None else f"units of {config.frame_unit:g} Å",
        scale=config.position_scale,
        layout=config.layout,
        norm="√(|x|² + ε)" if config.norm_form == "add" else "√max(|x|², ε²)",
        epsilon=config.norm_epsilon,
        terms=config.num_logit_terms,
        others=f"\n- Not as in Algorithm 22: {others}; the docstring of `IPAConfig` says what that is."
        if others
        else "",
        bounds=bounds,
        n=arrays["input/mask"].shape[-1],
        h=config.num_head,
    )
    return page + "".join(f"| `{name}` | {x.shape} |\n" for name, x in arrays.items())
