"""The features of one run after one epoch for the terminal: a line for each norm layer, one for the penultimate."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from l2bn.records import FeatureRow
from l2bn.reporting.wording import NONE

_COLUMNS: dict[str, tuple[str, str, int]] = {
    "norm cv": ("input", "norm_cv", 3),
    "within": ("input", "norm_cv_within", 3),
    "between": ("input", "norm_cv_between", 3),
    "after": ("output", "norm_cv", 3),
    "cosine": ("output", "class_cosine", 3),
    "within share": ("output", "within_share", 3),
    "angle": ("output", "angle_mean", 1),
    "distance": ("output", "distance", 2),
    "cdnv": ("output", "cdnv", 3),
}


def layers_table(title: str, row: FeatureRow) -> RenderableType:
    """A table for 100 columns and what its columns say."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", overflow="fold", max_width=24)
    for header in (*_COLUMNS, "shrink"):
        table.add_column(header, justify="right", no_wrap=True)
    for layer in row["layers"]:
        values = [_number(layer[side][name], digits) for side, name, digits in _COLUMNS.values()]
        table.add_row(layer["name"], *values, _number(layer["shrink"], 3))
    last = row["penultimate"]
    values = [_number(last[name], digits) if side == "output" else "" for side, name, digits in _COLUMNS.values()]
    table.add_row("penultimate", *values, "", style="bold")
    head = f"{title}, epoch {row['epoch']}, {row['images']:,} test images"
    return Group(Text(head, style="bold"), table, Text(_LEGEND, style="dim"))


_LEGEND = """\
norm cv   std / mean of the images' l2 norms at the layer's input, within and between classes; after the layer
cosine    and on: compactness and separation at the layer's output; shrink: what eps leaves of its deviation
"""


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
