"""Figures of features, BN against L2BN: norm spread by depth, compactness and separation over the epochs, a map.

In the style of figures.py; the same records give the same bytes.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from l2bn.records import InvalidRecordError, Problem, Sample, read_sample
from l2bn.reporting.comparison import Cell
from l2bn.reporting.feature_tables import ANGLE_MEAN, WITHIN_SHARE
from l2bn.reporting.features import INPUT, OUTPUT, PENULTIMATE, Measure, MeasuredArm, MeasuredPair
from l2bn.reporting.figures import GREY, RC, STYLES, save_figure
from l2bn.reporting.statistics import estimate
from l2bn.reporting.wording import plural, whole_cell

Floats = NDArray[np.float64]

CLASSES = (
    *("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE"),
    *("#AA3377", "#999999", "#222222", "#EE7733", "#99DDFF"),
)
"""After the schemes of P. Tol, Colour Schemes (2021), that the colour-blind can tell apart; markers differ, too."""
MARKERS = "osD^vP*Xph"


def write_feature_figures(pairs: Sequence[MeasuredPair], folder: Path) -> tuple[list[Path], list[Problem]]:
    """Draw BN and L2BN of each cell: the paths written, and the records whose sample cannot be read."""
    paths, problems = [], []
    with mpl.rc_context(RC):
        for pair in pairs:
            name = file_name(pair.cell)
            paths += save_figure(norms_by_depth(pair), folder, f"norms-{name}")
            if pair.has_curves:
                paths += save_figure(through_training(pair), folder, f"training-{name}")
            if not pair.sampled:
                continue
            seed, *folders = pair.sampled
            try:
                samples = [read_sample(folder) for folder in folders]
            except InvalidRecordError as error:
                problems.append(Problem(pair.other.arm.records[0].folder.parent, str(error)))
                continue
            paths += save_figure(feature_map(pair, seed, *(s for s in samples if s)), folder, f"map-{name}")
    return paths, problems


def file_name(cell: Cell) -> str:
    """A cell as part of a file's name."""
    setting = "" if cell.setting == "32-true" else f"-{cell.setting}"
    return re.sub(r"[^\w.=-]+", "-", f"{cell.dataset}-{cell.backbone}-{cell.recipe}{setting}")


def _title(figure: Figure, pair: MeasuredPair) -> None:
    figure.suptitle(whole_cell(pair.other.arm.label, pair.cell), x=0.01, ha="left").set_fontsize(10)


def _arms(pair: MeasuredPair) -> tuple[tuple[MeasuredArm, Any], ...]:
    return tuple((arm, STYLES[arm.arm.norm]) for arm in (pair.reference, pair.other))


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


# ---- By depth ---------------------------------------------------------------------------------------------------


def norms_by_depth(pair: MeasuredPair) -> Figure:
    """The norms' coefficient of variation at each norm layer, in the order in which they run: input and output.

    Mean over the seeds with a band of ± 1 std; hollow markers, without a line: between classes.
    """
    figure = Figure(figsize=(6.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, side in zip(panels, (INPUT, OUTPUT), strict=True):
        panel.set_title(f"at the {side} of each norm layer")
        for arm, style in _arms(pair):
            means, stds = _by_layer(arm, Measure("norm_cv", side))
            depth = range(1, len(means) + 1)
            panel.fill_between(depth, means - stds, means + stds, color=style["color"], alpha=0.18, linewidth=0)
            label = f"{style['label']}  (n = {len(arm.rows)})"
            panel.plot(depth, means, **{**style, "label": label}, linewidth=1.2, markersize=3.5)
            between, _ = _by_layer(arm, Measure("norm_cv_between", side))
            hollow = {"linestyle": "", "marker": style["marker"], "markerfacecolor": "white", "label": None}
            panel.plot(depth, between, **{**style, **hollow}, markersize=3, markeredgewidth=0.7)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("norm layer, in the order in which they run")
        panel.set_xlim(left=0.2)
        panel.xaxis.set_major_locator(MaxNLocator(7, integer=True, prune="lower"))
        _grid(panel)
    panels[0].set_ylabel("std / mean of the samples' l2 norms")
    handles, _ = panels[0].get_legend_handles_labels()
    hollow_key = Line2D([], [], color=GREY, linestyle="", marker="o", markerfacecolor="white", markersize=3)
    labels = [*(handle.get_label() for handle in handles), "between classes"]
    panels[0].legend([*handles, hollow_key], labels, handlelength=2.6)
    _title(figure, pair)
    return figure


def _by_layer(arm: MeasuredArm, measure: Measure) -> tuple[Floats, Floats]:
    """Mean and standard deviation over the seeds after the last epoch, (layers,); 0 where there is one seed."""
    values = np.array([measure.by_layer(rows[-1]) for rows in arm.rows.values()], dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


# ---- Through training -------------------------------------------------------------------------------------------

CURVES = (
    (WITHIN_SHARE, "within-class share of the variance\n(small: compact)"),
    (Measure("class_cosine", PENULTIMATE), "mean cosine to the class mean\n(near 1: compact)"),
    (ANGLE_MEAN, "mean angle of class means (°)\n(large: separated)"),
    (Measure("distance", PENULTIMATE), "distance of class means / spread\n(large: separated)"),
)


def through_training(pair: MeasuredPair) -> Figure:
    """Compactness and separation of the penultimate features over the epochs: mean ± 1 std over the seeds."""
    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    epochs = pair.reference.epochs
    for panel, (measure, text) in zip(panels, CURVES, strict=True):
        panel.set_title(text)
        for arm, style in _arms(pair):
            points = [estimate(list(arm.after(measure, index).values())) for index in range(len(epochs))]
            means = np.array([point.mean for point in points], dtype=float)  # None becomes nan, a gap
            stds = np.array([point.std or 0.0 for point in points])
            panel.fill_between(epochs, means - stds, means + stds, color=style["color"], alpha=0.18, linewidth=0)
            label = f"{style['label']}  (n = {len(arm.rows)})"
            panel.plot(epochs, means, **{**style, "label": label}, linewidth=1.2, markersize=3.5)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _grid(panel)
    for panel in panels[2:]:
        panel.set_xlabel("epoch")
    panels[0].legend(handlelength=2.6)
    _title(figure, pair)
    return figure


# ---- A map of the penultimate features --------------------------------------------------------------------------


def principal_plane(features: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean (d,), the first two principal directions (2, d), and their shares of the variance (2,).

    Each direction points to where its largest component is positive, so that a figure is not mirrored by chance.
    """
    mean = features.mean(0)
    _, sigma, directions = np.linalg.svd(features - mean, full_matrices=False)
    plane = directions[:2]
    largest = np.take_along_axis(plane, np.abs(plane).argmax(1)[:, None], 1)
    return mean, plane * np.sign(largest), (sigma**2 / (sigma**2).sum())[:2]


def feature_map(pair: MeasuredPair, seed: int, bn: Sample, l2bn: Sample) -> Figure:
    """The penultimate features of the same test images in both networks, on the plane of their joint PCA."""
    both = np.concatenate([bn.features, l2bn.features]).astype(float)
    mean, plane, shares = principal_plane(both)
    kinds = sorted(set(bn.labels.tolist()))[: len(CLASSES)]
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, sample, (_, style) in zip(panels, (bn, l2bn), _arms(pair), strict=True):
        panel.set_title(style["label"])
        points = (sample.features - mean) @ plane.T
        for kind, color, marker in zip(kinds, CLASSES, MARKERS, strict=False):
            at = points[sample.labels == kind]
            panel.scatter(*at.T, s=11, color=color, marker=marker, linewidths=0, alpha=0.8, label=str(kind))
        panel.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
        panel.set_aspect("equal", adjustable="box")
    panels[0].set_ylabel(f"second ({100 * shares[1]:.0f} %)")
    key = panels[0].get_legend_handles_labels()
    figure.legend(*key, loc="outside right center", title="class", markerscale=1.3)
    _title(figure, pair)
    images = plural("test image", len(bn.labels))
    panels[0].text(0, 1.13, f"seed {seed}, {images}", transform=panels[0].transAxes, color=GREY, fontsize=7)
    return figure
