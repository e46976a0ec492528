"""The one comparison: a norm against a reference, paired by seed, in any quantity.

    arm           the runs of one norm in one cell; empty where there is none
    comparison    two arms; a difference is taken for each seed that both have

The result of a run is its test accuracy after the last epoch. A diverged run has no result: it is counted.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Self

from l2bn.records import SAMPLE, FeatureRow, Record
from l2bn.reporting.evidence import (
    BN,
    L2BN,
    TOP1,
    Cell,
    Evidence,
    kernels_in_words,
    label_of,
    source_of,
    value_of,
)
from l2bn.reporting.statistics import MIN_PAIRS, Estimate, estimate, holm, paired_differences, pooled_estimate

FULL_EPOCHS = 30
"""Shorter runs measure how fast a network starts to learn: shown, but never pooled with longer ones."""


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one norm in one cell, one per seed, in the order of the seeds; an empty arm has none."""

    cell: Cell
    norm: str
    records: tuple[Record, ...] = ()
    features: Mapping[int, Sequence[FeatureRow]] = field(default_factory=dict)  # the measured epochs by seed

    def of(self, quantity: str = TOP1) -> dict[int, float]:
        """Seed to value, of the runs that have one."""
        found = {run.seed: value_of(run, self.features.get(run.seed, ()), quantity) for run in self.records}
        return {seed: value for seed, value in found.items() if value is not None}

    def only(self, seeds: Collection[int]) -> Self:
        """The arm with the runs of these seeds alone."""
        return replace(self, records=tuple(run for run in self.records if run.seed in seeds))

    def estimate(self, quantity: str = TOP1) -> Estimate:
        return estimate(list(self.of(quantity).values()))

    @property
    def seeds(self) -> set[int]:
        return {record.seed for record in self.records}

    @property
    def diverged(self) -> int:
        return sum(record.status == "diverged" for record in self.records)


def arms_of(evidence: Evidence) -> list[Arm]:
    """The runs grouped by cell and norm, sorted; their cells have the labels of the data sets."""
    groups: dict[Cell, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(evidence.records, key=lambda record: record.seed):
        cell, norm = evidence.grouping.of(record)
        groups[cell][norm].append(record)
    labels = {cell: _joined(label_of, norms.values()) for cell, norms in groups.items()}
    folders = Counter(label for label, _ in {(label, cell.dataset) for cell, label in labels.items()})
    arms = []
    for cell, norms in groups.items():
        label = f"{labels[cell]} ({cell.dataset})" if folders[labels[cell]] > 1 else labels[cell]
        named = replace(cell, label=label, source=_joined(source_of, norms.values()))
        for norm, runs in norms.items():
            rows = {run.seed: evidence.features[run.folder] for run in runs if run.folder in evidence.features}
            arms.append(Arm(named, norm, tuple(runs), rows))
    return sorted(arms, key=lambda arm: (arm.cell.order, arm.norm))


def _joined(name: Callable[[Record], str], arms: Iterable[Iterable[Record]]) -> str:
    """The names of a cell's records, of which most cells have one."""
    return " / ".join(sorted({name(record) for runs in arms for record in runs}))


def by_cell(arms: Iterable[Arm]) -> list[tuple[Cell, list[Arm]]]:
    """The arms of each cell, in the order of the list."""
    return [(cell, list(group)) for cell, group in groupby(arms, key=lambda arm: arm.cell)]


def find_arm(arms: Iterable[Arm], cell: Cell, norm: str) -> Arm:
    """The arm of a norm in a cell; an empty one where it is not among these."""
    return next((arm for arm in arms if (arm.cell, arm.norm) == (cell, norm)), Arm(cell, norm))


@dataclass(frozen=True, eq=False)
class Comparison:
    """An arm and its reference, of one cell except in studies; either may be empty."""

    reference: Arm
    other: Arm

    @property
    def cell(self) -> Cell:
        return self.other.cell

    @property
    def norm(self) -> str:
        return self.other.norm

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that have runs."""
        return tuple(arm for arm in (self.reference, self.other) if arm.records)

    @property
    def records(self) -> tuple[Record, ...]:
        return self.reference.records + self.other.records

    @property
    def kernels(self) -> str:
        """The norm's kernel paths, and whether the models of both arms were compiled; empty without a run of it."""
        return kernels_in_words(self.other.records, self.reference.records) if self.other.records else ""

    @property
    def epochs(self) -> int:
        return min(record.epochs for record in self.records)

    @property
    def full_length(self) -> bool:
        """True if the runs are long enough to be pooled with those of other recipes."""
        return self.epochs >= FULL_EPOCHS

    @property
    def measured(self) -> bool:
        """True if features were measured in both arms."""
        return bool(self.reference.features and self.other.features)

    @property
    def measured_epochs(self) -> list[int]:
        """The epochs in which features were measured, if they are the same in all runs and more than one."""
        lists = [[int(row["epoch"]) for row in rows] for arm in self.arms for rows in arm.features.values()]
        return lists[0] if lists and len(lists[0]) > 1 and all(one == lists[0] for one in lists) else []

    @property
    def sampled(self) -> tuple[int, Path, Path] | None:
        """The lowest seed of which both arms hold a sample of penultimate features, and the two folders."""
        reference, other = (
            {run.seed: run.folder for run in arm.records if (run.folder / SAMPLE).exists()}
            for arm in (self.reference, self.other)
        )
        seed = min(reference.keys() & other.keys(), default=None)
        return None if seed is None else (seed, reference[seed], other[seed])

    def differences(self, quantity: str = TOP1) -> list[float]:
        """The norm minus its reference, seed by seed, in the unit of the quantity; none of an arm to itself."""
        if self.reference is self.other:
            return []
        return paired_differences(self.reference.of(quantity), self.other.of(quantity))

    def difference(self, quantity: str = TOP1) -> Estimate:
        return estimate(self.differences(quantity))

    def missing(self, arm: Arm) -> int:
        """The number of seeds that one arm has and this one lacks."""
        return len({record.seed for record in self.records} - arm.seeds)

    def csv_row(self, quantity: str = TOP1, norm: str = "norm") -> dict[str, object]:
        """All of it as a row of a CSV file; `norm` begins the columns of the norm's arm."""
        difference = self.difference(quantity)
        row: dict[str, object] = {
            **{key: getattr(self.cell, key) for key in ("dataset", "backbone", "recipe", "setting")},
            "label": self.cell.label,
            "norm": self.norm,
            "reference": self.reference.norm,
            "epochs": self.epochs,
            "kernels": self.kernels,
        }
        for name, arm in (("bn", self.reference), (norm, self.other)):
            result = arm.estimate(quantity)
            row |= {f"{name}_n": result.n, f"{name}_mean": result.mean, f"{name}_std": result.std}
            row |= {f"{name}_diverged": arm.diverged, f"{name}_missing": self.missing(arm)}
        row |= {"pairs": difference.n, "difference": difference.mean, "difference_std": difference.std}
        return row | {"low": difference.low, "high": difference.high, "p": difference.p}


def compare(arms: Iterable[Arm], norms: Iterable[str], reference: str = BN) -> list[Comparison]:
    """Each arm of these norms with the reference in its cell.

    Where a cell has no run of the plain reference, as in a sweep of `norm=bn,l2bn norm.momentum=0.01`, it is the
    reference with the arm's own overridden values.
    """
    known, chosen = {(arm.cell, arm.norm): arm for arm in arms}, set(norms)
    found = []
    for (cell, norm), arm in known.items():
        if norm in chosen:
            _, *changes = norm.partition(",")
            alike = known.get((cell, "".join([reference, *changes])), Arm(cell, reference))
            found.append(Comparison(known.get((cell, reference), alike), arm))
    return found


def grid(arms: Iterable[Arm]) -> list[Comparison]:
    """BN against L2BN in every cell with a run of either, in the order of the list."""
    cells = by_cell(arm for arm in arms if arm.norm in (BN, L2BN))
    return [Comparison(find_arm(group, cell, BN), find_arm(group, cell, L2BN)) for cell, group in cells]


@dataclass(frozen=True, eq=False)
class Folds:
    """The folds of one cell that are averaged."""

    rows: Mapping[int, Comparison]  # by the fold that is tested
    seeds: frozenset[int]  # that all arms have
    diverged: Sequence[Comparison]  # of all folds, those in which a run diverged

    @property
    def first(self) -> Comparison:
        return next(iter(self.rows.values()))

    def accuracies(self, norm: str) -> dict[int, float]:
        """Fold to accuracy of a norm: the mean over the seeds."""
        arms = {fold: {BN: row.reference, row.norm: row.other}[norm] for fold, row in self.rows.items()}
        return {fold: fmean(arm.only(self.seeds).of().values()) for fold, arm in arms.items()}


def by_fold(comparisons: Iterable[Comparison]) -> list[Folds]:
    """The groups of comparisons of several folds with a seed that all have, in the order of the list."""
    groups: dict[tuple[str, ...], dict[int, Comparison]] = defaultdict(dict)
    for row in comparisons:
        cell = row.cell
        if cell.fold is not None:
            names = (cell.dataset_of_folds, cell.all_folds, cell.backbone, cell.recipe, cell.setting, row.norm)
            groups[names][cell.fold] = row
    found = []
    for group in groups.values():
        rows = {fold: row for fold, row in sorted(group.items()) if row.differences()}
        arms = [frozenset(arm.of()) for row in rows.values() for arm in row.arms]
        seeds = frozenset.intersection(*arms) if len(rows) > 1 else frozenset()
        if seeds:
            diverged = [row for row in group.values() if any(arm.diverged for arm in row.arms)]
            found.append(Folds(rows, seeds, diverged))
    return found


def without_further_folds(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons, and of each group by fold the lowest alone: the others are no data sets of their own."""
    further = {row.cell for folds in by_fold(comparisons) for row in folds.rows.values() if row is not folds.first}
    return [row for row in comparisons if row.cell not in further]


def other_norms(arms: Sequence[Arm]) -> list[Comparison]:
    """Every norm but L2BN, variants of BN and L2BN among them, against plain BN in its cell."""
    rows = compare(arms, {arm.norm for arm in arms} - {BN, L2BN})
    return [row for row in rows if row.other is not row.reference]


def holm_over(comparisons: Sequence[Comparison]) -> list[float | None]:
    """The p-value of each comparison with Holm's correction over those of its task, and of its fold."""
    found: list[float | None] = [None] * len(comparisons)
    families: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for index, row in enumerate(comparisons):
        families[row.cell.task, row.cell.fold].append(index)
    for indices in families.values():
        for index, p in zip(indices, holm([comparisons[i].difference().p for i in indices]), strict=True):
            found[index] = p
    return found


def backbone_of(cell: Cell) -> str:
    """The cell's backbone without its options: `resnet20,dropout=0.3` is no other network than `resnet20`."""
    name, *options = cell.backbone.split(",")
    named = [option for option in options if option.startswith("name=")]  # a network of timm or torchvision
    return ",".join([name, *named])


def pooled(comparisons: Iterable[Comparison], quantity: str = TOP1) -> Estimate:
    """The pooled paired estimate (`statistics.pooled_estimate`) over data set x backbone.

    A pair that was run under several recipes, settings or options of its backbone or data set, or from several
    folders of one label, is one observation, not several: the mean differences of its rows stand in one cell.
    Rows under `MIN_PAIRS` pairs are left out: one seed of theirs would weigh as much as all of another row.
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for comparison in comparisons:
        result = comparison.difference(quantity)
        if result.mean is not None and result.n >= MIN_PAIRS:
            cells[comparison.cell.source, backbone_of(comparison.cell)].append(result.mean)
    return pooled_estimate(list(cells.values()))
