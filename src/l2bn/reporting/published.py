"""Published accuracies from `results/reference/baselines.yaml`, shown only beside runs that they match."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from l2bn.errors import UserError
from l2bn.records import Record
from l2bn.reporting.comparison import Comparison
from l2bn.reporting.evidence import overrides

EPOCHS = {"last": "last epoch", "paper": "paper", "weights": "published weights", "best": "best epoch"}
"""The kinds of a published number, the most comparable with ours first, and their names in tables."""

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
        if comparison.reference is None:
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
        if not comparison.records:
            return {}
        record = comparison.records[0]
        row: Row = self.images.get(_baseline(record), {}).get(record.backbone, {})
        return row if row.get("recipe", record.recipe) == record.recipe else {}


def _baseline(record: Record) -> str:
    """The published rows that match a record's data set; empty where an override changed its images."""
    changed = overrides(record.dataset).keys() - {"label", "baseline"}
    return "" if changed else record.baseline or ""


def read_reference(path: Path) -> Reference:
    """The published rows of a file. Raises UserError where it is missing or not laid out as its header says."""
    try:
        content = yaml.safe_load(path.read_text())
        reference = Reference(content["bn"], content["l2bn"]["image_classification"])
        for table in reference.bn:
            if not {"source", "recipe"} < table.keys():
                raise ValueError(f"a table of `bn` needs a source, a recipe and a data set, it has {list(table)}")
            for dataset in table.keys() - {"source", "recipe"}:
                _check(dataset, table[dataset], EPOCHS.keys(), {"parameters"})
        for dataset, rows in reference.images.items():
            _check(dataset, rows, {"bn", "l2bn"}, {"where", "recipe"})
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be used as the published accuracies: {type(error).__name__}: {error}; "
            "its header says how it is laid out"
        ) from error
    return reference


def _check(dataset: str, rows: Mapping[str, Row], accuracies: Any, others: set[str]) -> None:
    """Raise ValueError for a row without an accuracy, with another key, or with an accuracy out of range."""
    for net, row in rows.items():
        given = {key: row[key] for key in row.keys() & set(accuracies)}
        if not given or row.keys() - given.keys() - others:
            raise ValueError(
                f"{dataset}: {net} may have {sorted(accuracies)} and {sorted(others)}, it has {sorted(row)}"
            )
        for key, value in given.items():
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                raise ValueError(f"{dataset}: {net}: {key} must be an accuracy in percent, it is {value!r}")
