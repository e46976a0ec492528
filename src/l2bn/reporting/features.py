"""The features that records hold: each arm's by seed, and two arms of one cell against each other.

A run counts with what was measured after its last epoch. Of a norm layer's measures the mean over the layers is
taken, each weighing alike.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import fmean

from l2bn.records import SAMPLE, FeatureRow, InvalidRecordError, Problem, Record, read_features
from l2bn.reporting.comparison import Arm, Cell, arms_of
from l2bn.reporting.statistics import Estimate, estimate, paired_differences

Features = Mapping[Path, Sequence[FeatureRow]]
"""The folder of a finished run to its measured epochs, the last of them the run's last."""

PENULTIMATE, INPUT, OUTPUT, SHRINK = "penultimate", "input", "output", "shrink"


@dataclass(frozen=True)
class Measure:
    """A measure at a place: the penultimate features, or the mean over the norm layers of one side of theirs."""

    name: str  # one of measurements.MEASURES; at `shrink` there is none
    place: str

    def of(self, row: FeatureRow) -> float | None:
        """Its value in one measured epoch; None where a layer has none."""
        values = self.by_layer(row) if self.place != PENULTIMATE else [row[PENULTIMATE][self.name]]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    def by_layer(self, row: FeatureRow) -> list[float | None]:
        """Its value at each norm layer, in the order in which they run."""
        return [layer[SHRINK] if self.place == SHRINK else layer[self.place][self.name] for layer in row["layers"]]


def read_all(records: Iterable[Record]) -> tuple[Features, list[Problem]]:
    """What was measured of the runs that finished, and the records whose measurements cannot be read."""
    found: dict[Path, Sequence[FeatureRow]] = {}
    problems = []
    for record in records:
        if record.status != "finished":
            continue
        try:
            rows = read_features(record.folder)
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error)))
            continue
        if rows and rows[-1]["epoch"] == record.epochs:
            found[record.folder] = rows
    return found, problems


@dataclass(frozen=True)
class MeasuredArm:
    """The runs of an arm whose features were measured."""

    arm: Arm
    rows: Mapping[int, Sequence[FeatureRow]]  # by seed

    def last(self, measure: Measure) -> dict[int, float]:
        """Seed to the measure after the last epoch, of the runs that have it."""
        return self.after(measure, -1)

    def after(self, measure: Measure, index: int) -> dict[int, float]:
        """Seed to the measure in the measured epoch of this place in the list."""
        values = {seed: measure.of(rows[index]) for seed, rows in self.rows.items()}
        return {seed: value for seed, value in values.items() if value is not None}

    @cached_property
    def epochs(self) -> list[int]:
        """The epochs that were measured in every run, which must be the same for a curve; empty otherwise."""
        lists = [[int(row["epoch"]) for row in rows] for rows in self.rows.values()]
        return lists[0] if lists and all(one == lists[0] for one in lists) else []

    @property
    def layers(self) -> list[str]:
        """The names of the norm layers, in the order in which they run."""
        return [layer["name"] for layer in next(iter(self.rows.values()))[-1]["layers"]]


@dataclass(frozen=True)
class MeasuredPair:
    """Two arms of one cell."""

    reference: MeasuredArm
    other: MeasuredArm

    @property
    def cell(self) -> Cell:
        return self.other.arm.cell

    @property
    def has_curves(self) -> bool:
        """Whether the same epochs, more than one, were measured in all runs of both arms."""
        return len(self.reference.epochs) > 1 and self.reference.epochs == self.other.epochs

    @property
    def sampled(self) -> tuple[int, Path, Path] | None:
        """The lowest seed of which both arms hold a sample of penultimate features, and the two folders."""
        arms = (self.reference, self.other)
        folders = [{record.seed: record.folder for record in arm.arm.records} for arm in arms]
        for seed in sorted(folders[0].keys() & folders[1].keys()):
            if all((folder[seed] / SAMPLE).exists() for folder in folders):
                return seed, folders[0][seed], folders[1][seed]
        return None

    def differences(self, measure: Measure) -> list[float]:
        """The other minus the reference, seed by seed, in the unit of the measure."""
        return paired_differences(self.reference.last(measure), self.other.last(measure))

    def difference(self, measure: Measure) -> Estimate:
        return estimate(self.differences(measure))


def by_cell(arms: Sequence[MeasuredArm]) -> list[tuple[Cell, list[MeasuredArm]]]:
    """The arms of each cell, in the order of the list."""
    return [(cell, list(group)) for cell, group in groupby(arms, key=lambda arm: arm.arm.cell)]


def measured_arms(records: Iterable[Record], features: Features) -> list[MeasuredArm]:
    """The arms with measured runs, in the order of their cells."""
    arms = []
    for arm in arms_of(records):
        rows = {record.seed: features[record.folder] for record in arm.records if record.folder in features}
        if rows:
            arms.append(MeasuredArm(arm, rows))
    return arms


def measured_pairs(arms: Sequence[MeasuredArm], reference: str, other: str) -> list[MeasuredPair]:
    """Each arm of one norm with that of another in its cell."""
    references = {arm.arm.cell: arm for arm in arms if arm.arm.norm == reference}
    return [
        MeasuredPair(references[arm.arm.cell], arm)
        for arm in arms
        if arm.arm.norm == other and arm.arm.cell in references
    ]
