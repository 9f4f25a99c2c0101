"""Known mistakes in implementations of Algorithm 22, each a small change of the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

from ipa_bridge.config import IPAConfig
from ipa_parity.checking.formula import Formula


class Mistake(NamedTuple):
    """One way to get Algorithm 22 wrong."""

    name: str
    """Words for what the code does, as the end of "Algorithm 22 with …"."""
    line: str
    """The lines of Algorithm 22 that it departs from."""
    mend: str
    changes: Mapping[str, Any]
    """Fields of the formula with their wrong values."""
    applies: Callable[[IPAConfig], bool] = lambda config: True


def _reads_pair(config: IPAConfig) -> bool:
    return config.pair_channel is not None


def _has_bias(config: IPAConfig) -> bool:
    return _reads_pair(config) and config.pair_bias


def _monomer(config: IPAConfig) -> bool:
    return config.layout == "monomer"


def _value_width_of_keys(config: IPAConfig) -> bool:
    return config.num_scalar_qk == config.num_scalar_v


def _biased(config: IPAConfig) -> bool:
    return config.scalar_bias or config.point_bias


def _squared(config: IPAConfig) -> bool:
    return config.distance_form == "squared"


def _softplus(config: IPAConfig) -> bool:
    return config.point_weight_form == "softplus"


def _three_terms(config: IPAConfig) -> bool:
    return config.num_logit_terms == 3


def _has_another_epsilon(epsilon: float, config: IPAConfig) -> bool:
    return (config.norm_form, config.norm_epsilon) != ("add", epsilon)


_FRAMES = "use x_global = R·x_local + t and x_local = Rᵀ(x_global − t) with matrices that act on column vectors"
_TERMS = "multiply the sum of all terms by √(1/3) with a pair representation, and by √(1/2) without one"
_POINTS = "multiply the squared distances by ½·softplus(γ)·√(2/(9P)), with P the number of query points"
_MASK = "add −1e5, or a larger number, to the logits of masked keys j before the softmax"
_SOFTMAX = "the weights of each query sum to 1 over keys"
_SUM = "sum a[i, j]·v[j] over j"
_UNPACK = "keys come before values, head by head, in the packed projection"
_ORDER = (
    "concatenate o, then all x, all y and all z of the points, their lengths, then o_pair; each with heads outermost"
)


def _order(*parts: str) -> dict[str, Any]:
    return {"order": parts}


MISTAKES = (
    # Frames
    Mistake("rotations transposed", "7, 10", _FRAMES, {"rotation": "transposed"}),
    Mistake(
        "row-vector frames (x·R) where column-vector frames (R·x) are given",
        "7, 10",
        "pass the transposed rotations, or change the order of the products",
        {"rotation": "transposed"},
    ),
    Mistake("query and key points left in their local frames", "7", _FRAMES, {"qk_frame": "local"}),
    Mistake("query and key points rotated but not translated", "7", _FRAMES, {"qk_frame": "rotated"}),
    Mistake("query and key points translated but not rotated", "7", _FRAMES, {"qk_frame": "shifted"}),
    Mistake("value points left in their local frames", "10", _FRAMES, {"v_frame": "local"}),
    Mistake("value points rotated but not translated", "10", _FRAMES, {"v_frame": "rotated"}),
    Mistake("value points translated but not rotated", "10", _FRAMES, {"v_frame": "shifted"}),
    Mistake("all points left in their local frames", "7, 10", _FRAMES, {"qk_frame": "local", "v_frame": "local"}),
    Mistake("all points rotated but not translated", "7, 10", _FRAMES, {"qk_frame": "rotated", "v_frame": "rotated"}),
    Mistake(
        "points translated before they are rotated, R·(x + t)",
        "7, 10",
        _FRAMES,
        {"qk_frame": "shifted first", "v_frame": "shifted first"},
    ),
    Mistake(
        "the inverse frames where points go to the global frame",
        "7, 10",
        _FRAMES,
        {"qk_frame": "inverse", "v_frame": "inverse"},
    ),
    Mistake(
        "rotations transposed where points go to the global frame, but not on their way back",
        "7, 10",
        _FRAMES,
        {"qk_frame": "transposed", "v_frame": "transposed"},
    ),
    Mistake("output points not taken back to the local frame", "10", _FRAMES, {"back": "none"}),
    Mistake("output points rotated back but not translated", "10", _FRAMES, {"back": "rotated"}),
    Mistake("output points translated back but not rotated", "10", _FRAMES, {"back": "shifted"}),
    Mistake("output points rotated back before they are translated, Rᵀx − t", "10", _FRAMES, {"back": "rotated first"}),
    Mistake("output points taken back with R instead of Rᵀ", "10", _FRAMES, {"back": "not transposed"}),
    Mistake("the frames themselves instead of their inverses on output points", "10", _FRAMES, {"back": "forward"}),
    Mistake(
        "translations ten times too large",
        "7, 10",
        "divide translations in Å by 10 if the weights were trained on nm",
        {"unit": 10.0},
    ),
    Mistake(
        "translations ten times too small",
        "7, 10",
        "pass translations in Å, or do not divide them a second time",
        {"unit": 0.1},
    ),
    # Scales of the logits
    Mistake("√(1/C) missing from q·k", "7", "divide q·k by √C", {"scalar_scale": "missing"}),
    Mistake("q·k divided by C instead of √C", "7", "divide q·k by √C", {"scalar_scale": "1/C"}),
    Mistake("q·k divided by √(H·C) instead of √C", "7", "divide q·k by √C, C per head", {"scalar_scale": "all heads"}),
    Mistake(
        "a constant added to q·k in place of the factor √(1/T)·√(1/C)",
        "7",
        "multiply q·k by √(1/T)·√(1/C); a constant cancels in the softmax",
        {"scalar_scale": "missing", "scaled": ("bias", "points")},
    ),
    Mistake("√(1/3) missing from all logits", "7", _TERMS, {"scaled": ()}, _three_terms),
    Mistake("√(1/2) missing from all logits", "7", _TERMS, {"scaled": ()}, lambda x: x.num_logit_terms == 2),
    Mistake("√(1/2) instead of √(1/3) on the logits", "7", _TERMS, {"terms": 2}, _three_terms),
    Mistake(
        "√(1/3) instead of √(1/2) on the logits", "7", _TERMS, {"terms": 3}, lambda config: config.num_logit_terms == 2
    ),
    Mistake("√(1/T) missing from the pair bias", "7", _TERMS, {"scaled": ("scalars", "points")}, _has_bias),
    Mistake("√(1/T) missing from the point term", "7", _TERMS, {"scaled": ("scalars", "bias")}),
    Mistake("√(1/T) missing from q·k", "7", _TERMS, {"scaled": ("bias", "points")}),
    Mistake("√(1/T) on q·k alone", "7", _TERMS, {"scaled": ("scalars",)}, _has_bias),
    # Point term
    Mistake("√(2/(9P)) missing from the point term", "7", _POINTS, {"w_c": "missing"}),
    Mistake(
        "the number of value points as P in √(2/(9P))",
        "7",
        _POINTS,
        {"w_c": "value points"},
        lambda config: config.num_point_v != config.num_point_qk,
    ),
    Mistake("all points, of keys and values, as P in √(2/(9P))", "7", _POINTS, {"w_c": "both points"}),
    Mistake("2/(9P) instead of its square root", "7", _POINTS, {"w_c": "without root"}),
    Mistake("√(2/9) instead of √(2/(9P))", "7", _POINTS, {"w_c": "without P"}),
    Mistake("H·P as P in √(2/(9P))", "7", _POINTS, {"w_c": "all heads"}),
    Mistake("√(9P/2) instead of √(2/(9P))", "7", _POINTS, {"w_c": "inverted"}),
    Mistake("√(2/P) instead of √(2/(9P))", "7", _POINTS, {"w_c": "without 9"}),
    Mistake("√(1/(9P)) instead of √(2/(9P))", "7", _POINTS, {"w_c": "1/9P"}),
    Mistake("½ missing from the point term", "7", _POINTS, {"half": 1.0}),
    Mistake("¼ instead of ½ in the point term", "7", _POINTS, {"half": 0.25}),
    Mistake("the point term added where it is subtracted", "7", "subtract the distances", {"sign": 1.0}),
    Mistake("no point term in the logits", "7", _POINTS, {"sign": 0.0}),
    Mistake("softplus missing from γ", "7", _POINTS, {"gamma": "identity"}, _softplus),
    Mistake("exp(γ) instead of softplus(γ)", "7", _POINTS, {"gamma": "exp"}),
    Mistake("ReLU(γ) instead of softplus(γ)", "7", _POINTS, {"gamma": "relu"}),
    Mistake("sigmoid(γ) instead of softplus(γ)", "7", _POINTS, {"gamma": "sigmoid"}),
    Mistake("softplus applied to γ twice", "7", _POINTS, {"gamma": "softplus twice"}),
    Mistake("softmax over heads instead of softplus of γ", "7", _POINTS, {"gamma": "softmax"}),
    Mistake(
        "softplus(γ) to the power H, with the index h of line 7 read as an exponent",
        "7",
        "h numbers the heads",
        {"gamma": "power"},
    ),
    Mistake(
        "the weights of heads spread over (head, point) in the order of (point, head)",
        "7",
        "all P points of a head have the weight of that head",
        {"spread": "tiled"},
        lambda config: config.num_point_qk > 1,
    ),
    Mistake("γ never read", "7", _POINTS, {"gamma": "constant"}),
    Mistake(
        "softplus on weights that enter as they are",
        "7",
        "this system has no softplus: use γ itself",
        {"gamma": "softplus"},
        lambda x: x.point_weight_form == "identity",
    ),
    *(
        Mistake("distances that are not squared", "7", "sum |q − k|² over points", {"distance": form}, _squared)
        for form in ("unsquared", "unsquared without ε")
    ),
    Mistake(
        "the root of the summed squared distances",
        "7",
        "sum |q − k|² over points, without a root",
        {"distance": "unsquared over points"},
    ),
    Mistake(
        "squared distances where this system has distances",
        "7",
        "take the square root of each point's squared distance",
        {"distance": "squared"},
        lambda config: config.distance_form == "unsquared",
    ),
    # Pair
    Mistake("the pair bias missing", "4", "add the projected pair to the logits", {"bias": "dropped"}, _has_bias),
    Mistake("the pair bias of (j, i) for the pair (i, j)", "4", "read pair[i, j]", {"bias": "transposed"}, _has_bias),
    Mistake(
        "the pair (j, i) read for (i, j)",
        "4, 8",
        "read pair[i, j]",
        {"bias": "transposed", "pair_values": "transposed"},
        _has_bias,
    ),
    Mistake("the pair bias scaled by √(1/T) twice", "7", _TERMS, {"bias": "scaled twice"}, _has_bias),
    Mistake(
        "the pair (j, i) summed for (i, j)", "8", "sum pair[i, j] over j", {"pair_values": "transposed"}, _reads_pair
    ),
    Mistake(
        "the column sums of the attention in place of its rows in the sum over the pair",
        "8",
        "sum a[i, j]·pair[i, j] over j",
        {"pair_values": "column sums"},
        _reads_pair,
    ),
    Mistake(
        "the column sums of the attention in place of its rows in the sum over the pair",
        "8",
        "sum a[i, j]·pair[i, j] over j",
        {"pair_values": "column sums", "masked_rows": "valid keys"},
        _reads_pair,
    ),
    Mistake("zeros in place of the summed pair", "8", "sum pair[i, j] over j", {"pair_values": "zero"}, _reads_pair),
    # Mask and softmax
    Mistake("the mask's polarity inverted", "7", f"a mask has 1 for valid residues: {_MASK}", {"mask": "inverted"}),
    Mistake("the mask never read", "7", _MASK, {"mask": "ignored"}),
    Mistake("keys hidden only where query and key are both masked", "7", _MASK, {"mask": "both"}),
    Mistake("masked queries instead of masked keys", "7", _MASK, {"mask": "queries"}),
    Mistake("−1 instead of a large number for masked keys", "7", _MASK, {"mask": "too weak"}),
    Mistake(
        "logits lost in the rounding of a large number that valid keys get, as in 1e9·mask − 1",
        "7",
        "add 1e9·(mask − 1), which is 0 for valid keys",
        {"mask": "swamped"},
    ),
    Mistake("the mask multiplied into the logits", "7", _MASK, {"mask": "multiplied"}),
    Mistake("the mask multiplied into the weights after the softmax", "7", _MASK, {"mask": "after softmax"}),
    Mistake("the softmax over queries", "7", _SOFTMAX, {"softmax": "queries"}),
    Mistake("the softmax over queries", "7", _SOFTMAX, {"softmax": "queries", "masked_rows": "valid keys"}),
    Mistake("the softmax over heads", "7", _SOFTMAX, {"softmax": "heads"}),
    Mistake("attention weights transposed in the sums", "9, 10", _SUM, {"values": "transposed"}),
    Mistake(
        "attention weights transposed in the sums",
        "9, 10",
        _SUM,
        {"values": "transposed", "masked_rows": "valid keys"},
    ),
    Mistake(
        "each residue's own values in place of the sum over all residues",
        "9, 10",
        _SUM,
        {"values": "own"},
    ),
    Mistake(
        "each residue's own scalar values in place of the sum over all residues", "9", _SUM, {"values": "own scalars"}
    ),
    # Projections
    Mistake(
        "queries and keys exchanged",
        "1, 2",
        "distances and products take the queries of i and the keys of j",
        {"roles": "queries and keys"},
    ),
    Mistake(
        "query points and key points exchanged",
        "2",
        "distances take the query points of i and the key points of j",
        {"roles": "query and key points"},
    ),
    Mistake("keys and values exchanged", "1", _UNPACK, {"roles": "keys and values"}, _value_width_of_keys),
    Mistake("values before keys in the packed scalars", "1", _UNPACK, {"scalar_packing": "values first"}, _monomer),
    Mistake(
        "all heads' keys before all heads' values in the packed scalars",
        "1",
        _UNPACK,
        {"scalar_packing": "all keys first"},
        _monomer,
    ),
    Mistake("values before keys in the packed points", "2, 3", _UNPACK, {"point_packing": "values first"}, _monomer),
    Mistake(
        "all heads' key points before all heads' value points in the packed points",
        "2, 3",
        _UNPACK,
        {"point_packing": "all keys first"},
        _monomer,
    ),
    Mistake(
        "the other order of points and coordinates in the point projections, point-major for coordinate-major",
        "2, 3",
        "in AlphaFold's weights all x come first, then all y, then all z; in lucidrains' family x, y, z of each point",
        {"point_order": "other"},
    ),
    Mistake(
        "the point projections read in the other one of AlphaFold's layouts",
        "2, 3",
        "channels are (coordinate, head, point) in monomer weights and (head, coordinate, point) in multimer weights",
        {"point_order": "other layout"},
    ),
    Mistake("heads innermost in the projections", "1–3", "unflatten channels as (H, C)", {"heads": "inner"}),
    Mistake("the projections' biases missing", "1–3", "add them", {"biases": "dropped"}, _biased),
    Mistake(
        "the point projections' biases missing", "2, 3", "add them", {"biases": "no points'"}, lambda x: x.point_bias
    ),
    # Norms and features
    Mistake("squared lengths in place of the lengths of output points", "11", "take the root", {"norm": "squared"}),
    Mistake(
        "lengths of the global output points", "11", "take the lengths after the inverse frame", {"norm": "global"}
    ),
    Mistake(
        "lengths clamped from above, √min(|x|², ε²)",
        "11",
        "clamp from below, so that only lengths near zero change",
        {"norm": "capped"},
    ),
    Mistake("zeros in place of the lengths of output points", "11", "append √(|x|² + ε)", {"norm": "zero"}),
    Mistake(
        "lengths without ε",
        "11",
        "use √(|x|² + ε), whose gradient at zero is finite",
        {"norm": "add", "epsilon": 0.0},
        lambda config: config.norm_epsilon > 0,
    ),
    *(
        Mistake(
            f"ε = {epsilon:g} in the lengths",
            "11",
            "use the ε of the config, or pass a config with yours",
            {"norm": "add", "epsilon": epsilon},
            partial(_has_another_epsilon, epsilon),
        )
        for epsilon in (1e-16, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
    ),
    Mistake(
        "lengths √max(|x|², ε²) in place of √(|x|² + ε)",
        "11",
        "use √(|x|² + ε)",
        {"norm": "clamp"},
        lambda config: config.norm_form == "add",
    ),
    Mistake(
        "features in the order o, points (x, y, z together), lengths, o_pair",
        "11",
        _ORDER,
        _order("o", "points", "norms", "o_pair"),
    ),
    Mistake(
        "features in the order o, points (x, y, z together), o_pair, lengths",
        "11",
        _ORDER,
        _order("o", "points", "o_pair", "norms"),
        _reads_pair,
    ),
    Mistake(
        "features in the order o, x, y, z, o_pair, lengths",
        "11",
        _ORDER,
        _order("o", "x", "y", "z", "o_pair", "norms"),
        _reads_pair,
    ),
    Mistake(
        "features in the order o, o_pair, x, y, z, lengths",
        "11",
        _ORDER,
        _order("o", "o_pair", "x", "y", "z", "norms"),
        _reads_pair,
    ),
    Mistake(
        "features in the order o, lengths, x, y, z, o_pair", "11", _ORDER, _order("o", "norms", "x", "y", "z", "o_pair")
    ),
    Mistake(
        "features in the order z, y, x of coordinates", "11", _ORDER, _order("o", "z", "y", "x", "norms", "o_pair")
    ),
    Mistake("heads innermost in the features", "11", _ORDER, {"feature_heads": "inner"}),
    Mistake("the output projection's bias missing", "11", "add it", {"output": "without bias"}),
    Mistake(
        "its input added to its output",
        "11",
        "return the update alone: Algorithm 20, line 6 adds it",
        {"output": "with the input"},
    ),
)
"""Mistakes that change the outputs."""

HARMLESS = (
    Mistake("no own bias of the pair bias", "4", "", {"bias": "without its own bias"}, lambda x: x.attention_2d_bias),
    Mistake("no bias of scalar keys", "1", "", {"biases": "no keys'"}, lambda config: config.scalar_bias),
)
"""Departures that the softmax removes."""

STOPS = (
    Mistake("no gradient to the single representation", "1–3", "", {"stop": frozenset({"single"})}),
    Mistake("no gradient to the pair representation", "4, 8", "", {"stop": frozenset({"pair"})}, _reads_pair),
    Mistake("no gradient through the pair bias", "4", "", {"stop": frozenset({"pair bias"})}, _has_bias),
    Mistake("no gradient through the summed pair", "8", "", {"stop": frozenset({"o_pair"})}, _reads_pair),
    Mistake("no gradient to rotations", "7, 10", "", {"stop": frozenset({"rotations"})}),
    Mistake("no gradient to translations", "7, 10", "", {"stop": frozenset({"translations"})}),
    Mistake("no gradient to frames", "7, 10", "", {"stop": frozenset({"rotations", "translations"})}),
    Mistake("no gradient through the inverse frames", "10", "", {"stop": frozenset({"inverse frames"})}),
    Mistake("no gradient through the attention weights", "7", "", {"stop": frozenset({"attention"})}),
    Mistake("no gradient through query and key points", "7", "", {"stop": frozenset({"q, k points"})}),
    Mistake("no gradient to γ", "7", "", {"stop": frozenset({"γ"})}),
    Mistake("no gradient through the lengths of points", "11", "", {"stop": frozenset({"norms"})}),
)
"""Places where gradients may end. They change no output."""


def singles(config: IPAConfig) -> tuple[Mistake, ...]:
    """The mistakes that an attention with this config can have."""
    return tuple(x for x in MISTAKES if x.applies(config))


def pairs(config: IPAConfig) -> Iterator[tuple[Mistake, Mistake]]:
    """Pairs of mistakes that change different things. Of those that change the same things alike, the first counts."""
    distinct: dict[tuple, Mistake] = {}
    for mistake in singles(config):
        distinct.setdefault(tuple(sorted(mistake.changes.items())), mistake)
    for one, other in combinations(distinct.values(), 2):
        if not one.changes.keys() & other.changes.keys():
            yield one, other


def formula_with(*mistakes: Mistake) -> Formula:
    """Algorithm 22 with these mistakes."""
    formula = Formula()
    for mistake in mistakes:
        formula = replace(formula, **mistake.changes)
    return formula
