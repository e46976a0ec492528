"""Figures of features and studies, in the style of figures.py; the same records give the same bytes.

Features, BN against L2BN: spread of the norms by depth, compactness and separation over the epochs, a map. Studies:
accuracy and shrink factors over eps, accuracy over learning rates, running against batch statistics over updates.
"""

from collections.abc import Mapping, Sequence
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
from l2bn.reporting.comparison import Arm, Comparison
from l2bn.reporting.evidence import BN, INPUT, L2BN, OUTPUT, PENULTIMATE, by_layer, measure
from l2bn.reporting.figures import GREY, RC, STYLES, finish, plot_band, save_figure
from l2bn.reporting.formatting import file_name, plural, title
from l2bn.reporting.mechanism import (
    ANGLE_MEAN,
    RMS,
    WITHIN_SHARE,
    Mechanism,
    Study,
    TrapStudy,
    measured_pairs,
    shrink_factors,
)
from l2bn.reporting.statistics import Estimate, estimate

Floats = NDArray[np.float64]

CLASSES = (
    *("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE"),
    *("#AA3377", "#999999", "#222222", "#EE7733", "#99DDFF"),
)
"""After the schemes of P. Tol, Colour Schemes (2021), that the colour-blind can tell apart; markers differ, too."""
MARKERS = "osD^vP*Xph"


NORMS: Mapping[str, Mapping[str, Any]] = {
    BN: {**STYLES[BN], "label": "BN"},
    L2BN: {**STYLES[L2BN], "label": "L2BN, norm 1"},
    # The blue of Okabe and Ito (2008).
    RMS: {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "^", "label": "L2BN, rms 1"},
}


def write_mechanism_figures(mechanism: Mechanism, folder: Path) -> tuple[list[Path], list[Problem]]:
    """Draw what the records allow: the paths written, and the records whose sample cannot be read."""
    paths, problems = [], []
    with mpl.rc_context(RC):
        for pair in measured_pairs(mechanism.arms):
            name = file_name(pair.cell)
            paths += save_figure(norms_by_depth(pair), folder, f"norms-{name}")
            if pair.measured_epochs:
                paths += save_figure(through_training(pair), folder, f"training-{name}")
            if not pair.sampled:
                continue
            seed, *folders = pair.sampled
            try:
                samples = [read_sample(folder) for folder in folders]
            except InvalidRecordError as error:
                problems.append(Problem(folders[1].parent, str(error)))
                continue
            paths += save_figure(feature_map(pair, seed, *(s for s in samples if s)), folder, f"map-{name}")
        for study in mechanism.eps:
            paths += save_figure(accuracy_over_eps(study), folder, f"eps-{file_name(study.cell)}")
        for study in mechanism.rates:
            paths += save_figure(accuracy_over_rates(study), folder, f"rates-{file_name(study.cell)}")
        for trap in mechanism.traps:
            paths += save_figure(accuracy_over_updates(trap), folder, f"trap-{file_name(trap.cell)}")
    return paths, problems


# ---- Features by depth ------------------------------------------------------------------------------------------


def norms_by_depth(pair: Comparison) -> Figure:
    """The norms' coefficient of variation at each norm layer, in order of execution: input and output.

    Mean over the seeds with a band of ± 1 std; hollow markers, without a line: between classes.
    """
    figure = Figure(figsize=(6.6, 2.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, side in zip(panels, (INPUT, OUTPUT), strict=True):
        panel.set_title(f"at the {side} of each norm layer")
        for arm in pair.arms:
            style, points = _style(arm), _by_layer(arm, f"{side}/norm_cv")
            plot_band(panel, range(1, len(points) + 1), points, style)
            between = [point.mean for point in _by_layer(arm, f"{side}/norm_cv_between")]
            hollow = {"linestyle": "", "markerfacecolor": "white", "label": None}
            panel.plot(
                range(1, len(between) + 1), between, **{**style, **hollow}, markersize=3, markeredgewidth=0.7
            )
        panel.set_ylim(bottom=0)
        panel.set_xlabel("norm layer, in order of execution")
        panel.set_xlim(left=0.2)
        panel.xaxis.set_major_locator(MaxNLocator(7, integer=True, prune="lower"))
    panels[0].set_ylabel("std / mean of the samples' l2 norms")
    handles, _ = panels[0].get_legend_handles_labels()
    hollow_key = Line2D([], [], color=GREY, linestyle="", marker="o", markerfacecolor="white", markersize=3)
    labels = [*(handle.get_label() for handle in handles), "between classes"]
    panels[0].legend([*handles, hollow_key], labels, handlelength=2.6)
    finish(figure, f"{title(pair.label, pair.cell)}; band: ± std over seeds")
    return figure


def _style(arm: Arm) -> dict[str, Any]:
    """The style of an arm, with its number of measured runs in the legend."""
    style = STYLES[arm.norm]
    return {**style, "label": f"{style['label']}  (n = {len(arm.features)})"}


def _by_layer(arm: Arm, quantity: str) -> list[Estimate]:
    """A quantity at each norm layer after the last epoch, over the seeds."""
    runs = (by_layer(rows[-1], quantity) for rows in arm.features.values())
    return [estimate([value for value in values if value is not None]) for values in zip(*runs, strict=True)]


# ---- Features over the epochs -----------------------------------------------------------------------------------

CURVES = (
    (WITHIN_SHARE, "within-class share of the variance\n(small: compact)"),
    (f"{PENULTIMATE}/class_cosine", "mean cosine to the class mean\n(near 1: compact)"),
    (ANGLE_MEAN, "mean angle of class means (°)\n(large: separated)"),
    (f"{PENULTIMATE}/distance", "distance of class means / spread\n(large: separated)"),
)


def through_training(pair: Comparison) -> Figure:
    """Compactness and separation of the penultimate features over the epochs: mean ± 1 std over the seeds."""
    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flatten()
    for panel, (quantity, text) in zip(panels, CURVES, strict=True):
        panel.set_title(text)
        for arm in pair.arms:
            runs = ([measure(row, quantity) for row in rows] for rows in arm.features.values())
            epochs = ([value for value in values if value is not None] for values in zip(*runs, strict=True))
            plot_band(panel, pair.measured_epochs, list(map(estimate, epochs)), _style(arm))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for panel in panels[2:]:
        panel.set_xlabel("epoch")
    panels[0].legend(handlelength=2.6)
    finish(figure, f"{title(pair.label, pair.cell)}; band: ± std over seeds")
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


def feature_map(pair: Comparison, seed: int, bn: Sample, l2bn: Sample) -> Figure:
    """The penultimate features of the same test images in both networks, on the plane of their joint PCA."""
    both = np.concatenate([bn.features, l2bn.features]).astype(float)
    mean, plane, shares = principal_plane(both)
    kinds = sorted(set(bn.labels.tolist()))[: len(CLASSES)]
    figure = Figure(figsize=(6.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, sample, arm in zip(panels, (bn, l2bn), pair.arms, strict=True):
        panel.set_title(STYLES[arm.norm]["label"])
        points = (sample.features - mean) @ plane.T
        for kind, color, marker in zip(kinds, CLASSES, MARKERS, strict=False):
            at = points[sample.labels == kind]
            panel.scatter(*at.T, s=11, color=color, marker=marker, linewidths=0, alpha=0.8, label=str(kind))
        panel.set_xlabel(f"first principal component ({100 * shares[0]:.0f} % of the variance)")
        panel.set_aspect("equal", adjustable="box")
    panels[0].set_ylabel(f"second ({100 * shares[1]:.0f} %)")
    key = panels[0].get_legend_handles_labels()
    figure.legend(*key, loc="outside right center", title="class", markerscale=1.3)
    figure.suptitle(title(pair.label, pair.cell), x=0.01, ha="left").set_fontsize(10)
    images = plural("test image", len(bn.labels))
    panels[0].text(0, 1.13, f"seed {seed}, {images}", transform=panels[0].transAxes, color=GREY, fontsize=7)
    return figure


# ---- Studies ----------------------------------------------------------------------------------------------------


def _points(panel: Axes, runs: Sequence[tuple[float, Arm | None]], style: Mapping[str, Any], shift: float) -> None:
    """Mean and every seed at each value of a logarithmic axis; a value at which all runs diverged has none."""
    known = [(x * shift, list(arm.of().values())) for x, arm in runs if arm and arm.of()]
    for x, values in known:
        panel.plot([x] * len(values), values, "_", color=style["color"], markersize=5, markeredgewidth=0.9)
    panel.plot(*zip(*((x, sum(v) / len(v)) for x, v in known), strict=True), **style, linewidth=1.2, markersize=4)


def _count(runs: Sequence[Arm | None]) -> str:
    """The number of finished runs at each value of an axis: "n = 3", or "n = 2 to 3"."""
    counts = [len(arm.of()) if arm else 0 for arm in runs]
    return f"n = {min(counts)}" + (f" to {max(counts)}" if len(set(counts)) > 1 else "")


def _power(eps: float) -> str:
    return f"{eps:.0e}".replace("e-0", "e-")


def accuracy_over_eps(study: Study) -> Figure:
    """Left: accuracy over eps, each seed a dash. Right: the shrink factor of each norm layer with norm 1."""
    figure = Figure(figsize=(6.6, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("test top-1 after the last epoch (%)")
    for index, (norm, style) in enumerate(NORMS.items()):
        runs = [(eps, study.at(norm, eps)) for (eps,) in study.values]
        if any(arm and arm.of() for _, arm in runs):
            counted = {**style, "label": f"{style['label']}  ({_count([arm for _, arm in runs])})"}
            _points(left, runs, counted, 1.25 ** (index - 1))
    left.set_xscale("log")
    left.set_xticks([eps for (eps,) in study.values], [_power(eps) for (eps,) in study.values])
    left.minorticks_off()
    left.set_xlabel("eps")
    left.legend(handlelength=2.6)
    right.set_title("shrink factor, L2BN at norm 1")
    greys = [f"{0.15 + 0.2 * i:.2f}" for i in range(len(study.values))]
    for (eps,), grey, marker in zip(study.values, greys, "osD^v", strict=False):
        layers = shrink_factors(study.at(L2BN, eps))
        if layers:
            depth = range(1, len(layers) + 1)
            right.plot(depth, layers, color=grey, marker=marker, markersize=3.5, linewidth=1.2, label=_power(eps))
    right.set_ylim(0, 1.05)
    right.set_xlabel("norm layer, in order of execution")
    right.xaxis.set_major_locator(MaxNLocator(7, integer=True, prune="lower"))
    right.legend(title="eps", loc="center right", bbox_to_anchor=(1, 0.62), ncols=2)
    finish(figure, f"{title(study.label, study.cell)}; a dash for each seed")
    return figure


def accuracy_over_rates(study: Study) -> Figure:
    """A panel per batch size: accuracy of BN and L2BN over the learning rates, each seed a dash."""
    batches = sorted({batch for batch, _ in study.values})
    figure = Figure(figsize=(2.2 * len(batches) + 0.6, 2.7), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        rates = [rate for size, rate in study.values if size == batch]
        panel.set_title(f"batch size {batch}")
        for norm, shift in ((BN, 0.95), (L2BN, 1.05)):
            runs = [(rate, study.at(norm, batch, rate)) for rate in rates]
            if any(arm and arm.of() for _, arm in runs):
                count = _count([study.at(norm, *value) for value in study.values])
                style = {**STYLES[norm], "label": f"{STYLES[norm]['label']}  ({count})"}
                _points(panel, runs, style, shift)
            for rate, lost in ((rate, arm.diverged) for rate, arm in runs if arm and arm.diverged):
                place = (rate * shift, 0.02 if norm == BN else 0.08)
                text = f"{lost} {STYLES[norm]['label']} diverged"
                panel.text(*place, text, transform=panel.get_xaxis_transform(), ha="right", fontsize=6, color=GREY)
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.minorticks_off()
        panel.set_xlabel("learning rate")
    panels[0].set_ylabel("test top-1 (%)")
    panels[0].legend(loc="lower left", handlelength=2.6)
    finish(figure, f"{study.label}, {study.cell.backbone}; a dash for each seed")
    return figure


def accuracy_over_updates(study: TrapStudy) -> Figure:
    """A panel per norm: accuracy by running and by batch statistics over the updates, mean and range."""
    norms = [norm for norm in NORMS if norm in study.rows]
    figure = Figure(figsize=(2.2 * len(norms) + 0.6, 2.7), layout="constrained")
    panels = figure.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for panel, norm in zip(panels, norms, strict=True):
        panel.set_title(NORMS[norm]["label"])
        for kind, line in (("batch", (0, (4, 1.5))), ("running", "-")):
            curve = study.curve(norm, kind)
            steps, seeds = [step for step, _ in curve], [values for _, values in curve]
            color = NORMS[norm]["color"] if kind == "running" else GREY
            panel.fill_between(
                steps, [min(v) for v in seeds], [max(v) for v in seeds], color=color, alpha=0.18, lw=0
            )
            means = [estimate(values).mean for values in seeds]
            panel.plot(steps, means, color=color, linestyle=line, linewidth=1.2, label=f"{kind} statistics")
        panel.set_xlabel("updates")
        panel.legend(loc="lower right", handlelength=2.6, title=f"n = {len(study.rows[norm])}")
    panels[0].set_ylabel("test top-1 (%)")
    finish(figure, f"{title(study.label, study.cell)}; band: range over seeds")
    return figure
