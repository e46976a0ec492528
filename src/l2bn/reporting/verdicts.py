"""What may be said of a claim."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["supported", "contradicted", "not decided at this n", "not measured"]

MIN_BACKBONES = 3
"""A claim about various models needs at least this many of them."""


@dataclass(frozen=True)
class Finding:
    """What the records say about a claim."""

    evidence: str
    verdict: Verdict
    details: tuple[str, ...] = ()  # what is too long for a table, a line each
