"""Test vectors: probes and their results in files, to judge an attention that is written in any language."""

from ipa_parity.vectors.judging import judge_outputs
from ipa_parity.vectors.writing import write_vectors

__all__ = ["judge_outputs", "write_vectors"]
