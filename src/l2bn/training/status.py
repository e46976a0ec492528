"""How a sweep stands, for the terminal: the grid of its runs, and the summary that it ends with."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from l2bn.training.outcome import Outcome, Standing
from l2bn.training.plan import PlannedRun

Runs = Sequence[tuple[PlannedRun, Outcome]]

# The word in the grid, which must do without its colour, too.
LOOKS: Mapping[Standing, tuple[str, str]] = {
    "finished": ("done", "green"),
    "running": ("run", "bold cyan"),
    "interrupted": ("cut", "yellow"),
    "diverged": ("div", "magenta"),
    "failed": ("FAIL", "bold red"),
    "missing": ("–", "dim"),
}
LINES = 3  # of an error's message


def overview(runs: Runs) -> RenderableType:
    """The grid of the runs, how far they are, and what there is to say of single ones."""
    if not runs:
        return Text("No run here yet.")
    places = " and ".join(_places(runs))
    recipes = sorted({run.cell.recipe for run, _ in runs})
    head = Text(places, style="bold").append(f", recipe {recipes[0]}" if len(recipes) == 1 else "")
    return Group(head, _grid(runs), Text(""), _counts(runs), _progress(runs), *_notes(runs))


def summary(runs: Runs, ended_before: Collection[Path]) -> RenderableType:
    """What a sweep has done; `ended_before` are the folders of the runs that it had only to skip."""
    done = [(run, outcome) for run, outcome in runs if run.folder not in ended_before]
    head = Text("\nsweep: ", style="bold").append(_counts(done, skipped=len(runs) - len(done)))
    parts = [head, *_notes(done)]
    if not all(outcome.ended for _, outcome in runs):
        parts.append(Text("the same command runs what is left", style="dim"))
    return Group(*parts)


def _place(run: PlannedRun) -> str:
    """The folder of runs that a run lies in."""
    return str(run.config["runs_dir"])


def _places(runs: Runs) -> list[str]:
    return sorted({_place(run) for run, _ in runs})


def _grid(runs: Runs) -> Table:
    """A row a data set, backbone and norm, apart in each folder of runs; a column a seed."""
    rows: dict[tuple[str, ...], dict[int, tuple[PlannedRun, Outcome]]] = defaultdict(dict)
    columns: dict[str, Callable[[PlannedRun], str]] = {
        "folder": _place,
        "data set": lambda run: run.cell.dataset,
        "backbone": lambda run: run.cell.backbone,
        "recipe": lambda run: run.cell.recipe,
        "norm": lambda run: run.cell.norm,
    }
    for name in ("folder", "recipe"):  # told above the grid where it is one
        if len({columns[name](run) for run, _ in runs}) == 1:
            del columns[name]
    for run, outcome in runs:
        rows[tuple(name_of(run) for name_of in columns.values())][run.cell.seed] = run, outcome
    seeds = sorted({run.cell.seed for run, _ in runs})
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, overflow="fold")
    for seed in seeds:
        table.add_column(f"seed {seed}", no_wrap=True)
    for name in ("s/epoch", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    pace = _Pace(runs)
    above: tuple[str, ...] = ()
    # In the order in which each name comes up, whichever of them the sweep goes through first.
    order = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    for names in sorted(rows, key=lambda names: [of.index(name) for of, name in zip(order, names, strict=True)]):
        row = rows[names]
        # A name that stands above is not repeated.
        same = [names[: i + 1] == above[: i + 1] for i in range(len(names))]
        shown = ["" if repeated else name for name, repeated in zip(names, same, strict=True)]
        cells = [_cell(*row[seed]) if seed in row else Text("") for seed in seeds]
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


def _counts(runs: Runs, skipped: int = 0) -> Text:
    """How many runs stand how, in the order of the looks; nothing of what there is none of."""
    text = Text()
    counts = {standing: sum(outcome.standing == standing for _, outcome in runs) for standing in LOOKS}
    parts = [(f"{count} {standing}", LOOKS[standing][1]) for standing, count in counts.items() if count]
    if skipped:
        parts.insert(1 if counts["finished"] else 0, (f"{skipped} skipped (ended before)", "green"))
    for i, (words, style) in enumerate(parts):
        text.append(", " if i else "").append(words, style=style)
    return text


def _progress(runs: Runs) -> Text:
    """Epochs done of all, and about how long the rest takes."""
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
        text.append(f"; {len(left) - len(known)} without an epoch to tell the pace by")
    return text


def _notes(runs: Runs) -> Iterator[Text]:
    """A line a run of which there is something to say, and below those that say the same the first lines of it."""
    pace, one_place = _Pace(runs), len(_places(runs)) == 1
    for standing in ("running", "interrupted", "diverged", "failed"):
        word, style = LOOKS[standing]
        here = [(run, outcome) for run, outcome in runs if outcome.standing == standing]
        for message in dict.fromkeys(outcome.message for _, outcome in here):
            for run, outcome in here:
                if outcome.message != message:
                    continue
                name = str(run.cell if one_place else run.folder)
                note = Text(f"{word:<5}", style=style).append(name, style="default")
                if not outcome.ended and outcome.standing != "failed":
                    note.append(f"  epoch {outcome.epoch} of {_epochs(run)}", style="default")
                    left = pace.left(run, outcome)
                    note.append("" if left is None else f", {duration(left)} left", style="default")
                yield note
            lines = message.splitlines()
            yield from (Text(f"     {line}") for line in [*lines[:LINES], *(["..."] if len(lines) > LINES else [])])


class _Pace:
    """Seconds an epoch: a run's own, else the mean of the runs most like it that have one."""

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
        """Seconds of training that a run still needs, None where no epoch tells."""
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
    """`42 s`, `12 min`, `3 h 05 min`, `2 d 4 h`; a question mark where it is not known."""
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
