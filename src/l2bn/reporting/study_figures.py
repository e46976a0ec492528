"""Figures of the studies: accuracy and shrink factors over eps, accuracy over learning rates, the variance trap."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from l2bn.reporting.comparison import BN, L2BN, data_set
from l2bn.reporting.feature_figures import file_name
from l2bn.reporting.figures import GREY, RC, STYLES, save_figure
from l2bn.reporting.statistics import estimate
from l2bn.reporting.studies import RMS, EpsStudy, RateStudy, Runs
from l2bn.reporting.trap import TrapStudy
from l2bn.reporting.wording import whole_cell

NORMS: Mapping[str, Mapping[str, Any]] = {
    BN: {**STYLES[BN], "label": "BN"},
    L2BN: {**STYLES[L2BN], "label": "L2BN, norm 1"},
    # The blue of Okabe and Ito (2008).
    RMS: {"color": "#0072B2", "linestyle": (0, (1, 1)), "marker": "^", "label": "L2BN, rms 1"},
}


def write_study_figures(
    eps: Sequence[EpsStudy], rates: Sequence[RateStudy], traps: Sequence[TrapStudy], folder: Path
) -> list[Path]:
    """Draw each study of each cell; the paths written."""
    paths = []
    with mpl.rc_context(RC):
        for study in eps:
            paths += save_figure(accuracy_over_eps(study), folder, f"eps-{file_name(study.cell)}")
        for rate_study in rates:
            paths += save_figure(accuracy_over_rates(rate_study), folder, f"rates-{rate_study.name}")
        for trap in traps:
            paths += save_figure(accuracy_over_updates(trap), folder, f"trap-{file_name(trap.cell)}")
    return paths


def _points(panel: Axes, runs: Sequence[tuple[float, Runs]], style: Mapping[str, Any], shift: float) -> None:
    """Mean and every seed at each value of a logarithmic axis; a value at which all runs diverged has none."""
    known = [(x * shift, list(r.accuracies.values())) for x, r in runs if r.accuracies]
    for x, values in known:
        panel.plot([x] * len(values), values, "_", color=style["color"], markersize=5, markeredgewidth=0.9)
    panel.plot(*zip(*((x, sum(v) / len(v)) for x, v in known), strict=True), **style, linewidth=1.2, markersize=4)


def _count(runs: Sequence[Runs]) -> str:
    """How many runs each value of an axis has, of those that finished: "n = 3", or "n = 2 to 3"."""
    counts = [len(r.accuracies) for r in runs]
    return f"n = {min(counts)}" + (f" to {max(counts)}" if len(set(counts)) > 1 else "")


def _power(eps: float) -> str:
    return f"{eps:.0e}".replace("e-0", "e-")


def accuracy_over_eps(study: EpsStudy) -> Figure:
    """Left: accuracy over eps, every seed a tick. Right: the shrink factor of each norm layer with norm 1."""
    figure = Figure(figsize=(6.6, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set_title("test top-1 after the last epoch (%)")
    for index, (norm, style) in enumerate(NORMS.items()):
        runs = [(eps, study.at(norm, eps)) for eps in study.values]
        if any(r.accuracies for _, r in runs):
            counted = {**style, "label": f"{style['label']}  ({_count([r for _, r in runs])})"}
            _points(left, runs, counted, 1.25 ** (index - 1))
    left.set_xscale("log")
    left.set_xticks(study.values, [_power(eps) for eps in study.values])
    left.minorticks_off()
    left.set_xlabel("eps")
    left.legend(handlelength=2.6)
    right.set_title("shrink factor, L2BN at norm 1")
    greys = [f"{0.15 + 0.2 * i:.2f}" for i in range(len(study.values))]
    for eps, grey, marker in zip(study.values, greys, "osD^v", strict=False):
        layers = study.shrink(L2BN, eps)
        if layers:
            depth = range(1, len(layers) + 1)
            right.plot(depth, layers, color=grey, marker=marker, markersize=3.5, linewidth=1.2, label=_power(eps))
    right.set_ylim(0, 1.05)
    right.set_xlabel("norm layer, in the order in which they run")
    right.xaxis.set_major_locator(MaxNLocator(7, integer=True, prune="lower"))
    right.legend(title="eps", loc="center right", bbox_to_anchor=(1, 0.62), ncols=2)
    _finish(figure, whole_cell(study.label, study.cell))
    return figure


def accuracy_over_rates(study: RateStudy) -> Figure:
    """A panel a batch size: accuracy of BN and L2BN over the learning rates, every seed a tick."""
    batches = sorted({batch for batch, _ in study.settings})
    figure = Figure(figsize=(2.2 * len(batches) + 0.6, 2.7), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        rates = [rate for size, rate in study.settings if size == batch]
        panel.set_title(f"batch size {batch}")
        for norm, shift in ((BN, 0.95), (L2BN, 1.05)):
            runs = [(rate, study.at(batch, rate, norm)) for rate in rates]
            if any(r.accuracies for _, r in runs):
                count = _count([study.at(*setting, norm) for setting in study.settings])
                style = {**STYLES[norm], "label": f"{STYLES[norm]['label']}  ({count})"}
                _points(panel, runs, style, shift)
            for rate, lost in ((rate, r.diverged) for rate, r in runs if r.diverged):
                place = (rate * shift, 0.02 if norm == BN else 0.08)
                text = f"{lost} {STYLES[norm]['label']} diverged"
                panel.text(*place, text, transform=panel.get_xaxis_transform(), ha="right", fontsize=6, color=GREY)
        panel.set_xscale("log")
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.minorticks_off()
        panel.set_xlabel("learning rate")
    panels[0].set_ylabel("test top-1 (%)")
    panels[0].legend(loc="lower left", handlelength=2.6)
    _finish(figure, f"{data_set(study.label, study.dataset)}, {study.backbone}; every seed a dash")
    return figure


def accuracy_over_updates(study: TrapStudy) -> Figure:
    """A panel a norm: accuracy by running and by batch statistics over the updates, mean with the seeds' range."""
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
    _finish(figure, whole_cell(study.label, study.cell))
    return figure


def _finish(figure: Figure, title: str) -> None:
    for axes in figure.axes:
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(title, x=0.01, ha="left").set_fontsize(10)
