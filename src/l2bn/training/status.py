"""Status: how each run of a sweep stands, the grid of all runs, and the summary that a sweep ends with."""

import contextlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from l2bn.failures import read_failure
from l2bn.records import CONFIG, METRICS, SUMMARY, InvalidRecordError, Record, files_under
from l2bn.training.interruption import is_locked
from l2bn.training.plan import PlannedRun, differences, has_begun, read_config

Standing = Literal["finished", "diverged", "running", "interrupted", "failed", "missing"]


@dataclass(frozen=True)
class Status:
    """The state of a run: after `epoch` epochs of `pace` seconds each (NaN before the first)."""

    run: PlannedRun
    standing: Standing
    epoch: int = 0
    pace: float = math.nan
    message: str = ""  # how it failed or diverged

    @property
    def ended(self) -> bool:
        """True if nothing is left to do: a diverged run is a result."""
        return self.standing in ("finished", "diverged")

    @property
    def epochs(self) -> int:
        """The length of the run."""
        return int(self.run.config["recipe"]["epochs"])

    @property
    def runs_dir(self) -> str:
        """The folder of all runs that the run belongs to."""
        return str(self.run.config["runs_dir"])


def find_runs(root: Path) -> list[PlannedRun]:
    """Return every run that has begun under a folder.

    Skips files that are not the configuration of a run, and folders that have been moved away or renamed: what
    stands at the place of their run is another start of it.
    """
    runs = []
    for path in files_under(root, CONFIG):
        with contextlib.suppress(OSError, ValueError):
            run = read_config(path.parent)
            parts = run.cell.path.parts
            folder = Path(os.path.abspath(path.parent))  # noqa: PTH100 - `..` within it ends
            if folder.parts[-len(parts) :] == parts:
                below = path.parent.parts[-len(parts) :] == parts  # else `root` lies within the runs' folder
                place = path.parents[len(parts)] if below else folder.parents[len(parts) - 1]
                runs.append(replace(run, config={**run.config, "runs_dir": str(place)}))
    return runs


def read_status(run: PlannedRun) -> Status:
    """Return the state of a planned run, read from its folder alone."""
    folder = run.folder
    if not folder.is_dir():
        return Status(run, "missing")
    epoch, pace = _epochs_done(folder / METRICS)
    if (folder / SUMMARY).exists():
        try:
            record = Record.read(folder)
        except InvalidRecordError as error:
            return Status(run, "failed", epoch, pace, str(error))
        if not differences(record.identity, run.identity):
            return Status(run, record.status, epoch, pace, record.divergence or "")
    begun = (folder / CONFIG).exists()
    if begun and has_begun(folder) and (other := _another(run)):
        return Status(run, "failed", message=f"the folder holds another run, with another {other}")
    if is_locked(folder):
        return Status(run, "running", epoch, pace)
    if (failure := read_failure(folder)) is not None:
        return Status(run, "failed", epoch, pace, failure)
    return Status(run, "interrupted" if begun else "missing", epoch, pace)


def _another(run: PlannedRun) -> str:
    """Return the keys in which the folder's run differs from the planned one; empty if none does."""
    try:
        found = read_config(run.folder)
    except (OSError, ValueError):
        return f"{CONFIG}, which cannot be read"
    return ", ".join(line.partition(":")[0] for line in differences(found.identity, run.identity))


def _epochs_done(path: Path) -> tuple[int, float]:
    """Return the number of epochs done and their mean seconds; a line that is being written does not count."""
    try:
        lines = path.read_text().splitlines()
        seconds = [float(json.loads(line)["seconds"]) for line in lines if line.endswith("}")]
    except (OSError, ValueError, KeyError, TypeError):
        seconds = []
    return len(seconds), fmean(seconds) if seconds else math.nan


# Estimates.


class _Pace:
    """Seconds per epoch: a run's own, else the mean of the most similar runs that have one."""

    def __init__(self, runs: Sequence[Status]) -> None:
        self._measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for status in runs:
            if not math.isnan(status.pace):
                for key in self._keys(status):
                    self._measured[key].append(status.pace)

    @staticmethod
    def _keys(status: Status) -> tuple[tuple[str, ...], ...]:
        cell = status.run.cell
        pair = (cell.dataset, cell.backbone, cell.recipe)
        return (status.runs_dir, *pair, cell.norm), (*pair, cell.norm), pair

    def of(self, status: Status) -> float:
        """Return the mean of the most similar runs; NaN if none was measured."""
        return next((fmean(self._measured[key]) for key in self._keys(status) if key in self._measured), math.nan)

    def left(self, status: Status) -> float:
        """Return the seconds of training that a run still needs; NaN if unknown."""
        if status.ended:
            return 0.0
        pace = self.of(status) if math.isnan(status.pace) else status.pace
        return pace * (status.epochs - status.epoch)


def duration(seconds: float) -> str:
    """Return `42 s`, `12 min`, `3 h 05 min` or `2 d 4 h`; a question mark for NaN."""
    if math.isnan(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


# What is printed.

# The word and the color of each standing in the grid; the word must do without the color.
LOOKS: Mapping[Standing, tuple[str, str]] = {
    "finished": ("done", "green"),
    "running": ("run", "bold cyan"),
    "interrupted": ("cut", "yellow"),
    "diverged": ("div", "magenta"),
    "failed": ("FAIL", "bold red"),
    "missing": ("–", "dim"),
}
LINES = 3  # of an error's message
LISTED = 10  # runs with the same message
NAME, SEED, PACE = 16, 9, 18  # columns: of a name before it is folded, of a seed, of the pace


def status_grid(runs: Sequence[Status], width: int) -> RenderableType:
    """Return the grid of the runs in a number of columns, their progress, and notes on single runs."""
    if not runs:
        return Text("No run here yet.")
    recipes = sorted({status.run.cell.recipe for status in runs})
    head = Text(" and ".join(sorted({status.runs_dir for status in runs})), style="bold")
    head.append(f", recipe {recipes[0]}" if len(recipes) == 1 else "")
    return Group(head, _grid(runs, width), Text(""), _counts(runs), _progress(runs), *_notes(runs))


def sweep_summary(runs: Sequence[Status], ended_before: Collection[Path]) -> RenderableType:
    """Return the runs of a sweep at its end; `ended_before` has the folders of the runs that it skipped."""
    done = [status for status in runs if status.run.folder not in ended_before]
    head = Text("\nsweep: ", style="bold").append(_counts(done, skipped=len(runs) - len(done)))
    parts = [head, *_notes(done)]
    if not all(status.ended for status in runs):
        parts.append(Text("the same command runs what is left", style="dim"))
    return Group(*parts)


def _grid(runs: Sequence[Status], width: int) -> Table:
    """Return a row for each data set, backbone and norm, in each folder of runs.

    A column for each seed; where the columns do not fit, one for each standing, with the number of runs.
    """
    columns: dict[str, Callable[[Status], str]] = {
        "folder": lambda status: status.runs_dir,
        "data set": lambda status: status.run.cell.dataset,
        "backbone": lambda status: status.run.cell.backbone,
        "recipe": lambda status: status.run.cell.recipe,
        "norm": lambda status: status.run.cell.norm,
    }
    for name in ("folder", "recipe"):  # shown above the grid if all runs have the same
        if len(set(map(columns[name], runs))) == 1:
            del columns[name]
    # In the order in which each name first occurs, whichever name the sweep varies first.
    order = [list(dict.fromkeys(map(column, runs))) for column in columns.values()]
    rows: dict[tuple[int, ...], dict[int, Status]] = defaultdict(dict)
    for status in runs:
        at = tuple(names.index(column(status)) for names, column in zip(order, columns.values(), strict=True))
        rows[at][status.run.cell.seed] = status
    seeds = sorted({status.run.cell.seed for status in runs})
    standings = [standing for standing in LOOKS if any(status.standing == standing for status in runs)]
    names_width = sum(min(NAME, max(map(len, names))) + 2 for names in order)
    shows_seeds = names_width + SEED * len(seeds) + PACE <= width

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold")
    if shows_seeds:
        for seed in seeds:
            table.add_column(f"seed {seed}", no_wrap=True)
    else:
        for standing in standings:
            table.add_column(LOOKS[standing][0].replace("–", "missing"), no_wrap=True, justify="right")
    for name in ("s/epoch", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    pace = _Pace(runs)
    above: tuple[int, ...] = ()
    for at, row in sorted(rows.items()):
        # A name is not repeated below itself.
        names = [Text("" if at[: i + 1] == above[: i + 1] else order[i][n]) for i, n in enumerate(at)]
        if shows_seeds:
            cells = [_cell(row[seed]) if seed in row else Text("") for seed in seeds]
        else:
            cells = [_number(standing, row.values()) for standing in standings]
        measured = pace.of(next(iter(row.values())))
        left = sum(map(pace.left, row.values()))
        times = "" if math.isnan(measured) else f"{measured:.1f}", "" if left == 0 else duration(left)
        table.add_row(*names, *cells, *times)
        above = at
    return table


def _cell(status: Status) -> Text:
    word, style = LOOKS[status.standing]
    if status.standing in ("running", "interrupted"):
        word += f" {100 * status.epoch / status.epochs:.0f}%"
    return Text(word, style=style)


def _number(standing: Standing, runs: Collection[Status]) -> Text:
    number = sum(status.standing == standing for status in runs)
    return Text(str(number or ""), style=LOOKS[standing][1])


def _counts(runs: Sequence[Status], skipped: int = 0) -> Text:
    """Return the number of runs of each standing that occurs."""
    counts = {standing: sum(status.standing == standing for status in runs) for standing in LOOKS}
    parts = [Text(f"{count} {standing}", LOOKS[standing][1]) for standing, count in counts.items() if count]
    if skipped:
        parts.insert(1 if counts["finished"] else 0, Text(f"{skipped} skipped (ended before)", "green"))
    return Text(", ").join(parts)


def _progress(runs: Sequence[Status]) -> Text:
    """Return the share of epochs done, and an estimate of the remaining time."""
    total = sum(status.epochs for status in runs)
    done = sum(status.epochs if status.ended else status.epoch for status in runs)
    if done == total:
        return Text(f"100 % of {total:,} epochs")
    text = Text(f"{100 * done / total:.0f} % of {total:,} epochs")
    left = list(map(_Pace(runs).left, runs))
    known = [seconds for seconds in left if not math.isnan(seconds)]
    at_once = max(1, sum(status.standing == "running" for status in runs))
    if any(known):
        text.append(f"; about {duration(max(sum(known) / at_once, max(known)))} of training left")
        text.append(f" with {at_once} at a time" if at_once > 1 else "")
    if len(known) < len(left):
        text.append(f"; {len(left) - len(known)} of unknown pace")
    return text


def _notes(runs: Sequence[Status]) -> Iterator[Text]:
    """Yield a line for each running, interrupted, diverged or failed run, with messages below their runs."""
    pace, one_folder = _Pace(runs), len({status.runs_dir for status in runs}) == 1
    for standing in ("running", "interrupted", "diverged", "failed"):
        word, style = LOOKS[standing]
        by_message: dict[str, list[Status]] = defaultdict(list)
        for status in runs:
            if status.standing == standing:
                by_message[status.message].append(status)
        for message, same in by_message.items():
            for status in same[:LISTED]:
                note = Text(f"{word:<5}", style=style)
                note.append(str(status.run.cell if one_folder else status.run.folder), style="default")
                if standing in ("running", "interrupted"):
                    note.append(f"  epoch {status.epoch} of {status.epochs}", style="default")
                    left = pace.left(status)
                    note.append("" if math.isnan(left) else f", {duration(left)} left", style="default")
                yield note
            if len(same) > LISTED:
                yield Text(f"     and {len(same) - LISTED} more")
            lines = message.splitlines()
            yield from (Text(f"     {line}") for line in [*lines[:LINES], *(["..."] if len(lines) > LINES else [])])
