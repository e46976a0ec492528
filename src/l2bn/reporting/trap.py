"""The running-variance trap: accuracy by running against batch statistics through the first updates of a run."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from l2bn.records import InvalidRecordError, Problem, Record, StatisticsRow, read_statistics
from l2bn.reporting.comparison import Cell, cell_of, data_set
from l2bn.reporting.markup import Table
from l2bn.reporting.wording import NONE

KINDS = ("running", "batch")
SHOWN_UPDATES = (10, 50, 100, 150, 200, 300)
CAUGHT_UP = 1.0
"""Points that running statistics may lie below batch statistics and count as caught up."""


@dataclass(frozen=True)
class TrapStudy:
    """The norms of one cell, each with its measured updates by seed."""

    cell: Cell
    label: str
    rows: Mapping[str, Mapping[int, Sequence[StatisticsRow]]]

    def curve(self, norm: str, kind: str) -> list[tuple[int, list[float]]]:
        """Update and the accuracy of each seed, for the updates that every seed has."""
        seeds = [{row["step"]: row[f"{kind}/top1"] for row in rows} for rows in self.rows[norm].values()]
        steps = sorted(set[int].intersection(*(set(seed) for seed in seeds)))
        return [(step, [seed[step] for seed in seeds]) for step in steps]

    def caught_up(self, norm: str) -> list[int | None]:
        """For each seed the first update from which on running statistics keep up; None if they never do."""
        return [_first_kept(rows) for rows in self.rows[norm].values()]


def _first_kept(rows: Sequence[StatisticsRow]) -> int | None:
    behind = [row["step"] for row in rows if row["running/top1"] < row["batch/top1"] - CAUGHT_UP]
    after = [int(row["step"]) for row in rows if not behind or row["step"] > max(behind)]
    return min(after, default=None)


def trap_studies(records: Iterable[Record]) -> tuple[list[TrapStudy], list[Problem]]:
    """The records that hold a comparison of statistics, by cell, and those that cannot be read."""
    found: dict[Cell, dict[str, dict[int, Sequence[StatisticsRow]]]] = defaultdict(lambda: defaultdict(dict))
    labels, problems = {}, []
    for record in records:
        try:
            rows = read_statistics(record.folder)
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error)))
            continue
        if rows:
            found[cell_of(record)][record.norm][record.seed] = rows
            labels[cell_of(record)] = data_set(record.label, record.dataset)
    cells = sorted(found, key=lambda cell: cell.order)
    return [TrapStudy(cell, labels[cell], found[cell]) for cell in cells], problems


def trap_table(study: TrapStudy) -> Table:
    """Accuracy by both statistics at some updates, as means over the seeds, and when the one has caught up."""
    columns = ("Norm", "Statistics", *(f"update {step}" for step in SHOWN_UPDATES), "caught up after", "n")
    rows = []
    for norm in study.rows:
        for kind in KINDS:
            means = {step: fmean(values) for step, values in study.curve(norm, kind)}
            shown = (f"{means[step]:.2f}" if step in means else NONE for step in SHOWN_UPDATES)
            when = _when(study.caught_up(norm)) if kind == "running" else ""
            rows.append((norm, kind, *shown, when, str(len(study.rows[norm]))))
    return Table("Accuracy by running and by batch statistics", columns, frozenset(columns[2:]), tuple(rows))


def _when(updates: Sequence[int | None]) -> str:
    """The updates of the seeds, the earliest and the latest."""
    known = [update for update in updates if update is not None]
    never = f"{len(updates) - len(known)} never" if len(known) < len(updates) else ""
    span = f"{min(known)} to {max(known)}" if len(set(known)) > 1 else "".join(map(str, known[:1]))
    return ", ".join(filter(None, (span, never)))
