"""The comparison for the terminal: the norms of each cell under each other."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from l2bn.records import Problem, Record
from l2bn.reporting.comparison import BN, L2BN, Arm, Cell, Comparison, arms_of
from l2bn.reporting.wording import cell_setting, in_words, interval, lost, mean_std, plural, signed


def terminal(records: Sequence[Record], problems: Sequence[Problem]) -> RenderableType:
    """All cells, and what was left out; made for 100 columns."""
    parts: list[RenderableType] = []
    for cell, arms in groupby(arms_of(records), key=lambda arm: arm.cell):
        parts += [*_cell(cell, list(arms)), Text("")]
    if records:
        parts.append(
            Text(
                "accuracy    test top-1 in percent after the last epoch, mean ± std over the seeds\n"
                "difference  to BN in points, paired by seed, with Student's 95 % interval",
                style="dim",
            )
        )
    else:
        parts.append(Text("No ended run here yet: nothing to compare."))
    for problem in problems:
        told = f"left out: {problem.folder}: {problem.reason}"
        parts.append(Text(told, style="red", no_wrap=True, overflow="ignore"))  # a path is copied from here
    if problems:
        parts.append(Text(f"{plural('record', len(problems))} left out", style="bold red"))
    return Group(*parts)


def _cell(cell: Cell, arms: list[Arm]) -> list[RenderableType]:
    """A line that names the cell, and a row for each norm, BN first."""
    names = [arms[0].label, in_words(cell.backbone), in_words(cell.recipe), cell_setting(cell)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("norm", width=24, overflow="fold")
    for header, width in (("accuracy", 13), ("difference", 10), ("95 % interval", 16)):
        table.add_column(header, justify="right", min_width=width, no_wrap=True)
    table.add_column("runs", overflow="fold")
    seeds = set[int]().union(*(arm.seeds for arm in arms))
    bn = next((arm for arm in arms if arm.norm == BN), None)
    for arm in sorted(arms, key=lambda arm: (arm.norm != BN, arm.norm != L2BN)):
        kernels = "" if [a.norm for a in arms].count(arm.norm) == 1 else f" ({arm.kernels})"
        other = lost(arm, len(seeds - arm.seeds))
        table.add_row(
            arm.norm + kernels,
            mean_std(arm.accuracies.values()),
            *_difference(bn, arm),
            f"{len(arm.accuracies)}{'; ' + other if other else ''}",
        )
    return [Text(" · ".join(names), style="bold"), table]


def _difference(bn: Arm | None, arm: Arm) -> tuple[str, str]:
    if arm.norm == BN:
        return "", ""
    if bn is None:
        return "", "no BN run"
    difference = Comparison(arm.cell, arm.norm, bn, arm).difference
    return signed(difference.mean), interval(difference)
