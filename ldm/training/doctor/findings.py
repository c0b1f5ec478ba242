"""What checks found before a run, and how it is reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ldm.data.rows import count


@dataclass(frozen=True)
class Finding:
    """What one check found; `message` names the key or file to change where it isn't ok."""

    state: Literal["ok", "warning", "problem"]
    check: str
    message: str

    def __str__(self) -> str:
        lines = self.message.splitlines() or [""]
        return f"\n{'':30}".join([f"{self.state:8} {self.check:21}{lines[0]}", *lines[1:]])


def report(findings: Iterable[Finding]) -> list[Finding]:
    """Print each finding as it is made and the verdict at the end."""
    reported = []
    for found in findings:
        reported.append(found)
        print(found, flush=True)
    states = [found.state for found in reported]
    problems, warnings = states.count("problem"), states.count("warning")
    print(f"{count(problems, 'problem')}, {count(warnings, 'warning')}", flush=True)
    return reported
