"""Which runs may be compared: cells that are never mixed, the arms in them, and BN against another norm.

    cell        data set x backbone x recipe x setting (precision, devices, compiled or not)
    arm         one norm in a cell, by one kernel path, over its seeds
    comparison  the arm of plain BN and another arm of the same cell, paired by seed

The result of a run is its test accuracy after the last epoch. A diverged run has no result: it is counted.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from l2bn.errors import UserError
from l2bn.records import COST_KEYS, THEN, Problem, Record, read_records
from l2bn.reporting.statistics import Estimate, estimate, holm, paired_differences, pooled_estimate

BN, L2BN = "bn", "l2bn"

FULL_EPOCHS = 30
"""Shorter runs measure how fast a network starts to learn: shown, but never pooled with longer ones."""


@dataclass(frozen=True)
class Cell:
    """What two arms must share; the names are those of the run's folder, overrides included."""

    dataset: str
    recipe: str
    backbone: str
    setting: str

    @property
    def order(self) -> tuple[object, ...]:
        """Sorts as a reader would: resnet20 before resnet110."""
        return natural(self.dataset), natural(self.recipe), natural(self.backbone), self.setting


def overrides(name: str) -> dict[str, str]:
    """The values overridden in a part of a run's folder: {"epochs": "3"} for "short,epochs=3".

    Where the name was too long for its folder, the one key is the digest that stands for them.
    """
    found: dict[str, str] = {}
    for part in re.split(r",(?![^\[]*\])", name)[1:]:  # not at a comma within a list
        key, equals, value = part.partition("=")
        if found and not equals:  # a comma within a text
            found[list(found)[-1]] += f",{part}"
        else:
            found[key] = value
    return found


def changes_in_words(changes: Mapping[str, str]) -> str:
    """Overridden values as a text: "batch size 16, epochs 3"."""
    # What lay below a value that is itself another says nothing more.
    own = [key for key in changes if not any(key.startswith(f"{above}.") for above in changes)]
    return ", ".join(f"{key.replace('_', ' ')} {changes[key].replace(',_', ', ')}".strip() for key in own)


def data_set(label: str, name: str) -> str:
    """What a table calls a data set: its label, and the overrides in its name that it does not say."""
    said = ("label", "baseline", "subset", "validation")
    changes = {key: value for key, value in overrides(name).items() if key not in said}
    return f"{label} ({changes_in_words(changes)})" if changes else label


def natural(name: str) -> list[tuple[str, int]]:
    """A sort key in which the numbers inside a name count as numbers."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


@dataclass(frozen=True)
class Arm:
    """The runs of one norm in one cell, one a seed, in the order of the seeds."""

    cell: Cell
    norm: str
    kernels: str
    records: tuple[Record, ...]

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Seed to test top-1 after the last epoch, percent, of the runs that finished."""
        return self._top1("last")

    @cached_property
    def best(self) -> dict[int, float]:
        """The same for the best epoch: chosen on the test set, so optimistic and never the result."""
        return self._top1("best")

    def _top1(self, epoch: str) -> dict[int, float]:
        rows = {record.seed: getattr(record, epoch) for record in self.records if record.status == "finished"}
        return {seed: row["test/top1"] for seed, row in rows.items()}

    @property
    def label(self) -> str:
        """What a table calls the data set."""
        return " / ".join(sorted({data_set(record.label, record.dataset) for record in self.records}))

    @property
    def seeds(self) -> set[int]:
        return {record.seed for record in self.records}

    @property
    def diverged(self) -> int:
        return sum(record.status == "diverged" for record in self.records)

    @property
    def epochs(self) -> int:
        return min(record.epochs for record in self.records)


@dataclass(frozen=True)
class Comparison:
    """Plain BN and another norm in one cell; an arm without any run is None."""

    cell: Cell
    norm: str
    bn: Arm | None
    other: Arm | None
    planned: str = ""  # the data set's label, for a cell without any run

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(arm for arm in (self.bn, self.other) if arm)

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for arm in self.arms for record in arm.records)

    @property
    def label(self) -> str:
        """What a table calls the data set."""
        return " / ".join(sorted({arm.label for arm in self.arms})) or self.planned

    @property
    def kernels(self) -> str:
        """The norm's kernel path, without what the cell says already."""
        arm = self.other or self.bn
        return THEN.join(dict.fromkeys(norm for norm, _ in _kernels(arm.kernels))) if arm else ""

    @property
    def full_length(self) -> bool:
        """Whether the runs are long enough to be pooled with those of other recipes."""
        return bool(self.arms) and min(arm.epochs for arm in self.arms) >= FULL_EPOCHS

    @cached_property
    def differences(self) -> list[float]:
        """Top-1 of the norm minus that of BN, in points, for each seed that finished in both arms."""
        return paired_differences(self.bn.accuracies, self.other.accuracies) if self.bn and self.other else []

    @cached_property
    def difference(self) -> Estimate:
        return estimate(self.differences)

    def missing_seeds(self, arm: Arm | None) -> set[int]:
        """The seeds that this comparison has seen in any arm and that are not in this one."""
        return {record.seed for record in self.records} - (arm.seeds if arm else set())

    def missing(self, arm: Arm | None) -> int:
        """How many they are."""
        return len(self.missing_seeds(arm))


def read_checked(root: Path) -> tuple[list[Record], list[Problem]]:
    """The records under a folder, one a cell, norm and seed, and what was left out.

    The same run found twice counts once. Raises UserError where the folder is missing, where two records of
    one cell, norm and seed hold different results, or where runs of one cell were made under unequal
    conditions.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} is no folder of records; train a run first (make demo), or name the folder that holds "
            "runs with --runs"
        )
    records, problems = read_records(root)
    problems += [Problem(record.folder, reason) for record in records if (reason := _unusable(record))]
    usable = distinct(record for record in records if not _unusable(record))
    _check_conditions(usable)
    return usable, problems


def _unusable(record: Record) -> str:
    """Why a finished record has no result that a table could use; empty where it has."""
    for row in (record.last, record.best) if record.status == "finished" else ():
        accuracy = row["test/top1"]
        if accuracy is None or not 0 <= accuracy <= 100:
            return f"test/top1 of a finished run must be in percent, it is {accuracy}"
    return ""


def distinct(records: Iterable[Record]) -> list[Record]:
    """One record a cell, norm, kernel path and seed. Raises UserError naming two that contradict."""
    kept: dict[tuple[Cell, str, str, int], Record] = {}
    for record in records:
        first = kept.setdefault((cell_of(record), record.norm, record.kernels, record.seed), record)
        if _result(first) != _result(record):
            raise UserError(
                "two records of one cell and seed hold different results: "
                f"{first.folder} and {record.folder}; keep one of them"
            )
    return list(kept.values())


def _result(record: Record) -> tuple[object, ...]:
    last, best = (
        {key: value for key, value in row.items() if key not in COST_KEYS} for row in (record.last, record.best)
    )
    return record.status, last, best


def cell_of(record: Record) -> Cell:
    """The cell of a run; its setting names the precision, and what else is not the default."""
    devices = record.identity.get("devices", 1)
    compiled = THEN.join(dict.fromkeys("compiled" if suffix else "eager" for _, suffix in _kernels(record.kernels)))
    setting = [
        record.precision,
        "" if devices == 1 else f"{devices} devices",
        "synchronised" if record.identity.get("sync_bn") else "",
        "" if compiled == "eager" else compiled,
    ]
    return Cell(record.dataset, record.recipe, record.backbone, ", ".join(filter(None, setting)))


def _kernels(text: str) -> list[tuple[str, str]]:
    """Of each of a record's kernels: the norm's path, and "compiled" where the model was compiled, else ""."""
    paths = [kernels.partition("+") for kernels in text.split(THEN)]
    return [(norm, suffix) for norm, _, suffix in paths]


def _check_conditions(records: Iterable[Record]) -> None:
    """Equal names must mean equal conditions: a default that was edited between two runs may not go unseen.

    Keys that only one of two runs knows are passed over, so that the suite may grow an option.
    """
    firsts: dict[object, Record] = {}
    for record in records:
        conditions = {key: value for key, value in record.identity.items() if key not in ("norm", "seed")}
        for key, content in (
            (cell_of(record), conditions),
            ((cell_of(record), record.norm), record.identity),
        ):
            first = firsts.setdefault(key, record)
            changed = [name for name in _changed(first.identity, content) if name != "seed"]
            if changed:
                raise UserError(
                    f"two runs of one cell were made under unequal conditions ({', '.join(changed)}): "
                    f"{first.folder} and {record.folder}; keep one of them, or give the changed config "
                    "a name of its own"
                )


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys that both have with unequal values."""
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from (f"{key}.{name}" for name in _changed(a, b))
        elif a != b:
            yield key


def arms_of(records: Iterable[Record]) -> list[Arm]:
    """The records grouped by cell, norm and kernel path, sorted."""
    groups: dict[tuple[Cell, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[cell_of(record), record.norm, record.kernels].append(record)
    return [
        Arm(*key, tuple(sorted(group, key=lambda record: record.seed)))
        for key, group in sorted(groups.items(), key=lambda item: (item[0][0].order, *item[0][1:]))
    ]


def grid(records: Iterable[Record]) -> list[Comparison]:
    """BN against L2BN in every cell, sorted; a cell of the grid in which nothing was run has no arms.

    The grid is every data set with every backbone among the runs of one recipe and setting. Names with
    overrides are side experiments and add only themselves.
    """
    arms = [arm for arm in arms_of(records) if arm.norm in (BN, L2BN)]
    comparisons = _compare(arms, (L2BN,))
    measured = {comparison.cell for comparison in comparisons}
    labels = {comparison.cell.dataset: comparison.label for comparison in comparisons}
    sweeps: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in measured:
        if "," not in cell.dataset + cell.backbone:
            sweeps[cell.recipe, cell.setting].append(cell)
    for (recipe, setting), cells in sweeps.items():
        names = product({cell.dataset for cell in cells}, {cell.backbone for cell in cells})
        planned = {Cell(dataset, recipe, backbone, setting) for dataset, backbone in names}
        comparisons += [Comparison(cell, L2BN, None, None, labels[cell.dataset]) for cell in planned - measured]
    return sorted(comparisons, key=lambda comparison: (comparison.cell.order, comparison.kernels))


def other_norms(records: Iterable[Record]) -> list[Comparison]:
    """Every norm but L2BN, variants of BN and L2BN among them, against plain BN in its cell."""
    arms = arms_of(records)
    return _compare(arms, sorted({arm.norm for arm in arms} - {BN, L2BN}))


def _compare(arms: Sequence[Arm], norms: Sequence[str]) -> list[Comparison]:
    """Each arm of these norms with BN's of its cell; for L2BN also the cells in which only BN was run."""
    bn = {arm.cell: arm for arm in arms if arm.norm == BN}
    comparisons = [Comparison(arm.cell, arm.norm, bn.get(arm.cell), arm) for arm in arms if arm.norm in norms]
    if L2BN in norms:
        alone = bn.keys() - {comparison.cell for comparison in comparisons}
        comparisons += [Comparison(cell, L2BN, bn[cell], None) for cell in alone]
    return comparisons


def holm_over(comparisons: Iterable[Comparison]) -> list[float | None]:
    """The p-value of each comparison with Holm's correction over all of them."""
    return holm([comparison.difference.p for comparison in comparisons])


def pooled_cells(comparisons: Iterable[Comparison], min_pairs: int = 1) -> list[list[float]]:
    """The paired differences of each data set x backbone, for those with at least `min_pairs` seeds.

    A pair that was run under several recipes, settings or kernel paths is one observation, not several: its
    rows' mean differences stand in one cell.
    """
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for comparison in comparisons:
        if len(comparison.differences) >= max(min_pairs, 1):
            mean = comparison.difference.mean
            assert mean is not None
            cells[comparison.cell.dataset, comparison.cell.backbone].append(mean)
    return list(cells.values())


def pooled(comparisons: Iterable[Comparison], min_pairs: int = 1) -> Estimate:
    """The pooled paired estimate (`statistics.pooled_estimate`) over data set x backbone, in points."""
    return pooled_estimate(pooled_cells(comparisons, min_pairs))
