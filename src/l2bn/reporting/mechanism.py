"""`results/mechanism.md`: features of the norms, controls and studies, which bear on why L2BN would work.

All numbers are made from records. The reading is a text by hand that names the records from which it was written.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast

import pandas as pd

from l2bn.records import (
    SUMMARY,
    FeatureRow,
    InvalidRecordError,
    Problem,
    Record,
    is_finite_number,
    read_statistics,
)
from l2bn.reporting.comparison import Arm, Comparison, arms_of, by_cell, compare, differences
from l2bn.reporting.evidence import (
    ANGLE_MEAN,
    BN,
    BY_NAME,
    DETACHED,
    FEATURES,
    INPUT,
    L2BN,
    MEAN_NORM,
    NORM_CV,
    OUTPUT,
    PENULTIMATE,
    RMS,
    SHRINK,
    TOP1,
    WITHIN_SHARE,
    Cell,
    Evidence,
    Place,
    by_layer,
    cell_of,
    images_in_words,
    label_of,
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
    mean_std,
    mean_std_n,
    names_of,
    numbers_of_values,
    plural,
    probability,
    signed,
    title,
)
from l2bn.reporting.statistics import Estimate, estimate, holm

# ---- Features -----------------------------------------------------------------------------------------------


class Quantity(NamedTuple):
    """A quantity as a table names it, and the decimals with which it is written."""

    name: str
    text: str
    digits: int


QUANTITIES = (
    Quantity(NORM_CV, "norm cv, inputs of norm layers", 4),
    Quantity(f"{INPUT}/norm_cv_within", "— within classes", 4),
    Quantity(f"{INPUT}/norm_cv_between", "— between classes", 4),
    Quantity(f"{OUTPUT}/norm_cv", "norm cv, outputs of norm layers", 4),
    Quantity(f"{OUTPUT}/within_share", "within share, outputs of norm layers", 4),
    Quantity(WITHIN_SHARE, "within share, penultimate", 4),
    Quantity(f"{PENULTIMATE}/class_cosine", "class cosine, penultimate", 4),
    Quantity(ANGLE_MEAN, "mean angle, penultimate (°)", 2),
    Quantity(f"{PENULTIMATE}/angle_min", "smallest angle, penultimate (°)", 2),
    Quantity(f"{PENULTIMATE}/centred_angle_min", "smallest centred angle, penultimate (°)", 2),
    Quantity(f"{PENULTIMATE}/distance", "distance, penultimate", 3),
    Quantity(f"{PENULTIMATE}/cdnv", "CDNV, penultimate", 4),
    Quantity(f"{PENULTIMATE}/nc1", "NC1, penultimate", 3),
    Quantity(f"{PENULTIMATE}/fisher", "Fisher's ratio, penultimate", 2),
    Quantity(f"{PENULTIMATE}/effective_rank", "effective rank, penultimate", 2),
    Quantity(f"{PENULTIMATE}/norm_cv", "norm cv, penultimate", 4),
    Quantity(SHRINK, "shrink factor of the norm layers", 4),
)

ACCURACY = Quantity(TOP1, "Accuracy", 2)
OF_CONTROLS = (
    ACCURACY,
    Quantity(WITHIN_SHARE, "Within share, penultimate", 4),
    Quantity(ANGLE_MEAN, "Mean angle, penultimate (°)", 2),
    Quantity(NORM_CV, "Norm cv, inputs of norm layers", 4),
)


def measured_pairs(arms: Sequence[Arm]) -> list[Comparison]:
    """BN and L2BN in each cell in which features of both were measured."""
    return [pair for pair in compare(arms, [L2BN]) if pair.measured]


def pair_table(pair: Comparison) -> Table:
    """Every measure in the two arms of a cell after the last epoch, and their paired differences."""
    columns = ("Measure", "BN", "L2BN", "L2BN − BN", "95 % interval", "n")
    rows = []
    for quantity, text, digits in QUANTITIES:
        arms = (mean_std(arm.of(quantity).values(), digits) for arm in pair.arms)
        difference = pair.difference(quantity)
        rows.append((text, *arms, *mean_interval(difference, digits), str(difference.n)))
    return Table("Features of BN and L2BN", columns, rows, _images(pair.arms))


def _images(arms: Iterable[Arm]) -> tuple[str, ...]:
    """A note where some fingerprints leave open whether the images were equal; the summary counts runs without."""
    text = images_in_words([run for arm in arms for run in arm.records])
    return () if text in ("", "no fingerprint") else (f"Images not proven equal by their fingerprints: {text}.",)


def summary_table(pairs: Sequence[Comparison]) -> Table:
    """A row per cell: the spread of the norms, and the two measures that decide the claims."""
    columns = (
        *("Data set", "Backbone", "Recipe", "Norm cv, BN", "Norm cv, L2BN"),
        *("Within share, L2BN − BN", "95 % interval", "Mean angle, L2BN − BN (°)", "95 % interval of that", "n"),
    )
    rows = []
    for pair in pairs:
        share, angle = pair.difference(WITHIN_SHARE), pair.difference(ANGLE_MEAN)
        spreads = (mean_std(arm.of(NORM_CV).values(), 3) for arm in pair.arms)
        results = *mean_interval(share, 4), *mean_interval(angle), numbers_of_values([share, angle])
        rows.append((*names_of(pair.label, pair.cell), *spreads, *results))
    return Table("Features of BN and L2BN", columns, rows, names=3)


def norms_table(arms: Sequence[Arm], quantity: Quantity) -> Table:
    """Every norm of one cell in one quantity, against BN and L2BN against it, paired by seed."""
    name, text, digits = quantity
    bn, l2bn = (next((arm for arm in arms if arm.norm == norm), None) for norm in (BN, L2BN))
    columns = ("Norm", f"{text} (n)", "Norm − BN", "95 % interval", "L2BN − norm", "95 % interval of that")
    rows = []
    for arm in sorted(arms, key=lambda arm: (arm.norm != BN, arm.norm != L2BN, arm.norm)):
        pairs = ((bn, arm), (arm, l2bn))
        results = (estimate(differences(reference, other, name)) for reference, other in pairs)
        cells = (cell for result in results for cell in mean_interval(result, digits))
        rows.append((arm.norm, mean_std_n(arm, name, digits), *cells))
    notes = _images(arms) if quantity is OF_CONTROLS[-1] else ()  # once below the tables of a cell
    return Table(f"Norms: {text}", columns, rows, notes)


STEPS = (
    (MEAN_NORM, DETACHED, "equal norms"),
    (DETACHED, L2BN, "the gradient through them"),
    (MEAN_NORM, L2BN, "both"),
)
"""The steps from the control with unequal norms to L2BN: from, to, what changes."""


def steps_table(arms: Sequence[Arm]) -> Table:
    """The effect of equal norms and of their gradient; no rows where a control is missing."""
    found = {arm.norm: arm for arm in arms}
    columns = ("Difference", *(quantity.text for quantity in OF_CONTROLS), "n")
    rows = []
    for start, end, text in STEPS if {DETACHED, MEAN_NORM, L2BN} <= found.keys() else ():
        results = [estimate(differences(found[start], found[end], quantity.name)) for quantity in OF_CONTROLS]
        cells = (
            " ".join(mean_interval(result, quantity.digits))
            for result, quantity in zip(results, OF_CONTROLS, strict=True)
        )
        rows.append((f"{text}: {end} − {start}", *cells, numbers_of_values(results)))
    return Table("Effects of equal norms and of the gradient through them", columns, rows)


def features_csv(arms: Sequence[Arm]) -> str:
    """A line per cell, norm, place and measure: the norm after its last epoch, beside BN where it was measured."""
    columns = (
        *("dataset", "label", "backbone", "recipe", "setting", "norm", "kernels", "place", "measure"),
        *("bn_n", "bn_mean", "bn_std", "norm_n", "norm_mean", "norm_std"),
        *("pairs", "difference", "low", "high", "p"),
    )
    rows = []
    for comparison in compare(arms, {arm.norm for arm in arms}):
        for quantity in FEATURES:
            place, _, name = quantity.partition("/")
            rows.append(comparison.row(quantity) | {"place": place, "measure": name})
    return csv_text(rows, columns, ".5g")


# ---- Studies ------------------------------------------------------------------------------------------------

EPS, RATES, TRAP = "eps_study", "lr_study", "variance_trap"
"""The folders of the studies' records. A cell may hold the same norm at many values of one setting, so these runs
have no place in the grid."""

DEFAULT_EPS, SMALLEST_EPS = 1e-5, 1e-12


def _number(record: Record, group: str, name: str) -> Any:
    """A number of the identity; None for an eps that is the network's own. Raises InvalidRecordError."""
    found = record.identity.get(group)
    value = found.get(name) if isinstance(found, dict) else None
    if not is_finite_number(value) and not (isinstance(found, dict) and name == "eps" and value is None):
        raise InvalidRecordError(f"{SUMMARY}: identity.{group}.{name} must be a number in a study, not {value!r}")
    return value


def _batch_and_rate(record: Record) -> tuple[int, float]:
    return int(_number(record, "recipe", "batch_size")), float(_number(record, "recipe", "lr"))


def _by_eps(record: Record) -> tuple[Cell, str]:
    """The cell at the run's eps, and the norm without it."""
    _batch_and_rate(record)  # stand in studies.csv
    eps = _number(record, "norm", "eps")
    value = (DEFAULT_EPS if eps is None else float(eps),)
    return replace(cell_of(record), value=value), re.sub(",eps=[^,]*", "", record.norm)


def _by_rate(record: Record) -> tuple[Cell, str]:
    """Data set and backbone at the run's batch size and learning rate, and the norm."""
    return Cell(record.dataset, "", record.backbone, "", _batch_and_rate(record)), record.norm


place_by_eps = Place(_by_eps, varied=("norm.eps",))
# Each batch size has its own number of epochs, so that all take about as many updates.
place_by_rate = Place(_by_rate, varied=("recipe.batch_size", "recipe.lr", "recipe.epochs"))


@dataclass(frozen=True, eq=False)
class Study:
    """The arms of one cell at each value of what the study varies."""

    cell: Cell
    arms: Sequence[Arm]

    @property
    def label(self) -> str:
        return self.arms[0].label

    @property
    def values(self) -> list[tuple[float, ...]]:
        return sorted({arm.cell.value for arm in self.arms})

    def at(self, norm: str, *value: float) -> Arm | None:
        return next((arm for arm in self.arms if (arm.norm, arm.cell.value) == (norm, value)), None)

    def difference(self, *value: float) -> Estimate:
        """L2BN − BN in top-1 at one value, points, paired by seed."""
        return estimate(differences(self.at(BN, *value), self.at(L2BN, *value)))


def studies_of(evidence: Evidence) -> list[Study]:
    """The arms by cell, in the order of the cells."""
    found: dict[Cell, list[Arm]] = defaultdict(list)
    for arm in arms_of(evidence):
        found[replace(arm.cell, value=())].append(arm)
    return [Study(cell, arms) for cell, arms in found.items()]


def _known_shrink(rows: Sequence[FeatureRow]) -> list[float]:
    """The shrink factors of one run's norm layers after the last epoch, in their order."""
    return [value for value in by_layer(rows[-1], SHRINK) if value is not None]


def shrink_factors(arm: Arm | None) -> list[float]:
    """The shrink factor of each norm layer, in their order, as the mean over the runs that have it."""
    runs = map(_known_shrink, arm.features.values()) if arm else ()
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
        results = (cell for arm in others for cell in mean_interval(estimate(differences(bn, arm))))
        layers = map(shrink_factors, arms)
        shrink = (f"{fmean(factors):.3f} ({min(factors):.3f})" if factors else NONE for factors in layers)
        rows.append((eps_text(eps), *map(mean_std_n, arms), *results, *shrink))
    return Table("Accuracy over eps", columns, rows, names=0)


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
    results = [estimate(differences(study.at(*reference), study.at(*other))) for _, reference, other in PARTS]
    # The two parts at the usual eps are the question of the study; the rest shows the same from another side.
    parts = results[1:3]
    corrected = map(probability, holm([result.p for result in parts]), parts)
    columns = ("Difference", "Points", "95 % interval", "n", "p (Holm)")
    rows = [
        (text, *mean_interval(result), str(result.n), p)
        for (text, _, _), result, p in zip(PARTS, results, (NONE, *corrected, NONE, NONE), strict=True)
    ]
    return Table("Effects of equal norms and of eps", columns, rows)


def rate_table(study: Study) -> Table:
    """A row per batch size and learning rate."""
    results = [study.difference(*value) for value in study.values]
    corrected = holm([result.p for result in results])
    columns = (
        *("Batch size", "Learning rate", "Updates", "BN (n)", "L2BN (n)"),
        *("L2BN − BN", "95 % interval", "p (Holm)"),
    )
    rows = []
    for (batch, rate), result, p in zip(study.values, results, corrected, strict=True):
        arms = [study.at(norm, batch, rate) for norm in (BN, L2BN)]
        updates = [run.updates for arm in arms if arm for run in arm.records if run.status == "finished"]
        names = f"{batch}", f"{rate:g}", f"{max(updates):,}" if updates else NONE
        rows.append((*names, *map(mean_std_n, arms), *mean_interval(result), probability(p, result)))
    return Table("BN and L2BN over learning rates and batch sizes", columns, rows, names=0)


class Overall(NamedTuple):
    """A mean over the settings of a study, one value per seed, and what it was taken over."""

    result: Estimate
    settings: int
    seeds: Sequence[int]


def overall(study: Study) -> Overall:
    """L2BN − BN over the settings in which all runs of the study's seeds finished.

    The study's seeds are those that more than half of its settings have: a seed more in some settings adds no value
    of its own, and a setting that lacks a seed is left out, not the seed.
    """
    pairs = {value: (study.at(BN, *value), study.at(L2BN, *value)) for value in study.values}
    whole = {value: (bn, l2bn) for value, (bn, l2bn) in pairs.items() if bn and l2bn}
    counts = Counter(seed for bn, l2bn in whole.values() for seed in bn.seeds | l2bn.seeds)
    seeds = sorted(seed for seed, count in counts.items() if 2 * count > len(pairs))
    found = {value: l2bn.values[TOP1] - bn.values[TOP1] for value, (bn, l2bn) in whole.items()}
    frame = pd.DataFrame(found).reindex(seeds).dropna(axis="columns")  # seed x setting
    means = list(frame.mean(axis="columns")) if not frame.empty else []
    return Overall(estimate(means), frame.shape[1] if seeds else 0, seeds)


def rate_note(study: Study) -> str:
    """One sentence over all settings."""
    results = [study.difference(*value) for value in study.values]
    above = sum(result.low is not None and result.low > 0 for result in results)
    below = sum(result.high is not None and result.high < 0 for result in results)
    lost = {norm: sum(arm.diverged for arm in study.arms if arm.norm == norm) for norm in (BN, L2BN)}
    mean, settings, seeds = overall(study)
    runs = f"{plural('setting', settings)} in which all runs of seeds {', '.join(map(str, seeds)) or NONE} finished"
    return (
        f"Of {len(results)} settings, the 95 % interval lies above 0 in {above} and below in {below}, uncorrected. "
        f"Mean over the {runs}, one value per seed: {signed(mean.mean)} points, 95 % interval {interval(mean)}, "
        f"n = {mean.n}. Diverged: {lost[BN]} of BN, {lost[L2BN]} of L2BN."
    )


def studies_csv(eps: Iterable[Study], rates: Iterable[Study]) -> str:
    """A line per run of the studies of eps and of the learning rate."""
    columns = (
        *("study", "dataset", "label", "backbone", "recipe", "setting", "norm", "eps", "batch_size", "lr", "seed"),
        *("status", "updates", "top1", "shrink_mean", "shrink_min"),
    )
    rows = []
    for study in eps:
        for arm in sorted(study.arms, key=lambda arm: (arm.norm, arm.cell.value)):
            rows += [_run_row(arm, run, "eps", f"{arm.cell.value[0]:g}") for run in arm.records]
    for study in rates:
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


# ---- The running-variance trap --------------------------------------------------------------------------------

KINDS = ("running", "batch")
SHOWN_UPDATES = (10, 50, 100, 150, 200, 300)
CAUGHT_UP = 1.0
"""Points that running statistics may lie below batch statistics and count as caught up."""


@dataclass(frozen=True, eq=False)
class TrapStudy:
    """The measured updates of one cell."""

    cell: Cell
    label: str
    rows: pd.DataFrame  # of finished runs: norm, seed, step, and accuracy by both statistics
    diverged: Mapping[str, int] = field(default_factory=dict)  # norm to number of runs

    @property
    def norms(self) -> dict[str, int]:
        """Norm to number of seeds."""
        return {str(norm): rows["seed"].nunique() for norm, rows in self.rows.groupby("norm", sort=False)}

    def curve(self, norm: str, kind: str) -> pd.DataFrame:
        """Accuracy, step x seed, at the updates that every seed has."""
        rows = self.rows[self.rows["norm"] == norm]
        return rows.pivot(index="step", columns="seed", values=f"{kind}/top1").dropna()

    def caught_up(self, norm: str) -> str:
        """The first update from which on running statistics keep up, from the earliest to the latest seed."""
        first = []
        for _, rows in self.rows[self.rows["norm"] == norm].groupby("seed"):
            behind = rows.loc[rows["running/top1"] < rows["batch/top1"] - CAUGHT_UP, "step"]
            first += [int(step) for step in rows["step"] if step > max(behind, default=-1)][:1]
        never = self.norms[norm] - len(first)
        span = f"{min(first)} to {max(first)}" if len(set(first)) > 1 else "".join(map(str, first[:1]))
        return ", ".join(filter(None, (span, f"{never} never" if never else "")))


def trap_studies(records: Iterable[Record]) -> tuple[list[TrapStudy], list[Problem]]:
    """The records that hold a comparison of statistics, by cell, and those that cannot be read."""
    rows, problems = [], []
    lost: dict[Cell, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.status == "diverged":
            lost[cell_of(record)][record.norm] += 1
            continue
        names = {"cell": cell_of(record), "label": label_of(record), "norm": record.norm, "seed": record.seed}
        try:
            rows += [names | row for row in read_statistics(record.folder)]
        except InvalidRecordError as error:
            problems.append(Problem(record.folder, str(error)))
    frame = pd.DataFrame(rows, columns=["cell", "label", "norm", "seed", "step", "running/top1", "batch/top1"])
    groups = frame.groupby("cell", sort=False)
    studies = [
        TrapStudy(cast("Cell", cell), group["label"].iloc[-1], group, lost[cast("Cell", cell)])
        for cell, group in groups
    ]
    return sorted(studies, key=lambda study: study.cell.order), problems


def trap_table(study: TrapStudy) -> Table:
    """Mean accuracy over the seeds by both statistics at some updates, and when the running ones have caught up."""
    columns = ("Norm", "Statistics", *(f"update {step}" for step in SHOWN_UPDATES), "caught up after", "n")
    rows = []
    for norm, seeds in study.norms.items():
        for kind in KINDS:
            means = study.curve(norm, kind).mean(axis="columns")
            shown = (f"{means[step]:.2f}" if step in means else NONE for step in SHOWN_UPDATES)
            when = study.caught_up(norm) if kind == "running" else ""
            gone = study.diverged.get(norm, 0)
            rows.append((norm, kind, *shown, when, f"{seeds}; {gone} diverged" if gone else str(seeds)))
    return Table("Accuracy by running and by batch statistics", columns, rows, names=2)


# ---- The document -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mechanism:
    """All that the document is made from."""

    records: Sequence[Record]  # those with measured features, and all of the studies
    arms: Sequence[Arm]  # with measured features
    eps: Sequence[Study]
    rates: Sequence[Study]
    traps: Sequence[TrapStudy]
    problems: Sequence[Problem]

    @cached_property
    def digest(self) -> str:
        """8 hexadecimal digits over everything that the tables are made from."""
        parts = [features_csv(self.arms), studies_csv(self.eps, self.rates)]
        parts += [markdown(trap_table(study)) for study in self.traps]
        parts += [markdown(norms_table(norms, ACCURACY)) for _, norms in by_cell(self.arms)]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()


def read_mechanism(runs: Path, studies: Path) -> Mechanism:
    """The records under a folder, and those of the studies under another that may be missing. Raises UserError."""
    evidence = read_evidence(runs, features=True)
    eps, rates, trap = found = [
        read_evidence(studies / name, features=name == EPS, place=place)
        if (studies / name).is_dir()
        else Evidence(())
        for name, place in ((EPS, place_by_eps), (RATES, place_by_rate), (TRAP, BY_NAME))
    ]
    traps, unreadable = trap_studies(trap.records)
    return Mechanism(
        records=[
            *(record for record in evidence.records if record.folder in evidence.features),
            *(record for study in found for record in study.records),
        ],
        arms=[arm for arm in arms_of(evidence) if arm.features],
        eps=studies_of(eps),
        rates=studies_of(rates),
        traps=traps,
        problems=[problem for one in (evidence, *found) for problem in one.problems] + unreadable,
    )


SECTIONS = {
    "Overview": (
        "Norm cv is the coefficient of variation of the samples' norms at the inputs of norm layers. Within share "
        "and mean angle are those of the features before the classifier: a smaller share is more compact, a larger "
        "angle more separated."
    ),
    "Features of BN and L2BN": (
        "All measures of BN and L2BN. One measure decides each claim ([claims.md](claims.md) has the rules): "
        "within share for compactness, mean angle for separation; the others are only shown. Intervals are not "
        "corrected for their number: one in 20 misses 0 by chance alone."
    ),
    "Controls": (
        "`l2bn_detached` has L2BN's values without a gradient through the norms; `l2bn_mean_norm` has its scale, "
        "but neither equal norms nor that gradient; `l2bn_rms` has equal norms at a scale where eps matters as "
        "little as in BN; `l2bn_position` has equal norms at every position; `group_norm` is an unrelated norm "
        "for comparison. Intervals are not corrected for their number."
    ),
    "How much is eps?": (
        "L2BN at norm 1 and at root mean square 1 against BN at the same eps. Shrink: the factor by which eps "
        "reduces the standard deviation of a norm layer's output, as the mean over the layers and in brackets the "
        "smallest, both from means over the seeds. A difference between norm 1 and rms 1 can come from eps alone. "
        "Holm's correction over the two parts at eps 1e-5."
    ),
    "The running-variance trap": (
        "Test top-1 in percent by running statistics, as in evaluation, and by the statistics of each batch of up "
        "to 512 test images. Caught up after: the first measured update from which running statistics stay within "
        "1 point of batch statistics, from the earliest to the latest seed. Running statistics also lag behind "
        "weights that change fast, so the start at 1 is one cause among others."
    ),
    "Learning rate and batch size": "No learning rate is chosen from these runs; each row is a comparison.",
}
"""The sections of the document in their order, and the text at the head of each."""


def mechanism_documents(mechanism: Mechanism, reading: str) -> dict[str, str]:
    """File name to text: `mechanism.md`, and the CSV files beside it.

    `reading` is the text by hand.
    """
    pairs = measured_pairs(mechanism.arms)
    found = (
        [markdown(summary_table(pairs))] if pairs else [],
        [part for pair in pairs for part in _features(pair)],
        [part for cell, norms in by_cell(mechanism.arms) for part in _controls(cell, norms)],
        [part for study in mechanism.eps for part in _eps(study)],
        [part for trap in mechanism.traps for part in _trap(trap)],
        [part for study in mechanism.rates for part in _rates(study)],
    )
    parts = [
        "# Mechanism: why would it work?",
        "<!-- Generated by make tables from the records; results/README.md defines every measure and column. -->",
        _summary(mechanism),
        _labelled(reading, mechanism.digest),
    ]
    for (head, text), section in zip(SECTIONS.items(), found, strict=True):
        parts += [f"## {head}", text, *section] if section else []
    return {
        "mechanism.md": "\n\n".join(part.strip("\n") for part in parts if part) + "\n",
        "mechanism/features.csv": features_csv(mechanism.arms),
        "mechanism/studies.csv": studies_csv(mechanism.eps, mechanism.rates),
    }


def _summary(mechanism: Mechanism) -> str:
    arms = [*mechanism.arms, *(arm for study in mechanism.eps for arm in study.arms)]
    measured = sum(len(arm.features) for arm in arms)
    unproven = sum(record.images is None for record in mechanism.records)
    left_out = f", {plural('unreadable record', len(mechanism.problems))} left out" if mechanism.problems else ""
    return (
        f"From {plural('record', len(mechanism.records))} ({measured} with measured features, {unproven} without a "
        f"fingerprint of their images{left_out}), digest `{mechanism.digest}`. Values are mean ± standard "
        "deviation over the seeds (n); differences are paired by seed, with Student's 95 % interval. Features are "
        "those of the test images after the last epoch."
    )


_WRITTEN = re.compile(r"<!-- written from the records of digest (\w+) -->\n*")


def _labelled(reading: str, digest: str) -> str:
    """The reading under a line that says whether it was written from these very records."""
    found = _WRITTEN.match(reading)
    if not found:
        return ""
    which = "which are these."
    if found[1] != digest:
        which = f"**not these** (`{digest}`): where text and tables differ, the tables are right."
    label = f"*Written by hand from the records of digest `{found[1]}`, {which}*"
    return f"## Reading\n\n{label}\n\n{reading[found.end() :]}"


def _features(pair: Comparison) -> list[str]:
    """All measures of one cell, and its figures."""
    name = file_name(pair.cell)
    parts = [f"### {title(pair.label, pair.cell)}", markdown(pair_table(pair))]
    parts.append(f"![Spread of the norms at each norm layer](figures/norms-{name}.png)")
    if pair.measured_epochs:
        parts.append(f"![Compactness and separation over the epochs](figures/training-{name}.png)")
    if pair.sampled:
        parts.append(f"![Penultimate features on the plane of their joint PCA](figures/map-{name}.png)")
    return parts


def _controls(cell: Cell, norms: Sequence[Arm]) -> list[str]:
    """All norms of one cell; nothing where only BN and L2BN were measured."""
    if {arm.norm for arm in norms} <= {BN, L2BN}:
        return []
    tables = [markdown(norms_table(norms, quantity)) for quantity in OF_CONTROLS]
    steps = steps_table(norms)
    return [f"### {title(norms[0].label, cell)}", *tables, *([_titled(steps)] if steps.rows else [])]


def _eps(study: Study) -> list[str]:
    return [
        f"### {title(study.label, study.cell)}: eps",
        markdown(eps_table(study)),
        _titled(parts_table(study)),
        f"![Accuracy and shrink factors over eps](figures/eps-{file_name(study.cell)}.png)",
    ]


def _trap(study: TrapStudy) -> list[str]:
    return [
        f"### {title(study.label, study.cell)}: statistics",
        markdown(trap_table(study)),
        f"![Accuracy by running and batch statistics](figures/trap-{file_name(study.cell)}.png)",
    ]


def _rates(study: Study) -> list[str]:
    return [
        f"### {study.label}, {in_words(study.cell.backbone)}: learning rates",
        markdown(rate_table(study)),
        rate_note(study),
        f"![Accuracy over learning rates and batch sizes](figures/rates-{file_name(study.cell)}.png)",
    ]


def _titled(table: Table) -> str:
    return f"**{table.title}**\n\n{markdown(table)}"
