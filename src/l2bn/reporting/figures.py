"""Figures from records: BN against L2BN in accuracy, paired differences, features and studies.

Readable in print without colour and by the colour-blind: the arms differ in lightness, line style and marker. The
same records give the same bytes.
"""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from l2bn.records import InvalidRecordError, Problem, Record, Sample, read_sample
from l2bn.reporting.claims import (
    ACCURATE,
    COMPACT,
    EQUAL_NORMS,
    UNKNOWN,
    Question,
    compared,
    estimate_for_others,
    judge_set,
)
from l2bn.reporting.comparison import (
    FULL_EPOCHS,
    Arm,
    Comparison,
    arms_of,
    grid,
    pooled,
    without_further_folds,
)
from l2bn.reporting.evidence import (
    ANGLE_MEAN,
    BN,
    INPUT,
    L2BN,
    OUTPUT,
    PENULTIMATE,
    RMS,
    TOP1,
    WITHIN_SHARE,
    Evidence,
    by_layer,
    measure,
)
from l2bn.reporting.formatting import (
    as_file_name,
    conditions,
    file_name,
    in_words,
    mean_std,
    plural,
    setting,
    signed,
    title,
)
from l2bn.reporting.mechanism import Mechanism, measured_pairs
from l2bn.reporting.reference import RunSet
from l2bn.reporting.statistics import MIN_PAIRS, Estimate, estimate
from l2bn.reporting.studies import Study, accuracy_by_update, eps_text, shrink_factors

# Black, and the vermilion and blue of Okabe and Ito (2008).
STYLES: Mapping[str, Mapping[str, Any]] = {
    BN: {"color": "#222222", "linestyle": (0, (4, 1.5)), "marker": "s", "label": "BN"},
    L2BN: {"color": "#D55E00", "linestyle": "-", "marker": "o", "label": "L2BN"},
}
EPS_STYLES: Mapping[str, Mapping[str, Any]] = {
    BN: STYLES[BN],
    L2BN: {**STYLES[L2BN], "label": "L2BN, norm 1"},
    RMS: {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "^", "label": "L2BN, rms 1"},
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
    "lines.solid_capstyle": "butt",  # an interval ends where it ends
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,  # above grid lines
    "savefig.dpi": 200,
    "figure.constrained_layout.w_pad": 0.08,
    "svg.hashsalt": "l2bn",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}

TITLE_LETTERS = 13
"""Characters of a title per inch."""

Curves = Mapping[Path, Sequence[float | None]]
"""The folder of a run to its test top-1 after each epoch, percent."""


def drawing() -> AbstractContextManager[None]:
    """Draw by RC and matplotlib's own defaults: a user's matplotlibrc changes nothing."""
    return mpl.style.context(["default", RC])


def read_curves(records: Sequence[Record]) -> tuple[Curves, list[Problem]]:
    """The curves of the runs that finished, and those whose epochs cannot be read."""
    found = {}
    problems = []
    for record in records:
        if record.status != "finished" or record.norm not in STYLES:
            continue
        try:
            found[record.folder] = [row["test/top1"] for row in record.metrics()]
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error), "curve"))
    return found, problems


def write_figures(
    evidence: Evidence, folder: Path, sets: Sequence[RunSet] = ()
) -> tuple[list[Path], list[Problem]]:
    """Draw accuracies, and compactness in sets, as PNG and SVG: the paths written, and records without a curve.

    Those count in all means and differences, as in the tables: their result stands in the summary.
    """
    found, problems = read_curves(evidence.records)
    comparisons = without_further_folds(grid(arms_of(evidence)))
    pages: dict[str, list[Comparison]] = defaultdict(list)  # of curves, one per data set
    for comparison in comparisons:
        pages[comparison.cell.dataset].append(comparison)
    paths = []
    with drawing():
        for dataset, group in pages.items():
            if any(arm.of() for comparison in group for arm in comparison.arms):
                paths += save_figure(curves(group, found), folder, f"curves-{as_file_name(dataset)}")
        if any(comparison.differences() for comparison in comparisons):
            paths += save_figure(differences(comparisons), folder, "differences")
        for run_set in sets:
            for (what, questions), name in zip(SET_FIGURES.items(), run_set.figures, strict=True):
                lines = lines_of_set(arms_of(evidence), run_set, questions)
                if lines:
                    paths += save_figure(forest_plot(lines, what), folder, name)
    return paths, problems


def write_mechanism_figures(mechanism: Mechanism, folder: Path) -> tuple[list[Path], list[Problem]]:
    """Draw features and studies as PNG and SVG: the paths written, and the records whose sample cannot be read."""
    paths, problems = [], []
    with drawing():
        for pair in measured_pairs(mechanism.arms):
            name = file_name(pair.cell)
            paths += save_figure(norms_by_depth(pair), folder, f"norms-{name}")
            if pair.measured_epochs:
                paths += save_figure(through_training(pair), folder, f"training-{name}")
            if not pair.sampled:
                continue
            seed, *runs = pair.sampled
            samples: list[Sample] = []
            for run in runs:
                try:
                    samples += filter(None, [read_sample(run)])
                except InvalidRecordError as error:
                    problems.append(Problem(run, str(error), "sample"))
            if len(samples) == 2:
                paths += save_figure(feature_map(pair, seed, *samples), folder, f"map-{name}")
        for study in mechanism.studies.eps:
            paths += save_figure(accuracy_over_eps(study), folder, f"eps-{file_name(study.cell)}")
        for study in mechanism.studies.rates:
            paths += save_figure(accuracy_over_rates(study), folder, f"rates-{file_name(study.cell)}")
        for trap in mechanism.studies.traps:
            if any(arm.features for arm in trap.arms):
                paths += save_figure(accuracy_over_updates(trap), folder, f"trap-{file_name(trap.cell)}")
    return paths, problems


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    # Neither the date nor the version of matplotlib, so that the files change only with the records.
    figure.savefig(paths[0], metadata={"Software": None})
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


# ---- Elements that figures share --------------------------------------------------------------------------


def _panels(width: float, height: float, rows: int = 1, columns: int = 2, **shared: Any) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flatten())


def _finish(figure: Figure, text: str, band: str = "", seeds: Iterable[int] = ()) -> None:
    """Horizontal grid lines behind the curves of each panel, and a title above all.

    band: what the bands show, named in the title if one of the numbers of seeds gives a band.
    """
    for axes in figure.axes:
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    shown = f"; band: {band} over seeds" if any(n > 1 for n in seeds) else ""
    letters = int(TITLE_LETTERS * figure.get_figwidth())
    figure.suptitle(textwrap.fill(text + shown, letters), x=0.01, ha="left", fontsize=10)


def _room_above(panel: Axes, low: float, top: float) -> None:
    """Set the ends of an axis of percent that holds a legend above the values: no tick is above 100."""
    panel.set_ylim(low, top)
    panel.set_yticks([tick for tick in panel.get_yticks() if low <= tick <= min(100, top)])


def _plot_band(panel: Axes, x: Sequence[float], points: Sequence[Estimate], style: Mapping[str, Any]) -> None:
    """Means with a band of ± 1 standard deviation, in the style of an arm; a point without a value is a gap."""
    means = [nan if point.mean is None else point.mean for point in points]
    low, high = ([m + sign * (p.std or 0.0) for m, p in zip(means, points, strict=True)] for sign in (-1, 1))
    panel.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    panel.plot(x, means, **{"linewidth": 1.2, "markersize": 3.5, **style})


def _counted(style: Mapping[str, Any], *counts: int) -> dict[str, Any]:
    """A style whose label has the number of runs at each value of an axis: "n = 3", or "n = 2 to 3"."""
    span = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return {**style, "label": f"{style['label']}  (n = {span})"}


def _over_runs(runs: Iterable[Sequence[float | None]]) -> list[Estimate]:
    """Mean and spread over the runs, place by place."""
    return [estimate([value for value in values if value is not None]) for values in zip(*runs, strict=True)]


def _depth_axis(panel: Axes) -> None:
    panel.set_xlabel("norm layer, in order of execution")
    panel.xaxis.set_major_locator(MaxNLocator(7, integer=True, prune="lower"))


# ---- Accuracy curves --------------------------------------------------------------------------------------


LONG, LAST = 20, 8  # runs of LONG epochs or more have an inset of their LAST ones
INSET_TOP = 0.44  # of a panel's height


def curves(comparisons: Sequence[Comparison], found: Curves) -> Figure:
    """A panel per pair: test top-1 over the epochs, mean over the seeds with a band of ± 1 std.

    Long runs have an inset of their last epochs, whose differences are small beside the rise before them; but not
    where it would lie on a curve, as after a warm restart.
    """
    columns = min(len(comparisons), 2 if len(comparisons) == 4 else 3)
    rows = -(-len(comparisons) // columns)
    shared = {conditions(comparison) for comparison in comparisons}
    width = 3.0 * columns if columns > 1 else 4.6
    figure, panels = _panels(width, (2.3 if len(shared) == 1 else 2.6) * rows + 0.5, rows, columns)
    for index, (panel, comparison) in enumerate(zip(panels, comparisons, strict=False)):
        if len(shared) == 1:
            panel.set_title(in_words(comparison.cell.backbone))
        else:
            recipe = textwrap.wrap(conditions(comparison), 42)
            panel.set_title(in_words(comparison.cell.backbone), pad=6 + 9 * len(recipe))
            panel.text(0, 1.03, "\n".join(recipe), fontsize=7, color=GREY, transform=panel.transAxes)
        _draw_pair(panel, comparison, found)
        if index % columns == 0:
            panel.set_ylabel("test top-1 (%)")
        if index >= len(comparisons) - columns:
            panel.set_xlabel("epoch")
    for panel in panels[len(comparisons) :]:
        panel.set_axis_off()
    named = ": ".join([comparisons[0].cell.label, *(shared if len(shared) == 1 else ())])
    insets = any(panel.child_axes for panel in panels)
    named += f"; inset: last {LAST} epochs" * insets
    _finish(figure, named, "± std", (len(arm.of()) for comparison in comparisons for arm in comparison.arms))
    return figure


def _draw_pair(panel: Axes, comparison: Comparison, found: Curves) -> None:
    visible: list[float] = []
    later: list[float] = []  # where an inset lies
    is_long = comparison.epochs >= LONG
    has_inset = is_long and any(arm.of() for arm in comparison.arms)
    inset = panel.inset_axes((0.56, 0.1, 0.42, INSET_TOP - 0.1)) if has_inset else None
    for arm in comparison.arms:
        n = len(arm.of())
        if n == 0:
            continue
        runs = [found[record.folder] for record in arm.records if record.folder in found]
        curve = _over_runs(runs)
        style = STYLES[arm.norm]
        drawn = "" if len(runs) == n else f", curve of {len(runs)}"
        label = f"{style['label']}  {mean_std(arm.of().values())}  (n = {n}{drawn})"
        # About eight markers a line, those of one arm between those of the other, so that both stay visible.
        step = max(1, len(curve) // 8)
        marks = (step // 2 if arm.norm == L2BN else 0), step
        epochs = range(1, len(curve) + 1)
        _plot_band(panel, epochs, curve, {**style, "label": label, "markevery": marks})
        if inset:
            _plot_band(inset, epochs[-LAST:], curve[-LAST:], {**style, "markersize": 2.5})
        means = [point.mean for point in curve if point.mean is not None]
        visible, later = visible + means, later + means[len(means) // 2 :]
    if visible and not is_long:
        panel.set_ylim(*_limits(visible))
    if inset:
        _room_above(panel, 0, 1.3 * max(visible, default=1.0))
    if inset and min(later, default=0.0) < INSET_TOP * panel.get_ylim()[1]:
        inset.remove()
    elif inset:
        inset.tick_params(labelsize=6.5, length=2)
        inset.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        inset.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        inset.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    if panel.lines:
        panel.legend(loc="upper left" if is_long else "lower right", handlelength=2.6, borderaxespad=0.2)
    panel.xaxis.set_major_locator(
        MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]) if comparison.epochs > 1 else FixedLocator([1])
    )
    lost = [f"{arm.diverged} {STYLES[arm.norm]['label']}" for arm in comparison.arms if arm.diverged]
    if lost:
        panel.set_title(f"diverged: {', '.join(lost)}", loc="right", fontsize=7, color=GREY)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of a short curve but for its lowest eighth, with room below it for the legend."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 8], ordered[-1]
    reach = max(high - low, 1.0)
    return max(0.0, low - 0.55 * reach), min(100.5, high + 0.08 * reach)


# ---- Paired differences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForestRow:
    """A row of the forest plot; one without a result is a heading, or a note below one."""

    text: str
    result: Estimate | None = None
    values: Sequence[float] = ()  # the single seeds
    color: str = "#222222"
    marker: str = "D"
    note: bool = False
    common: Estimate = UNKNOWN  # by a spread pooled over several lines
    digits: int = 2

    @property
    def style(self) -> dict[str, Any]:
        if self.result:
            return {}
        return {"color": GREY, "fontsize": 7} if self.note else {"fontweight": "bold"}


def _line(row: Comparison, quantity: str = TOP1) -> ForestRow:
    style = STYLES[L2BN]
    name = in_words(row.cell.backbone)
    return ForestRow(name, row.difference(quantity), row.differences(quantity), style["color"], style["marker"])


def differences(comparisons: Sequence[Comparison]) -> Figure:
    """A row per cell: mean paired difference, its 95 % interval, the seeds behind it; below, the pooled ones."""
    rows = [comparison for comparison in comparisons if comparison.differences()]
    lines: list[ForestRow] = []
    label = ""
    for (dataset, made_by), group in groupby(rows, key=lambda row: (row.cell.label, conditions(row))):
        lines += [ForestRow(dataset)] if dataset != label else []
        lines += [ForestRow(part, note=True) for part in textwrap.wrap(made_by, 60)]
        lines += map(_line, group)
        label = dataset
    images = [row for row in rows if row.cell.task == "images"]
    means = [
        ForestRow(text, pooled(row for row in images if row.full_length is full))
        for full, text in ((True, f"{FULL_EPOCHS} epochs and more"), (False, f"under {FULL_EPOCHS} epochs"))
    ]
    known = [line for line in means if line.result and line.result.n]
    head = ForestRow("Mean over cells of images, n cells"), ForestRow(f"{MIN_PAIRS} pairs or more", note=True)
    lines += [*head, *known] if known else []
    return forest_plot(lines, IN_ACCURACY)


IN_ACCURACY = "BN better  ←   L2BN − BN, test top-1 after the last epoch (points)   →  L2BN better"
IN_COMPACTNESS = "more compact  ←   L2BN − reference, within share of the penultimate features   →  less"
SET_FIGURES = {IN_ACCURACY: (ACCURATE,), IN_COMPACTNESS: (COMPACT, EQUAL_NORMS)}
"""The axes of the figures of a set, and the questions that each puts below another."""


def lines_of_set(arms: Sequence[Arm], run_set: RunSet, questions: Iterable[Question]) -> list[ForestRow]:
    """A row per network of a set and question, and below it the means by both rules, as far as they have one.

    arms: of every cell; the mean for other networks is over those on images.
    """
    lines: list[ForestRow] = []
    for question in questions:
        every = compared(question, arms)
        these = judge_set(question, run_set, arms)
        common = dict(zip(these.cells, these.estimates, strict=False))
        rows = []
        own = {pair.cell: pair for pair in these.pairs}  # of the seeds of the set alone
        for row in every:
            if row.cell in these.cells and row.differences(question.quantity):
                line = _line(own.get(row.cell, row), question.quantity)
                rows.append(replace(line, common=common.get(row.cell, UNKNOWN)))
                notes = [setting(row.cell)] if row.cell.setting != run_set.setting else []
                notes += ["each pair: a CPU and a GPU"] if row.cell.backbone in these.confounded else []
                rows += [ForestRow(f"    {note}", note=True) for note in notes]
        means = (
            ("mean over these networks, n pairs", these.overall, these.overall),
            ("the same, for other networks, n networks", estimate_for_others(every, question.quantity), UNKNOWN),
        )
        if rows:
            rows += [
                ForestRow(text, result, common=both) for text, result, both in means if result.mean is not None
            ]
            lines.append(ForestRow(f"{run_set.label}, L2BN − {question.reference_name}"))
            lines += [replace(row, digits=question.digits) for row in rows]
    return lines


PLOT, BESIDE, ROW, ABOVE, BELOW = 3.6, 0.95, 0.21, 0.3, 0.72  # inches


def forest_plot(lines: Sequence[ForestRow], what: str) -> Figure:
    """Names to the left of the plot, means and n to its right, so that no text overlaps it; `what` is its axis."""
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
            axes.plot(line.values, [place] * len(line.values), "|", color=GREY, markersize=9, markeredgewidth=0.9)
        if result.low is not None and result.high is not None:
            axes.plot([result.low, result.high], [place, place], color=line.color, linewidth=1.4)
        if line.common.low is not None and line.common.high is not None:
            pale: Any = {"color": line.color, "linewidth": 5, "alpha": 0.35}
            axes.plot([line.common.low, line.common.high], [place, place], **pale)
        face = "white" if result.low is None else line.color
        edge = line.color if result.low is None else "white"
        style: Any = {"color": line.color, "markerfacecolor": face, "markeredgecolor": edge, "markersize": 6}
        axes.plot(result.mean, place, line.marker, **style, zorder=3)
        axes.text(mean, place, signed(result.mean, line.digits), ha="right", **row)
        axes.text(n, place, str(result.n), ha="right", **row)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    hollow = any(line.result and line.result.mean is not None and line.result.low is None for line in lines)
    common = any(line.common.low is not None for line in lines)
    axes.set_xlabel(
        f"{what}\nline: 95 % interval{' by own spread, broad: by the pooled one' * common};"
        f"{' hollow: none (n too small or no spread);' * hollow} ticks: single seeds"
    )
    return figure


def _width(line: ForestRow) -> float:
    """The width of a line's text, inches."""
    style = {"fontsize": RC["font.size"], "fontweight": "normal"} | line.style
    font = FontProperties(family=RC["font.family"], weight=style["fontweight"], size=style["fontsize"])
    return float(TextPath((0, 0), line.text, prop=font).get_extents().width) / 72


# ---- Features -------------------------------------------------------------------------------------------------


def norms_by_depth(pair: Comparison) -> Figure:
    """The norms' coefficient of variation at each norm layer, in order of execution: input and output.

    Mean over the seeds with a band of ± 1 std.
    """
    figure, panels = _panels(6.6, 2.9, sharey=True)
    for panel, side in zip(panels, (INPUT, OUTPUT), strict=True):
        panel.set_title(f"at the {side} of each norm layer")
        for arm in pair.arms:
            style = _counted(STYLES[arm.norm], len(arm.features))
            points = _by_layer(arm, f"{side}/norm_cv")
            if len(points) > 30:  # markers of one arm between those of the other
                style |= {"markevery": (3 if arm.norm == L2BN else 0, 6)}
            _plot_band(panel, range(1, len(points) + 1), points, style)
        panel.set_xlim(left=0.2)
        _depth_axis(panel)
    panels[0].set_ylim(bottom=0)  # the axis of both: it follows the values no longer
    panels[0].set_ylabel("std / mean of the samples' l2 norms")
    panels[0].legend(handlelength=2.6)
    _finish(figure, title(pair.cell), "± std", (len(arm.features) for arm in pair.arms))
    return figure


def _by_layer(arm: Arm, quantity: str) -> list[Estimate]:
    """A quantity at each norm layer after the last epoch, over the seeds."""
    return _over_runs(by_layer(rows[-1], quantity) for rows in arm.features.values())


OVER_EPOCHS = (
    (WITHIN_SHARE, "within-class share of the variance\n(small: compact)"),
    (ANGLE_MEAN, "mean angle of class means (°)\n(large: separated)"),
    (f"{PENULTIMATE}/distance", "distance of class means / spread\n(large: separated)"),
)


def through_training(pair: Comparison) -> Figure:
    """Compactness and separation of the penultimate features over the epochs: mean ± 1 std over the seeds."""
    figure, panels = _panels(9.0, 2.7, columns=len(OVER_EPOCHS))
    for panel, (quantity, text) in zip(panels, OVER_EPOCHS, strict=True):
        panel.set_title(text)
        for arm in pair.arms:
            points = _over_runs([measure(row, quantity) for row in rows] for rows in arm.features.values())
            style = _counted(STYLES[arm.norm], len(arm.features))
            _plot_band(panel, pair.measured_epochs, points, style)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_xlabel("epoch")
    panels[0].legend(handlelength=2.6)
    _finish(figure, title(pair.cell), "± std", (len(arm.features) for arm in pair.arms))
    return figure


# ---- A map of the penultimate features --------------------------------------------------------------------------

Floats = NDArray[np.float64]
TINIEST = 1e-30  # of a spread, where all features are equal

CLASSES = (
    *("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE"),
    *("#AA3377", "#999999", "#222222", "#EE7733", "#99DDFF"),
)
"""After the schemes of P. Tol, Colour Schemes (2021), that the colour-blind can tell apart; markers differ, too."""
MARKERS = "osD^vP*Xph"


def principal_plane(features: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean (d,), the first two principal directions (2, d), and their shares of the variance (2,).

    Each direction points to where its largest component is positive, so that a figure is not mirrored by chance.
    """
    mean = features.mean(0)
    _, sigma, directions = np.linalg.svd(features - mean, full_matrices=False)
    plane = directions[:2]
    largest = np.take_along_axis(plane, np.abs(plane).argmax(1)[:, None], 1)
    return mean, plane * np.sign(largest), (sigma**2 / (sigma**2).sum())[:2]


def _scaled(sample: Sample, kinds: Sequence[int]) -> Sample:
    """The images of these classes, their features divided by the total standard deviation."""
    shown = np.isin(sample.labels, kinds)
    features = sample.features[shown]
    std = max(np.sqrt(features.var(0, dtype=float).sum()), TINIEST)
    return Sample(features / np.float32(std), sample.labels[shown])


def feature_map(pair: Comparison, seed: int, bn: Sample, l2bn: Sample) -> Figure:
    """The penultimate features of the same test images in both networks, on the plane of their joint PCA.

    Each network's features are divided by their total standard deviation, since their scale is arbitrary: so a
    network with smaller features does not look more compact.
    """
    kinds = sorted(set(bn.labels.tolist()))[: len(CLASSES)]  # as many as there are colours
    bn, l2bn = _scaled(bn, kinds), _scaled(l2bn, kinds)
    mean, plane, shares = principal_plane(np.concatenate([bn.features, l2bn.features]).astype(float))
    figure, panels = _panels(6.6, 3.4, sharex=True, sharey=True)
    for panel, sample, arm in zip(panels, (bn, l2bn), pair.arms, strict=True):
        panel.set_title(STYLES[arm.norm]["label"])
        points = (sample.features - mean) @ plane.T
        for kind, color, marker in zip(kinds, CLASSES, MARKERS, strict=False):
            at = points[sample.labels == kind]
            panel.scatter(*at.T, s=11, color=color, marker=marker, linewidths=0, alpha=0.8, label=str(kind))
        panel.set_xlabel(f"first principal component ({100 * shares[0]:.0f} %)")
        panel.set_aspect("equal", adjustable="box")
    panels[0].set_ylabel(f"second component ({100 * shares[1]:.0f} %)")
    key = panels[0].get_legend_handles_labels()
    figure.legend(*key, loc="outside right center", title="class", markerscale=1.3)
    figure.suptitle(f"{title(pair.cell)}\n", x=0.01, ha="left", fontsize=10)
    images = f"{plural('test image', len(bn.labels))} of {len(kinds)} classes; unit: each network's total std"
    note = f"seed {seed}, {images}"
    panels[0].text(0, 1.12, note, transform=panels[0].transAxes, color=GREY, fontsize=7, in_layout=False)
    return figure


# ---- Studies ----------------------------------------------------------------------------------------------------


def _points(panel: Axes, runs: Mapping[float, Arm], style: Mapping[str, Any], shift: float) -> None:
    """Mean and every seed at each value of a logarithmic axis; a value at which no run finished has none."""
    known = [(x * shift, list(arm.of().values())) for x, arm in runs.items() if arm.of()]
    for x, values in known:
        if len(values) > 1:
            panel.plot([x] * len(values), values, "_", color=style["color"], markersize=5, markeredgewidth=0.9)
    if known:
        means = [(x, sum(values) / len(values)) for x, values in known]
        if all(len(values) == 1 for _, values in known):
            style = {**style, "linestyle": "none"}  # a line through single runs would look like a trend
        panel.plot(*zip(*means, strict=True), **style, linewidth=1.2, markersize=4)


def _log_axis(panel: Axes, name: str, values: Sequence[float], texts: Sequence[str]) -> None:
    panel.set_xscale("log")
    panel.set_xticks(values, texts)
    panel.minorticks_off()
    panel.set_xlabel(name)


def accuracy_over_eps(study: Study) -> Figure:
    """Left: accuracy over eps, each seed a dash. Right: the shrink factor of each norm layer with norm 1."""
    figure, (left, right) = _panels(6.6, 2.9)
    values = {eps: eps_text(eps).replace("e-0", "e-") for (eps,) in study.values}
    left.set_title("test top-1 after the last epoch (%)")
    for index, (norm, style) in enumerate(EPS_STYLES.items()):
        runs = {eps: study.at(norm, eps) for eps in values}
        counts = (len(arm.of()) for arm in runs.values())
        _points(left, runs, _counted(style, *counts), 1.8 ** (index - 1))
    _log_axis(left, "eps", list(values), list(values.values()))
    low, high = left.get_ylim()
    _room_above(left, low, low + 1.45 * (high - low))
    left.legend(handlelength=2.6, loc="upper right")
    right.set_title("shrink factor, L2BN at norm 1")
    apart = min(0.2, 0.7 / max(len(values) - 1, 1))
    for index, (eps, text) in enumerate(values.items()):
        layers = shrink_factors(study.at(L2BN, eps))
        if layers:
            style = {"color": f"{0.15 + apart * index:.2f}", "marker": "osD^v"[index % 5], "label": text}
            # Hollow, and the earlier the larger: so equal ones are all seen.
            size: Any = {"markersize": 2.5 + 1.2 * (len(values) - index), "markerfacecolor": "none"}
            right.plot(range(1, len(layers) + 1), layers, **style, **size, linewidth=1.2)
    right.set_ylim(0, 1.05)
    _depth_axis(right)
    right.legend(title="eps", loc="center right", bbox_to_anchor=(1, 0.62), ncols=2)
    several = any(len(arm.of()) > 1 for arm in study.arms)
    _finish(figure, f"{title(study.cell)}; points shifted sideways{'; a dash for each seed' * several}")
    return figure


def accuracy_over_rates(study: Study) -> Figure:
    """A panel per batch size: accuracy of BN and L2BN over the learning rates, each seed a dash."""
    batches = sorted({batch for batch, _ in study.values})
    figure, panels = _panels(2.2 * len(batches) + 0.6, 2.7, columns=len(batches), sharey=True)
    for panel, batch in zip(panels, batches, strict=True):
        rates = [rate for size, rate in study.values if size == batch]
        panel.set_title(f"batch size {batch}")
        for norm, shift in ((BN, 0.95), (L2BN, 1.05)):
            runs = {rate: study.at(norm, batch, rate) for rate in rates}
            every = (study.at(norm, *value) for value in study.values)  # of all panels: one has the legend
            _points(panel, runs, _counted(STYLES[norm], *(len(arm.of()) for arm in every)), shift)
            for rate, lost in ((rate, arm.diverged) for rate, arm in runs.items() if arm.diverged):
                place = (rate * shift, 0.02 if norm == BN else 0.08)
                text = f"{lost} {STYLES[norm]['label']} diverged"
                panel.text(*place, text, transform=panel.get_xaxis_transform(), ha="right", fontsize=6, color=GREY)
        _log_axis(panel, "learning rate", rates, [f"{rate:g}" for rate in rates])
    panels[0].set_ylabel("test top-1 (%)")
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[0]))
    fullest.legend(loc="lower left", handlelength=2.6)
    _finish(figure, f"{study.cell.label}, {study.cell.backbone}; a dash for each seed")
    return figure


def accuracy_over_updates(study: Study) -> Figure:
    """A panel per norm: accuracy by running and by batch statistics over the updates, mean and range."""
    arms = [arm for arm in study.arms if arm.features]
    figure, panels = _panels(2.2 * len(arms) + 0.6, 2.7, columns=len(arms), sharey=True)
    for panel, arm in zip(panels, arms, strict=True):
        style = EPS_STYLES.get(arm.norm, {"color": "#222222", "label": arm.norm})
        panel.set_title(style["label"])
        for kind, line in (("batch", (0, (4, 1.5))), ("running", "-")):
            found = accuracy_by_update(arm, kind)
            steps, seeds = list(found), list(found.values())
            low, high = [min(values) for values in seeds], [max(values) for values in seeds]
            mean = [fmean(values) for values in seeds]
            color = style["color"] if kind == "running" else GREY
            panel.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
            panel.plot(steps, mean, color=color, linestyle=line, linewidth=1.2, label=f"{kind} statistics")
        panel.set_xlabel("updates")
        panel.legend(loc="lower right", handlelength=2.6, title=f"n = {len(arm.features)}")
    panels[0].set_ylabel("test top-1 (%)")
    _finish(figure, title(study.cell), "range", (len(arm.features) for arm in arms))
    return figure
