"""Report on one candidate: the verdict, what it computes instead, and every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ipa_parity.checking.diagnosis import Diagnosis
from ipa_parity.checking.judging import Finding
from ipa_parity.report import Comparison, as_json, table

Verdict = Literal["right", "imprecise", "wrong"]


@dataclass(frozen=True)
class Report:
    """Result of `ipa_parity.check`. Printed, it is a text of a few lines and a table.

    Attributes:
        candidate: name of what was checked.
        verdict: "right" if every number is within the bounds of its dtype; "imprecise" if the function is right, but
            with fewer digits than its dtype has; else "wrong".
        comparisons: every stage and gradient on every probe, in machine epsilons.
        findings: what else is wrong, such as an exception, a shape or inputs that change.
        diagnosis: what the candidate computes instead; None if it is right.
        notes: what to know about the check, such as fields of the config that were assumed.
        seconds: how long it took.
    """

    candidate: str
    verdict: Verdict
    comparisons: tuple[Comparison, ...]
    findings: tuple[Finding, ...] = ()
    diagnosis: Diagnosis | None = None
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True if the verdict is "right"."""
        return self.verdict == "right"

    def summary(self) -> list[str]:
        """The verdict with the diagnosis, then a line of advice for each mistake."""
        if self.diagnosis is None:
            return [f"{self.candidate} is {self.verdict}."]
        return [f"{self.candidate} is {self.verdict}: {self.diagnosis.text}.", *self.diagnosis.advice()]

    def __str__(self) -> str:
        lines = self.summary()
        lines += [f"  {text}" for text in dict.fromkeys(_briefly(self.findings))]
        problems = [f"{row.stage}: {row.problem}" for row in self.comparisons if row.problem]
        lines += [f"  {text}" for text in list(dict.fromkeys(problems))[:5]]
        lines += [f"  note: {note}" for note in self.notes]
        if self.comparisons:
            probes = ", ".join(dict.fromkeys(row.case for row in self.comparisons))
            lines += ["", f"Worst error of each stage over all probes ({probes}), in machine epsilons:", ""]
            lines += [table(self.comparisons)]
        return "\n".join([*lines, "", f"{self.seconds:.1f} s"])

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        diagnosis = self.diagnosis
        return {
            "candidate": self.candidate,
            "verdict": self.verdict,
            "passed": self.passed,
            "diagnosis": None
            if diagnosis is None
            else {
                "kind": diagnosis.kind,
                "text": diagnosis.text,
                "error": diagnosis.error if diagnosis.error == diagnosis.error else None,
                "mistakes": [
                    [{"name": x.name, "line": x.line, "mend": x.mend} for x in names] for names in diagnosis.mistakes
                ],
            },
            "findings": [finding._asdict() for finding in self.findings],
            "notes": list(self.notes),
            "seconds": self.seconds,
            "comparisons": as_json(self.comparisons),
        }


def _briefly(findings: Sequence[Finding]) -> list[str]:
    """Findings, each once with the first probe that shows it."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(finding.text, finding)
    return [str(x) for x in first.values()]
