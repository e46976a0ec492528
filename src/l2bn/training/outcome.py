"""What has become of a run so far, told by its folder alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import yaml

from l2bn.records import CONFIG, METRICS, SUMMARY, InvalidRecordError, Record
from l2bn.training.failure import read_failure
from l2bn.training.interruption import is_owned
from l2bn.training.plan import PlannedRun, differences, identity

Standing = Literal["finished", "diverged", "running", "interrupted", "failed", "missing"]


@dataclass(frozen=True)
class Outcome:
    """`epoch` epochs are done, at `pace` seconds each (None before the first)."""

    standing: Standing
    epoch: int = 0
    pace: float | None = None
    message: str = ""  # how it failed or diverged

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do: a diverged run is a result."""
        return self.standing in ("finished", "diverged")


def look(run: PlannedRun) -> Outcome:
    """How a planned run stands."""
    folder = run.folder
    if not folder.is_dir():
        return Outcome("missing")
    epoch, pace = _epochs(folder / METRICS)
    if (folder / SUMMARY).exists():
        try:
            record = Record.read(folder)
        except InvalidRecordError as error:
            return Outcome("failed", epoch, pace, str(error))
        if record.hash == run.hash:
            return Outcome(record.status, epoch, pace, record.divergence or "")
    if (folder / CONFIG).exists() and (other := _another(run)):
        return Outcome("failed", message=f"the folder holds another run, with another {other}")
    if is_owned(folder):
        return Outcome("running", epoch, pace)
    if (failure := read_failure(folder)) is not None:
        return Outcome("failed", epoch, pace, failure)
    return Outcome("interrupted" if (folder / CONFIG).exists() else "missing", epoch, pace)


def _another(run: PlannedRun) -> str:
    """The keys in which the folder's run differs from the planned one; empty where it is the same."""
    try:
        found = identity(yaml.safe_load((run.folder / CONFIG).read_text()))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        return f"{CONFIG}, which cannot be read"
    return ", ".join(line.partition(":")[0] for line in differences(found, run.identity))


def _epochs(path: Path) -> tuple[int, float | None]:
    """How many epochs are done, and their mean seconds; a line that is just being written does not count."""
    try:
        lines = path.read_text().splitlines()
        seconds = [float(json.loads(line)["seconds"]) for line in lines if line.endswith("}")]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        return 0, None
    return len(seconds), fmean(seconds) if seconds else None
