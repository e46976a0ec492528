"""Figures from records: accuracy curves of BN against L2BN, and the paired differences over the grid.

Readable in print without colour and by the colour-blind: the arms differ in lightness, line style and marker. The
same records give the same bytes.
"""

import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from l2bn.records import InvalidRecordError, Problem, Record
from l2bn.reporting.claims import ACCURATE, RunSet, judge_set
from l2bn.reporting.comparison import FULL_EPOCHS, Arm, Comparison, arms_of, grid, pooled
from l2bn.reporting.evidence import BN, L2BN, Evidence
from l2bn.reporting.formatting import conditions, in_words, mean_std, signed
from l2bn.reporting.statistics import Estimate, estimate

# Black and the vermilion of Okabe and Ito (2008).
STYLES: Mapping[str, Mapping[str, Any]] = {
    BN: {"color": "#222222", "linestyle": (0, (4, 1.5)), "marker": "s", "label": "BN"},
    L2BN: {"color": "#D55E00", "linestyle": "-", "marker": "o", "label": "L2BN"},
}
GREY = "#777777"

RC: Any = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # part of matplotlib, hence the same on every machine
    "font.size": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "figure.constrained_layout.w_pad": 0.08,
    "svg.hashsalt": "l2bn",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}


Curves = Mapping[Path, Sequence[float]]
"""The folder of a run to its test top-1 after each epoch, percent."""


def read_curves(records: Sequence[Record]) -> tuple[Curves, list[Problem]]:
    """The curves of the runs that finished, and those whose epochs cannot be read."""
    found: dict[Path, list[float]] = {}
    problems = []
    for record in records:
        if record.status != "finished" or record.norm not in STYLES:
            continue
        try:
            accuracies = [row["test/top1"] for row in record.metrics()]
            found[record.folder] = [accuracy for accuracy in accuracies if accuracy is not None]
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error)))
    return found, problems


def write_figures(
    evidence: Evidence, folder: Path, sets: Sequence[RunSet] = ()
) -> tuple[list[Path], list[Problem]]:
    """Draw what the records allow as PNG and SVG: the paths written, and the records left out."""
    found, problems = read_curves(evidence.records)
    broken = {problem.folder for problem in problems}
    readable = replace(evidence, records=[record for record in evidence.records if record.folder not in broken])
    comparisons = [row for row in grid(arms_of(readable)) if row.arms]
    paths = []
    with mpl.rc_context(RC):
        for name, group in _pages(comparisons).items():
            if any(arm.of() for comparison in group for arm in comparison.arms):
                paths += save_figure(curves(group, found), folder, f"curves-{name}")
        if any(comparison.differences() for comparison in comparisons):
            paths += save_figure(differences(comparisons), folder, "differences")
        for run_set in sets:
            rows = [row for row in comparisons if run_set.holds(row.cell)]
            if any(row.differences() for row in rows):
                paths += save_figure(differences_of_set(rows, run_set), folder, run_set.figure)
    return paths, problems


def _pages(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """One page of curves per data set; the key is the end of a file name."""
    pages: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        pages[re.sub(r"[^\w.]+", "-", comparison.cell.dataset)].append(comparison)
    return pages


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    # Neither the date nor the version of matplotlib, so that the files change only with the records.
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def finish(figure: Figure, title: str) -> None:
    """Horizontal grid lines behind the curves of each panel, and a title above all."""
    for axes in figure.axes:
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left").set_fontsize(10)


def plot_band(panel: Axes, x: Sequence[float], points: Sequence[Estimate], style: Mapping[str, Any]) -> None:
    """Means with a band of ± 1 standard deviation, in the style of an arm; a point without a value is a gap."""
    means = [nan if point.mean is None else point.mean for point in points]
    low, high = ([m + sign * (p.std or 0.0) for m, p in zip(means, points, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    panel.plot(x, means, **{"linewidth": 1.2, "markersize": 3.5, **style})


# ---- Accuracy curves --------------------------------------------------------------------------------------


def curves(comparisons: Sequence[Comparison], found: Curves) -> Figure:
    """A panel per pair: test top-1 over the epochs, mean over the seeds with a band of ± 1 std."""
    columns = min(len(comparisons), 2 if len(comparisons) == 4 else 3)
    rows = -(-len(comparisons) // columns)
    shared = {conditions(comparison) for comparison in comparisons}
    width = 3.0 * columns if columns > 1 else 4.6
    height = 2.3 * rows + 0.5 if len(shared) == 1 else 2.6 * rows + 0.5
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for index, (panel, comparison) in enumerate(zip(panels, comparisons, strict=False)):
        if len(shared) == 1:
            panel.set_title(in_words(comparison.cell.backbone))
        else:
            recipe = textwrap.wrap(conditions(comparison), 42)
            panel.set_title(in_words(comparison.cell.backbone), pad=6 + 9 * len(recipe))
            panel.text(0, 1.03, "\n".join(recipe), fontsize=7, color=GREY, transform=panel.transAxes)
        _panel(panel, comparison, found)
        if index % columns == 0:
            panel.set_ylabel("test top-1 (%)")
        if index >= len(comparisons) - columns:
            panel.set_xlabel("epoch")
    for panel in panels[len(comparisons) :]:
        panel.set_axis_off()
    several = any(len(arm.of()) > 1 for comparison in comparisons for arm in comparison.arms)
    named = ": ".join([comparisons[0].label, *(shared if len(shared) == 1 else ())])
    finish(figure, named + ("; band: ± std over seeds" if several else ""))
    return figure


def _panel(panel: Axes, comparison: Comparison, found: Curves) -> None:
    visible: list[float] = []
    for arm in comparison.arms:
        curve = _mean_curve(arm, found)
        if not curve:
            continue
        style = STYLES[arm.norm]
        label = f"{style['label']}  {mean_std(arm.of().values())}  (n = {len(arm.of())})"
        marks = _marks(len(curve), offset=arm.norm == L2BN)
        plot_band(panel, range(1, len(curve) + 1), curve, {**style, "label": label, "markevery": marks})
        visible += [point.mean or 0.0 for point in curve]
    if visible:
        panel.set_ylim(*_limits(visible))
        panel.legend(loc="lower right", handlelength=2.6, borderaxespad=0.2)
    longest = max((arm.epochs for arm in comparison.arms), default=1)
    panel.xaxis.set_major_locator(
        MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]) if longest > 1 else FixedLocator([1])
    )
    lost = [f"{arm.diverged} {STYLES[arm.norm]['label']}" for arm in comparison.arms if arm.diverged]
    if lost:
        panel.set_title(f"diverged: {', '.join(lost)}", loc="right", fontsize=7, color=GREY)


def _mean_curve(arm: Arm, found: Curves) -> list[Estimate]:
    """Mean and spread epoch by epoch over the runs that finished."""
    runs = [found[record.folder] for record in arm.records if record.folder in found]
    return [estimate(accuracies) for accuracies in zip(*runs, strict=False)]


def _marks(length: int, *, offset: bool) -> tuple[int, int]:
    """About eight markers per line, those of the two arms between each other so that both stay visible."""
    step = max(1, length // 8)
    return (step // 2 if offset else 0), step


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of the curve without its steep beginning, which would flatten the rest."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 8], ordered[-1]
    reach = max(high - low, 1.0)
    return max(0.0, low - 0.55 * reach), min(100.5, high + 0.08 * reach)


# ---- Paired differences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A row of the dot plot; one without a result is a heading, or a note below one."""

    text: str
    result: Estimate | None = None
    values: Sequence[float] = ()  # the single seeds
    color: str = "#222222"
    marker: str = "D"
    note: bool = False

    @property
    def style(self) -> dict[str, Any]:
        if self.result:
            return {}
        return {"color": GREY, "fontsize": 7} if self.note else {"fontweight": "bold"}


def differences(comparisons: Sequence[Comparison]) -> Figure:
    """A row per cell: mean paired difference, its 95 % interval, the seeds behind it; pooled below."""
    rows = [comparison for comparison in comparisons if comparison.differences()]
    style, lines = STYLES[L2BN], list[Line]()
    label = ""
    for (dataset, made_by), group in groupby(rows, key=lambda row: (row.label, conditions(row))):
        lines += [Line(dataset)] if dataset != label else []
        lines += [Line(part, note=True) for part in textwrap.wrap(made_by, 60)]
        for row in group:
            name, values = in_words(row.cell.backbone), row.differences()
            lines.append(Line(name, row.difference(), values, style["color"], style["marker"]))
        label = dataset
    lines.append(Line("Pooled, n cells"))
    for full, text in ((True, f"{FULL_EPOCHS} epochs and more"), (False, f"under {FULL_EPOCHS} epochs")):
        chosen = [row for row in rows if row.full_length is full and row.cell.task == "images"]
        if chosen:
            lines.append(Line(text, pooled(chosen)))
    return _dots(lines)


def differences_of_set(rows: Sequence[Comparison], run_set: RunSet) -> Figure:
    """A row per network of a set, and below it the means by both rules, as far as they have one."""
    style, lines = STYLES[L2BN], [Line(run_set.label)]
    for row in rows:
        values = row.differences()
        if values:
            name = in_words(row.cell.backbone)
            lines.append(Line(name, row.difference(), values, style["color"], style["marker"]))
    arms = [arm for row in rows for arm in row.arms]
    these, others = judge_set(ACCURATE, run_set, arms, run_set.seeds), pooled(rows)
    lines.append(Line("Mean over the networks"))
    if these.overall and these.overall.mean is not None:
        lines.append(Line("these networks; n: pairs", these.overall))
    lines.append(Line("other networks; n: networks", others))
    return _dots(lines)


PLOT, BESIDE, ROW, ABOVE, BELOW = 3.6, 0.95, 0.21, 0.3, 0.72  # inches


def _dots(lines: Sequence[Line]) -> Figure:
    """Names to the left of the plot, means and n to its right, so that no text overlaps it."""
    names = max(_width(line) for line in lines) + 0.3
    width, height = names + PLOT + BESIDE, ABOVE + ROW * len(lines) + BELOW
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((names / width, BELOW / height, PLOT / width, ROW * len(lines) / height))
    row: Any = {"transform": blended_transform_factory(figure.transFigure, axes.transData), "va": "center"}
    mean, n = ((names + PLOT + beside) / width for beside in (0.55, 0.85))
    for text, x in (("mean", mean), ("n", n)):
        axes.text(x, -1, text, ha="right", color=GREY, **row)
    axes.axvline(0, color="#222222", linewidth=0.8)
    for place, line in enumerate(lines):
        result = line.result
        axes.text((0.1 if result is None else 0.2) / width, place, line.text, **row, **line.style)
        if result is None or result.mean is None:
            continue
        if len(line.values) > 1:
            axes.plot(line.values, [place] * len(line.values), "|", color=GREY, markersize=7, markeredgewidth=0.9)
        if result.low is not None and result.high is not None:
            axes.plot([result.low, result.high], [place, place], color=line.color, linewidth=1.4)
        face = "white" if result.low is None else line.color
        axes.plot(result.mean, place, line.marker, color=line.color, markerfacecolor=face, markersize=5.5, zorder=3)
        axes.text(mean, place, signed(result.mean), ha="right", **row)
        axes.text(n, place, str(result.n), ha="right", **row)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "L2BN − BN, test top-1 after the last epoch (points)\n"
        "line: 95 % interval; hollow: n too small for one; ticks: single seeds"
    )
    return figure


def _width(line: Line) -> float:
    """The width of a line's text, inches."""
    style = {"fontsize": RC["font.size"], "fontweight": "normal"} | line.style
    font = FontProperties(family=RC["font.family"], weight=style["fontweight"], size=style["fontsize"])
    return float(TextPath((0, 0), line.text, prop=font).get_extents().width) / 72
