"""The files that are written by hand in `results/reference/`: the sets of runs, and published accuracies.

Both files are checked when they are read; their headers say how they are laid out.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from l2bn.errors import UserError
from l2bn.records import Record, first_fault
from l2bn.reporting.comparison import Comparison
from l2bn.reporting.evidence import BN, L2BN, MEAN_NORM, TASKS, Cell, overrides
from l2bn.reporting.formatting import PRECISIONS


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Raise UserError where a file cannot be read or its content is not laid out as expected."""
    try:
        yield
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = first_fault(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} cannot be used as the {what}: {reason}; its header says how it is laid out"
        ) from error


# ---- Sets of runs ---------------------------------------------------------------------------------------------


class Control(NamedTuple):
    """A further norm that is compared with L2BN, and the backbones that have runs of it."""

    norm: str
    backbones: tuple[str, ...]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RunSet:
    """A named set of runs, fixed before the first of them was published.

    settings: of the backbones that were measured in another setting than `setting`.

    Raises pydantic's ValidationError, a ValueError, for a value that is wrong.
    """

    label: str
    dataset: str
    recipe: str
    setting: str
    backbones: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    more_seeds: tuple[int, ...] = ()
    control: Control | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seeds = (*self.seeds, *self.more_seeds)
        if len({*seeds}) < len(seeds) or len({*self.backbones}) < len(self.backbones):
            raise ValueError("a seed or a backbone is given twice")
        if self.control and self.control.norm != MEAN_NORM:
            raise ValueError(f"control names {self.control.norm}; claim 1 compares L2BN with {MEAN_NORM}")
        named = self.settings.keys() | set(self.control.backbones if self.control else ())
        if other := named - {*self.backbones}:
            raise ValueError(f"settings or control name {', '.join(sorted(other))}, which is none of the backbones")
        if task := TASKS.get(self.dataset.partition(",")[0]):
            raise ValueError(f"{self.dataset} is {task}, and the claims that sets decide are about images")
        precisions = {setting.partition(",")[0] for setting in (self.setting, *self.settings.values())}
        if unknown := precisions - PRECISIONS.keys():
            raise ValueError(f"no precision is {', '.join(sorted(unknown))}; take one of {', '.join(PRECISIONS)}")

    @property
    def figures(self) -> tuple[str, str]:
        """The file names of its figures: paired differences in accuracy and in compactness."""
        name = f"{self.dataset}-{self.recipe}"
        return f"differences-{name}", f"compactness-{name}"

    def cells(self, norm: str) -> list[Cell]:
        """The cells in which a norm is run; none where the set has no runs of it."""
        control = self.control.backbones if self.control else ()
        backbones = {BN: self.backbones, L2BN: self.backbones, MEAN_NORM: control}.get(norm, ())
        return [Cell(self.dataset, self.recipe, one, self.settings.get(one, self.setting)) for one in backbones]


def read_sets(path: Path) -> list[RunSet]:
    """The sets of a file, at least one. Raises UserError where it is missing or not laid out as its header says."""
    with _reading(path, "sets of runs"):
        sets = [RunSet(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["sets"]]
        if not sets:
            raise ValueError("there is no set")
        if len({one.label for one in sets}) < len(sets):
            raise ValueError("two sets have one label")
        return sets


# ---- Published accuracies -------------------------------------------------------------------------------------

EPOCHS = {"last": "last epoch", "paper": "paper", "weights": "published weights", "best": "best epoch"}
"""The kinds of a published number, the most comparable with ours first, and their names in tables."""

NO_DATA_SETS = {"source", "recipe"}
"""The keys of a published table that are no data set."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A published BN accuracy, percent."""

    accuracy: float
    kind: str  # a key of EPOCHS
    best: float | None  # at the best epoch, where the source reports it
    source: str
    distance: float | None  # our BN minus this one, points; None where all of our runs diverged


@dataclass(frozen=True)
class Reference:
    """The published rows; empty ones match no run."""

    bn: list[Row] = field(default_factory=list)
    images: Row = field(default_factory=dict)

    def published(self, comparison: Comparison) -> Published | None:
        """The BN accuracy with our arm's data set, network (its parameters too, if known) and recipe."""
        if not comparison.reference.records:
            return None
        record = comparison.reference.records[0]
        for table in self.bn:
            row = table.get(_baseline(record), {}).get(record.backbone)
            same_net = row and row.get("parameters", record.parameters) == record.parameters
            if same_net and table["recipe"] == record.recipe:
                kind = next(kind for kind in EPOCHS if kind in row)
                ours = comparison.reference.estimate().mean
                distance = None if ours is None else ours - row[kind]
                return Published(row[kind], kind, row.get("best"), table["source"], distance)
        return None

    def paper(self, comparison: Comparison) -> Row:
        """`bn`, `l2bn` (percent) and `where` of the L2BN paper's row for the pair; empty where none was entered."""
        record = comparison.records[0]
        row: Row = self.images.get(_baseline(record), {}).get(record.backbone, {})
        return row if row.get("recipe", record.recipe) == record.recipe else {}


def _baseline(record: Record) -> str:
    """The published rows that match a record's data set; empty where an override changed its images."""
    changed = overrides(record.dataset).keys() - {"label", "baseline"}
    return "" if changed or record.baseline in NO_DATA_SETS else record.baseline or ""


def read_reference(path: Path) -> Reference:
    """The published rows of a file. Raises UserError where it is missing or not laid out as its header says."""
    with _reading(path, "published accuracies"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        reference = Reference(content["bn"], content["l2bn"]["image_classification"])
        for table in reference.bn:
            if not table.keys() > NO_DATA_SETS:
                raise ValueError(f"a table of `bn` needs a source, a recipe and a data set, it has {list(table)}")
            for dataset in table.keys() - NO_DATA_SETS:
                _check(dataset, table[dataset], EPOCHS.keys(), {"parameters"})
        for dataset, rows in reference.images.items():
            _check(dataset, rows, {"bn", "l2bn"}, {"where", "recipe"})
        return reference


def _check(dataset: str, rows: Mapping[str, Row], accuracies: Collection[str], others: Collection[str]) -> None:
    """Raise ValueError for a row without an accuracy, with another key, or with an accuracy out of range."""
    for net, row in rows.items():
        given = {key: row[key] for key in row.keys() & set(accuracies)}
        if not given or row.keys() - given.keys() - set(others):
            raise ValueError(
                f"{dataset}: {net} may have {sorted(accuracies)} and {sorted(others)}, it has {sorted(row)}"
            )
        for key, value in given.items():
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"{dataset}: {net}: {key} must be an accuracy in percent, it is {value!r}")
