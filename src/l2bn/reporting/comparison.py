"""The one comparison: a norm against a reference in the same cell, paired by seed, in any quantity.

    arm           the runs of one norm in one cell
    comparison    two arms of one cell; a difference is taken for each seed that both have

The result of a run is its test accuracy after the last epoch. A diverged run has no result: it is counted.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from l2bn.records import SAMPLE, FeatureRow, Record
from l2bn.reporting.evidence import BN, L2BN, TOP1, Cell, Evidence, kernels_in_words, label_of, value_of
from l2bn.reporting.statistics import Estimate, estimate, holm, paired_differences, pooled_estimate

FULL_EPOCHS = 30
"""Shorter runs measure how fast a network starts to learn: shown, but never pooled with longer ones."""


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one norm in one cell, one per seed, in the order of the seeds."""

    cell: Cell
    norm: str
    records: tuple[Record, ...]
    features: Mapping[int, Sequence[FeatureRow]]  # the measured epochs by seed
    shared: bool = False  # whether a data set in another folder has the same label

    def of(self, quantity: str = TOP1) -> dict[int, float]:
        """Seed to value, of the runs that have one."""
        found = {run.seed: value_of(run, self.features.get(run.seed, ()), quantity) for run in self.records}
        return {seed: value for seed, value in found.items() if value is not None}

    def estimate(self, quantity: str = TOP1) -> Estimate:
        return estimate(list(self.of(quantity).values()))

    @property
    def data(self) -> str:
        """The label of the data set; folders of one label are taken for one data set."""
        return " / ".join(sorted({label_of(record) for record in self.records}))

    @property
    def label(self) -> str:
        """The data set as tables name it."""
        return f"{self.data} ({self.cell.dataset})" if self.shared else self.data

    @property
    def seeds(self) -> set[int]:
        return {record.seed for record in self.records}

    @property
    def diverged(self) -> int:
        return sum(record.status == "diverged" for record in self.records)

    @property
    def epochs(self) -> int:
        return min(record.epochs for record in self.records)


def arms_of(evidence: Evidence) -> list[Arm]:
    """The runs grouped by cell and norm, sorted."""
    groups: dict[tuple[Cell, str], list[Record]] = defaultdict(list)
    for record in sorted(evidence.records, key=lambda record: record.seed):
        groups[evidence.place.of(record)].append(record)
    arms = []
    for (cell, norm), runs in groups.items():
        rows = {run.seed: evidence.features[run.folder] for run in runs if run.folder in evidence.features}
        arms.append(Arm(cell, norm, tuple(runs), rows))
    folders: dict[str, set[str]] = defaultdict(set)
    for arm in arms:
        folders[arm.data].add(arm.cell.dataset)
    named = [replace(arm, shared=len(folders[arm.data]) > 1) for arm in arms]
    return sorted(named, key=lambda arm: (arm.cell.order, arm.norm))


def by_cell(arms: Iterable[Arm]) -> list[tuple[Cell, list[Arm]]]:
    """The arms of each cell, in the order of the list."""
    return [(cell, list(group)) for cell, group in groupby(arms, key=lambda arm: arm.cell)]


def differences(reference: Arm | None, other: Arm | None, quantity: str = TOP1) -> list[float]:
    """The other minus the reference, for each seed that has a value in both arms, in the order of the seeds."""
    if reference is None or other is None or reference is other:
        return []
    return paired_differences(reference.of(quantity), other.of(quantity))


def difference(reference: Arm | None, other: Arm | None, quantity: str = TOP1) -> Estimate:
    """The mean of these differences."""
    return estimate(differences(reference, other, quantity))


@dataclass(frozen=True, eq=False)
class Comparison:
    """A norm and its reference in one cell; an arm without any run is None, but not both."""

    cell: Cell
    norm: str
    reference: Arm | None
    other: Arm | None

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in (self.reference, self.other) if arm)

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for arm in self.arms for record in arm.records)

    @property
    def label(self) -> str:
        """The data set as tables name it."""
        return " / ".join(sorted({arm.label for arm in self.arms}))

    @property
    def kernels(self) -> str:
        """The norm's kernel paths, and whether the models of both arms were compiled; empty without a run of it."""
        paths, _, _ = kernels_in_words(self.other.records if self.other else ()).partition(", ")
        _, comma, compiled = kernels_in_words(self.records).partition(", ")
        return paths + comma + compiled if paths else ""

    @property
    def epochs(self) -> int:
        return min(arm.epochs for arm in self.arms)

    @property
    def full_length(self) -> bool:
        """True if the runs are long enough to be pooled with those of other recipes."""
        return self.epochs >= FULL_EPOCHS

    @property
    def measured(self) -> bool:
        """True if features were measured in both arms."""
        return len(self.arms) == 2 and all(arm.features for arm in self.arms)

    @property
    def measured_epochs(self) -> list[int]:
        """The epochs in which features were measured, if they are the same in all runs and more than one."""
        lists = [[int(row["epoch"]) for row in rows] for arm in self.arms for rows in arm.features.values()]
        return lists[0] if lists and len(lists[0]) > 1 and all(one == lists[0] for one in lists) else []

    @property
    def sampled(self) -> tuple[int, Path, Path] | None:
        """The lowest seed of which both arms hold a sample of penultimate features, and the two folders."""
        folders = [{run.seed: run.folder for run in arm.records} for arm in self.arms]
        for seed in sorted(set[int].intersection(*map(set, folders))) if len(folders) == 2 else ():
            if all((folder[seed] / SAMPLE).exists() for folder in folders):
                return seed, folders[0][seed], folders[1][seed]
        return None

    def differences(self, quantity: str = TOP1) -> list[float]:
        """The norm minus its reference, seed by seed, in the unit of the quantity."""
        return differences(self.reference, self.other, quantity)

    def difference(self, quantity: str = TOP1) -> Estimate:
        return difference(self.reference, self.other, quantity)

    @property
    def paired_seeds(self) -> set[int]:
        """The seeds of which both arms have a run, finished or diverged."""
        return self.reference.seeds & self.other.seeds if self.reference and self.other else set()

    def missing_seeds(self, arm: Arm | None) -> set[int]:
        """The seeds that one arm of this comparison has and this one lacks."""
        return {record.seed for record in self.records} - (arm.seeds if arm else set())

    def row(self, quantity: str = TOP1, norm: str = "norm") -> dict[str, object]:
        """All of it as a row of a CSV file; `norm` begins the columns of the norm's arm."""
        difference = self.difference(quantity)
        row: dict[str, object] = {
            **{key: getattr(self.cell, key) for key in ("dataset", "backbone", "recipe", "setting")},
            "label": self.label,
            "norm": self.norm,
            "epochs": self.epochs,
            "kernels": self.kernels,
        }
        for name, arm in (("bn", self.reference), (norm, self.other)):
            result = arm.estimate(quantity) if arm else Estimate(0)
            row |= {f"{name}_n": result.n, f"{name}_mean": result.mean, f"{name}_std": result.std}
            row |= {f"{name}_diverged": arm.diverged if arm else 0, f"{name}_missing": len(self.missing_seeds(arm))}
        row |= {"pairs": difference.n, "difference": difference.mean, "difference_std": difference.std}
        return row | {"low": difference.low, "high": difference.high, "p": difference.p}


def compare(arms: Sequence[Arm], norms: Iterable[str], reference: str = BN) -> list[Comparison]:
    """Each arm of these norms with the reference of its cell."""
    references = {arm.cell: arm for arm in arms if arm.norm == reference}
    chosen = set(norms)
    return [Comparison(arm.cell, arm.norm, references.get(arm.cell), arm) for arm in arms if arm.norm in chosen]


def grid(arms: Iterable[Arm]) -> list[Comparison]:
    """BN against L2BN in every cell with a run of either, in the order of the list."""
    found = {(arm.cell, arm.norm): arm for arm in arms if arm.norm in (BN, L2BN)}
    cells = dict.fromkeys(cell for cell, _ in found)
    return [Comparison(cell, L2BN, found.get((cell, BN)), found.get((cell, L2BN))) for cell in cells]


def other_norms(arms: Sequence[Arm]) -> list[Comparison]:
    """Every norm but L2BN, variants of BN and L2BN among them, against plain BN in its cell."""
    return compare(arms, {arm.norm for arm in arms} - {BN, L2BN})


def holm_over(comparisons: Iterable[Comparison]) -> list[float | None]:
    """The p-value of each comparison with Holm's correction over all of them."""
    return holm([comparison.difference().p for comparison in comparisons])


def backbone_of(cell: Cell) -> str:
    """The cell's backbone without its options: `resnet20,dropout=0.3` is no other network than `resnet20`."""
    name, *options = cell.backbone.split(",")
    named = [option for option in options if option.startswith("name=")]  # a network of timm or torchvision
    return ",".join([name, *named])


def pooled(comparisons: Iterable[Comparison], quantity: str = TOP1) -> Estimate:
    """The pooled paired estimate (`statistics.pooled_estimate`) over data set x backbone.

    A pair that was run under several recipes, settings or options of its backbone, or from several folders of one
    label, is one observation, not several: the mean differences of its rows stand in one cell.
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for comparison in comparisons:
        mean = comparison.difference(quantity).mean
        if mean is not None:
            cells[comparison.arms[0].data, backbone_of(comparison.cell)].append(mean)
    return pooled_estimate(list(cells.values()))
