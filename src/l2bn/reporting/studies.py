"""The studies of what a comparison may hang on: eps, the learning rate and batch size, the running variance.

Each reads the records of its own folder under `results/studies/`, where a cell may hold the same norm at many
values of one setting; those runs have no place in the grid.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from l2bn.records import Record
from l2bn.reporting.comparison import BN, L2BN, Cell, cell_of, data_set
from l2bn.reporting.features import SHRINK, Features, Measure
from l2bn.reporting.markup import Table
from l2bn.reporting.statistics import Estimate, estimate, holm, paired_differences
from l2bn.reporting.wording import NONE, interval, mean_std, probability, signed

RMS = "l2bn_rms"
DEFAULT_EPS = 1e-5


@dataclass(frozen=True)
class Runs:
    """The runs of one setting, one a seed."""

    records: tuple[Record, ...]

    @property
    def accuracies(self) -> dict[int, float]:
        """Seed to test top-1 after the last epoch, percent, of the runs that finished."""
        finished = (record for record in self.records if record.status == "finished")
        return {record.seed: float(record.last["test/top1"] or 0.0) for record in finished}

    @property
    def diverged(self) -> int:
        return sum(record.status == "diverged" for record in self.records)

    def text(self) -> str:
        """`mean ± std (n; diverged)`."""
        if not self.records:
            return NONE
        lost = f"; {self.diverged} diverged" if self.diverged else ""
        return f"{mean_std(self.accuracies.values())} ({len(self.accuracies)}{lost})"


def difference(reference: Runs, other: Runs) -> Estimate:
    """Top-1 of the other minus the reference, points, paired by seed."""
    return estimate(paired_differences(reference.accuracies, other.accuracies))


# ---- eps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpsStudy:
    """BN, L2BN at norm 1 and at root mean square 1 in one data set and backbone, over eps."""

    cell: Cell
    label: str
    runs: Mapping[tuple[str, float], Runs]  # by norm and eps
    features: Features

    @property
    def values(self) -> list[float]:
        return sorted({eps for _, eps in self.runs})

    def at(self, norm: str, eps: float) -> Runs:
        return self.runs.get((norm, eps), Runs(()))

    def shrink(self, norm: str, eps: float) -> list[float]:
        """The shrink factor of each norm layer, in their order, as the mean over the runs that have it."""
        runs = [layers for record in self.at(norm, eps).records if (layers := self.shrink_of(record))]
        return [fmean(values) for values in zip(*runs, strict=True)]

    def shrink_of(self, record: Record) -> list[float]:
        """The shrink factor of each norm layer of one run after its last epoch; empty where it was not measured."""
        rows = self.features.get(record.folder)
        layers = Measure("", SHRINK).by_layer(rows[-1]) if rows else []
        return [value for value in layers if value is not None]


def eps_studies(records: Iterable[Record], features: Features) -> list[EpsStudy]:
    """The records by data set and backbone, in the order of their cells."""
    found: dict[Cell, dict[tuple[str, float], list[Record]]] = defaultdict(lambda: defaultdict(list))
    labels = {}
    for record in records:
        eps = record.identity["norm"].get("eps")
        cell = cell_of(record)
        labels[cell] = data_set(record.label, record.dataset)
        norm = record.norm.partition(",")[0]
        found[cell][norm, DEFAULT_EPS if eps is None else float(eps)].append(record)
    return [
        EpsStudy(cell, labels[cell], {key: Runs(tuple(runs)) for key, runs in found[cell].items()}, features)
        for cell in sorted(found, key=lambda cell: cell.order)
    ]


def eps_table(study: EpsStudy) -> Table:
    """Accuracy over eps, L2BN against BN at the same eps, and what eps leaves of the layers' outputs."""
    columns = (
        *("eps", "BN (n)", "norm 1 (n)", "rms 1 (n)"),
        *("norm 1 − BN", "95 % interval", "rms 1 − BN", "95 % interval of that"),
        *("shrink: BN", "norm 1", "rms 1"),
    )
    rows = []
    for eps in study.values:
        bn, unit, rms = (study.at(norm, eps) for norm in (BN, L2BN, RMS))
        cells = [f"{eps:.0e}", *(runs.text() for runs in (bn, unit, rms))]
        for runs in (unit, rms):
            result = difference(bn, runs)
            cells += [signed(result.mean), interval(result)]
        for norm in (BN, L2BN, RMS):
            layers = study.shrink(norm, eps)
            cells.append(f"{fmean(layers):.3f} ({min(layers):.3f})" if layers else NONE)
        rows.append(tuple(cells))
    return Table("Accuracy over eps", columns, frozenset(columns), tuple(rows))


@dataclass(frozen=True)
class Part:
    """A part of the difference between L2BN and BN, both at the usual eps."""

    text: str
    reference: tuple[str, float]
    other: tuple[str, float]


SMALLEST = 1e-12

PARTS = (
    Part("L2BN (norm 1) − BN", (BN, DEFAULT_EPS), (L2BN, DEFAULT_EPS)),
    Part("of equal norms: rms 1 − BN", (BN, DEFAULT_EPS), (RMS, DEFAULT_EPS)),
    Part("of eps: norm 1 − rms 1", (RMS, DEFAULT_EPS), (L2BN, DEFAULT_EPS)),
    Part("of equal norms, without eps: norm 1 − BN at eps 1e-12", (BN, SMALLEST), (L2BN, SMALLEST)),
    Part("of eps, seen otherwise: norm 1 at eps 1e-5 − at 1e-12", (L2BN, SMALLEST), (L2BN, DEFAULT_EPS)),
)


def parts_table(study: EpsStudy) -> Table:
    """How much of L2BN's difference to BN comes of equal norms, and how much of eps; the two add up to the
    first."""
    results = [difference(study.at(*part.reference), study.at(*part.other)) for part in PARTS]
    # The two parts at the usual eps are what the study asks for; the rest shows the same from another side.
    corrected = {1: None, 2: None} | dict(zip((1, 2), holm([results[1].p, results[2].p]), strict=True))
    columns = ("Difference", "Points", "95 % interval", "n", "p (Holm)")
    rows = tuple(
        (
            part.text,
            signed(result.mean),
            interval(result),
            str(result.n),
            probability(corrected[index], result) if index in corrected else NONE,
        )
        for index, (part, result) in enumerate(zip(PARTS, results, strict=True))
    )
    return Table("What comes of equal norms, and what of eps", columns, frozenset(columns[1:]), rows)


# ---- Learning rate and batch size ---------------------------------------------------------------------------


@dataclass(frozen=True)
class RateStudy:
    """BN and L2BN in one data set and backbone, over batch sizes and learning rates."""

    dataset: str
    backbone: str
    label: str
    runs: Mapping[tuple[int, float, str], Runs]  # by batch size, learning rate and norm

    @property
    def name(self) -> str:
        """As part of a file's name."""
        return f"{self.dataset}-{self.backbone}".replace(",", "-")

    @property
    def settings(self) -> list[tuple[int, float]]:
        return sorted({(batch, rate) for batch, rate, _ in self.runs})

    def at(self, batch: int, rate: float, norm: str) -> Runs:
        return self.runs.get((batch, rate, norm), Runs(()))

    def difference(self, batch: int, rate: float) -> Estimate:
        return difference(self.at(batch, rate, BN), self.at(batch, rate, L2BN))

    @property
    def overall(self) -> Estimate:
        """L2BN − BN as the mean over the settings in which every run finished, one value a seed."""
        pairs = [
            {
                seed: self.at(batch, rate, L2BN).accuracies[seed] - accuracy
                for seed, accuracy in self.at(batch, rate, BN).accuracies.items()
                if seed in self.at(batch, rate, L2BN).accuracies
            }
            for batch, rate in self.settings
        ]
        seeds = set[int]().union(*pairs)
        whole = [pair for pair in pairs if pair.keys() == seeds]
        return estimate([fmean(pair[seed] for pair in whole) for seed in sorted(seeds)] if whole else [])


def rate_studies(records: Iterable[Record]) -> list[RateStudy]:
    """The records by data set and backbone."""
    found: dict[tuple[str, str], dict[tuple[int, float, str], list[Record]]]
    found = defaultdict(lambda: defaultdict(list))
    labels = {}
    for record in records:
        recipe: Mapping[str, Any] = record.identity["recipe"]
        labels[record.dataset, record.backbone] = record.label
        key = int(recipe["batch_size"]), float(recipe["lr"]), record.norm
        found[record.dataset, record.backbone][key].append(record)
    return [
        RateStudy(*names, labels[names], {key: Runs(tuple(runs)) for key, runs in found[names].items()})
        for names in sorted(found)
    ]


DIFFERENCE = ("L2BN − BN", "95 % interval", "p (Holm)")


def rate_table(study: RateStudy) -> Table:
    """A row a batch size and learning rate."""
    results = [study.difference(*setting) for setting in study.settings]
    corrected = holm([result.p for result in results])
    columns = ("Batch size", "Learning rate", "Updates", "BN (n)", "L2BN (n)", *DIFFERENCE)
    rows = []
    for (batch, rate), result, p in zip(study.settings, results, corrected, strict=True):
        arms = [study.at(batch, rate, norm) for norm in (BN, L2BN)]
        finished = [r.updates for runs in arms for r in runs.records if r.status == "finished"]
        cells = [
            f"{batch}",
            f"{rate:g}",
            f"{max(finished):,}" if finished else NONE,
            *(runs.text() for runs in arms),
        ]
        rows.append((*cells, signed(result.mean), interval(result), probability(p, result)))
    return Table("BN and L2BN over learning rates and batch sizes", columns, frozenset(columns), tuple(rows))


def rate_note(study: RateStudy) -> str:
    """One sentence over all settings."""
    results = [study.difference(*setting) for setting in study.settings]
    above = sum(result.low is not None and result.low > 0 for result in results)
    below = sum(result.high is not None and result.high < 0 for result in results)
    lost = [sum(study.at(*s, norm).diverged for s in study.settings) for norm in (BN, L2BN)]
    overall = study.overall
    return (
        f"Of {len(results)} settings, the 95 % interval lies above 0 in {above} and below in {below}, uncorrected. "
        f"Mean over the settings in which all runs finished, one value a seed: {signed(overall.mean)} points, 95 % "
        f"interval {interval(overall)}, n = {overall.n}. Diverged: {lost[0]} of BN, {lost[1]} of L2BN."
    )


# ---- A line a run ---------------------------------------------------------------------------------------------

CSV_COLUMNS = (
    *("study", "dataset", "label", "backbone", "recipe", "setting", "norm", "eps", "batch_size", "lr", "seed"),
    *("status", "updates", "top1", "shrink_mean", "shrink_min"),
)


def studies_csv(eps: Iterable[EpsStudy], rates: Iterable[RateStudy]) -> str:
    """Every run of the studies of eps and of the learning rate."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for study in eps:
        for (_, value), runs in sorted(study.runs.items()):
            for record in runs.records:
                writer.writerow(_csv_row("eps", record, f"{value:g}", study.shrink_of(record)))
    for rate_study in rates:
        for _, runs in sorted(rate_study.runs.items()):
            for record in runs.records:
                writer.writerow(_csv_row("lr", record, "", []))
    return file.getvalue()


def _csv_row(study: str, record: Record, eps: str, shrinks: list[float]) -> list[object]:
    cell, recipe = cell_of(record), record.identity["recipe"]
    names = [study, cell.dataset, record.label, cell.backbone, cell.recipe, cell.setting, record.norm, eps]
    factors = [f"{fmean(shrinks):.5g}", f"{min(shrinks):.5g}"] if shrinks else ["", ""]
    top1 = record.last.get("test/top1")
    accuracy = "" if top1 is None or record.status != "finished" else f"{top1:.4f}"
    settings = [recipe["batch_size"], f"{recipe['lr']:g}", record.seed, record.status, record.updates]
    return [*names, *settings, accuracy, *factors]
