"""Tables for the terminal, made for 100 columns: the norms of each cell, and the features of one run."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from l2bn.records import FeatureRow
from l2bn.reporting.comparison import Arm, arms_of, by_cell, compare
from l2bn.reporting.evidence import (
    BN,
    INPUT,
    L2BN,
    OUTPUT,
    PENULTIMATE,
    SHRINK,
    Cell,
    Evidence,
    agreement,
    images_in_words,
    is_mixed,
    unlike_code,
    unlike_devices,
)
from l2bn.reporting.formatting import NONE, few_pairs, left_out, lost, mean_interval, mean_std, names_of, setting


def accuracy_overview(evidence: Evidence) -> RenderableType:
    """All cells, the norms of each below each other, and the number of records left out."""
    parts: list[RenderableType] = []
    for cell, arms in by_cell(arms_of(evidence)):
        parts += [*_cell(cell, arms), Text("")]
    if evidence.records:
        parts.append(
            Text(
                "accuracy    test top-1 in percent after the last epoch, mean ± std over the seeds\n"
                "difference  to BN in points, paired by seed, with Student's 95 % interval",
                style="dim",
            )
        )
    else:
        parts.append(Text("No ended run here yet: nothing to compare."))
    if problems := left_out(evidence.problems, ""):
        parts.append(Text(problems, style="bold red"))
    return Group(*parts)


def _cell(cell: Cell, arms: Sequence[Arm]) -> list[RenderableType]:
    """A line that names the cell, a row for each norm, BN first, and notes on kernels and images."""
    table = _table()
    table.add_column("norm", width=24, overflow="fold")
    for header, width in (("accuracy", 13), ("difference", 10), ("95 % interval", 16)):
        table.add_column(header, justify="right", min_width=width, no_wrap=True)
    table.add_column("runs", overflow="fold")
    records = [record for arm in arms for record in arm.records]
    seeds = {record.seed for record in records}
    rows = compare(arms, {arm.norm for arm in arms})
    notes = []
    for row in sorted(rows, key=lambda row: (row.norm != BN, row.norm != L2BN)):
        values, rest = row.other.of().values(), lost(row.other, len(seeds - row.other.seeds))
        shown = mean_interval(row.difference()) if row.reference.records else ("", "no BN run")
        runs = " ".join(filter(None, [f"{len(values)}{'; ' + rest if rest else ''}", few_pairs(row)]))
        # A plain text would be read as rich's markup, and lose what is in brackets.
        own = row.other is row.reference
        table.add_row(Text(row.norm), mean_std(values), *(("", "") if own else shown), runs)
    if images := images_in_words(records):
        notes.append(f"images not proven equal: {images}")
    for row in (row for row in rows if row.other is not row.reference):
        if is_mixed(row.kernels):
            notes.append(f"{row.norm}: kernels {row.kernels}, which agree {agreement(row.kernels)}")
        if unlike := unlike_devices(row.records):
            notes.append(f"{row.norm}: pairs made in part on a CPU and in part on a GPU: {unlike}")
        if unlike_code(row.records):
            notes.append(f"{row.norm}: your own code was edited between runs: train them anew by one version")
    head = " · ".join((*names_of(cell), setting(cell)))
    return [Text(head, style="bold"), table, *(Text(note, style="dim") for note in notes)]


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")


# ---- The features of one run ----------------------------------------------------------------------------------

_COLUMNS: dict[str, tuple[str, str, int]] = {
    "norm cv": (INPUT, "norm_cv", 3),
    "within": (INPUT, "norm_cv_within", 3),
    "between": (INPUT, "norm_cv_between", 3),
    "after": (OUTPUT, "norm_cv", 3),
    "cosine": (OUTPUT, "class_cosine", 3),
    "within share": (OUTPUT, "within_share", 3),
    "angle": (OUTPUT, "angle_mean", 1),
    "distance": (OUTPUT, "distance", 2),
    "cdnv": (OUTPUT, "cdnv", 3),
}
"""Header to side, measure and decimals."""

_LEGEND = """\
norm cv   std / mean of the images' l2 norms at the layer's input, within and between classes; after the layer
cosine    and on: compactness and separation at the layer's output; shrink: what eps leaves of its deviation
"""


def layers_table(title: str, row: FeatureRow) -> RenderableType:
    """The features of one run after one epoch: a line per norm layer, one for the penultimate, and a legend."""
    table = _table()
    table.add_column("layer", overflow="fold", max_width=24)
    for header in (*_COLUMNS, SHRINK):
        table.add_column(header, justify="right", no_wrap=True)
    for layer in row["layers"]:
        values = [_number(layer[side][name], digits) for side, name, digits in _COLUMNS.values()]
        table.add_row(Text(layer["name"]), *values, _number(layer[SHRINK], 3))
    last = row[PENULTIMATE]
    values = [_number(last[name], digits) if side == OUTPUT else "" for side, name, digits in _COLUMNS.values()]
    table.add_row(PENULTIMATE, *values, "", style="bold")
    head = f"{title}, epoch {row['epoch']}, {row['images']:,} test images"
    return Group(Text(head, style="bold"), table, Text(_LEGEND, style="dim"))


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
