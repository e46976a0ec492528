"""The evidence: the runs under a folder and the values of each, checked before anything is compared.

Runs that are compared share a cell: data set x backbone x recipe x setting (precision, devices).

Quantities are TOP1 and BEST, and of a run with measured features the measures after its last epoch, named by place
and measure: "penultimate/within_share"; at norm layers ("input/norm_cv", "output/norm_cv", "shrink") the mean over
all of them. A diverged run has no values.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from l2bn.errors import UserError
from l2bn.records import (
    ENVIRONMENT,
    FEATURES,
    MEASURES,
    THEN,
    FeatureRow,
    Fingerprint,
    InvalidRecordError,
    Problem,
    Record,
    natural_order,
    read_features,
    read_records,
    read_statistics,
    same_images,
)

BN, L2BN = "bn", "l2bn"
RMS, DETACHED, MEAN_NORM = "l2bn_rms", "l2bn_detached", "l2bn_mean_norm"

TOP1, BEST = "top1", "best_top1"
"""Test top-1 in percent after the last epoch, the result of a run; and after the best epoch, which is chosen on the
test set, hence optimistic and never the result."""

PENULTIMATE, INPUT, OUTPUT, SHRINK = "penultimate", "input", "output", "shrink"
FEATURE_QUANTITIES = (SHRINK, *(f"{place}/{name}" for place in (INPUT, OUTPUT, PENULTIMATE) for name in MEASURES))
WITHIN_SHARE, ANGLE_MEAN = f"{PENULTIMATE}/within_share", f"{PENULTIMATE}/angle_mean"
NORM_CV = f"{INPUT}/norm_cv"


# ---- Cells and their names ----------------------------------------------------------------------------------


Task = Literal["images", "acoustic scenes", "environmental sound", "sound"]
TASKS: Mapping[str, Task] = {
    "tau2020": "acoustic scenes",
    "esc50": "environmental sound",
    "sound_folder": "sound",
}


_FOLD = re.compile(r", fold (\d+)(?=,|$)")
"""The fold that is the test set, in the label of a data set."""


@dataclass(frozen=True)
class Cell:
    """The names that two runs must share to be compared: those of the run's folder, overrides included."""

    dataset: str
    recipe: str
    backbone: str
    setting: str
    value: tuple[float, ...] = ()  # what a study varies: eps, or batch size and learning rate
    task: Task = field(default="images", compare=False)  # the contents of the data set
    fold: int | None = field(default=None, compare=False)  # that is its test set
    label: str = field(default="", compare=False)  # the data set as tables name it
    source: str = field(default="", compare=False)  # where its images are from: cells of one are pooled as one

    @property
    def all_folds(self) -> str:
        """The label of the data set without the fold that is its test set."""
        return _FOLD.sub("", self.label)

    @property
    def dataset_of_folds(self) -> str:
        """The name of the data set without the fold that is its test set."""
        return re.sub(r",fold=[^,]*", "", self.dataset)

    @property
    def order(self) -> tuple[object, ...]:
        """A sort key."""
        names = (self.dataset, self.recipe, self.backbone)
        return *map(natural_order, names), self.setting, self.value


def cell_of(record: Record) -> Cell:
    """The cell of a run; its task by the choice of data set, else by the function that a user's own file names."""
    dataset = record.identity.get("dataset")
    known = dataset if isinstance(dataset, dict) else {}
    own: Task = "sound" if str(known.get("_target_")).startswith("l2bn.data.sound.") else "images"
    task = TASKS.get(record.dataset.partition(",")[0], own)
    told = _FOLD.search(record.label)
    # A user's own data set may call something else a fold.
    fold = int(told[1]) if told and known.get("fold") == int(told[1]) else None
    return Cell(record.dataset, record.recipe, record.backbone, record.setting, task=task, fold=fold)


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


def with_changes(name: str, changes: Mapping[str, str]) -> str:
    """A name with its overridden values in brackets: "short (batch size 16, epochs 3)"."""
    # A value below another overridden one adds nothing.
    own = [key for key in changes if not any(key.startswith(f"{above}.") for above in changes)]
    words = (f"{key.replace('_', ' ')} {changes[key].replace(',_', ', ')}".strip() for key in own)
    return f"{name} ({', '.join(words)})" if own else name


def label_of(record: Record) -> str:
    """The data set as tables name it: the record's label, and the overrides that the label does not contain."""
    contained = ("label", "baseline", "subset", "validation", "fold", "leave_out", "esc10")
    changes = {key: value for key, value in overrides(record.dataset).items() if key not in contained}
    return with_changes(record.label, changes)


_OF_SOURCE = (
    r"validation [^,]+|coarse|decoded at \d+ pixels|"
    r"[\d,]+ of [\d,]+ (?:classes untrained|classes untested|test images known from training)"
)
"""The parts of a data set's label that say how its images were used."""


def source_of(record: Record) -> str:
    """The data set that a record's images are from: its label, without how they were used or held out."""
    return re.sub(rf", (?:{_OF_SOURCE})(?=,|$)", "", record.label)


# ---- Reading and checking -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grouping:
    """The cell and the norm under which a record is compared.

    of: gives them. Raises InvalidRecordError for a record without them.
    varied: dotted names of what may differ in the identities of a cell's runs between two of its values.
    """

    of: Callable[[Record], tuple[Cell, str]]
    varied: tuple[str, ...] = ()


BY_NAME = Grouping(lambda record: (cell_of(record), record.norm))
"""The names of the run's folder."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """The records under a folder, the measured rows of their runs by folder, and what was left out."""

    records: Sequence[Record]
    problems: Sequence[Problem] = ()
    features: Mapping[Path, Sequence[FeatureRow]] = field(default_factory=dict)
    grouping: Grouping = BY_NAME


def value_of(record: Record, features: Sequence[FeatureRow], quantity: str) -> float | None:
    """The value of a quantity in a run with these measured epochs; None where it has none, as where it diverged."""
    if record.status != "finished":
        return None
    if quantity in (TOP1, BEST):
        return (record.last if quantity == TOP1 else record.best)["test/top1"]
    return measure(features[-1], quantity) if features else None


def measure(row: FeatureRow, quantity: str) -> float | None:
    """The value of a feature quantity in one measured epoch; None where a layer has none."""
    place, _, name = quantity.partition("/")
    values = [row[place][name]] if place == PENULTIMATE else by_layer(row, quantity)
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def by_layer(row: FeatureRow, quantity: str) -> list[float | None]:
    """The values of a feature quantity at each norm layer, in the order in which the layers run."""
    place, _, name = quantity.partition("/")
    return [layer[place][name] if name else layer[place] for layer in row["layers"]]


def read_evidence(
    root: Path, *, features: bool = False, statistics: bool = False, grouping: Grouping = BY_NAME
) -> Evidence:
    """The records under a folder, one per cell, norm and seed, on request with their measured features.

    statistics: instead of features, the measured updates of running against batch statistics.

    The same run found twice counts once. `grouping` gives a record's cell and norm if a study groups them
    otherwise; a record without them is left out, as one that cannot be read. Raises UserError where the folder is
    missing, where two records of one cell, norm and seed hold different results, or where runs of one cell, or of
    the folds of one data set, were made under unequal conditions.
    """
    if not root.is_dir():
        raise UserError(
            f"{root} is no folder of records; train a run first (make demo), or name the folder that holds runs "
            "with --runs"
        )
    found, problems = read_records(root)
    records = []
    for record in found:
        try:
            grouping.of(record)
            records.append(record)
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error)))
    _check_conditions(records, grouping)
    records = _distinct(records, grouping)
    measured: dict[Path, Sequence[FeatureRow]] = {}
    for record in records if features or statistics else ():
        if record.status != "finished":
            continue
        try:
            rows = read_statistics(record.folder) if statistics else read_features(record.folder)
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error), "measurements"))
            continue
        if rows and (statistics or rows[-1]["epoch"] == record.epochs):
            measured[record.folder] = rows
    return Evidence(records, problems, measured, grouping)


def _distinct(records: Iterable[Record], grouping: Grouping) -> list[Record]:
    """One record per cell, norm and seed, with features if any has them. Raises UserError on a contradiction."""
    kept: dict[tuple[Cell, str, int], Record] = {}
    for record in records:
        first = kept.setdefault((*grouping.of(record), record.seed), record)
        if first.result != record.result:
            raise UserError(
                "two records of one cell and seed hold different results: "
                f"{first.folder} and {record.folder}; keep one of them"
            )
        if not (first.folder / FEATURES).exists() and (record.folder / FEATURES).exists():
            kept[*grouping.of(record), record.seed] = record
    return list(kept.values())


_OF_A_FOLD = ("dataset.fold", "train_images", "test_images", "images.files")
"""Dotted names of what may differ between the folds of a data set, which are averaged."""


def _check_conditions(records: Iterable[Record], grouping: Grouping) -> None:
    """Raise UserError where runs of one cell, or of one study, were made under unequal conditions.

    So a default edited between two runs, or a changed folder of images, is not overlooked. A key that some runs
    lack is passed over where its value is empty, false or 0, so that the suite may grow an option; so is a missing
    fingerprint. Runs of a study may differ in what the study varies, those of a data set's folds in their images.
    """
    # By cell, or the cell without the study's value; by norm for values of the norm's own; and by name.
    known: dict[tuple[Cell, str, str], tuple[object, Path]] = {}
    members: dict[tuple[Cell, str], dict[Path, Mapping[str, object]]] = defaultdict(dict)
    may_differ: dict[tuple[Cell, str], Sequence[str]] = {}
    for record in records:
        own = _conditions(record)
        scopes = {BY_NAME.of(record): (), grouping.of(record): grouping.varied}
        if (cell := cell_of(record)).fold is not None:
            folds = replace(cell, dataset=f"all folds of {cell.dataset_of_folds}", value=(cell.fold,))
            scopes[folds, record.norm] = _OF_A_FOLD
        for (cell, norm), varied in scopes.items():
            study = replace(cell, value=())
            for name, value in own.items():
                of_norm = name == "parameters" or name.startswith("norm.")
                scope = cell if name in varied else study, norm if of_norm else ""
                first, folder = known.setdefault((*scope, name), (value, record.folder))
                if first != value:
                    raise _unequal(name, (first, value), (folder, record.folder), varied)
                members[scope][record.folder] = own
                may_differ[scope] = varied
    for (cell, norm, name), (value, folder) in known.items():
        lacking = [other for other, own in members[cell, norm].items() if name not in own]
        allowed = may_differ[cell, norm]
        if value and lacking and name not in (*allowed, "images.files"):
            raise _unequal(name, (value, "no value"), (folder, min(lacking)), allowed)


def _conditions(record: Record) -> dict[str, object]:
    """The values that the runs of a cell must share, by dotted names; `parameters` and `norm.`, those of a norm."""
    found = {name: value for name, value in _flat(record.identity) if name not in ("seed", "norm")}
    found |= {"setting": record.setting, "train_images": record.train_images, "test_images": record.test_images}
    found["parameters"] = record.parameters
    return found | ({"images.files": _Images(record.images)} if record.images else {})


@dataclass(frozen=True, eq=False)
class _Images:
    """A fingerprint, equal to another one of the same images."""

    fingerprint: Fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Images) and same_images(self.fingerprint, other.fingerprint)

    def __str__(self) -> str:
        return self.fingerprint["files"]


def _unequal(
    name: str, values: tuple[object, object], folders: tuple[Path, Path], varied: Sequence[str]
) -> UserError:
    of = "of one cell"
    if varied is _OF_A_FOLD:
        of = "of the folds of a data set"
        remedy = "train all folds under one configuration, or give one of them a name of its own by dataset.label"
    elif name in ("train_images", "test_images", "images.files"):
        remedy = "keep the runs on one set of images, or give the other a name of its own by dataset.label"
    elif varied:
        remedy = f"keep one of them: the runs of this study differ in nothing but {', '.join(varied)}"
    else:
        remedy = "keep one of them, or give the changed config a name of its own"
    return UserError(
        f"two runs {of} were made under unequal conditions ({name}: {values[0]} and {values[1]}): "
        f"{folders[0]} and {folders[1]}; {remedy}"
    )


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted key and value of everything in a nested mapping; {} for a mapping itself."""
    for key, value in node.items():
        yield f"{prefix}{key}", {} if isinstance(value, dict) else value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


# ---- Notes on the runs of a comparison ------------------------------------------------------------------------


def kernels_in_words(runs: Iterable[Record], reference: Iterable[Record]) -> str:
    """The kernel paths of a norm's runs, and whether these and its reference's were compiled: "fused, compiled".

    Kernel paths agree within rounding, so they are a note to a comparison and do not separate runs.
    """
    used, others = (
        [kernels.partition("+") for record in records for kernels in record.kernels.split(THEN)]
        for records in (runs, reference)
    )
    compiled = {suffix == "compiled" for _, _, suffix in used + others}
    suffix = "" if compiled == {False} else ", compiled" if compiled == {True} else ", in part compiled"
    return " and ".join(sorted({path for path, _, _ in used})) + suffix


def is_mixed(kernels: str) -> bool:
    """Tell whether kernels, in words, are of several paths or in part compiled."""
    return " and " in kernels or "in part" in kernels


def agreement(kernels: str) -> str:
    """Say in words how far mixed kernels agree: "within rounding"."""
    return "within rounding" + "; a compiled model draws other masks of dropout" * ("in part" in kernels)


def images_in_words(records: Sequence[Record]) -> str:
    """Doubts that the fingerprints of the images leave in a comparison of these runs; empty where they are equal.

    Differing files are an error; pixels can also differ by the decoder, and older records have no fingerprint.
    """
    found = [record.images for record in records]
    missing, pixels = found.count(None), {images["pixels"] for images in found if images and images["pixels"]}
    notes = ["decoded pixels differ"] if len(pixels) > 1 else []
    if missing:
        notes.append(
            "no fingerprint" if missing == len(found) else f"no fingerprint in {missing} of {len(found)} runs"
        )
    return ", ".join(notes)


def seeds_on_unlike_devices(records: Iterable[Record]) -> list[int]:
    """The seeds whose runs were made in part on a CPU and in part on a GPU.

    A record that does not say its device is passed over.
    """
    kinds: dict[int, list[set[str]]] = defaultdict(list)
    for record in records:
        devices = {"CPU" if start["device"] == "cpu" else "GPU" for start in _starts(record) if "device" in start}
        if devices:
            kinds[record.seed].append(devices)
    # Two runs that both changed the device may have done so at different epochs.
    several = ((seed, found) for seed, found in sorted(kinds.items()) if len(found) > 1)
    return [seed for seed, found in several if len(set.union(*found)) > 1]


def unlike_devices(records: Iterable[Record]) -> str:
    """The seeds whose runs were made in part on a CPU and in part on a GPU, as text; empty without."""
    seeds = seeds_on_unlike_devices(records)
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""


def unlike_code(records: Iterable[Record]) -> str:
    """Say in words that these runs were made by more than one version of the user's own code; empty if by one.

    Code of the norm is compared among the runs of one norm, the rest among all. A record that does not say its code
    is passed over.
    """
    known: dict[str, set[object]] = defaultdict(set)  # of all seeds: an edit may lie between any two of the runs
    for record in records:
        for start in _starts(record):
            for key, scope in (("own_source", record.norm), ("own_source_beside_norm", "")):
                if key in start:
                    known[f"{key} {scope}"].add(start[key])
    return "more than one version" if any(len(found) > 1 for found in known.values()) else ""


def _starts(record: Record) -> list[dict[str, Any]]:
    """The starts of a run in its `env.json`; none where it cannot be read."""
    try:
        starts = json.loads((record.folder / ENVIRONMENT).read_text())["starts"]
        return [start for start in starts if isinstance(start, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
