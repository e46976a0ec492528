"""Arms in TensorBoard: the mean curve of each norm in each cell over its seeds, and the paired difference as text.

TensorBoard draws a chart per tag and gives each of its runs one color. So a norm is one TensorBoard run, and a cell
is a group of tags: every chart compares the norms of one cell, in the same colors throughout. The custom scalars
tab adds the spread over the seeds. Curves contain runs that have not ended, but none that diverged: a text names
those. Differences are of finished runs alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from l2bn.errors import UserError
from l2bn.records import (
    CONFIG,
    METRICS,
    SUMMARY,
    Record,
    files_under,
    natural_order,
    read_features,
    read_metrics,
    setting_of,
)
from l2bn.reporting.comparison import arms_of, by_cell, compare
from l2bn.reporting.evidence import ANGLE_MEAN, BN, WITHIN_SHARE, Cell, Evidence, measure, read_evidence
from l2bn.reporting.formatting import interval, mean_std_n, plural, signed
from l2bn.reporting.statistics import across

QUANTITIES = {
    "test/top1": "test top-1, percent",
    "train/loss": "training loss",
    WITHIN_SHARE: "within share",
    ANGLE_MEAN: "mean angle, degrees",
}
"""The curves of an arm and their names: accuracy, loss, and the measures that decide claims 2 and 3."""

SPREAD = "Mean ± standard deviation over the seeds"


@dataclass(frozen=True)
class Run:
    """A run that has finished an epoch; `curves` holds quantity -> epoch -> value."""

    cell: str
    norm: str
    seed: int
    curves: Mapping[str, Mapping[int, float]]


def read_runs(root: Path) -> list[Run]:
    """Every run under a folder that has finished an epoch and not diverged, each cell, norm and seed once.

    Of a run that lies there twice, as one and its replay, the longer is taken, or the one with more features. Other
    folders are passed over.
    """
    longest: dict[tuple[Cell, str, int], tuple[tuple[int, int], Run]] = {}
    for path in files_under(root, METRICS):
        try:
            config = yaml.safe_load((path.parent / CONFIG).read_text())
            names, compute = config["cell"], config["compute"]
            setting = setting_of(compute["precision"], compute.get("devices", 1), compute.get("sync_bn", False))
            match [names[key] for key in ("dataset", "recipe", "backbone", "norm", "seed")]:
                case str(dataset), str(recipe), str(backbone), str(norm), int(seed):
                    cell = Cell(dataset, recipe, backbone, setting)
                case _:
                    continue
            rows: list[dict[str, Any]] = [*read_metrics(path)]
            features = read_features(path.parent)
            ended = (path.parent / SUMMARY).exists()
            diverged = ended and Record.read(path.parent).status == "diverged"
        except (OSError, ValueError, RecursionError, yaml.YAMLError, AttributeError, KeyError, TypeError):
            continue  # also while a run is writing a line
        curves: dict[str, dict[int, float]] = defaultdict(dict)
        for quantity in QUANTITIES:
            for row in features if quantity.startswith("penultimate") else rows:
                value = measure(row, quantity) if quantity.startswith("penultimate") else row[quantity]
                if value is not None:
                    curves[quantity][row["epoch"]] = value
        length = len(rows), len(features)
        if length > longest.get((cell, norm, seed), ((0, 0),))[0] and not diverged:
            longest[cell, norm, seed] = length, Run(chart_group(cell), norm, seed, curves)
    return [run for _, run in longest.values()]


def chart_group(cell: Cell) -> str:
    """A cell as the name of a group of charts; the setting only if it is not the default.

    The custom scalars tab takes tags for regular expressions, so no character that means more than itself is left;
    a digest tells apart what differed in such characters alone, but for the brackets of a list.
    """
    names = (cell.dataset, cell.backbone, cell.recipe, cell.setting.removeprefix("32-true").removeprefix(", "))
    text = ", ".join(filter(None, names))
    plain = re.sub(r"[^\w ,.=-]", "_", text)
    lost = re.search(r"[^\w ,.=\[\]-]", text)
    return f"{plain} {blake2b(text.encode(), digest_size=4).hexdigest()}" if lost else plain


def curves_of(runs: Iterable[Run]) -> dict[tuple[str, str, str], dict[int, list[float]]]:
    """(norm, cell, quantity) -> epoch -> the values of all seeds, of the epochs that each of them has finished."""
    seeds: dict[tuple[str, str, str], list[Mapping[int, float]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (natural_order(run.cell), run.norm, run.seed)):
        for quantity, curve in run.curves.items():
            seeds[run.norm, run.cell, quantity].append(curve)
    return {key: across(curves) for key, curves in seeds.items()}


def cut_off(runs: Iterable[Run]) -> dict[tuple[str, str], str]:
    """(norm, tag) -> Markdown: the runs that end an arm's curve, a mean of all, before another of its runs ends."""
    arms: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for run in runs:
        arms[run.norm, run.cell][run.seed] = max(run.curves["test/top1"], default=0)
    found = {}
    for (norm, cell), ends in arms.items():
        first = min(ends.values())
        seeds = ", ".join(str(seed) for seed, end in sorted(ends.items()) if end == first)
        if first < max(ends.values()):
            text = f"the curve of **{norm}** ends at epoch {first}, where its shortest run does: seed {seeds}"
            found[norm, f"{cell}/shortest run"] = text
    return found


def texts_of(evidence: Evidence) -> dict[tuple[str, str], str]:
    """(norm, tag) -> Markdown: a norm's paired difference to BN in a cell, and the runs that diverged there."""
    found = {}
    for cell, arms in by_cell(arms_of(evidence)):
        for one in compare(arms, {arm.norm for arm in arms} - {BN}):
            difference = one.difference()
            found[one.norm, f"{chart_group(cell)}/difference to bn"] = (
                f"**{one.norm} − bn: {signed(difference.mean)} points {interval(difference)}**, "
                f"{plural('pair', difference.n)} of equal seed, Student's 95 % interval  \n"
                f"test top-1 in percent after the last epoch: bn {mean_std_n(one.reference)}, "
                f"{one.norm} {mean_std_n(one.other)}"
            )
        for arm in arms:
            if arm.diverged:
                seeds = ", ".join(str(run.seed) for run in arm.records if run.status == "diverged")
                runs = f"**{plural('run', arm.diverged)} of {arm.norm} diverged**"
                found[arm.norm, f"{chart_group(cell)}/diverged"] = f"{runs}, left out of its curves: seed {seeds}"
    return found


class Board:
    """The arms of the runs under `root`, as TensorBoard's events in its folder `arms`."""

    def __init__(self, root: Path) -> None:
        self._root, self._out = root, root / "arms"
        self._written: object = None

    def update(self) -> bool:
        """Write all arms if they have changed; whether they had. Raises UserError where there is no such folder."""
        runs = read_runs(self._root)
        curves, texts = curves_of(runs), cut_off(runs)
        try:
            texts |= texts_of(read_evidence(self._root))
        except UserError as error:
            if not self._root.is_dir():
                raise
            # Records contradict each other: their curves can be seen all the same.
            texts |= {(BN, "no differences"): str(error)}
        if self._written == (curves, texts):
            return False
        norms = dict.fromkeys(norm for norm, *_ in (*curves, *texts))
        for path in self._out.glob("*/events.out.tfevents.*"):
            if path.parent.name not in norms:  # its runs have gone
                path.unlink(missing_ok=True)
        for norm in norms:
            self._write(
                norm,
                {(cell, quantity): curve for (one, cell, quantity), curve in curves.items() if one == norm},
                {tag: text for (one, tag), text in texts.items() if one == norm},
            )
        self._written = curves, texts
        return True

    def _write(self, norm: str, curves: Mapping[tuple[str, str], Mapping[int, list[float]]], texts: Any) -> None:
        """Write one arm of all cells to a new file, which purges what earlier files hold.

        Of these the last stays, because TensorBoard may be reading it; all of them would fill the disk in time.
        """
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        folder = self._out / norm
        for path in sorted(folder.glob("events.out.tfevents.*"))[:-1]:
            path.unlink(missing_ok=True)
        writer: Any = SummaryWriter(str(folder), purge_step=0)
        charts = {}
        for (cell, quantity), curve in curves.items():
            tag = f"{cell}/{QUANTITIES[quantity]}"
            bounds = [tag, f"spread/{tag}, low", f"spread/{tag}, high"]
            charts[f"{cell}: {QUANTITIES[quantity]}"] = ["Margin", bounds]
            for epoch, values in curve.items():
                mean, std = fmean(values), stdev(values) if len(values) > 1 else 0.0
                for name, value in zip(bounds, (mean, mean - std, mean + std), strict=True):
                    writer.add_scalar(name, value, epoch)
        if charts:
            # The tab shows the last chart first.
            writer.add_custom_scalars({SPREAD: dict(reversed(charts.items()))})
        for tag, text in texts.items():
            writer.add_text(tag, text)
        writer.close()
