"""The studies of eps, of the learning rate and of running statistics: their runs, tables and CSV file.

A cell of a study may hold the same norm at many values of one setting, so its runs have no place in the grid.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from l2bn.records import SUMMARY, FeatureRow, InvalidRecordError, Problem, Record, StatisticsRow, is_finite_number
from l2bn.reporting.comparison import Arm, Comparison, arms_of, find_arm, holm_over
from l2bn.reporting.evidence import (
    BN,
    BY_NAME,
    L2BN,
    RMS,
    SHRINK,
    Cell,
    Evidence,
    Grouping,
    by_layer,
    cell_of,
    read_evidence,
)
from l2bn.reporting.formatting import (
    NONE,
    Table,
    csv_text,
    file_name,
    in_words,
    interval,
    markdown,
    mean_interval,
    mean_std_n,
    plural,
    probability,
    signed,
    title,
)
from l2bn.reporting.statistics import Estimate, across, estimate, holm

EPS, RATES, TRAP = "eps_study", "lr_study", "variance_trap"
"""The folders of the studies' records."""

DEFAULT_EPS, SMALLEST_EPS = 1e-5, 1e-12


def _number(record: Record, group: str, name: str) -> float:
    """A number of the identity. Raises InvalidRecordError for another value.

    So for an eps of null, the network's own, which a record does not hold: networks differ in it.
    """
    found = record.identity.get(group)
    value = found.get(name) if isinstance(found, dict) else None
    if not is_finite_number(value):
        raise InvalidRecordError(f"{SUMMARY}: identity.{group}.{name} must be a number in a study, not {value!r}")
    return float(value)


def _batch_and_rate(record: Record) -> tuple[int, float]:
    return int(_number(record, "recipe", "batch_size")), _number(record, "recipe", "lr")


def _by_eps(record: Record) -> tuple[Cell, str]:
    """The cell at the run's eps, and the norm without it."""
    _batch_and_rate(record)  # stand in studies.csv
    eps = _number(record, "norm", "eps")
    return replace(cell_of(record), value=(eps,)), re.sub(",eps=[^,]*", "", record.norm)


def _by_rate(record: Record) -> tuple[Cell, str]:
    """Data set and backbone at the run's batch size and learning rate, and the norm."""
    return Cell(record.dataset, "", record.backbone, "", _batch_and_rate(record)), record.norm


BY_EPS = Grouping(_by_eps, varied=("norm.eps",))
# Each batch size has its own number of epochs, so that all take about as many updates.
BY_RATE = Grouping(_by_rate, varied=("recipe.batch_size", "recipe.lr", "recipe.epochs"))


@dataclass(frozen=True, eq=False)
class Study:
    """The arms of one cell at each value of what the study varies; the trap varies nothing."""

    cell: Cell
    arms: Sequence[Arm]

    @property
    def values(self) -> list[tuple[float, ...]]:
        return sorted({arm.cell.value for arm in self.arms})

    def at(self, norm: str, *value: float) -> Arm:
        """The arm of a norm at a value; an empty one where it was not run."""
        return find_arm(self.arms, replace(self.cell, value=value), norm)

    @property
    def pairs(self) -> list[Comparison]:
        """BN and L2BN at each value, in the order of `values`."""
        return [Comparison(self.at(BN, *value), self.at(L2BN, *value)) for value in self.values]


class Studies(NamedTuple):
    """The studies of each kind. Arms of a trap hold measured updates in the place of features."""

    eps: Sequence[Study] = ()
    rates: Sequence[Study] = ()
    traps: Sequence[Study] = ()


def studies_of(evidence: Evidence) -> list[Study]:
    """The arms by cell, in the order of the cells."""
    groups = groupby(arms_of(evidence), key=lambda arm: replace(arm.cell, value=()))
    return [Study(cell, list(arms)) for cell, arms in groups]


def read_studies(folder: Path | None) -> tuple[Studies, list[Problem]]:
    """The studies under a folder, each of which may be missing, and the records left out. Raises UserError."""
    found = [
        read_evidence(folder / name, features=name == EPS, statistics=name == TRAP, grouping=grouping)
        if folder is not None and (folder / name).is_dir()
        else Evidence(())
        for name, grouping in ((EPS, BY_EPS), (RATES, BY_RATE), (TRAP, BY_NAME))
    ]
    eps, rates, traps = map(studies_of, found)
    traps = [study for study in traps if any(arm.features or arm.diverged for arm in study.arms)]
    return Studies(eps, rates, traps), [problem for evidence in found for problem in evidence.problems]


# ---- The study of eps -----------------------------------------------------------------------------------------


def _known_shrink(rows: Sequence[FeatureRow]) -> list[float]:
    """The shrink factors of one run's norm layers after the last epoch, in their order."""
    return [value for value in by_layer(rows[-1], SHRINK) if value is not None]


def shrink_factors(arm: Arm) -> list[float]:
    """The shrink factor of each norm layer, in their order, as the mean over the runs that have it."""
    runs = map(_known_shrink, arm.features.values())
    return [fmean(values) for values in zip(*filter(None, runs), strict=True)]


def eps_text(eps: float) -> str:
    """1e-05, and 2.5e-05 where one digit is not all of it."""
    short = f"{eps:.0e}"
    return short if float(short) == eps else f"{eps:g}"


def eps_table(study: Study) -> Table:
    """Accuracy over eps, L2BN against BN at the same eps, and the shrink factors of the layers' outputs."""
    columns = (
        *("eps", "BN (n)", "norm 1 (n)", "rms 1 (n)"),
        *("norm 1 − BN", "95 % interval", "rms 1 − BN", "95 % interval of that"),
        *("shrink: BN", "norm 1", "rms 1"),
    )
    rows = []
    for (eps,) in study.values:
        bn, *others = arms = [study.at(norm, eps) for norm in (BN, L2BN, RMS)]
        results = (cell for arm in others for cell in mean_interval(Comparison(bn, arm).difference()))
        layers = map(shrink_factors, arms)
        shrink = (f"{fmean(factors):.3f} ({min(factors):.3f})" if factors else NONE for factors in layers)
        rows.append((eps_text(eps), *map(mean_std_n, arms), *results, *shrink))
    return Table(columns, rows, names=0)


PARTS = (
    ("L2BN (norm 1) − BN", (BN, DEFAULT_EPS), (L2BN, DEFAULT_EPS)),
    ("equal norms: rms 1 − BN", (BN, DEFAULT_EPS), (RMS, DEFAULT_EPS)),
    ("eps: norm 1 − rms 1", (RMS, DEFAULT_EPS), (L2BN, DEFAULT_EPS)),
    ("equal norms, without eps: norm 1 − BN at eps 1e-12", (BN, SMALLEST_EPS), (L2BN, SMALLEST_EPS)),
    ("eps, from another side: norm 1 at eps 1e-5 − at 1e-12", (L2BN, SMALLEST_EPS), (L2BN, DEFAULT_EPS)),
)
"""The difference between L2BN and BN at the usual eps, and its parts: text, reference, other."""


def parts_table(study: Study) -> Table:
    """The parts of L2BN's difference to BN that equal norms and eps contribute; the two add up to the first row."""
    pairs = [Comparison(study.at(*reference), study.at(*other)) for _, reference, other in PARTS]
    results = [pair.difference() for pair in pairs]
    # The two parts at the usual eps are the question of the study; the rest shows the same from another side.
    parts = results[1:3]
    corrected = map(probability, holm([result.p for result in parts]), parts)
    columns = ("Difference", "Points", "95 % interval", "n", "p (Holm)")
    rows = [
        (text, *mean_interval(result), str(result.n), p)
        for (text, _, _), result, p in zip(PARTS, results, (NONE, *corrected, NONE, NONE), strict=True)
    ]
    return Table(columns, rows)


# ---- The study of the learning rate ---------------------------------------------------------------------------


def rate_table(study: Study) -> Table:
    """A row per batch size and learning rate."""
    pairs = study.pairs
    columns = (
        *("Batch size", "Learning rate", "Updates", "BN (n)", "L2BN (n)"),
        *("L2BN − BN", "95 % interval", "p (Holm)"),
    )
    rows = []
    for (batch, rate), pair, p in zip(study.values, pairs, holm_over(pairs), strict=True):
        result = pair.difference()
        updates = [run.updates for run in pair.records if run.status == "finished"]
        names = f"{batch}", f"{rate:g}", f"{max(updates):,}" if updates else NONE
        arms = mean_std_n(pair.reference), mean_std_n(pair.other)
        rows.append((*names, *arms, *mean_interval(result), probability(p, result)))
    return Table(columns, rows, names=0)


class Overall(NamedTuple):
    """A mean over the settings of a study, one value per seed, and what it was taken over."""

    result: Estimate
    settings: int
    seeds: Sequence[int]
    median: float | None  # of the settings' mean differences: a few large ones may make most of the mean


def overall(study: Study) -> Overall:
    """L2BN − BN over the settings in which all runs of the study's seeds finished.

    The study's seeds are those that more than half of its settings have: a seed more in some settings adds no value
    of its own, and a setting that lacks a seed is left out, not the seed.
    """
    pairs = [pair for pair in study.pairs if len(pair.arms) == 2]
    counts = Counter(seed for pair in pairs for seed in pair.reference.seeds | pair.other.seeds)
    seeds = sorted(seed for seed, count in counts.items() if 2 * count > len(study.values))
    accuracies = [(pair.reference.of(), pair.other.of()) for pair in pairs]
    whole = [(bn, l2bn) for bn, l2bn in accuracies if seeds and bn.keys() & l2bn.keys() >= set(seeds)]
    means = [fmean(l2bn[seed] - bn[seed] for bn, l2bn in whole) for seed in seeds if whole]
    per_setting = [fmean(l2bn[seed] - bn[seed] for seed in seeds) for bn, l2bn in whole]
    return Overall(estimate(means), len(whole), seeds, median(per_setting) if per_setting else None)


def rate_note(study: Study) -> str:
    """One sentence over all settings."""
    results = [pair.difference() for pair in study.pairs]
    above = sum(result.side > 0 for result in results)
    below = sum(result.side < 0 for result in results)
    lost = {norm: sum(arm.diverged for arm in study.arms if arm.norm == norm) for norm in (BN, L2BN)}
    mean, settings, seeds, middle = overall(study)
    runs = f"{plural('setting', settings)} in which all runs of seeds {', '.join(map(str, seeds)) or NONE} finished"
    return (
        f"Of {len(results)} settings, the 95 % interval lies above 0 in {above} and below in {below}, uncorrected. "
        f"Mean over the {runs}, one value per seed: {signed(mean.mean)} points, 95 % interval {interval(mean)}, "
        f"n = {mean.n}; the settings' median {signed(middle)}. Diverged: {lost[BN]} of BN, {lost[L2BN]} of L2BN."
    )


# ---- The running-variance trap --------------------------------------------------------------------------------

SHOWN_UPDATES = (10, 50, 100, 150, 200, 300)
CAUGHT_UP = 1.0
"""Points that running statistics may lie below batch statistics and count as caught up."""


def accuracy_by_update(arm: Arm, kind: str) -> dict[int, list[float]]:
    """Update to the accuracy of each seed, percent, by "running" or "batch" statistics, if all seeds have it."""
    key = f"{kind}/top1"
    return across(
        [{row["step"]: row[key] for row in rows if row[key] is not None} for rows in arm.features.values()]
    )


def _keeps_up(row: StatisticsRow) -> bool:
    return (row["running/top1"] or 0.0) >= (row["batch/top1"] or 0.0) - CAUGHT_UP


def caught_up(arm: Arm) -> str:
    """The first update from which on running statistics keep up, from the earliest to the latest seed."""
    first = []
    for rows in arm.features.values():
        first += [int(row["step"]) for row in takewhile(_keeps_up, reversed(rows))][-1:]
    never = len(arm.features) - len(first)
    span = f"{min(first)} to {max(first)}" if len(set(first)) > 1 else "".join(map(str, first[:1]))
    return ", ".join(filter(None, (span, f"{never} never" if never else "")))


def trap_table(study: Study) -> Table:
    """Mean accuracy over the seeds by both statistics at some updates, and when the running ones have caught up."""
    columns = ("Norm", "Statistics", *(f"update {step}" for step in SHOWN_UPDATES), "caught up after", "n")
    rows = []
    for arm in study.arms:
        n = f"{len(arm.features)}; {arm.diverged} diverged" if arm.diverged else str(len(arm.features))
        for kind, when in (("running", caught_up(arm)), ("batch", "")):
            found = accuracy_by_update(arm, kind)
            shown = (f"{fmean(found[step]):.2f}" if step in found else NONE for step in SHOWN_UPDATES)
            rows.append((arm.norm, kind, *shown, when, n))
    return Table(columns, rows, names=2)


# ---- The files ------------------------------------------------------------------------------------------------


def studies_csv(studies: Studies) -> str:
    """A line per run of the studies of eps and of the learning rate."""
    columns = (
        *("study", "dataset", "label", "backbone", "recipe", "setting", "norm", "eps", "batch_size", "lr", "seed"),
        *("status", "updates", "top1", "shrink_mean", "shrink_min"),
    )
    rows = []
    for study in studies.eps:
        for arm in sorted(study.arms, key=lambda arm: (arm.norm, arm.cell.value)):
            rows += [_run_row(arm, run, "eps", f"{arm.cell.value[0]:g}") for run in arm.records]
    for study in studies.rates:
        rows += [_run_row(arm, run, "lr", None) for arm in study.arms for run in arm.records]
    return csv_text(rows, columns, ".5g")


def _run_row(arm: Arm, run: Record, study: str, eps: str | None) -> dict[str, object]:
    (batch, rate), top1 = _batch_and_rate(run), arm.of().get(run.seed)
    factors = _known_shrink(arm.features[run.seed]) if run.seed in arm.features else []
    names = ("dataset", "label", "backbone", "recipe", "norm", "seed", "status", "updates")
    return {
        **{key: getattr(run, key) for key in names},
        "study": study,
        "setting": cell_of(run).setting,
        "eps": eps,
        "batch_size": batch,
        "lr": f"{rate:g}",
        "top1": None if top1 is None else f"{top1:.4f}",
        "shrink_mean": fmean(factors) if factors else None,
        "shrink_min": min(factors, default=None),
    }


def studies_sections(studies: Studies) -> Iterator[str]:
    """The sections of mechanism.md, of the studies that have records."""
    yield from _eps(studies.eps)
    yield from _traps(studies.traps)
    yield from _rates(studies.rates)


def _eps(studies: Sequence[Study]) -> Iterator[str]:
    if studies:
        yield "## How much is eps?"
        yield (
            "L2BN at norm 1 and at root mean square 1 against BN at the same eps. Shrink: the factor by which eps "
            "reduces the standard deviation of a norm layer's output, as the mean over the layers and in brackets "
            "the smallest, both from means over the seeds. Only eps can make norm 1 and rms 1 differ. Holm's "
            "correction over the two parts at eps 1e-5."
        )
    for study in studies:
        yield f"### {title(study.cell)}: eps"
        yield markdown(eps_table(study))
        yield f"**Effects of equal norms and of eps**\n\n{markdown(parts_table(study))}"
        yield f"![Accuracy and shrink factors over eps](figures/eps-{file_name(study.cell)}.png)"


def _traps(studies: Sequence[Study]) -> Iterator[str]:
    if studies:
        yield "## The running-variance trap"
        yield (
            "Test top-1 in percent by running statistics, as in evaluation, and by the statistics of each batch of "
            "up to 512 test images. Caught up after: the first measured update from which running statistics stay "
            "within 1 point of batch statistics, from the earliest to the latest seed. Running statistics also lag "
            "behind weights that change fast, so the start at 1 is one cause among others."
        )
    for study in studies:
        yield f"### {title(study.cell)}: statistics"
        yield markdown(trap_table(study))
        if any(arm.features for arm in study.arms):
            yield f"![Accuracy by running and batch statistics](figures/trap-{file_name(study.cell)}.png)"


def _rates(studies: Sequence[Study]) -> Iterator[str]:
    if studies:
        yield "## Learning rate and batch size"
        yield "No learning rate is chosen from these runs; each row is a comparison."
    for study in studies:
        yield f"### {study.cell.label}, {in_words(study.cell.backbone)}: learning rates"
        yield markdown(rate_table(study))
        yield rate_note(study)
        yield f"![Accuracy over learning rates and batch sizes](figures/rates-{file_name(study.cell)}.png)"
