"""What a check returns, and the report of all of them."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import List, Sequence

from tabulate import tabulate

from ..files import atomic_write

OK, WARNING, FAULT = "ok", "warning", "FAULT"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: one of `fgd.doctor.settings.CHECKS`.
        verdict: OK; WARNING: may be meant; FAULT: distilling would be pointless or wrong.
        found: what was found and where, with numbers. advice: what to do; "" where nothing could
            be better.
    """

    name: str
    verdict: str
    found: str
    advice: str = ""


@dataclass
class Report:
    """All findings of one examination, and figures for doctor.json."""

    findings: List[Finding] = field(default_factory=list)
    figures: dict = field(default_factory=dict)  # JSON values
    tables: List[str] = field(default_factory=list)  # printed below the findings

    @property
    def faults(self) -> List[Finding]:
        return [finding for finding in self.findings if finding.verdict == FAULT]

    def accepting(self, names: Sequence[str]) -> "Report":
        """The report with faults of the named checks as warnings that say so."""
        findings = [
            replace(x, verdict=WARNING, advice=f"accepted by DOCTOR.ACCEPT; {x.advice}")
            if x.verdict == FAULT and x.name in names
            else x
            for x in self.findings
        ]
        return Report(findings, self.figures, self.tables)

    def text(self) -> str:
        """One row per finding, then the tables."""
        rows = [[x.name, x.verdict, x.found, x.advice] for x in self.findings]
        headers = ["check", "verdict", "found", "what to do"]
        table = tabulate(rows, headers, maxcolwidths=[None, None, 60, 50], disable_numparse=True)
        return "\n\n".join([table, *self.tables])

    def summary(self) -> str:
        """A line per finding that is not fine, and one that counts those that are."""
        lines = [
            f"{x.verdict}: {x.name}: {' '.join(f'{x.found}. {x.advice}'.split())}"
            for x in self.findings
            if x.verdict != OK
        ]
        fine = len(self.findings) - len(lines)
        return "\n".join([f"{fine} of {len(self.findings)} checks are fine", *lines])

    def complaint(self) -> str:
        """The faults in one line, for the error that ends the run."""
        parts = [f"{x.name}: {x.found}. {x.advice}" for x in self.faults]
        return " ".join(" | ".join(parts).split())

    def write(self, path: str) -> None:
        """Write the report as JSON, whole or not at all."""
        content = {"findings": [asdict(x) for x in self.findings], **self.figures}
        text = json.dumps(content, indent=1, allow_nan=False)
        atomic_write(path, lambda file: file.write(text.encode()))
