"""Status: how each run of a sweep stands, the grid of all runs, and the summary that a sweep ends with."""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from l2bn.failures import read_failure
from l2bn.records import CONFIG, METRICS, SUMMARY, InvalidRecordError, Record
from l2bn.training.interruption import is_owned
from l2bn.training.plan import PlannedRun, differences, identity, read_config

Standing = Literal["finished", "diverged", "running", "interrupted", "failed", "missing"]


@dataclass(frozen=True)
class Outcome:
    """The state of a run: after `epoch` epochs of `pace` seconds each (None before the first)."""

    standing: Standing
    epoch: int = 0
    pace: float | None = None
    message: str = ""  # how it failed or diverged

    @property
    def ended(self) -> bool:
        """True if nothing is left to do: a diverged run is a result."""
        return self.standing in ("finished", "diverged")


def look(run: PlannedRun) -> Outcome:
    """The state of a planned run, read from its folder alone."""
    folder = run.folder
    if not folder.is_dir():
        return Outcome("missing")
    epoch, pace = _epochs_done(folder / METRICS)
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
    """The keys in which the folder's run differs from the planned one; empty if none does."""
    try:
        found, _ = read_config(run.folder / CONFIG)
    except (OSError, ValueError):
        return f"{CONFIG}, which cannot be read"
    return ", ".join(line.partition(":")[0] for line in differences(identity(found), run.identity))


def _epochs_done(path: Path) -> tuple[int, float | None]:
    """The number of epochs done and their mean seconds; a line that is just being written does not count."""
    try:
        lines = path.read_text().splitlines()
        seconds = [float(json.loads(line)["seconds"]) for line in lines if line.endswith("}")]
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        return 0, None
    return len(seconds), fmean(seconds) if seconds else None


Runs = Sequence[tuple[PlannedRun, Outcome]]

# The word and the colour of each standing in the grid; the word must do without the colour.
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


def overview(runs: Runs, width: int) -> RenderableType:
    """The grid of the runs in so many columns, their progress, and notes on single runs."""
    if not runs:
        return Text("No run here yet.")
    places = " and ".join(_places(runs))
    recipes = sorted({run.cell.recipe for run, _ in runs})
    head = Text(places, style="bold").append(f", recipe {recipes[0]}" if len(recipes) == 1 else "")
    return Group(head, _grid(runs, width), Text(""), _counts(runs), _progress(runs), *_notes(runs))


def summary(runs: Runs, ended_before: Collection[Path]) -> RenderableType:
    """The runs of a sweep at its end; `ended_before` has the folders of the runs that it skipped."""
    done = [(run, outcome) for run, outcome in runs if run.folder not in ended_before]
    head = Text("\nsweep: ", style="bold").append(_counts(done, skipped=len(runs) - len(done)))
    parts = [head, *_notes(done)]
    if not all(outcome.ended for _, outcome in runs):
        parts.append(Text("the same command runs what is left", style="dim"))
    return Group(*parts)


def _place(run: PlannedRun) -> str:
    """The folder of all runs that a run belongs to."""
    return str(run.config["runs_dir"])


def _places(runs: Runs) -> list[str]:
    return sorted({_place(run) for run, _ in runs})


def _grid(runs: Runs, width: int) -> Table:
    """A row for each data set, backbone and norm, in each folder of runs.

    A column for each seed; where the columns do not fit, one for each standing, with the number of runs.
    """
    rows: dict[tuple[str, ...], dict[int, tuple[PlannedRun, Outcome]]] = defaultdict(dict)
    columns: dict[str, Callable[[PlannedRun], str]] = {
        "folder": _place,
        "data set": lambda run: run.cell.dataset,
        "backbone": lambda run: run.cell.backbone,
        "recipe": lambda run: run.cell.recipe,
        "norm": lambda run: run.cell.norm,
    }
    for name in ("folder", "recipe"):  # shown above the grid if all runs have the same
        if len({columns[name](run) for run, _ in runs}) == 1:
            del columns[name]
    for run, outcome in runs:
        rows[tuple(name_of(run) for name_of in columns.values())][run.cell.seed] = run, outcome
    seeds = sorted({run.cell.seed for run, _ in runs})
    standings = [standing for standing in LOOKS if any(outcome.standing == standing for _, outcome in runs)]
    names_width = sum(min(NAME, max(map(len, column))) + 2 for column in zip(*rows, strict=True))
    shows_seeds = names_width + SEED * len(seeds) + PACE <= width
    headers = (
        [f"seed {seed}" for seed in seeds]
        if shows_seeds
        else [LOOKS[standing][0].replace("–", "missing") for standing in standings]
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold")
    for header in headers:
        table.add_column(header, no_wrap=True, justify="left" if shows_seeds else "right")
    for name in ("s/epoch", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    pace = _Pace(runs)
    above: tuple[str, ...] = ()
    # In the order in which each name first occurs, whichever name the sweep varies first.
    order = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    for names in sorted(rows, key=lambda names: [of.index(name) for of, name in zip(order, names, strict=True)]):
        row = rows[names]
        # A name is not repeated below itself.
        same = [names[: i + 1] == above[: i + 1] for i in range(len(names))]
        shown = ["" if repeated else name for name, repeated in zip(names, same, strict=True)]
        if shows_seeds:
            cells = [_cell(*row[seed]) if seed in row else Text("") for seed in seeds]
        else:
            cells = [_number(standing, row.values()) for standing in standings]
        measured = pace.of(next(iter(row.values()))[0])
        left = _sum(pace.left(run, outcome) for run, outcome in row.values())
        table.add_row(
            *shown, *cells, "" if measured is None else f"{measured:.1f}", "" if left == 0 else duration(left)
        )
        above = names
    return table


def _cell(run: PlannedRun, outcome: Outcome) -> Text:
    word, style = LOOKS[outcome.standing]
    if outcome.standing in ("running", "interrupted"):
        word += f" {100 * outcome.epoch / _epochs(run):.0f}%"
    return Text(word, style=style)


def _number(standing: Standing, runs: Collection[tuple[PlannedRun, Outcome]]) -> Text:
    number = sum(outcome.standing == standing for _, outcome in runs)
    return Text(str(number) if number else "", style=LOOKS[standing][1])


def _counts(runs: Runs, skipped: int = 0) -> Text:
    """The number of runs of each standing that occurs."""
    text = Text()
    counts = {standing: sum(outcome.standing == standing for _, outcome in runs) for standing in LOOKS}
    parts = [(f"{count} {standing}", LOOKS[standing][1]) for standing, count in counts.items() if count]
    if skipped:
        parts.insert(1 if counts["finished"] else 0, (f"{skipped} skipped (ended before)", "green"))
    for i, (words, style) in enumerate(parts):
        text.append(", " if i else "").append(words, style=style)
    return text


def _progress(runs: Runs) -> Text:
    """The share of epochs done, and an estimate of the remaining time."""
    total = sum(_epochs(run) for run, _ in runs)
    done = sum(_epochs(run) if outcome.ended else outcome.epoch for run, outcome in runs)
    text = Text(f"{100 * done / total:.0f} % of {total:,} epochs")
    if done == total:
        return text
    pace = _Pace(runs)
    left = [pace.left(run, outcome) for run, outcome in runs]
    known = [seconds for seconds in left if seconds is not None]
    at_once = max(1, sum(outcome.standing == "running" for _, outcome in runs))
    if any(known):
        text.append(f"; about {duration(sum(known) / at_once)} of training left")
        text.append(f" with {at_once} at a time" if at_once > 1 else "")
    if len(known) < len(left):
        text.append(f"; {len(left) - len(known)} of unknown pace")
    return text


def _notes(runs: Runs) -> Iterator[Text]:
    """A line for each run that is running, interrupted, diverged or failed; messages stand below their runs."""
    pace, one_place = _Pace(runs), len(_places(runs)) == 1
    for standing in ("running", "interrupted", "diverged", "failed"):
        word, style = LOOKS[standing]
        here = [(run, outcome) for run, outcome in runs if outcome.standing == standing]
        for message in dict.fromkeys(outcome.message for _, outcome in here):
            same = [(run, outcome) for run, outcome in here if outcome.message == message]
            for run, outcome in same[:LISTED]:
                name = str(run.cell if one_place else run.folder)
                note = Text(f"{word:<5}", style=style).append(name, style="default")
                if not outcome.ended and outcome.standing != "failed":
                    note.append(f"  epoch {outcome.epoch} of {_epochs(run)}", style="default")
                    left = pace.left(run, outcome)
                    note.append("" if left is None else f", {duration(left)} left", style="default")
                yield note
            if len(same) > LISTED:
                yield Text(f"     and {len(same) - LISTED} more")
            lines = message.splitlines()
            yield from (Text(f"     {line}") for line in [*lines[:LINES], *(["..."] if len(lines) > LINES else [])])


class _Pace:
    """Seconds per epoch: a run's own, else the mean of the most similar runs that have one."""

    def __init__(self, runs: Runs) -> None:
        self._measured: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for run, outcome in runs:
            if outcome.pace is not None:
                for key in self._keys(run):
                    self._measured[key].append(outcome.pace)

    @staticmethod
    def _keys(run: PlannedRun) -> tuple[tuple[str, ...], ...]:
        cell = run.cell
        pair = (cell.dataset, cell.backbone, cell.recipe)
        return (_place(run), *pair, cell.norm), (*pair, cell.norm), pair

    def of(self, run: PlannedRun) -> float | None:
        return next((fmean(self._measured[key]) for key in self._keys(run) if key in self._measured), None)

    def left(self, run: PlannedRun, outcome: Outcome) -> float | None:
        """Seconds of training that a run still needs; None if unknown."""
        if outcome.ended:
            return 0.0
        pace = outcome.pace if outcome.pace is not None else self.of(run)
        return None if pace is None else pace * (_epochs(run) - outcome.epoch)


def _epochs(run: PlannedRun) -> int:
    return int(run.config["recipe"]["epochs"])


def _sum(values: Iterator[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def duration(seconds: float | None) -> str:
    """`42 s`, `12 min`, `3 h 05 min`, `2 d 4 h`; a question mark for None."""
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
